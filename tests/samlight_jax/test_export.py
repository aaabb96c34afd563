"""Exports: StableHLO that a fresh interpreter runs with JAX alone, and what stands beside it."""

import hashlib
import json
import subprocess
import sys

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import samlight_jax
from pallas_kernels import device
from samlight_jax import attention, cli, export, export_plain, layers, weights
from samlight_jax.config import Pattern, SamConfig, TinyViTConfig, ViTConfig
from samlight_jax.errors import exit_on_error
from samlight_jax.sam import Sam
from tests.models import TINY, random_arrays, random_model

STUDENT = SamConfig(  # what TINY lacks: a stem, local convolutions, dilation, padding
    name="student",
    encoder=ViTConfig(
        width=32,
        depth=3,
        heads=2,
        attention=(
            Pattern(segment=(3, 3), attend_padding=True),
            Pattern(segment=(4, 4), dilation=2),
            Pattern(segment=8, dilation=2),
        ),
        stem="conv",
        local_conv=True,
    ),
    image_size=96,
    decoder_mlp=64,
)
TINY_VIT = SamConfig(
    name="tiny_vit",
    encoder=TinyViTConfig(widths=(8, 16, 24, 32), depths=(1, 1, 1, 1), heads=(1, 2, 2, 4)),
    image_size=128,
    decoder_mlp=64,
)
CONFIGS = pytest.mark.parametrize("config", [TINY, STUDENT, TINY_VIT], ids=lambda c: c.name)
STRANGER = """
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] in {"samlight_jax", "pallas_kernels", "flax", "convert"}:
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import jax, numpy as np
with open(sys.argv[1], "rb") as file:
    exported = jax.export.deserialize(bytearray(file.read()))
given = np.load(sys.argv[2])
got = exported.call(*(given[name] for name in sorted(given.files)))
np.savez(sys.argv[3], *got)
assert not {"samlight_jax", "pallas_kernels", "flax"} & set(sys.modules)
"""


def assert_close(got, want):
    """Float32's rounding, in another order."""
    assert np.shape(got) == np.shape(want) and np.abs(want).max() > 0
    assert np.abs(np.asarray(got) - np.asarray(want)).max() <= 1e-5 * np.abs(want).max()


def photographs(config, count, seed=0):
    """`count` photographs that fit the frame without being resized, each of another height."""
    rng, s = np.random.default_rng(seed), config.image_size
    return [rng.integers(0, 256, (s - 16 * i - 5, s, 3), np.uint8) for i in range(count)]


def exported_frames(config, images):
    """(frames, sizes) with other bytes than zero where there is no photograph."""
    frames = np.full((len(images), config.image_size, config.image_size, 3), 77, np.uint8)
    for frame, image in zip(frames, images, strict=True):
        frame[: image.shape[0], : image.shape[1]] = image
    return frames, np.array([image.shape[:2] for image in images], np.int32)


def prompts(config, count, seed=0):
    """`count` prompts: (point_coords, point_labels, box, masks), two points and a box each."""
    rng, s = np.random.default_rng(seed), config.image_size - 5
    points = rng.uniform(0, s, (count, 2, 2)).astype(np.float32)
    boxes = np.sort(rng.uniform(0, s, (count, 2, 2)), axis=1).reshape(count, 4).astype(np.float32)
    low = config.image_size // 4
    masks = rng.normal(0, 5, (count, low, low)).astype(np.float32)
    return points, rng.integers(0, 2, (count, 2)), boxes, masks


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Runs `samlight export` with arguments in a folder with tiny models: (code, out, err)."""
    for config in (TINY, STUDENT):
        weights.save(tmp_path / f"{config.name}.safetensors", random_arrays(config), config)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["samlight", "export", *map(str, arguments)])
        try:
            exit_on_error(cli.main)
            code = 0
        except SystemExit as end:
            code = end.code
        return (code, *capfd.readouterr())

    return run


def as_a_stranger(folder, file, *given):
    """What an export gives in an interpreter that has JAX and NumPy, and nothing of ours."""
    np.savez(folder / "given.npz", **{f"{i}": array for i, array in enumerate(given)})
    command = [sys.executable, "-c", STRANGER, folder / file, "given.npz", "got.npz"]
    subprocess.run(command, cwd=folder, check=True)
    got = np.load(folder / "got.npz")
    return [got[name] for name in got.files]


def test_a_stranger_encodes(run, tmp_path):
    assert run("--model", "student.safetensors", "--what", "encoder", "--uint8")[0] == 0
    images = photographs(STUDENT, 3)
    given = exported_frames(STUDENT, images)
    (got,) = as_a_stranger(tmp_path, "student_encoder_uint8.stablehlo", *given)
    assert len(got) == 3
    for each, image in zip(got, images, strict=True):
        assert_close(each, samlight_jax.encode(image, model=random_model(STUDENT)))


def test_a_stranger_decodes(run, tmp_path):
    """Two images with three prompts, of which every other has a mask too."""
    assert run("--model", "tiny.safetensors", "--what", "decoder")[0] == 0
    model, images = random_model(TINY), photographs(TINY, 1) * 2
    embeddings = np.stack([samlight_jax.encode(image, model=model) for image in images])
    each = [prompts(TINY, 3, seed) for seed in (1, 2)]
    points, labels, boxes, masks = (np.stack(parts) for parts in zip(*each, strict=True))
    has_mask = np.array([[True, False, True], [False, True, False]])
    coords = np.concatenate([points, boxes.reshape(2, 3, 2, 2)], axis=2)
    kinds = np.concatenate([labels, np.broadcast_to([2, 3], (2, 3, 2))], axis=2).astype(np.int32)
    given = embeddings, coords, kinds, masks, has_mask
    low_res, iou = as_a_stranger(tmp_path, "tiny_decoder.stablehlo", *given)
    absent = np.where(has_mask[..., None, None], masks, -1)
    for multimask, chosen in ((True, slice(1, None)), (False, slice(0, 1))):
        _, want_iou, want = samlight_jax.predict_batch(
            images, points, labels, boxes, absent, multimask, model=model
        )
        assert_close(low_res[:, :, chosen], want)
        assert_close(iou[:, :, chosen], want_iou)


@CONFIGS
@pytest.mark.parametrize("batch", [1, 3])
def test_any_batch_is_encoded_by_one_file(config, batch):
    program, model = export.encoder(config), random_model(config)
    content = export.stablehlo(program, model).serialize(vjp_order=0)
    loaded = jax.export.deserialize(bytearray(content))
    pixels = np.random.default_rng(0).normal(size=(batch, *program.inputs[0].shape[1:]))
    pixels = jnp.asarray(pixels, jnp.float32)
    assert_close(loaded.call(pixels)[0], jax.jit(Sam.encode)(model, pixels)[0])


def test_no_kernel_of_one_device_is_in_the_file(monkeypatch):
    """Whatever the machine's own device is."""
    asked = []
    monkeypatch.setattr(device, "current", lambda now=device.current: asked.append(now()) or now())
    exported = export.stablehlo(export.encoder(STUDENT), random_model(STUDENT))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert asked and {each.platform for each in asked} == {"cpu"}
    assert jax.config.jax_default_device is None


def test_a_label_below_minus_one_is_no_token():
    model, program = random_model(TINY), export.decoder(TINY)
    (points, labels, _, masks), g = prompts(TINY, 1), TINY.grid
    embedding = np.random.default_rng(0).normal(size=(1, g, g, 256)).astype(np.float32)
    labels = labels.astype(np.int32)
    rest = masks[None], np.zeros((1, 1), bool)

    def decode(points, labels):
        return jax.jit(program.run)(model, embedding, points[None], labels[None], *rest)

    longer = np.concatenate([points, np.full((1, 3, 2), 9, np.float32)], axis=1)
    for kind, equal in ((-2, True), (-1, False)):
        kinds = np.concatenate([labels, np.full((1, 3), kind, np.int32)], axis=1)
        same = [
            np.allclose(a, b, atol=1e-5)
            for a, b in zip(decode(points, labels), decode(longer, kinds), strict=True)
        ]
        assert all(same) == equal


@CONFIGS
def test_plain_operations_compute_the_same(config):
    program, model = export.encoder(config), random_model(config)
    before = attention.dilated_attention_qkvpacked, layers.depthwise_conv
    closed = export_plain.plain_jaxpr(
        program._replace(inputs=export.sized(program.inputs, {"b": 2})), model
    )
    assert (attention.dilated_attention_qkvpacked, layers.depthwise_conv) == before
    names = {eqn.primitive.name for eqn in closed.jaxpr.eqns}
    assert not names & {"scan", "while", "custom_vjp_call", "cond", "pallas_call"}
    s = config.image_size
    pixels = jax.random.normal(jax.random.key(0), (2, s, s, 3))
    (got,) = jax.jit(jax.extend.core.jaxpr_as_fun(closed))(pixels)
    assert_close(got, jax.jit(Sam.encode)(model, pixels)[0])


def test_the_description_says_what_is_in_the_file(run, tmp_path):
    code, out, _ = run("--model", "tiny.safetensors", "--what", "encoder", "--batch", "2",
                       "-o", "new/e.bin")  # fmt: skip
    assert code == 0
    content = (tmp_path / "new" / "e.bin").read_bytes()
    facts = json.loads((tmp_path / "new" / "e.bin.json").read_text())
    assert f"{len(content) / 1e6:.1f} MB" in out and " ms; differs by " in out
    assert facts["bytes"] == len(content)
    assert facts["sha256"] == hashlib.sha256(content).hexdigest()
    assert facts["fingerprint"] == weights.fingerprint(TINY, random_arrays(TINY))
    assert SamConfig.from_json(json.dumps(facts["config"])) == TINY
    assert facts["versions"]["jax"] == jax.__version__
    loaded = jax.export.deserialize(bytearray(content))
    for ports, avals in ((facts["inputs"], loaded.in_avals), (facts["outputs"], loaded.out_avals)):
        assert [(tuple(p["shape"]), p["dtype"]) for p in ports] == [
            (aval.shape, aval.dtype.name) for aval in avals
        ]
    assert loaded.in_avals[0].shape == (2, 64, 64, 3)
    assert list(loaded.platforms) == facts["platforms"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["e.bin", "e.bin.json"]


BAD = [
    (["--what", "encoder", "--batch", "0"], "--batch 0: expected dynamic, or a whole number"),
    (["--what", "encoder", "--batch", "many"], "--batch many: expected dynamic"),
    (["--what", "decoder", "--uint8"], "--uint8 is the encoder's"),
    (["--what", "decoder", "--low-res"], "are for --format onnx; drop them"),
    (["--what", "decoder", "--single-mask"], "are for --format onnx; drop them"),
    (["--what", "decoder", "--model", "x.safetensors"], "There is no model file x.safetensors"),
    (["--what", "decoder", "--model", "samlight_s"], "no released weights of 'samlight_s'"),
    (["--what", "decoder", "-o", "tiny.safetensors/x"], "File exists"),
    (["--what", "decoder", "-o", "."], "is a folder; give --output the name of a file"),
    (["--what", "decoder", "--format", "onnx", "--batch", "-1"], "--batch -1: expected dynamic"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[b[1][:30] for b in BAD])
def test_bad_input_ends_with_one_sentence(run, arguments, sentence):
    code, _, err = run("--model", "tiny.safetensors", *arguments)
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ")
    assert sentence in err


def test_what_cannot_be_done_here_is_said(run, monkeypatch, tmp_path):
    def sentence(*arguments):
        code, _, err = run("--model", "tiny.safetensors", "--what", "decoder", *arguments)
        assert code == 2 and err.count("\n") == 1
        return err

    with monkeypatch.context() as change:
        change.setattr(export, "LARGEST", 1000)
        assert "more than the 1,000 that a file of jax.export holds" in sentence()
    with monkeypatch.context() as change:
        change.setattr(export, "TO_ONNX", tmp_path / "to_onnx.py")
        assert "install this package from its repository" in sentence("--format", "onnx")
    with monkeypatch.context() as change:
        change.setattr(export.importlib.util, "find_spec", lambda name: None)
        assert "pip install onnx" in sentence("--format", "onnx")

    def devices(kind):
        raise RuntimeError(f"Unknown backend {kind}\nmore")

    monkeypatch.setattr(jax, "devices", devices)
    assert "JAX offers no CPU (Unknown backend cpu)" in sentence()

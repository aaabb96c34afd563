"""Model files: whole or absent, strict, bit for bit; models built from them."""

import dataclasses
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from samlight_jax import weights
from samlight_jax.config import Pattern, SamConfig, TinyViTConfig, ViTConfig
from samlight_jax.errors import InputError
from tests.conftest import normal, run
from tests.models import TINY, random_arrays

TINY_VIT = SamConfig(
    name="tiny_vit",
    encoder=TinyViTConfig(widths=(8, 8, 8, 8), depths=(1, 1, 1, 1), heads=(1, 1, 1, 1)),
    decoder_mlp=64,
)
GRID = SamConfig(
    name="grid",
    encoder=ViTConfig(
        width=8,
        depth=3,
        heads=1,
        attention=(Pattern(segment=(64, 64), dilation=4), Pattern(segment=(16, 16))),
        rel_pos=True,
        stem="conv",
        local_conv=True,
    ),
    decoder_mlp=64,
)
FILES = ["model.safetensors", "model_folder"]


@pytest.fixture(scope="module")
def arrays():
    return random_arrays(TINY)


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], strict=True)


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


# Files.


@pytest.mark.parametrize("name", FILES)
def test_a_file_comes_back_bit_for_bit_with_its_metadata(name, arrays, tmp_path):
    path = tmp_path / "new folder" / name
    weights.save(path, arrays, TINY, metadata={"source": "a test", "licence": "MIT"})
    back, config, metadata = weights.read(path)
    assert_equal(back, arrays)
    assert config == TINY
    assert metadata["source"] == "a test" and metadata["licence"] == "MIT"
    assert listing(path.parent) == [name]


@pytest.mark.parametrize("config", [TINY, TINY_VIT, GRID], ids=lambda config: config.name)
def test_a_models_arrays_are_those_it_was_built_of(config):
    arrays = random_arrays(config)
    assert_equal(weights.arrays_of(weights.build(config, arrays, folded=False)), arrays)


def test_the_metadata_cannot_replace_the_config_or_format(arrays, tmp_path):
    path = tmp_path / "model.safetensors"
    weights.save(path, arrays, TINY, metadata={"config": "{}", "format": "0"})
    assert weights.read(path)[1] == TINY


def test_a_file_is_replaced_and_a_folder_is_not(arrays, tmp_path):
    path, folder = tmp_path / "model.safetensors", tmp_path / "model"
    other = {name: array + 1 for name, array in arrays.items()}
    for content in (arrays, other):
        weights.save(path, content, TINY)
    assert_equal(weights.read(path)[0], other)

    weights.save(folder, arrays, TINY)
    with pytest.raises(InputError, match=f"^{folder} exists and is a directory; remove it or"):
        weights.save(folder, other, TINY)
    assert_equal(weights.read(folder)[0], arrays)


@pytest.mark.parametrize("name", FILES)
def test_a_failed_write_leaves_everything_as_it_was(name, arrays, tmp_path, monkeypatch):
    import orbax.checkpoint as ocp
    import safetensors.numpy

    def fail(*args, **kwargs):
        """A disk that fills up half-way."""
        target = next(arg for arg in args if isinstance(arg, os.PathLike))
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    (tmp_path / "model.safetensors").write_bytes(b"an older model")
    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    monkeypatch.setattr(ocp.StandardCheckpointer, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        weights.save(tmp_path / name, arrays, TINY)
    assert listing(tmp_path) == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == b"an older model"


def test_a_file_is_replaced_in_one_step(arrays, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("Killed")

    (tmp_path / "model.safetensors").write_bytes(b"an older model")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Killed"):
        weights.save(tmp_path / "model.safetensors", arrays, TINY)
    assert (tmp_path / "model.safetensors").read_bytes() == b"an older model"
    assert listing(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("kept", [0, 5, 200, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused_by_name(kept, arrays, tmp_path):
    path = tmp_path / "model.safetensors"
    weights.save(path, arrays, TINY)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(
        InputError, match=f"^{path} is not a whole .safetensors file .*get it again"
    ):
        weights.read(path)


READ = """
import sys
from samlight_jax import errors, weights
errors.exit_on_error(lambda: weights.read(sys.argv[1]))
"""


@pytest.mark.parametrize("part", ["d", "ocdbt.process_0"])
def test_a_folder_that_lacks_a_part_is_refused_in_one_sentence(part, arrays, tmp_path):
    """In a process of its own: Orbax leaves threads behind that fail later, on stderr."""
    weights.save(tmp_path / "whole", arrays, TINY)
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "whole", broken, ignore=shutil.ignore_patterns(part))
    program = subprocess.run([sys.executable, "-c", READ, broken], capture_output=True, text=True)
    assert program.returncode == 2
    assert program.stderr.startswith(f"error: {broken} is not a whole model directory")
    assert program.stderr.count("\n") == 1


def test_what_is_no_model_file_is_refused_with_the_way_out(arrays, tmp_path):
    path = tmp_path / "m.safetensors"
    convert = r"convert it with: python convert/from_torch.py"

    with pytest.raises(InputError, match=f"^There is no model file {path}.$"):
        weights.read(path)
    path.write_bytes(b"PK\x03\x04 a PyTorch checkpoint" * 9)
    with pytest.raises(
        InputError, match="If it is a PyTorch checkpoint: python convert/from_torch"
    ):
        weights.read(path)
    save_file(arrays, path)  # as Hugging Face's: no config
    with pytest.raises(InputError, match=f"^{path} is not a model file of this.*{convert}"):
        weights.read(path)
    save_file(arrays, path, {"format": "pt", "config": TINY.to_json()})
    with pytest.raises(InputError, match=r"\(format 'pt', expected '1'\)"):
        weights.read(path)
    save_file(arrays, path, {"format": "1", "config": "[]"})
    with pytest.raises(InputError, match=f"^{path}: The model config is not one"):
        weights.read(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder is not a whole model directory"):
        weights.read(tmp_path / "folder")


# Strictness.


def test_every_problem_is_in_one_error_and_nothing_is_written(arrays, tmp_path):
    wrong = dict(arrays)
    del wrong["image_encoder.neck.norm1.scale"], wrong["mask_decoder.iou_token.embedding"]
    wrong["adapter.kernel"] = np.zeros(3, np.float32)
    wrong["image_encoder.pos_embed"] = np.zeros((1, 2, 2, 32), np.float32)
    wrong["image_encoder.neck.norm2.bias"] = np.zeros((), np.float32)
    for refuse in (
        lambda: weights.build(TINY, wrong),
        lambda: weights.save(tmp_path / "m.safetensors", wrong, TINY),
        lambda: weights.save(tmp_path / "m", wrong, TINY),
    ):
        with pytest.raises(InputError) as error:
            refuse()
        assert str(error.value) == (
            "These arrays are not a 'tiny' (5 problems): "
            "missing image_encoder.neck.norm1.scale (256,); "
            "missing mask_decoder.iou_token.embedding (1, 256); "
            "unknown adapter.kernel; "
            "image_encoder.neck.norm2.bias is (), expected (256,); "
            "image_encoder.pos_embed is (1, 2, 2, 32), expected (1, 4, 4, 32)"
        )
    assert listing(tmp_path) == []


@pytest.mark.parametrize("config", [TINY_VIT, GRID], ids=lambda config: config.name)
def test_folding_leaves_just_the_arrays_of_a_folded_model(config):
    folded = weights.fold(random_arrays(config))
    want = weights.expected(config, folded=True)
    assert {name: a.shape for name, a in folded.items()} == {n: a.shape for n, a in want.items()}
    assert not any(".bn." in name for name in folded)
    assert all(array.dtype == np.float32 for array in folded.values())


# Another image size.


@pytest.mark.parametrize(
    "config, image_size",
    [(GRID, 512), (GRID, 2048), (TINY_VIT, 512), (TINY_VIT, 2048)],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_model_of_1024_pixels_works_at_512_and_2048(config, image_size):
    resized, arrays = weights.resize(config, random_arrays(config), image_size)
    assert resized == dataclasses.replace(config, image_size=image_size)
    model = weights.build(resized, arrays)
    x = np.repeat(np.repeat(normal(1, 16, 16, 3), image_size // 16, axis=1), image_size // 16, 2)
    embedding, _ = run(model.image_encoder, x)
    assert embedding.shape == (1, image_size // 16, image_size // 16, 256)
    assert np.isfinite(embedding).all() and np.std(embedding) > 0.1


def test_resizing_touches_the_position_tables_alone():
    arrays = random_arrays(GRID)
    _, resized = weights.resize(GRID, arrays, 480)  # 30 tokens: groups of 8 rows, windows of 16
    changed = {name for name in arrays if resized[name] is not arrays[name]}
    tables = {f"image_encoder.blocks.{i}.attn.rel_pos_{axis}" for i in range(3) for axis in "hw"}
    assert changed == {"image_encoder.pos_embed"} | tables
    assert resized["image_encoder.pos_embed"].shape == (1, 30, 30, 8)
    lengths = [len(resized[f"image_encoder.blocks.{i}.attn.rel_pos_h"]) for i in range(3)]
    assert lengths == [15, 31, 15]


def test_the_size_it_has_changes_nothing():
    arrays = random_arrays(GRID)
    config, same = weights.resize(GRID, arrays, 1024)
    assert config == GRID
    assert_equal(same, arrays)


# Checksum and fingerprint.


@pytest.mark.parametrize("name", ["m.safetensors", "m"])
def test_a_changed_weight_is_noticed(name, arrays, tmp_path, monkeypatch):
    path = tmp_path / name
    changed = {**arrays, "mask_decoder.iou_token.embedding": np.zeros((1, 256), np.float32)}
    right = weights.checksum(changed)
    with monkeypatch.context() as patch:
        patch.setattr(weights, "checksum", lambda _: right)
        weights.save(path, arrays, TINY)
    with pytest.raises(InputError, match=r"is damaged: its arrays have the checksum"):
        weights.read(path)


def test_the_fingerprint_is_of_every_weight_name_and_the_config(arrays):
    name = "mask_decoder.iou_token.embedding"
    original = weights.fingerprint(TINY, arrays)
    assert original == weights.fingerprint(TINY, dict(reversed(arrays.items())))
    one_weight = arrays[name].copy()
    one_weight[0, 7] = np.nextafter(one_weight[0, 7], np.float32(9))
    others = [
        (TINY, arrays | {name: one_weight}),
        (TINY, {n + "x" * (n == name): a for n, a in arrays.items()}),
        (TINY, arrays | {name: arrays[name].T}),
        (dataclasses.replace(TINY, attention_scale="ba"), arrays),
    ]
    prints = {original, *(weights.fingerprint(*other) for other in others)}
    assert len(prints) == 5

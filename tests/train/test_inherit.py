import dataclasses

import numpy as np
import pytest

from samlight_jax import weights
from samlight_jax.config import Pattern, SamConfig, TinyViTConfig, ViTConfig
from samlight_jax.errors import InputError
from tests.conftest import normal, run
from tests.models import TINY, random_arrays
from train.inherit import inherited

ROOT = "image_encoder."
SMALL = SamConfig(
    name="small",
    encoder=ViTConfig(width=16, depth=2, heads=2, rel_pos=True),
    image_size=64,
    decoder_mlp=64,
)
LARGE = dataclasses.replace(
    SMALL, encoder=ViTConfig(width=32, depth=4, heads=4, rel_pos=True), name="large"
)
STUDENT = ViTConfig(
    width=32,
    depth=2,
    heads=2,
    attention=(Pattern(segment=(2, 2)), Pattern(segment=(4, 4), dilation=2)),
    stem="conv",
    local_conv=True,
)


def encoder_of(arrays):
    return {n: x for n, x in arrays.items() if n.startswith(ROOT)}


def embedding(config, encoder):
    model = weights.build(config, {**random_arrays(config), **encoder})
    return np.asarray(run(model.image_encoder, normal(1, 64, 64, 3))[0])


@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY, encoder=STUDENT)])
def test_a_student_like_its_teacher_is_its_teacher(config):
    teacher, fresh = random_arrays(config, 1), random_arrays(config, 2)
    found = inherited(config, teacher, config, fresh)
    want = encoder_of(teacher)
    assert found.keys() == want.keys()
    for name, x in found.items():
        np.testing.assert_array_equal(x, want[name])


def wider(small):
    """A teacher that computes what `small` does, with its kept parts, all places drawn.

    Its other channels hold copies of the kept ones, so that norms find the same moments, but
    nothing reads them; its other heads and hidden units are not read; its other blocks add nothing.
    """
    rng = np.random.default_rng(0)
    places = rng.permutation(32)
    kept, copies = np.sort(places[:16]), places[16:]
    copies = copies[np.argsort(rng.random(16))]
    units = np.sort(rng.permutation(128)[:64])
    heads = np.concatenate([np.arange(8, 16), np.arange(24, 32)])  # the second and the fourth
    packed = np.concatenate([heads, 32 + heads, 64 + heads])
    teacher = {n: x.copy() for n, x in random_arrays(LARGE, 3).items()}

    def stream(name, x):
        teacher[name][..., kept] = teacher[name][..., copies] = x

    def read(name, rows, columns, x):
        teacher[name][..., rows, :] = 0
        teacher[name][..., rows[:, None], columns] = x

    for name in ("pos_embed", "patch_embed.proj.kernel", "patch_embed.proj.bias"):
        stream(ROOT + name, small[ROOT + name])
    everything = np.arange(32)
    for i in range(4):
        block = f"{ROOT}blocks.{i}."
        for name in [n for n in teacher if n.startswith(block) and ".norm" not in n]:
            teacher[name][:] = 0
        if i % 2 == 0:
            continue
        own = {n: small[f"{ROOT}blocks.{i // 2}.{n}"] for n in _names(small)}
        for name in ("norm1.scale", "norm1.bias", "norm2.scale", "norm2.bias"):
            teacher[block + name][kept] = own[name]
        teacher[f"{block}attn.qkv.kernel"][kept[:, None], packed] = own["attn.qkv.kernel"]
        teacher[f"{block}attn.qkv.bias"][packed] = own["attn.qkv.bias"]
        teacher[f"{block}mlp.lin1.kernel"][kept[:, None], units] = own["mlp.lin1.kernel"]
        teacher[f"{block}mlp.lin1.bias"][units] = own["mlp.lin1.bias"]
        for name, rows in (("attn.proj", heads), ("mlp.lin2", units)):
            for columns in (kept, copies):
                teacher[f"{block}{name}.kernel"][rows[:, None], columns] = own[f"{name}.kernel"]
            stream(f"{block}{name}.bias", own[f"{name}.bias"])
        for axis in "hw":
            teacher[f"{block}attn.rel_pos_{axis}"][:] = own[f"attn.rel_pos_{axis}"]
    read(f"{ROOT}neck.conv1.kernel", everything, np.arange(256), 0)
    teacher[f"{ROOT}neck.conv1.kernel"][:, :, kept] = small[f"{ROOT}neck.conv1.kernel"]
    for name in ("norm1.scale", "norm1.bias", "conv2.kernel", "norm2.scale", "norm2.bias"):
        teacher[f"{ROOT}neck.{name}"] = small[f"{ROOT}neck.{name}"]
    return teacher


def _names(arrays):
    block = f"{ROOT}blocks.0."
    return [n.removeprefix(block) for n in arrays if n.startswith(block)]


def test_what_does_nothing_is_dropped():
    small = random_arrays(SMALL, 4)
    teacher = wider(small)
    found = inherited(SMALL, teacher, LARGE, random_arrays(SMALL, 5))
    want = encoder_of(small)
    assert found.keys() == want.keys()
    for name, x in found.items():
        np.testing.assert_array_equal(x, want[name])
    got, before = embedding(SMALL, found), embedding(LARGE, encoder_of(teacher))
    assert np.std(before) > 0.1
    np.testing.assert_allclose(got, before, atol=1e-4)


def test_blocks_and_heads_are_evenly_spaced():
    """Channels aside: of ten blocks the 3rd, 7th and 10th, of six heads the 2nd, 4th and 6th."""
    large = dataclasses.replace(LARGE, encoder=ViTConfig(width=24, depth=10, heads=6))
    small = dataclasses.replace(LARGE, encoder=ViTConfig(width=12, depth=3, heads=3))
    teacher = random_arrays(large)
    for i in range(10):
        teacher[f"{ROOT}blocks.{i}.mlp.lin2.bias"][:] = i
        teacher[f"{ROOT}blocks.{i}.attn.qkv.bias"][:] = np.tile(np.repeat(np.arange(6), 4), 3)
    found = inherited(small, teacher, large, random_arrays(small))
    blocks = [f"{ROOT}blocks.{i}." for i in range(3)]
    assert [found[f"{block}mlp.lin2.bias"][0] for block in blocks] == [2, 6, 9]
    for block in blocks:
        bias = found[f"{block}attn.qkv.bias"]
        np.testing.assert_array_equal(bias, np.tile(np.repeat([1, 3, 5], 4), 3))


def test_what_has_no_counterpart_stays():
    """A student with a stem, a local convolution and heads of its own, and no positions."""
    config = dataclasses.replace(SMALL, encoder=dataclasses.replace(STUDENT, width=24, heads=2))
    fresh = random_arrays(config)
    found = inherited(config, random_arrays(LARGE), LARGE, fresh)
    assert {n: x.shape for n, x in found.items()} == {n: fresh[n].shape for n in found}
    missing = {n.removeprefix(ROOT) for n in encoder_of(fresh).keys() - found.keys()}
    own = ("patch_embed.", "blocks.0.attn.", "blocks.1.attn.")
    assert {n for n in missing if not n.startswith(own)} == {
        f"blocks.{i}.local_conv.{part}" for i in range(2) for part in ("kernel", "bias")
    }
    assert not any(n.removeprefix(ROOT).startswith(own) for n in found)


@pytest.mark.parametrize(
    "student, teacher, sentence",
    [
        (
            SMALL,
            SamConfig(name="minisam", encoder=TinyViTConfig()),
            "inherit needs a ViT as teacher; 'minisam' is a TinyViT. Leave it out.",
        ),
        (LARGE, SMALL, "width=32, depth=4 is more than the teacher's 16, 2."),
        (
            dataclasses.replace(SMALL, encoder=ViTConfig(width=16, depth=5, heads=2)),
            LARGE,
            "width=16, depth=5 is more than the teacher's 32, 4.",
        ),
    ],
)
def test_teachers_that_cannot_be_cut(student, teacher, sentence):
    with pytest.raises(InputError, match=sentence):
        inherited(student, {}, teacher, {})

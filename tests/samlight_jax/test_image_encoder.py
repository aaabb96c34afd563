"""`ImageEncoderViT` against segment-anything; the students by their parts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

from samlight_jax import weights
from samlight_jax.config import PRESETS, Pattern, SamConfig, ViTConfig
from samlight_jax.image_encoder import Block, ImageEncoderViT, resize_pos_embed
from tests import oracles
from tests.conftest import assert_parity, nchw, nhwc, normal, run


def redraw(module):
    """Every parameter anew, products with a gain near 1; default weights would hide mistakes."""
    flat = nnx.to_flat_state(nnx.state(module))
    for i, (path, leaf) in enumerate(flat):
        draw = normal(*leaf.shape, seed=i)
        if path[-1] == "kernel":
            leaf[...] = draw / math.prod(leaf.shape[:-1]) ** 0.5
        else:
            leaf[...] = 0.5 + abs(draw) if path[-1] in ("var", "scale") else 0.3 * draw
    nnx.update(module, nnx.from_flat_state(flat))
    return module


def tensors(module):
    """The arrays of a Flax module by name, as PyTorch's tensors."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {".".join(map(str, path)): torch.tensor(np.asarray(leaf[...])) for path, leaf in flat}


# SAM's encoder.


def test_embedding_and_the_features_of_every_block_are_sams(twins):
    x = normal(2, 80, 80, 3)
    encoder = twins.torch.image_encoder
    y = encoder.patch_embed(nchw(x)) + encoder.pos_embed
    outputs = [y, *(y := block(y) for block in encoder.blocks)]
    want = encoder(nchw(x))

    embedding, features = run(twins.flax.image_encoder, x)
    assert_parity(embedding, nhwc(want))
    names = ["patch_embed", "blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    assert features.keys() == set(names)
    for name, output in zip(names, outputs, strict=True):
        assert_parity(features[name], output)


@pytest.mark.parametrize("size", [(5, 8), (8, 5), (64, 32), (64, 96)], ids=str)
def test_pos_embed_is_resized_as_by_torchs_bicubic(size):
    old, new = size
    table = normal(1, old, old, 8)
    want = F.interpolate(nchw(table), (new, new), mode="bicubic", align_corners=False)
    assert_parity(resize_pos_embed(table, new), nhwc(want))


@pytest.mark.parametrize("image_size", [48, 128])
def test_at_another_image_size_it_is_sam_with_interpolated_tables(twins, image_size):
    """SAM resizes relative positions at every call, its loaders the absolute ones."""
    flax, torch_encoder = twins.flax, twins.torch.image_encoder
    x, grid = normal(1, image_size, image_size, 3), image_size // 16
    pos = torch_encoder.pos_embed.permute(0, 3, 1, 2)
    pos = F.interpolate(pos, (grid, grid), mode="bicubic", align_corners=False)
    y = torch_encoder.patch_embed(nchw(x)) + nhwc(pos)
    for block in torch_encoder.blocks:
        y = block(y)
    want = nhwc(torch_encoder.neck(y.permute(0, 3, 1, 2)))

    config, arrays = weights.resize(flax.config, weights.arrays_of(flax), image_size)
    embedding, _ = run(weights.build(config, arrays).image_encoder, x)
    assert_parity(embedding, want)


@pytest.mark.parametrize("size", ["b", "l", "h"])
def test_sam_presets_have_segment_anythings_shapes(size):
    sa = oracles.segment_anything()
    with torch.device("meta"):
        theirs = sa.sam_model_registry[f"vit_{size}"]().state_dict()
    theirs = {name: a for name, a in theirs.items() if not name.startswith("pixel_")}
    ours = weights.expected(PRESETS[f"sam_vit_{size}"])
    assert sum(math.prod(a.shape) for a in ours.values()) == sum(a.numel() for a in theirs.values())
    assert len(ours) == len(theirs)
    for name, array in theirs.items():
        if "rel_pos" in name or name.endswith("pos_embed"):
            assert ours[name].shape == tuple(array.shape)


# The students.

STUDENT = SamConfig(
    name="student",
    encoder=ViTConfig(
        width=24,
        depth=3,
        heads=2,
        attention=(Pattern(segment=(4, 4)), Pattern(segment=(8, 8), dilation=4)),
        stem="conv",
        local_conv=True,
    ),
    image_size=128,
)


@pytest.fixture(scope="module")
def student():
    return redraw(ImageEncoderViT(STUDENT, rngs=nnx.Rngs(0)))


def test_a_students_features_are_its_blocks_in_turn(student):
    embedding, features = run(student, normal(2, 128, 128, 3))
    assert [block.attn.pattern for block in student.blocks] == [
        Pattern(segment=(4, 4)),
        Pattern(segment=(8, 8), dilation=4),
        Pattern(segment=(4, 4)),
    ]
    assert features.keys() == {"patch_embed", "blocks.0", "blocks.1", "blocks.2"}
    assert {x.shape for x in features.values()} == {(2, 8, 8, 24)}

    @jax.jit
    def in_turn(encoder, x):
        outputs = [x, *(x := block(x) for block in encoder.blocks)]
        return outputs[1:], encoder.neck(x)

    outputs, want = in_turn(student, features["patch_embed"])
    for i, output in enumerate(outputs):
        np.testing.assert_allclose(features[f"blocks.{i}"], output, atol=1e-4)
    np.testing.assert_allclose(embedding, want, atol=1e-4)
    assert np.std(embedding) > 0.1


@pytest.mark.parametrize("size", [(64, 64), (32, 80)], ids=str)
def test_the_conv_stem_is_three_convolutions_with_norm_and_gelu_after_two(student, size):
    stem = student.patch_embed
    t, x = tensors(stem), normal(2, *size, 3)

    def conv(y, name, **options):
        return F.conv2d(y, t[f"{name}.kernel"].permute(3, 2, 0, 1), **options)

    def norm(y, name):
        mean, var, scale, bias = (t[f"{name}.{part}"] for part in ("mean", "var", "scale", "bias"))
        return F.batch_norm(y, mean, var, scale, bias, eps=1e-5)

    y = F.gelu(norm(conv(nchw(x), "conv1.conv", stride=4), "conv1.bn"))
    y = F.gelu(norm(conv(y, "conv2.conv", stride=2, padding=1), "conv2.bn"))
    want = conv(y, "proj", stride=2, padding=1, bias=t["proj.bias"])
    assert want.shape[2:] == (size[0] // 16, size[1] // 16)
    assert_parity(run(stem, x), nhwc(want))


def test_a_student_block_convolves_locally_between_attention_and_mlp(student):
    block = student.blocks[1]
    t, x = tensors(block), normal(2, 8, 8, 24)

    def norm(y, name):
        return F.layer_norm(y, (24,), t[f"{name}.scale"], t[f"{name}.bias"], eps=1e-6)

    attended = np.asarray(block.attn(jnp.asarray(norm(torch.from_numpy(x), "norm1").numpy())))
    y = torch.from_numpy(x + attended)
    kernel = t["local_conv.kernel"].permute(3, 2, 0, 1)
    local = F.conv2d(y.permute(0, 3, 1, 2), kernel, t["local_conv.bias"], padding=1, groups=24)
    y = y + nhwc(local)
    hidden = F.gelu(norm(y, "norm2") @ t["mlp.lin1.kernel"] + t["mlp.lin1.bias"])
    want = y + hidden @ t["mlp.lin2.kernel"] + t["mlp.lin2.bias"]
    assert_parity(run(block, x), want)


def test_a_folded_student_is_the_unfolded_one(student):
    folded = ImageEncoderViT(STUDENT, folded=True, rngs=nnx.Rngs(1))
    arrays = weights.fold({name: t.numpy() for name, t in tensors(student).items()})
    flat = nnx.to_flat_state(nnx.state(folded))
    assert {".".join(map(str, path)) for path, _ in flat} == arrays.keys()
    for path, leaf in flat:
        leaf[...] = arrays[".".join(map(str, path))]
    nnx.update(folded, nnx.from_flat_state(flat))
    x = normal(1, 128, 128, 3)
    assert_parity(run(folded, x)[0], torch.tensor(np.asarray(run(student, x)[0])))


def _linear(before, after):
    return before * after + after


CONV_STEM = 4 * 4 * 3 * 64 + 2 * 64 + 9 * 64 * 128 + 2 * 128 + 9 * 128 * 384 + 384
BLOCK = (
    4 * 384 + _linear(384, 3 * 384) + _linear(384, 384) + _linear(384, 1536) + _linear(1536, 384)
)
LOCAL_CONV = 9 * 384 + 384
REST = 64 * 64 * 384 + (384 * 256 + 9 * 256 * 256 + 4 * 256)  # positions and neck


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("samlight_t", CONV_STEM + REST + 6 * (BLOCK + LOCAL_CONV)),
        ("samlight_s", CONV_STEM + REST + 12 * (BLOCK + LOCAL_CONV)),
        ("samlight_t_paper", _linear(16 * 16 * 3, 384) + REST + 6 * BLOCK),
    ],
)
def test_student_presets_have_the_parameters_of_their_design(name, parameters):
    counts = {
        array: math.prod(shape.shape)
        for array, shape in weights.expected(PRESETS[name]).items()
        if not array.endswith((".bn.mean", ".bn.var", "gaussian_matrix"))
    }
    encoder = sum(n for array, n in counts.items() if array.startswith("image_encoder."))
    assert encoder == parameters
    assert sum(counts.values()) == parameters + 6220 + 4058340  # as every SAM's


@pytest.mark.parametrize(
    "preset, block, group",
    [
        ("samlight_t", 0, lambda y, x: (y // 16 == 21 // 16) & (x // 16 == 42 // 16)),
        ("samlight_t", 1, lambda y, x: (y % 4 == 21 % 4) & (x % 4 == 42 % 4)),
        ("samlight_t_paper", 0, lambda y, x: (y // 16 == 21 // 16) & (x % 2 == 42 % 2)),
        ("samlight_t_paper", 1, lambda y, x: x % 4 == 42 % 4),
    ],
)
def test_a_token_sees_its_group_and_nothing_else(preset, block, group):
    """By the gradient of one token's output to all 64x64 inputs."""
    config = PRESETS[preset]
    encoder = dataclasses.replace(config.encoder, width=4, heads=1, local_conv=False)
    config = dataclasses.replace(config, encoder=encoder)
    module = redraw(Block(config, encoder.attention[block], rngs=nnx.Rngs(0)))
    weight = normal(4, seed=1)
    gradient = jax.jit(jax.grad(lambda x: module(x)[0, 21, 42] @ weight))
    seen = np.abs(gradient(jnp.asarray(normal(1, 64, 64, 4)))[0]).max(-1) > 0
    np.testing.assert_array_equal(seen, group(*np.mgrid[:64, :64]))

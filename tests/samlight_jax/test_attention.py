"""Attention of SAM's encoder against segment-anything, of the students against a plain gather."""

import math
import types

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from pallas_kernels import chain
from samlight_jax.attention import Attention, backends, group_shape, resize_rel_pos
from samlight_jax.config import PRESETS, Pattern, SamConfig, ViTConfig, attention_scale
from tests import oracles
from tests.conftest import assert_parity, normal, run

WINDOW = Pattern(segment=(14, 14), attend_padding=True)


def attention(pattern, grid, *, width=8, heads=2, rel_pos=False, scale="plain"):
    """An `Attention` whose every parameter is drawn anew: sharp weights, positions that matter."""
    encoder = ViTConfig(width=width, depth=1, heads=heads, rel_pos=rel_pos, attention=(pattern,))
    config = SamConfig(name="tiny", encoder=encoder, image_size=16 * grid, attention_scale=scale)
    module = Attention(config, pattern, rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(nnx.state(module))
    drawn = [0.7 * normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)]
    nnx.update(module, jax.tree.unflatten(tree, drawn))
    return module


# Against segment-anything.


def test_windows_attend_their_zero_padding_as_in_sam(twins):
    """5x5 tokens in windows of 3: the last row and column of windows are padded."""
    modeling = oracles.segment_anything().modeling.image_encoder
    x = normal(2, 5, 5, 32)
    windows, padded = modeling.window_partition(torch.from_numpy(x), 3)
    assert padded == (6, 6)
    want = twins.torch.image_encoder.blocks[0].attn(windows)
    want = modeling.window_unpartition(want, 3, padded, (5, 5))
    assert_parity(run(twins.flax.image_encoder.blocks[0].attn, x), want)


def test_dense_attention_with_relative_positions_is_sams(twins):
    x = normal(2, 5, 5, 32)
    want = twins.torch.image_encoder.blocks[1].attn(torch.from_numpy(x))
    assert_parity(run(twins.flax.image_encoder.blocks[1].attn, x), want)


@pytest.mark.parametrize("size", [(5, 5), (5, 8), (8, 3), (64, 32), (64, 96), (14, 1)], ids=str)
def test_relative_position_tables_are_resized_as_in_sam(size):
    old, new = size
    table = normal(2 * old - 1, 16)
    get_rel_pos = oracles.segment_anything().modeling.image_encoder.get_rel_pos
    want = get_rel_pos(new, new, torch.from_numpy(table))  # (query, key, 16)
    resized = resize_rel_pos(table, new)
    assert resized.shape == (2 * new - 1, 16)
    offsets = np.arange(new)[:, None] - np.arange(new)[None]
    assert_parity(resized[offsets + new - 1], want)


# Against NumPy.


def gather(module, x, group, scale):
    """The definition, token by token, float64: each query attends the tokens of its group.

    `group(row, column)` lists them as (row, column, their row and column within the group).
    """
    qkv_w, qkv_b, out_w, out_b = (
        np.asarray(a[...], np.float64)
        for a in (module.qkv.kernel, module.qkv.bias, module.proj.kernel, module.proj.bias)
    )
    b, h, w, c = x.shape
    q, k, v = np.moveaxis((x @ qkv_w + qkv_b).reshape(b, h, w, 3, module.heads, -1), 3, 0)
    out = np.zeros_like(q)
    for y in range(h):
        for z in range(w):
            tokens = group(y, z)
            rows, columns = [t[0] for t in tokens], [t[1] for t in tokens]
            scores = scale * np.einsum("bnd,bknd->bnk", q[:, y, z], k[:, rows, columns])
            if module.rel_pos_h is not None:
                (own,) = (t[2:] for t in tokens if t[:2] == (y, z))
                for axis, table in enumerate((module.rel_pos_h, module.rel_pos_w)):
                    table = np.asarray(table[...], np.float64)
                    middle = (len(table) - 1) // 2
                    offsets = [own[axis] - t[2 + axis] + middle for t in tokens]
                    scores += np.einsum("bnd,kd->bnk", q[:, y, z], table[offsets])
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[:, y, z] = np.einsum("bnk,bknd->bnd", weights, v[:, rows, columns])
    return out.reshape(b, h, w, c) @ out_w + out_b


def planar_group(h, w, segment, dilation):
    def same(p, a, s):
        return p // s == a // s and p % s % dilation == a % s % dilation

    def group(y, z):
        return [
            (a, e, a % segment[0] // dilation, e % segment[1] // dilation)
            for a in range(h)
            for e in range(w)
            if same(y, a, segment[0]) and same(z, e, segment[1])
        ]

    return group


def raster_group(h, w, segment, dilation):
    def group(y, z):
        p = y * w + z
        start, residue = p - p % segment, p % segment % dilation
        tokens = range(start + residue, min(start + segment, h * w), dilation)
        return [(*divmod(t, w), 0, 0) for t in tokens]

    return group


PATTERNS = [  # tokens on a side, segment, dilation
    (8, (4, 4), 1),
    (8, (8, 8), 4),
    (8, (4, 8), 2),
    (7, (4, 4), 2),  # padding, which nothing attends
    (5, (64, 64), 4),  # longer than the axis
    (8, 16, 2),
    (8, 64, 4),
    (7, 10, 5),  # 49 tokens: the last segment has 9
    (6, 1024, 8),
]


@pytest.mark.parametrize("grid, segment, dilation", PATTERNS, ids=str)
def test_students_attend_just_their_group(grid, segment, dilation):
    module = attention(Pattern(segment=segment, dilation=dilation), grid)
    x = normal(2, grid, grid, 8, seed=9)
    groups = raster_group if isinstance(segment, int) else planar_group
    want = gather(module, x, groups(grid, grid, segment, dilation), 4**-0.5)
    assert_parity(run(module, x), torch.from_numpy(want))


@pytest.mark.parametrize("grid, segment, dilation", PATTERNS[:5], ids=str)
def test_relative_positions_count_places_within_the_group(grid, segment, dilation):
    module = attention(Pattern(segment=segment, dilation=dilation), grid, rel_pos=True)
    x = normal(1, grid, grid, 8, seed=9)
    want = gather(module, x, planar_group(grid, grid, segment, dilation), 4**-0.5)
    assert_parity(run(module, x), torch.from_numpy(want))


# BA-SAM's length scaling.


def test_ba_scale_is_bit_equal_to_plain_at_1024_pixels():
    x = normal(1, 64, 64, 4)
    plain, ba = (
        run(attention(Pattern(), 64, width=4, heads=1, scale=scale), x) for scale in ("plain", "ba")
    )
    np.testing.assert_array_equal(plain, ba)


@pytest.mark.parametrize("grid", [8, 20])
def test_ba_scale_elsewhere_is_the_ratio_of_log_lengths(grid):
    module = attention(Pattern(), grid, scale="ba")
    x = normal(1, grid, grid, 8)
    factor = math.log(grid**2) / math.log(64**2)
    dense = planar_group(grid, grid, (grid, grid), 1)
    want = gather(module, x, dense, 4**-0.5 * factor)
    assert_parity(run(module, x), torch.from_numpy(want))


def test_ba_scale_grows_with_the_image():
    config = SamConfig(
        name="b", encoder=PRESETS["sam_vit_b"].encoder, image_size=2048, attention_scale="ba"
    )
    assert attention_scale(config, 64, 128**2, 64**2) == pytest.approx(14 / 12 / 8)


@pytest.mark.parametrize(
    "pattern, grid, keys",
    [
        (WINDOW, 64, (14, 14)),
        (WINDOW, 5, (14, 14)),  # a padded window is whole: nothing changes with the size
        (Pattern(), 32, (32, 32)),
        (Pattern(segment=(64, 64), dilation=4), 64, (16, 16)),
        (Pattern(segment=(64, 64), dilation=4), 128, (16, 16)),
        (Pattern(segment=(64, 64), dilation=4), 30, (8, 8)),
        (Pattern(segment=(16, 16)), 10, (10, 10)),
        (Pattern(segment=4096, dilation=4), 64, (1, 1024)),
        (Pattern(segment=4096, dilation=4), 9, (1, 21)),
    ],
    ids=str,
)
def test_group_shape_counts_the_keys_of_a_query(pattern, grid, keys):
    assert group_shape(pattern, grid) == keys


ASKED = [
    (WINDOW, 5, True, "plain"),
    (Pattern(), 4, True, "ba"),
    (Pattern(segment=(4, 8), dilation=2), 6, False, "ba"),
    (Pattern(segment=10, dilation=2), 6, False, "plain"),
]


@pytest.mark.parametrize(("pattern", "grid", "rel_pos", "scale"), ASKED, ids=str)
def test_backends_asks_what_the_model_will_ask(pattern, grid, rel_pos, scale, monkeypatch):
    asked = []

    def unsupported(*args, **kwargs):
        arrays = jax.tree.map(lambda x: (x.shape, x.dtype), args)
        asked.append((arrays, kwargs))
        return "listens only."

    listener = types.SimpleNamespace(unsupported=unsupported)
    monkeypatch.setattr(chain, "CHAIN", {"listener": listener, **chain.CHAIN})
    module = attention(pattern, grid, rel_pos=rel_pos, scale=scale)
    run(module, normal(1, grid, grid, 8))
    found = backends(module.config, pattern, np.float32)
    assert len(asked) == 2 and asked[0] == asked[1]
    assert found["listener"] == "listens only." and None in found.values()

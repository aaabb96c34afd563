import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    dilated_attention,
    dilated_attention_mixture,
    dilated_attention_qkvpacked,
)

ROW = jnp.ones((8, 2, 4))
PLANE = jnp.ones((8, 6, 2, 4))
REL_H, REL_W = jnp.ones((8, 6, 2, 4)), jnp.ones((8, 6, 2, 3))  # segment (8, 6), dilation 2


def refuses(text, *qkv, **options):
    q, k, v = qkv if len(qkv) == 3 else qkv * 3
    with pytest.raises(ValueError, match=text) as error:
        dilated_attention(q, k, v, **options)
    assert str(error.value).endswith(".")
    assert ". " not in str(error.value)  # one sentence


@pytest.mark.parametrize("bad", [0, -4, 4.0, True, "4", None, (4,), (4, 0), (4, 2.0), (4, 4, 4)])
def test_segment_and_dilation_are_whole_numbers(bad):
    refuses(r"segment=.* must be a whole number >= 1, or for the 2-D form a pair", ROW, segment=bad)
    refuses(r"dilation=.* must be a whole number >= 1", ROW, segment=4, dilation=bad)


def test_numpy_numbers_and_lists_are_taken():
    got = dilated_attention(PLANE, PLANE, PLANE, segment=[np.int64(4), 6], dilation=np.int32(2))
    assert got.shape == PLANE.shape


@pytest.mark.parametrize(
    ("segment", "dilation"), [(4, 3), (2, 4), ((4, 6), 4), ((4, 6), (2, 4)), ((4, 6), (3, 2))]
)
def test_dilation_divides_segment(segment, dilation):
    x = ROW if isinstance(segment, int) else PLANE
    refuses(
        r"dilation=.* must divide segment=.* on each axis", x, segment=segment, dilation=dilation
    )


def test_pair_of_dilations_needs_pair_of_segments():
    refuses(
        r"dilation=\(2, 2\) is a pair, so segment=4 must be one", ROW, segment=4, dilation=(2, 2)
    )


def test_rank():
    refuses(r"q.shape=\(2, 4\) must be \(\.\.\., L, heads, d\)", ROW[0], segment=4)
    refuses(r"q.shape=\(8, 2, 4\) must be \(\.\.\., H, W, heads, d\)", ROW, segment=(4, 4))


def test_shapes_are_equal():
    refuses(r"k.shape=\(7, 2, 4\) and v.shape=\(8, 2, 4\) must", ROW, ROW[1:], ROW, segment=4)
    refuses(r"repeat the heads of k and v", ROW, ROW[:, :1], ROW[:, :1], segment=4)


@pytest.mark.parametrize("axis", range(4))
def test_empty_axes(axis):
    shape = [2, 8, 2, 4]
    shape[axis] = 0
    refuses(r"q.shape=\(.*\) has an empty axis", jnp.ones(shape), segment=4)


def test_dtypes():
    refuses("q.dtype=int32, .* must be one of float16, bf", ROW.astype(jnp.int32), segment=4)
    low = ROW.astype(jnp.bfloat16)
    refuses("k.dtype=bfloat16 .*, the same for all; cast them", ROW, low, low, segment=4)


@pytest.mark.parametrize(
    ("x", "segment", "text"),
    [
        (ROW, 3, "axis L holds 8 tokens, which segments of 3 do not divide; pass pad=True"),
        (PLANE, (3, 6), "axis H holds 8 tokens, which segments of 3 do"),
        (PLANE, (8, 4), "axis W holds 6 tokens, which segments of 4 do"),
    ],
)
def test_without_padding_segments_divide_the_axes(x, segment, text):
    refuses(text, x, segment=segment, pad=False)


def test_clamping_can_need_padding():
    assert dilated_attention(ROW, ROW, ROW, segment=64, dilation=4, pad=False).shape == ROW.shape
    refuses(
        "axis L holds 7 tokens, which segments of 8", ROW[1:], segment=64, dilation=4, pad=False
    )


def test_relative_positions():
    grid = {"segment": (8, 6), "dilation": 2}
    refuses("rel_h came with rel_w=None but both", PLANE, **grid, rel_h=REL_H)
    refuses("rel_w came with rel_h=None but both", PLANE, **grid, rel_w=REL_W)
    refuses("needs the 2-D form, but seg", ROW, segment=8, rel_h=REL_H, rel_w=REL_W)
    text = r"rel_w.shape=\(8, 6, 2, 4\) must be \(8, 6, 2, 3\), .* for groups of 4 x 3 tokens"
    refuses(text, PLANE, **grid, rel_h=REL_H, rel_w=REL_H)
    half = REL_H.astype(jnp.float16)
    refuses("rel_h.dtype=float16 must be float32 or q's", PLANE, **grid, rel_h=half, rel_w=REL_W)


def test_relative_positions_follow_the_clamped_segment():
    rel = {"rel_h": REL_H, "rel_w": REL_W}
    got = dilated_attention(PLANE, PLANE, PLANE, segment=(64, 64), dilation=2, **rel)
    assert got.shape == PLANE.shape


def test_offsets():
    refuses("offsets='some' is unknown; pass 'all' or 'per_head'", ROW, segment=4, offsets="some")


@pytest.mark.parametrize("bad", [0, -0.5, np.nan, np.inf, "1", jnp.float32(1)])
def test_scale(bad):
    refuses(
        "scale=.* must be a positive, finite Python number; pass None", ROW, segment=4, scale=bad
    )


@pytest.mark.parametrize("shape", [(4,), (8, 2, 4), (3, 8, 2, 4)])
def test_packed_shape(shape):
    with pytest.raises(ValueError, match=r"qkv.shape=\(.*\) must be \(\.\.\., L, 3, heads, d\)"):
        dilated_attention_qkvpacked(jnp.ones(shape), segment=4)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([], r"patterns=\[\] must be one or more \(segment, dilation\) pairs; for a single"),
        ((8, 2), r"patterns=\(8, 2\) must be one or more \(segment, dilation\) pairs"),
        ([8], r"patterns=\[8\] must be one or more"),
        ([(8, 2, 1)], r"patterns=\[\(8, 2, 1\)\] must be one or more"),
        (8, "patterns=8 must be one or more"),
        ([(8, 2), ((4, 4), 1)], r"\(\(4, 4\), 1\)\] must be all 1-D or all 2-D; write every"),
        ([(8, 3)], "dilation=3 must divide segment=8"),
    ],
)
def test_patterns_of_a_mixture(patterns, message):
    with pytest.raises(ValueError, match=message):
        dilated_attention_mixture(ROW, ROW, ROW, patterns=patterns)

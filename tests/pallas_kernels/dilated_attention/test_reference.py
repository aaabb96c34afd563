"""The reference against loops written from the definition; kernels are held to the reference."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from pallas_kernels import dilated_attention
from tests.pallas_kernels.dilated_attention import oracle


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


STATIC = ("segment", "dilation", "offsets", "scale")


@functools.partial(jax.jit, static_argnames=STATIC)
def attend(q, k, v, **options):
    return dilated_attention(q, k, v, **options, implementation="reference", return_residuals=True)


def check_against_oracle(size, segment, dilation, offsets, with_rel=False, heads=3):
    q, k, v = (x.astype(np.float64) for x in draw(3, *size, heads, 4))
    rel = {}
    if with_rel:
        keys = [
            min(s, -(-n // r) * r) // r for n, s, r in zip(size, segment, dilation, strict=True)
        ]
        rel = {
            name: draw(*size, heads, m, seed=seed).astype(np.float64)
            for name, seed, m in zip(("rel_h", "rel_w"), (1, 2), keys, strict=True)
        }
    want = oracle.attend(q, k, v, segment, dilation, offsets, 0.4, **rel)
    options = {"segment": segment, "dilation": dilation, "offsets": offsets, "scale": 0.4}
    with jax.enable_x64(True):
        for got, expected in zip(attend(q, k, v, **rel, **options), want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


offsets_both = pytest.mark.parametrize("offsets", ["all", "per_head"])


@offsets_both
@pytest.mark.parametrize(
    ("size", "segment", "dilation", "with_rel"),
    [
        ((8, 8), (4, 4), (1, 1), True),  # windows
        ((8, 8), (8, 8), (4, 4), False),  # one segment of dilated groups
        ((8, 6), (4, 6), (2, 3), False),  # unlike axes
        ((8, 6), (4, 6), (2, 2), True),  # unlike groups
        ((5, 7), (4, 4), (2, 2), False),  # padded; some groups are nothing but padding
        ((5, 7), (64, 64), (4, 4), True),  # clamped, then padded
    ],
)
def test_2d_is_the_definition(size, segment, dilation, with_rel, offsets):
    check_against_oracle(size, segment, dilation, offsets, with_rel, heads=5)


@offsets_both
@pytest.mark.parametrize(
    ("length", "segment", "dilation"),
    [(16, 16, 1), (16, 8, 4), (17, 16, 4), (5, 64, 4), (1, 1, 1)],
)
def test_1d_is_the_definition(length, segment, dilation, offsets):
    q, k, v = draw(3, length, 3, 4)
    out, lse = oracle.attend(
        *(x[None].astype(np.float64) for x in (q, k, v)), (1, segment), (1, dilation), offsets, 0.5
    )
    got = attend(q, k, v, segment=segment, dilation=dilation, offsets=offsets)
    np.testing.assert_allclose(got[0], out[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[1], lse[0], rtol=1e-5, atol=1e-5)


@st.composite
def patterns(draw):
    dilation = [draw(st.integers(1, 3)) for _ in range(2)]
    segment = [r * draw(st.integers(1, 3)) for r in dilation]
    size = [draw(st.integers(1, 7)) for _ in range(2)]
    return tuple(size), tuple(segment), tuple(dilation)


@hypothesis.settings(max_examples=15, derandomize=True)
@hypothesis.given(
    patterns(), st.sampled_from(["all", "per_head"]), st.booleans(), st.integers(1, 4)
)
def test_any_pattern_is_the_definition(pattern, offsets, with_rel, heads):
    check_against_oracle(*pattern, offsets, with_rel, heads)


def test_one_segment_is_dense_attention():
    q, k, v = map(jnp.asarray, draw(3, 2, 40, 3, 8))
    want = jax.jit(jax.nn.dot_product_attention)(q, k, v)
    got = attend(q, k, v, segment=40)[0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_no_dilation_is_windowed_attention():
    q, k, v = map(jnp.asarray, draw(3, 8, 12, 3, 8))

    def windows(x):
        return x.reshape(2, 4, 3, 4, 3, 8).transpose(0, 2, 1, 3, 4, 5).reshape(6, 16, 3, 8)

    want = jax.jit(jax.nn.dot_product_attention)(*map(windows, (q, k, v)))
    got = windows(attend(q, k, v, segment=(4, 4))[0])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_large_scores_stay_finite():
    q, k, v = draw(3, 16, 2, 8)
    out, lse = attend(q * 100, k * 100, v, segment=16)
    assert np.isfinite(out).all()
    assert (lse > 88).any()  # where exp alone would overflow float32
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_as_exact_as_plain_attention(dtype):
    low = jnp.asarray(draw(3, 256, 6, 40)).astype(dtype)  # 40**-0.5 is exact in neither dtype
    truth, true_lse = attend(*low.astype(jnp.float32), segment=256)

    @jax.jit
    def plain(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k) * 40**-0.5)
        return jnp.einsum("hqk,khd->qhd", weights, v)

    def error(out):
        return float(jnp.abs(out.astype(jnp.float32) - truth).max())

    out, lse = attend(*low, segment=256)
    assert 0 < error(out) <= 2 * error(plain(*low))
    np.testing.assert_allclose(lse, true_lse, atol=1e-5)


@offsets_both
@pytest.mark.parametrize(
    ("size", "segment", "with_rel"),
    [((9,), 8, False), ((3, 5), (4, 4), True)],  # both padded
    ids=["row", "plane"],
)
def test_gradients(size, segment, with_rel, offsets):
    with jax.enable_x64(True):
        arrays = [x.astype(np.float64) for x in draw(3, *size, 3, 2)]
        if with_rel:
            arrays += [x.astype(np.float64) for x in draw(2, *size, 3, 2, seed=1)]

        @jax.jit
        def run(q, k, v, *rel):
            rel = dict(zip(("rel_h", "rel_w"), rel, strict=False))
            out, lse = attend(q, k, v, segment=segment, dilation=2, offsets=offsets, **rel)
            return out, jnp.where(jnp.isfinite(lse), lse, 0.0)

        jax.test_util.check_grads(run, arrays, order=1, modes=("rev",), rtol=1e-6, atol=1e-6)


def all_gradients(arrays, **options):
    def loss(arrays):
        out, lse = attend(**arrays, **options)
        return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()

    return jax.jit(jax.grad(loss))(arrays)


@offsets_both
def test_padding_brings_no_nan(offsets):
    # 17 tokens: of the last segment's four groups three are nothing but padding
    arrays = dict(zip("qkv", draw(3, 17, 6, 4), strict=True))
    out, lse = attend(**arrays, segment=16, dilation=4, offsets=offsets)
    assert np.isfinite(out).all()
    assert not np.isnan(lse).any()
    for gradient in all_gradients(arrays, segment=16, dilation=4, offsets=offsets).values():
        assert np.isfinite(gradient).all()


def test_row_masked_by_the_caller_is_zero():
    arrays = dict(zip("qkv", draw(3, 4, 4, 2, 4), strict=True))
    arrays |= {"rel_h": draw(4, 4, 2, 2), "rel_w": draw(4, 4, 2, 2)}
    arrays["rel_h"][1, 2, 0] = -np.inf  # one query sees no key
    arrays["rel_w"][3, 3, 1, 0] = -np.inf  # another sees half
    options = {"segment": (4, 4), "dilation": 2}
    out, lse = attend(**arrays, **options)
    assert (out[1, 2, 0] == 0).all()
    assert list(zip(*np.nonzero(np.isneginf(lse)), strict=True)) == [(1, 2, 0)]
    assert np.isfinite(out).all()
    for gradient in all_gradients(arrays, **options).values():
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("size", [(8, 8), (7, 7)], ids=["whole", "padded"])
def test_nan_stays_in_its_group(size):
    arrays = dict(zip("qkv", draw(3, *size, 2, 4), strict=True))
    arrays |= {"rel_h": draw(*size, 2, 2), "rel_w": draw(*size, 2, 2)}
    options = {"segment": (4, 4), "dilation": 2}
    clean, clean_gradients = attend(**arrays, **options), all_gradients(arrays, **options)
    inside = np.zeros(size, bool)
    inside[4:8:2, 1:4:2] = True  # residue (0, 1) of the lower left segment
    poisoned = {name: x.copy() for name, x in arrays.items()}
    for x in poisoned.values():
        x[inside] = np.nan
    out, lse = attend(**poisoned, **options)
    assert np.isnan(out[inside]).all()
    np.testing.assert_array_equal(out[~inside], clean[0][~inside])
    np.testing.assert_array_equal(lse[~inside], clean[1][~inside])
    for name, gradient in all_gradients(poisoned, **options).items():
        np.testing.assert_array_equal(gradient[~inside], clean_gradients[name][~inside])


def test_nan_where_a_head_does_not_attend_is_not_seen():
    arrays = dict(zip("qkv", draw(3, 8, 2, 4), strict=True))
    options = {"segment": 8, "dilation": 2, "offsets": "per_head"}
    clean, clean_gradients = attend(**arrays, **options), all_gradients(arrays, **options)
    for x in arrays.values():
        x[1::2, 0] = x[::2, 1] = np.nan  # head 0 attends the even tokens, head 1 the odd
    for got, want in zip(attend(**arrays, **options), clean, strict=True):
        np.testing.assert_array_equal(got, want)
    for name, gradient in all_gradients(arrays, **options).items():
        np.testing.assert_array_equal(gradient, clean_gradients[name])

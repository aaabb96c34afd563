"""The mixture against one softmax over all patterns' keys, written as loops."""

import functools
import itertools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from pallas_kernels import dilated_attention, dilated_attention_mixture

ROW = [(4, 1), (8, 2), (16, 4)]  # LongNet's: segment and dilation grow together
PLANE = [((3, 3), 1), ((6, 6), (3, 2))]


def oracle(q, k, v, patterns, offsets):
    """One softmax over the keys of all patterns, in float64; q, k, v are (H, W, heads, d)."""
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    tokens = list(np.ndindex(q.shape[:2]))
    for (y, x), h in itertools.product(tokens, range(q.shape[2])):
        keys = []  # one that several patterns have is there several times
        for (sh, sw), (rh, rw) in patterns:
            own = divmod(h % (rh * rw), rw)
            if offsets == "per_head" and (y % sh % rh, x % sw % rw) != own:
                continue
            keys += [
                (i, j)
                for i, j in tokens
                if (i // sh, j // sw) == (y // sh, x // sw)
                and (i % sh % rh, j % sw % rw) == (y % sh % rh, x % sw % rw)
            ]
        if keys:
            weights = np.exp([q[y, x, h] @ k[i, j, h] / 2 for i, j in keys])
            lse[y, x, h] = np.log(weights.sum())
            out[y, x, h] = weights @ [v[i, j, h] for i, j in keys] / weights.sum()
    return out, lse


def draw(*shape, dtype=np.float64):
    return np.random.default_rng(0).normal(size=(3, *shape)).astype(dtype)


@functools.partial(jax.jit, static_argnames=("patterns", "offsets"))
def mixture(q, k, v, patterns, offsets="all"):
    return dilated_attention_mixture(
        q, k, v, patterns=patterns, offsets=offsets, return_residuals=True
    )


def finite(results):
    """Output, and log-sum-exp with 0 for what no pattern covers."""
    out, lse = results
    return out, jnp.where(jnp.isfinite(lse), lse, 0.0)


offsets_both = pytest.mark.parametrize("offsets", ["all", "per_head"])


@offsets_both
def test_row_is_one_softmax_over_all_keys(offsets):
    with jax.enable_x64(True):
        qkv = draw(19, 5, 4)  # padded in every pattern
        got = mixture(*qkv, tuple(ROW), offsets)
    patterns = [((1, s), (1, r)) for s, r in ROW]
    want = oracle(*(x[None] for x in qkv), patterns, offsets)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y[0], rtol=1e-12, atol=1e-12)


@offsets_both
def test_plane_is_one_softmax_over_all_keys(offsets):
    with jax.enable_x64(True):
        qkv = draw(6, 7, 4, 4)
        got = mixture(*qkv, tuple(PLANE), offsets)
    want = oracle(*qkv, [((3, 3), (1, 1)), ((6, 6), (3, 2))], offsets)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


def test_of_one_pattern_is_that_pattern():
    qkv = draw(16, 2, 4, dtype=np.float32)
    want = dilated_attention(*qkv, segment=8, dilation=2, return_residuals=True)
    for x, y in zip(mixture(*qkv, ((8, 2),)), want, strict=True):
        np.testing.assert_array_equal(x, y)


def test_key_counts_once_for_each_pattern():
    qkv = draw(16, 2, 4, dtype=np.float32)
    once, twice = (mixture(*qkv, ((8, 2),) * n) for n in (1, 2))
    np.testing.assert_array_equal(twice[0], once[0])
    np.testing.assert_allclose(twice[1], once[1] + np.log(2), atol=1e-6)


@pytest.mark.parametrize(
    ("size", "patterns", "offsets"),
    [
        ((9,), ((4, 1), (8, 2)), "all"),
        ((9,), ((4, 2), (8, 4)), "per_head"),  # some tokens are covered by none
        ((3, 5), (((2, 2), 1), ((4, 4), 2)), "all"),
    ],
    ids=["row", "own", "plane"],
)
def test_gradients_are_finite_differences(size, patterns, offsets):
    """Through output and log-sum-exp, so through the weights too."""
    with jax.enable_x64(True):
        jax.test_util.check_grads(
            jax.jit(lambda *qkv: finite(mixture(*qkv, patterns, offsets))),
            tuple(draw(*size, 3, 2)),
            order=1,
            modes=("rev",),
            rtol=1e-6,
            atol=1e-6,
        )


def test_token_that_no_pattern_covers_is_zero():
    qkv = jnp.asarray(draw(16, 2, 4, dtype=np.float32))
    patterns = ((8, 2), (16, 4))  # head 0: even tokens, multiples of 4; head 1: odd, 1 more

    def loss(q, k, v):
        out, lse = finite(mixture(q, k, v, patterns, "per_head"))
        return (out**2).sum() + lse.sum()

    out, lse = mixture(*qkv, patterns, "per_head")
    covered = np.zeros((16, 2), bool)
    covered[::2, 0] = covered[1::2, 1] = True
    assert (np.asarray(out)[~covered] == 0).all()
    assert np.array_equal(np.isneginf(lse), ~covered)
    for gradient in jax.jit(jax.grad(loss, (0, 1, 2)))(*qkv):
        assert (np.asarray(gradient)[~covered] == 0).all()
        assert (np.asarray(gradient)[covered] != 0).any(-1).all()
        assert np.isfinite(gradient).all()


def test_large_scores_stay_finite():
    q, k, v = draw(16, 2, 4, dtype=np.float32)
    out, lse = mixture(q * 100, k * 100, v, tuple(ROW))
    assert np.isfinite(out).all()
    assert (lse > 88).any()  # where exp alone would overflow float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes(dtype):
    qkv = jnp.asarray(draw(16, 2, 4, dtype=np.float32)).astype(dtype)
    out, lse = mixture(*qkv, tuple(ROW))
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    want = mixture(*qkv.astype(jnp.float32), tuple(ROW))[0]
    # Rounded once a pattern and once more.
    tolerance = 2 * float(jnp.finfo(dtype).eps) * float(jnp.abs(qkv[2]).max())
    np.testing.assert_allclose(out.astype(jnp.float32), want, atol=tolerance)


def test_implementation_and_padding_reach_every_pattern():
    q = jnp.ones((12, 2, 4))
    with pytest.raises(ValueError, match="implementation='none' is unknown"):
        dilated_attention_mixture(q, q, q, patterns=[(4, 1)], implementation="none")
    with pytest.raises(ValueError, match="axis L holds 12 tokens, which segments of 8"):
        dilated_attention_mixture(q, q, q, patterns=[(4, 1), (8, 2)], pad=False)

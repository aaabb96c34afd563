"""Depthwise convolution: Pallas's interpreter on any machine, and a real GPU."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import depthwise_conv
from pallas_kernels.device import Device, assume
from tests.pallas_kernels.conftest import INTERPRETED

MODULE = importlib.import_module("pallas_kernels.depthwise_conv")
CASES = {  # (b, H, W, c), dtype, error
    "whole tiles": ((1, 16, 32, 64), "float32", 4e-6),
    "ragged, two channel blocks": ((2, 9, 18, 48), "float32", 4e-6),
    "smaller than a tile": ((2, 3, 1, 16), "float16", 2e-2),
    "TinyViT's channels": ((1, 8, 17, 160), "bfloat16", 8e-2),
}


def draw(shape, dtype, seed=0):
    random = np.random.default_rng(seed)
    c = shape[-1]
    return tuple(jnp.asarray(random.normal(size=s), dtype) for s in (shape, (3, 3, c), (c,)))


def oracle(arrays, residual):
    """Neighbour by neighbour, in float64."""
    x, kernel, bias = (np.asarray(a).astype(np.float64) for a in arrays)
    out = np.broadcast_to(bias, x.shape) + (x if residual else 0)
    for b, i, j, p, q in np.ndindex(*x.shape[:3], 3, 3):
        y, z = i + p - 1, j + q - 1
        if 0 <= y < x.shape[1] and 0 <= z < x.shape[2]:
            out[b, i, j] += x[b, y, z] * kernel[p, q]
    return out


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_channel_is_convolved_by_itself(kernel, case, residual):
    shape, dtype, error = case
    arrays = draw(shape, dtype)
    assert MODULE.unsupported(*arrays[:2], 1) is None
    want = oracle(arrays, residual)
    got = jax.jit(lambda *x: depthwise_conv(*x, residual=residual))(*arrays)
    assert got.dtype == dtype
    np.testing.assert_allclose(np.asarray(got).astype(float), want, atol=error)
    plain = MODULE.plain(*arrays, stride=1, residual=residual)
    np.testing.assert_allclose(np.asarray(plain).astype(float), want, atol=4 * error)


def test_every_output_is_written(kernel):
    """Two runs after other memory was in use give the same bits, none of them NaN."""
    arrays = draw((2, 13, 21, 32), "bfloat16")
    grad = jax.grad(lambda *x: depthwise_conv(*x).astype(jnp.float32).std(), (0, 1, 2))
    run = jax.jit(lambda *x: (depthwise_conv(*x), grad(*x)))
    first = run(*arrays)
    jax.tree.map(lambda x: jnp.full_like(x, jnp.nan).block_until_ready(), first)
    second = run(*arrays)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(first))
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: (x == y).all(), first, second)))


@pytest.mark.parametrize("residual", [False, True])
def test_gradients_are_those_of_the_plain_form(kernel, residual):
    shape = (2, 37, 18, 32)  # two tiles of rows in the sums
    arrays = draw(shape, "float32")
    weight = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)

    def gradients(run):
        return jax.jit(jax.grad(lambda *x: (run(*x) ** 2 * weight).sum(), (0, 1, 2)))(*arrays)

    got = gradients(lambda *x: depthwise_conv(*x, residual=residual))
    want = gradients(lambda *x: MODULE.plain(*x, stride=1, residual=residual))
    for x, y in zip(got, want, strict=True):
        assert jnp.abs(y).max() > 1
        np.testing.assert_allclose(x, y, atol=2e-5 * float(jnp.abs(y).max()))


def test_gelu_by_tanh_and_its_gradients(kernel):
    """Of any form: the plain one, and the kernel's, whose tanh is off by 2**-11 on a GPU."""
    arrays = draw((1, 9, 17, 32), "float32")

    def both(run):
        out = run(*arrays)
        return out, *jax.grad(lambda *x: (run(*x) ** 2).sum(), (0, 1, 2))(*arrays)

    def wanted(*x):
        return jax.nn.gelu(MODULE.plain(*x, stride=1, residual=False), approximate=True)

    got = both(lambda *x: depthwise_conv(*x, gelu_tanh=True))
    with assume(Device("cpu", "cpu", None)):
        plain = both(lambda *x: depthwise_conv(*x, gelu_tanh=True))
    for x, y, z in zip(got, plain, both(wanted), strict=True):
        np.testing.assert_allclose(x, z, atol=2e-3 * float(jnp.abs(z).max()))
        np.testing.assert_allclose(y, z, atol=1e-5 * float(jnp.abs(z).max()))


def test_without_a_bias_no_gradient_is_made_of_it(kernel):
    x, taps, bias = draw((1, 8, 8, 16), "float32")
    want = depthwise_conv(x, taps, jnp.zeros_like(bias))
    np.testing.assert_array_equal(depthwise_conv(x, taps), want)
    found = jax.grad(lambda k: depthwise_conv(x, k).sum())(taps)
    want = jax.grad(lambda k: MODULE.plain(x, k, None, stride=1, residual=False).sum())(taps)
    np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.parametrize("axes", [(0, None, None), (1, 0, 0)])
def test_vmap(kernel, axes):
    draws = [draw((2, 5, 6, 16), "float32", seed) for seed in range(3)]
    own = axes[1] is not None
    want = jnp.stack([depthwise_conv(x, *draws[own * i][1:]) for i, (x, *_) in enumerate(draws)])
    maps = jnp.stack([x for x, *_ in draws], axes[0])
    shared = [jnp.stack(x) if own else x[0] for x in list(zip(*draws, strict=True))[1:]]
    got = jax.jit(jax.vmap(depthwise_conv, axes))(maps, *shared)
    np.testing.assert_allclose(got, want, atol=4e-6)


def test_what_the_kernel_does_not_take_runs_plainly():
    x, taps, bias = draw((1, 6, 7, 24), "float32")
    with assume(INTERPRETED):
        assert "(1, 6, 7, 24)" in MODULE.unsupported(x, taps, 1)
        assert "stride=2" in MODULE.unsupported(x, taps, 2)
        assert "one dtype" in MODULE.unsupported(x, taps.astype("bfloat16"), 1)
        got = depthwise_conv(x, taps, bias, stride=2)
    want = oracle((x, taps, bias), False)[:, ::2, ::2]
    np.testing.assert_allclose(got, want, atol=4e-6)
    with assume(Device("gpu", "Tesla T4", (7, 5))):
        assert "8.0" in MODULE.unsupported(x, taps, 1)


def test_bad_calls_are_refused_in_a_sentence():
    x, taps, bias = draw((1, 6, 7, 16), "float32")
    with pytest.raises(ValueError, match=r"kernel.shape=\(3, 3, 8\).* \(3, 3, c\) and \(c,\)\."):
        depthwise_conv(x, taps[..., :8], bias)
    with pytest.raises(ValueError, match=r"residual=True needs stride=1, but stride=2\."):
        depthwise_conv(x, taps, bias, stride=2, residual=True)

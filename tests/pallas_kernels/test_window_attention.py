"""Window attention with a bias a pair: Pallas's interpreter on any machine, and a real GPU."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels import window_attention
from pallas_kernels.device import Device, assume
from tests.pallas_kernels.conftest import INTERPRETED, on_four_devices

MODULE = importlib.import_module("pallas_kernels.window_attention")
CASES = {  # map, window, heads, head_dim, dtype, error
    "one tile": ((14, 21), 7, 3, 32, "float32", 2e-6),
    "four tiles, TinyViT's": ((28, 14), 14, 2, 32, "bfloat16", 2e-2),
    "of a power of two": ((8, 16), 8, 2, 16, "float16", 2e-3),
    "wide heads": ((10, 5), 5, 1, 64, "bfloat16", 2e-2),
}


def draw(size, window, heads, head_dim, dtype, seed=0, batch=2):
    random = np.random.default_rng(seed)
    qkv = random.normal(size=(batch, *size, heads, 3, head_dim))
    bias = random.normal(size=(heads, window**2, window**2))
    return jnp.asarray(qkv, dtype), jnp.asarray(bias, dtype)


def oracle(qkv, bias, window):
    """Token by token, in float64."""
    qkv, bias = (np.asarray(x).astype(np.float64) for x in (qkv, bias))
    b, height, width, heads, _, d = qkv.shape
    out = np.zeros((b, height, width, heads, d))
    for i, y, x, head in np.ndindex(b, height, width, heads):
        top, left = y // window * window, x // window * window
        seen = qkv[i, top : top + window, left : left + window, head].reshape(-1, 3, d)
        me = (y - top) * window + x - left
        scores = seen[:, 1] @ qkv[i, y, x, head, 0] / np.sqrt(d) + bias[head, me]
        weights = np.exp(scores - scores.max())
        out[i, y, x, head] = weights @ seen[:, 2] / weights.sum()
    return out


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_token_attends_to_its_window(kernel, case):
    *shape, error = case
    window = case[1]
    qkv, bias = draw(*shape)
    assert MODULE.unsupported(qkv, window) is None
    want = oracle(qkv, bias, window)
    got = jax.jit(lambda *x: window_attention(*x, window=window))(qkv, bias)
    np.testing.assert_allclose(np.asarray(got).astype(float), want, atol=error)
    plain = np.asarray(MODULE.plain(qkv, bias, window)).astype(float)
    np.testing.assert_allclose(plain, want, atol=2 * error)


def test_every_output_is_written(kernel):
    """Two runs after other memory was in use give the same bits, none of them NaN."""
    qkv, bias = draw((28, 14), 14, 2, 32, "bfloat16")
    run = jax.jit(lambda *x: window_attention(*x, window=14))
    first = run(qkv, bias)
    jnp.full_like(first, jnp.nan).block_until_ready()
    second = run(qkv, bias)
    assert jnp.isfinite(first).all()
    assert (first == second).all()


def test_gradients_are_those_of_the_plain_form(kernel):
    *arrays, weight = *draw((14, 7), 7, 2, 16, "float32"), jnp.sin(jnp.arange(16.0))

    def loss(run):
        return jax.jit(jax.grad(lambda *x: ((run(*x) ** 2) @ weight).sum(), (0, 1)))

    got = loss(lambda *x: window_attention(*x, window=7))(*arrays)
    want = loss(lambda *x: MODULE.plain(*x, 7))(*arrays)
    for x, y in zip(got, want, strict=True):
        assert jnp.abs(y).max() > 0.1
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("axes", [(0, None), (1, 0)])
def test_vmap(kernel, axes):
    qkv, bias = zip(*(draw((7, 7), 7, 2, 16, "float32", seed) for seed in range(3)), strict=True)
    own = axes[1] is not None
    want = jnp.stack([MODULE.plain(q, bias[own * i], 7) for i, q in enumerate(qkv)])
    maps, table = jnp.stack(qkv, axes[0]), jnp.stack(bias) if own else bias[0]
    run = jax.jit(jax.vmap(lambda *x: window_attention(*x, window=7), axes))
    np.testing.assert_allclose(run(maps, table), want, atol=2e-6)


def sharded():
    """Batch and heads divide among four devices: no message, equal numbers."""
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    qkv, bias = draw((14, 7), 7, 2, 16, "float32")
    specs = PartitionSpec("rows", None, None, "columns"), PartitionSpec("columns")
    placed = [
        jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip((qkv, bias), specs, strict=True)
    ]
    with assume(INTERPRETED):
        run = jax.jit(lambda *x: window_attention(*x, window=7)).lower(*placed).compile()
    assert "all-" not in run.as_text(), run.as_text()
    got = run(*placed)
    assert got.addressable_shards[0].data.size * 4 == got.size
    np.testing.assert_allclose(got, MODULE.plain(qkv, bias, 7), atol=2e-6)


def test_batch_and_heads_divide_among_devices_without_messages():
    on_four_devices(f"from {__name__} import sharded; sharded()")


def test_what_the_kernel_does_not_take_runs_plainly():
    qkv, bias = draw((14, 7), 7, 2, 24, "float32")
    with assume(INTERPRETED):
        assert "head_dim=24" in MODULE.unsupported(qkv, 7)
        assert "window=17" in MODULE.unsupported(qkv[..., :16], 17)
        got = window_attention(qkv, bias, window=7)
    np.testing.assert_array_equal(got, MODULE.plain(qkv, bias, 7))
    with assume(Device("gpu", "Tesla T4", (7, 5))):
        assert "8.0" in MODULE.unsupported(qkv, 7)


def test_bad_shapes_are_refused_in_a_sentence():
    qkv, bias = draw((14, 7), 7, 2, 16, "float32")
    with pytest.raises(ValueError, match=r"qkv\.shape=.* multiples of window=4; pad the map\."):
        window_attention(qkv, bias, window=4)
    with pytest.raises(ValueError, match=r"bias\.shape=\(1, 49, 49\) must be \(2, 49, 49\)"):
        window_attention(qkv, bias[:1], window=7)

"""The local convolution and its norm: Pallas's interpreter on any machine, and a real GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import depthwise_norm
from pallas_kernels.depthwise_norm import depthwise_conv_norm
from pallas_kernels.device import assume
from tests.pallas_kernels import test_depthwise_conv
from tests.pallas_kernels.conftest import INTERPRETED, on_four_devices

EPSILON = 1e-6
CASES = {  # (b, H, W, c), dtype, error
    "samlight_t's channels": ((2, 8, 6, 384), "float32", 1e-5),
    "one part, odd width": ((1, 4, 7, 128), "float32", 1e-5),
    "several columns apart": ((1, 4, 16, 256), "bfloat16", 6e-2),
}


def draw(shape, dtype, seed=0):
    """As of the convolution, and the norm's scale and shift: other draws' biases."""
    scale, shift = (test_depthwise_conv.draw(shape, dtype, seed + i)[2] for i in (10, 20))
    return *test_depthwise_conv.draw(shape, dtype, seed), scale, shift


def run(*arrays):
    return depthwise_conv_norm(*arrays, epsilon=EPSILON)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_both_results_are_their_definitions(kernel, case):
    shape, dtype, error = case
    arrays = draw(shape, dtype)
    assert depthwise_norm.unsupported(*arrays[:2]) is None
    total, norm = jax.jit(run)(*arrays)
    assert total.dtype == norm.dtype == dtype
    want = test_depthwise_conv.oracle(arrays[:3], True)
    np.testing.assert_allclose(np.asarray(total).astype(float), want, atol=error)
    scale, shift = (np.asarray(x).astype(float) for x in arrays[3:])
    want = (want - want.mean(-1, keepdims=True)) / np.sqrt(want.var(-1, keepdims=True) + EPSILON)
    np.testing.assert_allclose(np.asarray(norm).astype(float), want * scale + shift, atol=error)


def test_many_columns_or_few_make_no_difference(kernel, monkeypatch):
    arrays = draw((1, 8, 16, 128), "float32")
    want = run(*arrays)
    monkeypatch.setattr(depthwise_norm, "BUSY", 1)  # whole rows
    for x, y in zip(run(*arrays), want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_gradients_are_those_of_the_plain_form(kernel):
    arrays = draw((1, 8, 6, 128), "float32")

    def gradients(run):
        def loss(*x):
            total, norm = run(*x)
            return (total**2 + norm**3).sum()

        return jax.jit(jax.grad(loss, range(5)))(*arrays)

    want = gradients(lambda *x: depthwise_norm.plain(*x, epsilon=EPSILON))
    for x, y in zip(gradients(run), want, strict=True):
        assert jnp.abs(y).max() > 1
        np.testing.assert_allclose(x, y, atol=2e-5 * float(jnp.abs(y).max()))


def test_vmap_joins_the_batch(kernel):
    draws = [draw((2, 4, 6, 128), "float32", seed) for seed in range(3)]
    maps = jnp.stack([x for x, *_ in draws])
    got = jax.jit(jax.vmap(run, (0, *[None] * 4)))(maps, *draws[0][1:])
    for i, x in enumerate(maps):
        for many, one in zip(got, run(x, *draws[0][1:]), strict=True):
            np.testing.assert_allclose(many[i], one, atol=1e-5)


def sharded():
    """In a process of its own, with four devices."""
    arrays = draw((4, 4, 6, 128), "float32")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(arrays[0], NamedSharding(mesh, P("data")))
    with assume(INTERPRETED):
        compiled = jax.jit(run).lower(x, *arrays[1:]).compile()
        assert "all-gather" not in compiled.as_text()
        for got, want in zip(compiled(x, *arrays[1:]), run(*arrays), strict=True):
            assert got.sharding.spec[0] == "data"
            np.testing.assert_allclose(got, want, atol=1e-5)


def test_devices_divide_the_batch_without_a_gather():
    on_four_devices(f"from {__name__} import sharded; sharded()")


def test_what_the_kernel_does_not_take_runs_plainly():
    x, taps, *_ = draw((1, 6, 7, 96), "float32")
    with assume(INTERPRETED):
        assert "(1, 6, 7, 96)" in depthwise_norm.unsupported(x, taps)
        assert "one dtype" in depthwise_norm.unsupported(x, taps.astype("bfloat16"))
    assert "NVIDIA GPU" in depthwise_norm.unsupported(*draw((1, 4, 4, 128), "float32")[:2])

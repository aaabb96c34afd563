"""The convolution over patches and its GELU: interpreted on any machine, and a real GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import patch_conv
from pallas_kernels.device import Device, assume
from pallas_kernels.patch_conv import patch_conv_gelu
from tests.pallas_kernels.conftest import INTERPRETED, on_four_devices

CASES = {  # (b, y, x, c), size, channels out
    "the stem's patches": ((2, 8, 512, 3), 4, 64),
    "whole rows of numbers": ((1, 6, 128, 8), 2, 16),
}


def draw(shape=(2, 8, 256, 3), size=4, out=32, dtype="bfloat16"):
    random = np.random.default_rng(0)
    depth = size * size * shape[-1]
    kernel = random.normal(size=(size, size, shape[-1], out)) * depth**-0.5
    arrays = random.normal(size=shape), kernel, random.normal(size=out)
    return [jnp.asarray(x, dtype) for x in arrays]


def oracle(x, kernel, bias):
    """In PyTorch, float64."""
    torch = pytest.importorskip("torch")
    x, kernel, bias = (
        torch.from_numpy(np.asarray(a).astype(np.float64)) for a in (x, kernel, bias)
    )
    kernel, stride = kernel.permute(3, 2, 0, 1), len(kernel)
    y = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), kernel, bias, stride)
    return torch.nn.functional.gelu(y).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_its_definition(kernel, case):
    arrays = draw(*case)
    assert patch_conv.unsupported(*arrays[:2]) is None
    got = jax.jit(patch_conv_gelu)(*arrays)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got).astype(float), oracle(*arrays), atol=2e-2)


def test_gradients_are_those_of_the_product(kernel):
    arrays = draw()

    def gradients(run):
        return jax.jit(jax.grad(lambda *x: (run(*x).astype("float32") ** 2).sum(), range(3)))(
            *arrays
        )

    for x, y in zip(gradients(patch_conv_gelu), gradients(patch_conv.plain), strict=True):
        x, y = (np.asarray(z).astype(float) for z in (x, y))
        np.testing.assert_allclose(x, y, atol=0.02 * np.abs(y).max())


def test_vmap_joins_the_batch(kernel):
    x, *weights = draw((3, 4, 256, 3))
    got = jax.jit(jax.vmap(patch_conv_gelu, (0, None, None)))(x[:, None], *weights)[:, 0]
    np.testing.assert_array_equal(got, patch_conv_gelu(x, *weights))


def sharded():
    """In a process of its own, with four devices."""
    x, *weights = draw((4, 4, 256, 3))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    cut = jax.device_put(x, NamedSharding(mesh, P("data")))
    with assume(INTERPRETED):
        compiled = jax.jit(patch_conv_gelu).lower(cut, *weights).compile()
        assert "all-gather" not in compiled.as_text()
        got = compiled(cut, *weights)
        assert got.sharding.spec[0] == "data"
        np.testing.assert_array_equal(got, patch_conv_gelu(x, *weights))


def test_devices_divide_the_batch_without_a_gather():
    on_four_devices(f"from {__name__} import sharded; sharded()")


def test_what_the_kernel_does_not_take_is_a_product():
    x, kernel, bias = draw(dtype="float32")
    with assume(INTERPRETED):
        assert "takes bfloat16" in patch_conv.unsupported(x, kernel)
        x, kernel = x.astype("bfloat16"), kernel.astype("bfloat16")
        assert "64 patches" in patch_conv.unsupported(x[:, :, :-4], kernel)
        assert "a power of two" in patch_conv.unsupported(x, kernel[..., :24])
    with assume(Device("gpu", "Tesla T4", (7, 5))):
        assert "8.0" in patch_conv.unsupported(x, kernel)
    x, kernel, bias = draw((1, 8, 12, 3), dtype="float32")
    np.testing.assert_allclose(patch_conv_gelu(x, kernel, bias), oracle(x, kernel, bias), atol=1e-5)

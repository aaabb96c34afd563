"""Upscaled masks: against PyTorch's transposed convolutions, interpreted and on a real GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import upscaling
from pallas_kernels.device import Device, assume
from pallas_kernels.upscaling import Upscaling, upscaled_masks
from tests.pallas_kernels.conftest import INTERPRETED, PRECISION

SIZE, EPSILON = (4, 32), 1e-6


def draw(dtype, images=2, size=SIZE, masks=4, c=64, e=16, f=32):
    random = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * random.normal(size=shape), dtype)

    weights = Upscaling(
        *(normal(c, 2, 2, e, scale=c**-0.5), normal(e), normal(e), normal(e)),
        *(normal(e, 2, 2, f, scale=e**-0.5), normal(f)),
    )
    return normal(images, size[0] * size[1], c), normal(images, masks, f), weights


def oracle(image, masks, weights, size=SIZE):
    """As segment-anything does it, in float64."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    image, masks, *weights = (
        torch.from_numpy(np.asarray(x).astype(np.float64)) for x in (image, masks, *weights)
    )
    w = Upscaling(*weights)
    x = image.reshape(len(image), *size, -1).permute(0, 3, 1, 2)
    kernels = (k.permute(0, 3, 1, 2) for k in (w.first, w.second))
    x = functional.conv_transpose2d(x, next(kernels), w.first_bias, stride=2)
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + EPSILON).sqrt()
    x = functional.gelu(x * w.scale[:, None, None] + w.shift[:, None, None])
    x = functional.gelu(functional.conv_transpose2d(x, next(kernels), w.second_bias, stride=2))
    return torch.einsum("bkf,bfyx->bkyx", masks, x).numpy()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_is_what_segment_anything_does(kernel, dtype):
    given = draw(dtype)
    assert (upscaling.unsupported(*given[:2]) is None) == (dtype == "bfloat16")
    want = oracle(*given)
    with jax.default_matmul_precision(PRECISION[given[0].dtype.itemsize]):
        got = jax.jit(lambda *x: upscaled_masks(*x, size=SIZE))(*given)
    assert got.shape == (2, 4, 16, 128) and got.dtype == dtype
    error = {"bfloat16": 0.02, "float32": 1e-5}[dtype] * np.abs(want).max()
    np.testing.assert_allclose(np.asarray(got).astype(float), want, atol=error)


def test_gradients_are_those_of_the_plain_form(kernel):
    given = draw("bfloat16")

    def loss(*args):
        return (upscaled_masks(*args, size=SIZE).astype(jnp.float32) ** 2).sum()

    got = jax.jit(jax.grad(loss, (0, 1, 2)))(*given)
    with assume(Device("cpu", "cpu")):
        want = jax.jit(jax.grad(loss, (0, 1, 2)))(*given)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = (np.asarray(z).astype(float) for z in (x, y))
        np.testing.assert_allclose(x, y, atol=0.02 * np.abs(y).max())


def test_vmap_over_images(kernel):
    image, masks, weights = draw("bfloat16", images=3)
    run = jax.vmap(lambda *x: upscaled_masks(*x, size=SIZE), (0, 0, None))
    got = jax.jit(run)(image[:, None], masks[:, None], weights)[:, 0]
    want = oracle(image, masks, weights)
    np.testing.assert_allclose(np.asarray(got).astype(float), want, atol=0.02 * np.abs(want).max())


def test_what_the_kernel_does_not_take_runs_plainly():
    image, masks, _ = draw("bfloat16")
    with assume(INTERPRETED):
        assert "takes bfloat16" in upscaling.unsupported(image.astype("float16"), masks)
        assert "steps of 64 tokens" in upscaling.unsupported(image[:, :100], masks)
    with assume(Device("gpu", "Tesla T4", (7, 5))):
        assert "8.0" in upscaling.unsupported(image, masks)

"""GELU in each type against PyTorch's, and its form within Triton kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gelu import gelu, gelu_in_triton

torch = pytest.importorskip("torch")
X = np.linspace(-5, 5, 1001, dtype=np.float32)


@pytest.mark.parametrize("dtype, error", [("float32", 4e-6), ("float16", 3e-3), ("bfloat16", 2e-2)])
def test_gelu_and_its_derivative_are_pytorchs(dtype, error):
    x = jnp.asarray(X, dtype)
    tensor = torch.from_numpy(np.array(x.astype(jnp.float32))).requires_grad_()
    want = torch.nn.functional.gelu(tensor)
    (slope,) = torch.autograd.grad(want.sum(), tensor)
    got, pull_back = jax.vjp(gelu, x)
    assert got.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(got.astype(float), want.detach(), atol=error)
    (found,) = pull_back(jnp.ones_like(got))
    np.testing.assert_allclose(found.astype(float), slope, atol=error)


def test_within_kernels_it_is_by_tanh():
    want = torch.nn.functional.gelu(torch.from_numpy(X), approximate="tanh")
    got = gelu_in_triton(jnp.asarray(X), interpret=True)
    np.testing.assert_allclose(got, want, atol=2e-6)

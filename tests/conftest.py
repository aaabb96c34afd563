"""What the parity tests share: one pair of equal models, draws, layouts, and what equal means."""

import types

import hypothesis
import jax
import numpy as np
import pytest

hypothesis.settings.register_profile("compiles", deadline=None)  # a first example compiles
hypothesis.settings.load_profile("compiles")
TOLERANCE = 1e-4  # absolute, against PyTorch


@jax.jit
def run(module, *args):
    """A module's call, compiled whole."""
    return module(*args)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def nchw(x):
    """A NumPy array of our layout to a tensor of PyTorch's."""
    import torch

    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def assert_parity(got, want, tolerance=TOLERANCE):
    """`got` is PyTorch's `want`, and that varies by 100 tolerances at least."""
    got, want = np.asarray(got), want.detach().numpy()
    assert got.shape == want.shape
    assert want.std() > 100 * tolerance, f"vacuous: the oracle's deviation is {want.std():.2g}"
    error = np.abs(got - want).max()
    assert error <= tolerance, f"differs by {error:.2g}"


@pytest.fixture(scope="session")
def twins():
    """`torch`, segment-anything's `Sam` of `oracles.TINY`, and `flax`, ours: the same weights."""
    from convert.apply import to_flax
    from samlight_jax import weights
    from tests import oracles

    torch_sam = oracles.tiny_sam().requires_grad_(False)
    oracles.randomise(torch_sam.image_encoder, 1, std=0.2)  # narrow: 0.05 would hide attention
    state = {name: tensor.numpy() for name, tensor in torch_sam.state_dict().items()}
    flax_sam = weights.build(oracles.TINY, to_flax(state, oracles.TINY))
    return types.SimpleNamespace(torch=torch_sam, flax=flax_sam)

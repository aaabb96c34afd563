"""Shared layers against PyTorch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

from samlight_jax import weights
from samlight_jax.layers import ConvNorm, DepthwiseConv, layer_norm
from tests.conftest import assert_parity, nchw, nhwc, normal, run


def oihw(kernel):
    return torch.from_numpy(np.array(kernel)).permute(3, 2, 0, 1)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(7, 7), (8, 8), (5, 10), (1, 1), (1, 4)], ids=str)
def test_depthwise_conv_is_torchs_grouped_conv(size, stride):
    module = DepthwiseConv(16, stride=stride, rngs=nnx.Rngs(0))
    module.kernel[...], module.bias[...] = normal(3, 3, 1, 16), normal(16, seed=1)
    x = normal(2, *size, 16, seed=2)
    kernel, bias = oihw(module.kernel[...]), torch.from_numpy(normal(16, seed=1))
    want = F.conv2d(nchw(x), kernel, bias, stride=stride, padding=1, groups=16)
    assert_parity(run(module, x), nhwc(want))


CONV_NORMS = [
    {"channels": (3, 8), "size": 4, "stride": 4},
    {"channels": (3, 8), "size": 3, "stride": 2},
    {"channels": (6, 8), "size": 1},
    {"channels": (8, 8), "size": 3, "stride": 2, "depthwise": True},
]


@pytest.mark.parametrize("options", CONV_NORMS, ids=str)
def test_conv_norm_is_torchs_conv_and_batch_norm_folded_or_not(options):
    channels, size, stride = options["channels"], options["size"], options.get("stride", 1)
    unfolded = ConvNorm(**options, rngs=nnx.Rngs(0))
    arrays = {
        "x.conv.kernel": normal(*unfolded.conv.kernel.shape),
        "x.bn.scale": 1 + 0.3 * normal(8, seed=1),
        "x.bn.bias": normal(8, seed=2),
        "x.bn.mean": normal(8, seed=3),
        "x.bn.var": 0.1 + np.abs(normal(8, seed=4)),
    }
    x = normal(2, 12, 9, channels[0], seed=5)
    y = F.conv2d(
        nchw(x),
        oihw(arrays["x.conv.kernel"]),
        stride=stride,
        padding=0 if size == stride else size // 2,
        groups=8 if options.get("depthwise") else 1,
    )
    mean, var, scale, bias = (
        torch.from_numpy(arrays[f"x.bn.{part}"]) for part in ("mean", "var", "scale", "bias")
    )
    want = nhwc(F.batch_norm(y, mean, var, scale, bias, eps=1e-5))

    fill(unfolded, arrays)
    assert_parity(run(unfolded, x), want)
    folded = ConvNorm(**options, folded=True, rngs=nnx.Rngs(0))
    fill(folded, weights.fold(arrays))
    assert_parity(run(folded, x), want)


def fill(module, arrays):
    """Sets every array of a module; all must be there, and no more."""
    state = nnx.to_flat_state(nnx.state(module))
    names = [".".join(("x", *path)) for path, _ in state]
    assert sorted(names) == sorted(arrays)
    for name, (_, leaf) in zip(names, state, strict=True):
        leaf[...] = arrays[name]
    nnx.update(module, nnx.from_flat_state(state))


def test_neck_is_sams(twins):
    x = normal(2, 5, 5, 32)
    want = twins.torch.image_encoder.neck(nchw(x))
    assert_parity(run(twins.flax.image_encoder.neck, x), nhwc(want))


def test_layer_norm_keeps_a_small_variance_beside_a_large_mean():
    """The fast variance, E[x^2] - E[x]^2, is off by whole units here."""
    x = 3000 + normal(4, 32)
    want = F.layer_norm(torch.from_numpy(x), (32,), eps=1e-6)
    got = layer_norm(32, 1e-6, rngs=nnx.Rngs(0))(x)
    np.testing.assert_allclose(got, want, atol=1e-3)  # neighbouring floats lie 2.4e-4 apart

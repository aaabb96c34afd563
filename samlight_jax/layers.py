"""Layers that several encoders and the decoder share; every map is channels-last."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels import depthwise_conv, depthwise_norm, patch_conv
from pallas_kernels.gelu import gelu
from samlight_jax.config import EMBEDDING


class Buffer(nnx.Variable):
    """An array that belongs to the model but is never trained."""


def layer_norm(width: int, epsilon: float, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over channels, its variance about the mean as in PyTorch."""
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


def weights_of(*modules: Any) -> list[Array]:
    """Kernel and bias of products, scale and bias of norms, one after the other."""
    found = []
    for module in modules:
        first = module.scale if isinstance(module, nnx.LayerNorm) else module.kernel
        assert first is not None and module.bias is not None
        found += [first[...], module.bias[...]]
    return found


class Mlp(nnx.Module):
    """Two products with an activation between them.

    Source: segment-anything, `modeling/common.py`, `MLPBlock`.
    """

    def __init__(self, width: int, hidden: int, *, activation=gelu, rngs: nnx.Rngs):
        self.lin1 = nnx.Linear(width, hidden, rngs=rngs)
        self.lin2 = nnx.Linear(hidden, width, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return self.lin2(self.activation(self.lin1(x)))


class PointwiseConv(nnx.Module):
    """A 1x1 convolution, as the matrix product that it is: on a CPU, XLA is slower otherwise."""

    def __init__(self, channels: tuple[int, int], *, use_bias: bool = True, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (1, 1, *channels)))
        self.bias = nnx.Param(jnp.zeros(channels[1])) if use_bias else None

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b d"]:
        y = x @ self.kernel[0, 0]
        return y if self.bias is None else y + self.bias[...]


class PatchConv(nnx.Module):
    """A convolution whose stride is its size, as the product over patches that it is.

    Of three channels, cuDNN takes several times as long.
    """

    def __init__(
        self, channels: tuple[int, int], size: int, *, use_bias: bool = True, rngs: nnx.Rngs
    ):
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (size, size, *channels)))
        self.bias = nnx.Param(jnp.zeros(channels[1])) if use_bias else None

    def __call__(
        self, x: Float[Array, "b y x c"], *, activate: bool = False
    ) -> Float[Array, "b h w d"]:
        """The convolution of `x`, cut to whole patches; with `activate` its GELU."""
        kernel = self.kernel[...]
        height, width = (side - side % len(kernel) for side in x.shape[1:3])
        x = x[:, :height, :width]
        if activate and self.bias is not None:
            return patch_conv.patch_conv_gelu(x, kernel, self.bias[...])
        y = patch_conv.product(x, kernel)
        y = y if self.bias is None else y + self.bias[...]
        return gelu(y) if activate else y


class DepthwiseConv(nnx.Module):
    """A 3x3 convolution of every channel by itself, zero-padded, with a bias unless told not to."""

    def __init__(self, width: int, *, stride: int = 1, use_bias: bool = True, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(in_axis=(0, 1), out_axis=-1, batch_axis=())
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, 1, width)))
        self.bias = nnx.Param(jnp.zeros(width)) if use_bias else None
        self.stride = stride

    def __call__(
        self, x: Float[Array, "b h w c"], *, residual: bool = False, activate: bool = False
    ) -> Float[Array, "b h2 w2 c"]:
        """The convolution of `x`; with `residual` and `x` itself; with `activate` its GELU."""
        bias = None if self.bias is None else self.bias[...]
        fused = activate and x.dtype == jnp.bfloat16
        kernel, options = self.kernel[:, :, 0], {"residual": residual, "gelu_tanh": fused}
        y = depthwise_conv(x, kernel, bias, stride=self.stride, **options)
        return gelu(y) if activate and not fused else y

    def and_norm(
        self, x: Float[Array, "b h w c"], norm: nnx.LayerNorm
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """The convolution of `x` and `x` itself, and the norm of both together."""
        kernel, *numbers = weights_of(self, norm)
        kernel = kernel[:, :, 0]
        if depthwise_norm.unsupported(x, kernel) is not None:
            y = self(x, residual=True)
            return y, norm(y)
        return depthwise_norm.depthwise_conv_norm(x, kernel, *numbers, epsilon=norm.epsilon)


class ConvNorm(nnx.Module):
    """A convolution and its batch norm, or (folded) one convolution with a bias.

    Source: MobileSAM, `tiny_vit_sam.py`, `Conv2d_BN`.
    """

    def __init__(
        self,
        channels: tuple[int, int],
        size: int,
        *,
        stride: int = 1,
        depthwise: bool = False,
        folded: bool = False,
        rngs: nnx.Rngs,
    ):
        if depthwise:
            self.conv = DepthwiseConv(channels[1], stride=stride, use_bias=folded, rngs=rngs)
        elif size == 1:
            self.conv = PointwiseConv(channels, use_bias=folded, rngs=rngs)
        elif size == stride:
            self.conv = PatchConv(channels, size, use_bias=folded, rngs=rngs)
        else:
            options = {"strides": stride, "padding": size // 2, "use_bias": folded}
            self.conv = nnx.Conv(*channels, (size, size), **options, rngs=rngs)
        if folded:
            self.bn = None
        else:  # torch's momentum 0.1 is 0.9 here; `train()` turns to batch statistics
            self.bn = nnx.BatchNorm(
                channels[1], use_running_average=True, momentum=0.9, epsilon=1e-5, rngs=rngs
            )

    def __call__(
        self, x: Float[Array, "b h w c"], *, activate: bool = False
    ) -> Float[Array, "b h2 w2 d"]:
        """The normed convolution; with `activate` its GELU."""
        if activate and self.bn is None and isinstance(self.conv, (DepthwiseConv, PatchConv)):
            return self.conv(x, activate=True)
        x = self.conv(x)
        x = x if self.bn is None else self.bn(x)
        return gelu(x) if activate else x


class Neck(nnx.Module):
    """From an encoder's width to the 256 channels of the image embedding.

    Source: segment-anything, `modeling/image_encoder.py`, `ImageEncoderViT.neck`.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        out = EMBEDDING
        self.conv1 = PointwiseConv((width, out), use_bias=False, rngs=rngs)
        self.norm1 = layer_norm(out, 1e-6, rngs=rngs)
        self.conv2 = nnx.Conv(out, out, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.norm2 = layer_norm(out, 1e-6, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w 256"]:
        return self.norm2(self.conv2(self.norm1(self.conv1(x))))

"""`TinyViT`: the image encoder of MobileSAM (TinyViT-5M, three stages of stride 2).

Source: MobileSAM, `modeling/tiny_vit_sam.py`; TinyViT, arXiv 2207.10666.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from samlight_jax.attention import WindowAttention
from samlight_jax.config import SamConfig, TinyViTConfig
from samlight_jax.layers import ConvNorm, Neck, gelu, layer_norm

STRIDES = (2, 2, 1)  # between the stages; 1 keeps SAM's 64x64 tokens


class PatchEmbed(nnx.Module):
    """Two 3x3 convolutions of stride 2."""

    def __init__(self, width: int, *, folded: bool, rngs: nnx.Rngs):
        self.conv1 = ConvNorm((3, width // 2), 3, stride=2, folded=folded, rngs=rngs)
        self.conv2 = ConvNorm((width // 2, width), 3, stride=2, folded=folded, rngs=rngs)

    def __call__(self, x: Float[Array, "b y x 3"]) -> Float[Array, "b h w c"]:
        return self.conv2(gelu(self.conv1(x)))


class MBConv(nnx.Module):
    """An inverted bottleneck: widen, convolve each channel, narrow, add."""

    def __init__(self, width: int, hidden: int, *, folded: bool, rngs: nnx.Rngs):
        self.conv1 = ConvNorm((width, hidden), 1, folded=folded, rngs=rngs)
        self.conv2 = ConvNorm((hidden, hidden), 3, depthwise=True, folded=folded, rngs=rngs)
        self.conv3 = ConvNorm((hidden, width), 1, folded=folded, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return gelu(x + self.conv3(self.conv2(gelu(self.conv1(x)), activate=True)))


class PatchMerging(nnx.Module):
    """To the next stage's width and, by its stride, its size."""

    def __init__(self, widths: tuple[int, int], stride: int, *, folded: bool, rngs: nnx.Rngs):
        before, after = widths
        self.conv1 = ConvNorm((before, after), 1, folded=folded, rngs=rngs)
        self.conv2 = ConvNorm(
            (after, after), 3, stride=stride, depthwise=True, folded=folded, rngs=rngs
        )
        self.conv3 = ConvNorm((after, after), 1, folded=folded, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        return self.conv3(self.conv2(gelu(self.conv1(x)), activate=True))


class MlpNorm(nnx.Module):
    """LayerNorm and MLP."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.norm = layer_norm(width, 1e-5, rngs=rngs)
        self.fc1 = nnx.Linear(width, hidden, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        return self.fc2(gelu(self.fc1(self.norm(x))))


class TinyViTBlock(nnx.Module):
    """Window attention, a local convolution, and an MLP."""

    def __init__(self, encoder: TinyViTConfig, stage: int, *, folded: bool, rngs: nnx.Rngs):
        width = encoder.widths[stage]
        self.attn = WindowAttention(width, encoder.heads[stage], encoder.windows[stage], rngs=rngs)
        self.local_conv = ConvNorm((width, width), 3, depthwise=True, folded=folded, rngs=rngs)
        self.mlp = MlpNorm(width, int(width * encoder.mlp_ratio), rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        height, width = x.shape[1:3]
        down, right = -height % self.attn.window, -width % self.attn.window
        # Zeros before the norm: padding then carries the norm's bias and is attended.
        y = self.attn(jnp.pad(x, ((0, 0), (0, down), (0, right), (0, 0))))
        x = self.local_conv(x + y[:, :height, :width])
        return x + self.mlp(x)


class Stage(nnx.Module):
    """The blocks of one stage and the way to the next; `TinyViT` runs them."""

    def __init__(self, encoder: TinyViTConfig, stage: int, *, folded: bool, rngs: nnx.Rngs):
        width, hidden = encoder.widths[stage], int(encoder.widths[stage] * encoder.expand_ratio)
        self.blocks = nnx.List(
            [
                TinyViTBlock(encoder, stage, folded=folded, rngs=rngs)
                if stage
                else MBConv(width, hidden, folded=folded, rngs=rngs)
                for _ in range(encoder.depths[stage])
            ]
        )
        if stage == len(STRIDES):
            self.downsample = None
        else:
            widths = (width, encoder.widths[stage + 1])
            self.downsample = PatchMerging(widths, STRIDES[stage], folded=folded, rngs=rngs)


class TinyViT(nnx.Module):
    """A stem, a convolutional stage, three stages of window attention, and SAM's neck."""

    def __init__(self, config: SamConfig, *, folded: bool = False, rngs: nnx.Rngs):
        encoder = config.encoder
        assert isinstance(encoder, TinyViTConfig)
        self.patch_embed = PatchEmbed(encoder.widths[0], folded=folded, rngs=rngs)
        self.layers = nnx.List([Stage(encoder, i, folded=folded, rngs=rngs) for i in range(4)])
        self.neck = Neck(encoder.widths[-1], rngs=rngs)

    def __call__(
        self, x: Float[Array, "b y x 3"]
    ) -> tuple[Float[Array, "b h w 256"], dict[str, Array]]:
        """Pixels to (embedding, features): the outputs of stem, blocks and mergings, by name."""
        features = {"patch_embed": (x := self.patch_embed(x))}
        for i, stage in enumerate(self.layers):
            for j, block in enumerate(stage.blocks):
                features[f"layers.{i}.blocks.{j}"] = x = block(x)
            if stage.downsample is not None:
                features[f"layers.{i}.downsample"] = x = stage.downsample(x)
        return self.neck(x), features

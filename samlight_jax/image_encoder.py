"""`ImageEncoderViT`: pixels -> image embedding; SAM's encoder and the dilated students.

Source: segment-anything, `modeling/image_encoder.py`; the convolutional stem and the local
convolution are ours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from samlight_jax.attention import Attention
from samlight_jax.config import PATCH, Pattern, SamConfig, ViTConfig
from samlight_jax.layers import ConvNorm, DepthwiseConv, Mlp, Neck, PatchConv, layer_norm


class PatchEmbed(nnx.Module):
    """One product over every patch of 16x16 pixels."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.proj = PatchConv((3, width), PATCH, rngs=rngs)

    def __call__(self, x: Float[Array, "b y x 3"]) -> Float[Array, "b h w c"]:
        return self.proj(x)


class ConvStem(nnx.Module):
    """A product over 4x4 pixels, then two 3x3 convolutions of stride 2."""

    def __init__(self, width: int, *, folded: bool, rngs: nnx.Rngs):
        self.conv1 = ConvNorm((3, 64), 4, stride=4, folded=folded, rngs=rngs)
        self.conv2 = ConvNorm((64, 128), 3, stride=2, folded=folded, rngs=rngs)
        self.proj = nnx.Conv(128, width, (3, 3), strides=2, padding=1, rngs=rngs)

    def __call__(self, x: Float[Array, "b y x 3"]) -> Float[Array, "b h w c"]:
        return self.proj(self.conv2(self.conv1(x, activate=True), activate=True))


class Block(nnx.Module):
    """Attention, the local convolution where there is one, and the MLP, each with a residual."""

    def __init__(self, config: SamConfig, pattern: Pattern, *, rngs: nnx.Rngs):
        encoder = config.encoder
        assert isinstance(encoder, ViTConfig)
        width = encoder.width
        self.norm1 = layer_norm(width, 1e-6, rngs=rngs)
        self.attn = Attention(config, pattern, rngs=rngs)
        self.local_conv = DepthwiseConv(width, rngs=rngs) if encoder.local_conv else None
        self.norm2 = layer_norm(width, 1e-6, rngs=rngs)
        self.mlp = Mlp(width, int(width * encoder.mlp_ratio), rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = x + self.attn(self.norm1(x))
        if self.local_conv is None:
            return x + self.mlp(self.norm2(x))
        x, normed = self.local_conv.and_norm(x, self.norm2)
        return x + self.mlp(normed)


class ImageEncoderViT(nnx.Module):
    """A vision transformer over 16x16 patches with absolute positions and SAM's neck."""

    def __init__(self, config: SamConfig, *, folded: bool = False, rngs: nnx.Rngs):
        encoder = config.encoder
        assert isinstance(encoder, ViTConfig)
        width = encoder.width
        if encoder.stem == "conv":
            self.patch_embed = ConvStem(width, folded=folded, rngs=rngs)
        else:
            self.patch_embed = PatchEmbed(width, rngs=rngs)
        self.pos_embed = nnx.Param(jnp.zeros((1, config.grid, config.grid, width)))
        patterns = encoder.attention
        self.blocks = nnx.List(
            [Block(config, patterns[i % len(patterns)], rngs=rngs) for i in range(encoder.depth)]
        )
        self.neck = Neck(width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b y x 3"]
    ) -> tuple[Float[Array, "b h w 256"], dict[str, Array]]:
        """Pixels to (embedding, features): the outputs of the stem and of every block, by name."""
        x = self.patch_embed(x) + self.pos_embed[...]
        features = {"patch_embed": x}
        for i, block in enumerate(self.blocks):
            # The name lets a training program keep these alone (`jax.checkpoint_policies`).
            features[f"blocks.{i}"] = x = checkpoint_name(block(x), "block")
        return self.neck(x), features


def resize_pos_embed(table: np.ndarray, grid: int) -> np.ndarray:
    """Resizes (1, h, w, c) absolute positions to another grid, bicubic as in ViTDet's loaders."""
    shape = (1, grid, grid, table.shape[-1])
    method = jax.image.ResizeMethod.CUBIC_PYTORCH
    return np.asarray(jax.image.resize(table, shape, method, antialias=False))

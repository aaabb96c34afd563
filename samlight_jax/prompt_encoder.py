"""`PromptEncoder`: points, boxes and masks -> sparse and dense embeddings.

Source: segment-anything, `modeling/prompt_encoder.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from samlight_jax.config import EMBEDDING, SamConfig
from samlight_jax.layers import Buffer, gelu, layer_norm
from samlight_jax.prompts import Prompts


class PositionEmbeddingRandom(nnx.Module):
    """Fourier features of positions at random frequencies, drawn once and kept."""

    def __init__(self, *, rngs: nnx.Rngs):
        frequencies = jax.random.normal(rngs.params(), (2, EMBEDDING // 2))
        self.positional_encoding_gaussian_matrix = Buffer(frequencies)

    def __call__(self, places: Float[Array, "*b 2"]) -> Float[Array, "*b 256"]:
        """(x, y) in units of the frame, 0 to 1."""
        frequencies = self.positional_encoding_gaussian_matrix[...].astype(jnp.float32)
        # HIGHEST: tf32 would move a point by a pixel.
        phases = jnp.dot(2 * places - 1, frequencies, precision=jax.lax.Precision.HIGHEST)
        phases = 2 * np.pi * phases
        return jnp.concatenate([jnp.sin(phases), jnp.cos(phases)], axis=-1)


class MaskDownscaling(nnx.Module):
    """A mask of low-resolution logits to one 256-vector a token."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 4, (2, 2), strides=2, padding="VALID", rngs=rngs)
        self.norm1 = layer_norm(4, 1e-6, rngs=rngs)
        self.conv2 = nnx.Conv(4, 16, (2, 2), strides=2, padding="VALID", rngs=rngs)
        self.norm2 = layer_norm(16, 1e-6, rngs=rngs)
        self.conv3 = nnx.Conv(16, EMBEDDING, (1, 1), rngs=rngs)

    def __call__(self, x: Float[Array, "q y x 1"]) -> Float[Array, "q h w 256"]:
        x = gelu(self.norm1(self.conv1(x)))
        return self.conv3(gelu(self.norm2(self.conv2(x))))


class PromptEncoder(nnx.Module):
    """Embeds prompts that are already in the model's frame."""

    def __init__(self, config: SamConfig, *, rngs: nnx.Rngs):
        self.grid, self.image_size = config.grid, config.image_size
        self.pe_layer = PositionEmbeddingRandom(rngs=rngs)
        self.point_embeddings = nnx.List([nnx.Embed(1, EMBEDDING, rngs=rngs) for _ in range(4)])
        self.not_a_point_embed = nnx.Embed(1, EMBEDDING, rngs=rngs)
        self.no_mask_embed = nnx.Embed(1, EMBEDDING, rngs=rngs)
        self.mask_downscaling = MaskDownscaling(rngs=rngs)

    def __call__(
        self, prompts: Prompts
    ) -> tuple[Float[Array, "q n 256"], Float[Array, "#q h w 256"]]:
        """Prompts of shape (q, n) to sparse and dense embeddings, one for each of q.

        Without masks all have the same dense embedding, and there is one.
        """
        points = self.pe_layer((prompts.coords + 0.5) / self.image_size)  # to the pixel's centre
        kinds = jnp.concatenate([e.embedding[...] for e in self.point_embeddings])
        points = points.astype(kinds.dtype) + kinds[jnp.maximum(prompts.labels, 0)]
        nothing = self.not_a_point_embed.embedding[...][0]  # replaces the position, as in SAM
        sparse = jnp.where((prompts.labels == -1)[..., None], nothing, points)

        no_mask = self.no_mask_embed.embedding[...][0]
        if prompts.masks is None:
            return sparse, jnp.broadcast_to(no_mask, (1, self.grid, self.grid, EMBEDDING))
        masks = self.mask_downscaling(prompts.masks[..., None].astype(kinds.dtype))
        dense = jnp.where(prompts.has_mask[:, None, None, None], masks, no_mask)
        return sparse, dense

    def dense_pe(self) -> Float[Array, "h w 256"]:
        """The position embedding of every token of the image embedding."""
        centres = (jnp.arange(self.grid) + 0.5) / self.grid
        x, y = jnp.meshgrid(centres, centres)
        return self.pe_layer(jnp.stack([x, y], axis=-1))

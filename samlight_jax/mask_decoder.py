"""`MaskDecoder`: image embedding and prompt embeddings -> four low-resolution masks, their IoU.

Source: segment-anything, `modeling/mask_decoder.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from pallas_kernels.upscaling import Upscaling, upscaled_masks
from samlight_jax.config import EMBEDDING, SamConfig
from samlight_jax.layers import layer_norm, weights_of
from samlight_jax.transformer import TwoWayTransformer

MASKS = 4  # the single mask, then the three of the multimask output


class ConvTranspose(nnx.Module):
    """The weights of a transposed 2x2 convolution of stride 2."""

    def __init__(self, before: int, after: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(in_axis=0, out_axis=(1, 2, 3))
        self.kernel = nnx.Param(init(rngs.params(), (before, 2, 2, after)))
        self.bias = nnx.Param(jnp.zeros(after))


class OutputUpscaling(nnx.Module):
    """Image tokens to masks of four times their resolution."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = ConvTranspose(EMBEDDING, EMBEDDING // 4, rngs=rngs)
        self.norm1 = layer_norm(EMBEDDING // 4, 1e-6, rngs=rngs)
        self.conv2 = ConvTranspose(EMBEDDING // 4, EMBEDDING // 8, rngs=rngs)

    def __call__(
        self, image: Float[Array, "b m 256"], masks: Float[Array, "b k 32"], size: tuple[int, int]
    ) -> Float[Array, "b k y x"]:
        """Logits: the image's upscaled channels times those of each mask."""
        weights = Upscaling(*weights_of(self.conv1, self.norm1, self.conv2))
        return upscaled_masks(image, masks, weights, size=size, epsilon=self.norm1.epsilon)


class Head(nnx.Module):
    """Three products with ReLU between them."""

    def __init__(self, out: int, *, rngs: nnx.Rngs):
        widths = (EMBEDDING, EMBEDDING, EMBEDDING, out)
        self.layers = nnx.List([nnx.Linear(widths[i], widths[i + 1], rngs=rngs) for i in range(3)])

    def __call__(self, x: Float[Array, "*b 256"]) -> Float[Array, "*b d"]:
        first, second, last = self.layers
        return last(jax.nn.relu(second(jax.nn.relu(first(x)))))


class MaskDecoder(nnx.Module):
    """Decodes all four masks; the caller picks the single one or the three."""

    def __init__(self, config: SamConfig, *, rngs: nnx.Rngs):
        self.transformer = TwoWayTransformer(mlp=config.decoder_mlp, rngs=rngs)
        self.iou_token = nnx.Embed(1, EMBEDDING, rngs=rngs)
        self.mask_tokens = nnx.Embed(MASKS, EMBEDDING, rngs=rngs)
        self.output_upscaling = OutputUpscaling(rngs=rngs)
        self.output_hypernetworks_mlps = nnx.List(
            [Head(EMBEDDING // 8, rngs=rngs) for _ in range(MASKS)]
        )
        self.iou_prediction_head = Head(MASKS, rngs=rngs)

    def __call__(
        self,
        embedding: Float[Array, "h w 256"],
        image_pe: Float[Array, "h w 256"],
        sparse: Float[Array, "q n 256"],
        dense: Float[Array, "#q h w 256"],
        valid: Bool[Array, "q n"],
    ) -> tuple[Float[Array, "q 4 y x"], Float[Array, "q 4"]]:
        """One image's embedding and q prompts to (low-resolution logits, predicted IoU).

        `dense` is one for all prompts where none has a mask.
        """
        q, (_, h, w, c) = sparse.shape[0], dense.shape
        own = jnp.concatenate([self.iou_token.embedding[...], self.mask_tokens.embedding[...]])
        tokens = jnp.concatenate([jnp.broadcast_to(own, (q, *own.shape)), sparse], axis=1)
        valid = jnp.concatenate([jnp.ones((q, len(own)), bool), valid], axis=1)

        image = (embedding + dense).reshape(-1, h * w, c)
        pe = image_pe.astype(image.dtype).reshape(h * w, c)
        tokens, image = self.transformer(image, pe, tokens, valid)

        weights = jnp.stack(
            [mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], axis=1
        )
        logits = self.output_upscaling(image, weights, (h, w))
        return logits, self.iou_prediction_head(tokens[:, 0])

"""`Sam`: the stateless core. `encode` pixels once, `decode` any number of prompts.

Source: segment-anything, `modeling/sam.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from samlight_jax.config import SamConfig, ViTConfig
from samlight_jax.image_encoder import ImageEncoderViT
from samlight_jax.mask_decoder import MaskDecoder
from samlight_jax.prompt_encoder import PromptEncoder
from samlight_jax.prompts import Prompts
from samlight_jax.tiny_vit import TinyViT


class Sam(nnx.Module):
    """Image encoder, prompt encoder and mask decoder.

    Args:
      config: what to build.
      folded: batch norms folded into their convolutions, for inference; a model in training
        keeps them apart.
      rngs: for the random initial parameters.
    """

    def __init__(self, config: SamConfig, *, folded: bool = False, rngs: nnx.Rngs):
        encoder = ImageEncoderViT if isinstance(config.encoder, ViTConfig) else TinyViT
        self.config = config
        self.image_encoder = encoder(config, folded=folded, rngs=rngs)
        self.prompt_encoder = PromptEncoder(config, rngs=rngs)
        self.mask_decoder = MaskDecoder(config, rngs=rngs)

    @property
    def dtype(self) -> Any:
        """Of the parameters, in which products are made."""
        return self.prompt_encoder.no_mask_embed.embedding[...].dtype

    def encode(
        self, pixels: Float[Array, "b y x 3"]
    ) -> tuple[Float[Array, "b h w 256"], dict[str, Array]]:
        """Normalised, padded pixels to (image embedding, encoder features by name)."""
        return self.image_encoder(pixels.astype(self.image_encoder.neck.conv1.kernel.dtype))

    def decode(
        self, embedding: Float[Array, "h w 256"], prompts: Prompts
    ) -> tuple[Float[Array, "q 4 y x"], Float[Array, "q 4"]]:
        """One image's embedding and q prompts to the logits and predicted IoU of four masks.

        Mask 0 is SAM's single mask, 1 to 3 its multimask output; logits have a quarter of the
        frame's resolution. The predicted IoU is as the model gives it, not clipped.
        """
        prompts = jax.tree.map(jnp.asarray, prompts)
        sparse, dense = self.prompt_encoder(prompts)
        pe = self.prompt_encoder.dense_pe()
        return self.mask_decoder(embedding.astype(self.dtype), pe, sparse, dense, prompts.valid)

"""`TwoWayTransformer`: tokens and image attend each other.

Source: segment-anything, `modeling/transformer.py`. `valid` is ours: bucket padding is a token that
nothing attends, so it never changes a result. So is an image of batch 1 for several prompts: until
the first block has changed it, it serves them all.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from pallas_kernels.two_way import ToImage, ToTokens, image_to_tokens, tokens_to_image
from samlight_jax.config import EMBEDDING
from samlight_jax.layers import Mlp, layer_norm, weights_of


class Attention(nnx.Module):
    """Attention with projections to an inner width and back: of tokens, or with the image."""

    def __init__(self, width: int, heads: int, *, downsample: int = 1, rngs: nnx.Rngs):
        inner = width // downsample
        self.heads = heads
        self.q_proj = nnx.Linear(width, inner, rngs=rngs)
        self.k_proj = nnx.Linear(width, inner, rngs=rngs)
        self.v_proj = nnx.Linear(width, inner, rngs=rngs)
        self.out_proj = nnx.Linear(inner, width, rngs=rngs)

    def __call__(
        self,
        q: Float[Array, "b n c"],
        k: Float[Array, "b n c"],
        v: Float[Array, "b n c"],
        valid: Bool[Array, "b n"],
    ) -> Float[Array, "b n c"]:
        """Of tokens to those of the same prompt that are valid."""
        projections = (self.q_proj, q), (self.k_proj, k), (self.v_proj, v)
        q, k, v = (proj(x).reshape(*x.shape[:2], self.heads, -1) for proj, x in projections)
        scores = jnp.einsum("bnhe,bmhe->bhnm", q * q.shape[-1] ** -0.5, k).astype(jnp.float32)
        scores = jnp.where(valid[:, None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("bhnm,bmhe->bnhe", weights, v)
        return self.out_proj(out.reshape(*out.shape[:2], -1))

    def to_image(
        self,
        tokens: Float[Array, "b n c"],
        image: Float[Array, "#b m c"],
        image_pe: Float[Array, "m c"],
    ) -> Float[Array, "b n c"]:
        """Of tokens to the image."""
        q = self.q_proj(tokens)
        weights = ToImage(self.k_proj.kernel[...], *weights_of(self.v_proj))
        of_image = q.reshape(image.shape[0], -1, *q.shape[1:])
        out = tokens_to_image(image, image_pe, of_image, weights, heads=self.heads)
        return self.out_proj(out.reshape(q.shape))

    def from_image(
        self,
        image: Float[Array, "#b m c"],
        image_pe: Float[Array, "m c"],
        tokens: Float[Array, "b n c"],
        token_pe: Float[Array, "b n c"],
        valid: Bool[Array, "b n"],
        norm: nnx.LayerNorm,
    ) -> Float[Array, "b m c"]:
        """Of the image to tokens, with its residual and the norm after it."""
        keys, values = self.k_proj(tokens + token_pe), self.v_proj(tokens)
        keys, values, valid = (
            x.reshape(image.shape[0], -1, *x.shape[1:]) for x in (keys, values, valid)
        )
        weights = ToTokens(*weights_of(self.q_proj, self.out_proj, norm))
        options = {"heads": self.heads, "epsilon": norm.epsilon}
        out = image_to_tokens(image, image_pe, keys, values, valid, weights, **options)
        return out.reshape(-1, *out.shape[2:])


class TwoWayAttentionBlock(nnx.Module):
    """Tokens attend themselves, then the image; an MLP; then the image attends the tokens."""

    def __init__(self, heads: int, mlp: int, *, skip_first_layer_pe: bool, rngs: nnx.Rngs):
        width = EMBEDDING
        self.self_attn = Attention(width, heads, rngs=rngs)
        self.norm1 = layer_norm(width, 1e-5, rngs=rngs)
        self.cross_attn_token_to_image = Attention(width, heads, downsample=2, rngs=rngs)
        self.norm2 = layer_norm(width, 1e-5, rngs=rngs)
        self.mlp = Mlp(width, mlp, activation=jax.nn.relu, rngs=rngs)
        self.norm3 = layer_norm(width, 1e-5, rngs=rngs)
        self.norm4 = layer_norm(width, 1e-5, rngs=rngs)
        self.cross_attn_image_to_token = Attention(width, heads, downsample=2, rngs=rngs)
        self.skip_first_layer_pe = skip_first_layer_pe

    def __call__(
        self,
        tokens: Float[Array, "b n c"],
        image: Float[Array, "#b m c"],
        token_pe: Float[Array, "b n c"],
        image_pe: Float[Array, "m c"],
        valid: Bool[Array, "b n"],
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b m c"]]:
        if self.skip_first_layer_pe:
            tokens = self.self_attn(tokens, tokens, tokens, valid)
        else:
            q = tokens + token_pe
            tokens = tokens + self.self_attn(q, q, tokens, valid)
        tokens = self.norm1(tokens)

        seen = self.cross_attn_token_to_image.to_image(tokens + token_pe, image, image_pe)
        tokens = self.norm2(tokens + seen)
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.cross_attn_image_to_token.from_image(
            image, image_pe, tokens, token_pe, valid, self.norm4
        )
        return tokens, image


class TwoWayTransformer(nnx.Module):
    """Two blocks and a last look of the tokens at the image."""

    def __init__(self, *, depth: int = 2, heads: int = 8, mlp: int = 2048, rngs: nnx.Rngs):
        self.layers = nnx.List(
            [
                TwoWayAttentionBlock(heads, mlp, skip_first_layer_pe=i == 0, rngs=rngs)
                for i in range(depth)
            ]
        )
        self.final_attn_token_to_image = Attention(EMBEDDING, heads, downsample=2, rngs=rngs)
        self.norm_final_attn = layer_norm(EMBEDDING, 1e-5, rngs=rngs)

    def __call__(
        self,
        image: Float[Array, "#b m c"],
        image_pe: Float[Array, "m c"],
        point_embedding: Float[Array, "b n c"],
        valid: Bool[Array, "b n"],
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b m c"]]:
        """(tokens, image) after attending each other.

        `valid` marks the tokens that count; an image of batch 1 is that of all prompts.
        """
        tokens = point_embedding
        for layer in self.layers:
            tokens, image = layer(tokens, image, point_embedding, image_pe, valid)
        attended = self.final_attn_token_to_image.to_image(
            tokens + point_embedding, image, image_pe
        )
        return self.norm_final_attn(tokens + attended), image

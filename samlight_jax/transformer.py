"""`TwoWayTransformer`: tokens and image attend each other.

Source: segment-anything, `modeling/transformer.py`. `valid` is ours: bucket padding is a token that
nothing attends, so it never changes a result. So is an image of batch 1 for several prompts: until
the first block has changed it, its projections serve them all.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from samlight_jax.config import EMBEDDING
from samlight_jax.layers import Mlp, layer_norm


class Attention(nnx.Module):
    """Attention with projections to an inner width and back."""

    def __init__(self, width: int, heads: int, *, downsample: int = 1, rngs: nnx.Rngs):
        inner = width // downsample
        self.heads = heads
        self.q_proj = nnx.Linear(width, inner, rngs=rngs)
        self.k_proj = nnx.Linear(width, inner, rngs=rngs)
        self.v_proj = nnx.Linear(width, inner, rngs=rngs)
        self.out_proj = nnx.Linear(inner, width, rngs=rngs)

    def __call__(
        self,
        q: Float[Array, "#b n c"],
        k: Float[Array, "#b m c"],
        v: Float[Array, "#b m c"],
        valid: Bool[Array, "#b m"] | None = None,
        q_pe: Float[Array, "n c"] | None = None,
        k_pe: Float[Array, "m c"] | None = None,
    ) -> Float[Array, "b n c"]:
        q, k, v = (
            _projected(proj, x, pe).reshape(*x.shape[:2], self.heads, -1)
            for proj, x, pe in (
                (self.q_proj, q, q_pe),
                (self.k_proj, k, k_pe),
                (self.v_proj, v, None),
            )
        )
        scores = jnp.einsum("bnhd,bmhd->bhnm", q * q.shape[-1] ** -0.5, k)
        scores = scores.astype(jnp.float32)
        if valid is not None:
            scores = jnp.where(valid[:, None, None, :], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("bhnm,bmhd->bnhd", weights, v)
        return self.out_proj(out.reshape(*out.shape[:2], -1))


def _projected(proj: nnx.Linear, x: jax.Array, pe: jax.Array | None) -> jax.Array:
    """Of x and the positions that belong to it."""
    if pe is None:
        return proj(x)
    if len(x) == 1:
        return proj(x + pe)
    return proj(x) + pe @ proj.kernel[...]  # a sum for every prompt would be a map for each


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

        seen = self.cross_attn_token_to_image(tokens + token_pe, image, image, k_pe=image_pe)
        tokens = tokens + seen
        tokens = self.norm2(tokens)
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = image + self.cross_attn_image_to_token(
            image, tokens + token_pe, tokens, valid, q_pe=image_pe
        )
        return tokens, self.norm4(image)


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
        attended = self.final_attn_token_to_image(
            tokens + point_embedding, image, image, k_pe=image_pe
        )
        return self.norm_final_attn(tokens + attended), image

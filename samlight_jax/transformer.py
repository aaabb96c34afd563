"""`TwoWayTransformer`: tokens and image attend each other.

Source: segment-anything, `modeling/transformer.py`. `valid` is ours: bucket padding is a token that
nothing attends, so it never changes a result. So is an image of batch 1 for several prompts: until
the first block has changed it, its projections serve them all.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
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
        few_keys: bool = False,
    ) -> Float[Array, "b n c"]:
        q, k = _projected(self.q_proj, q, q_pe), _projected(self.k_proj, k, k_pe)
        q, v = q * (q.shape[-1] // self.heads) ** -0.5, self.v_proj(v)
        # Heads are told apart on the side of few tokens: the image, as it is, meets them all in
        # one product, and is never put in another order.
        if few_keys:
            k, v = _spread(k, self.heads), _spread(v, self.heads)
        else:
            q = _spread(q, self.heads)
        scores = jnp.einsum("bnc,bmc->bnm", q, k).astype(jnp.float32)
        shape = scores.shape
        if few_keys:  # each head's keys among those of all
            scores = scores.reshape(*shape[:2], shape[2] // self.heads, self.heads)
        else:
            scores = scores[..., None]
        if valid is not None:
            scores = jnp.where(valid[:, None, :, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=2).astype(v.dtype).reshape(shape)
        out = jnp.einsum("bnm,bmc->bnc", weights, v)
        return self.out_proj(out if few_keys else _gathered(out, self.heads))


def _heads(channels: int, heads: int) -> np.ndarray:
    """(heads, channels) of 0 and 1: which channels are a head's."""
    return np.repeat(np.eye(heads, dtype=np.float32), channels // heads, axis=1)


def _spread(x: jax.Array, heads: int) -> jax.Array:
    """(b, n, c) to (b, n heads, c): the channels of each head by themselves, zeros around them."""
    b, n, c = x.shape
    return (x[:, :, None] * _heads(c, heads).astype(x.dtype)).reshape(b, n * heads, c)


def _gathered(x: jax.Array, heads: int) -> jax.Array:
    """The way back: of each head its channels."""
    b, n, c = x.shape
    own = _heads(c, heads).astype(x.dtype)
    return (x.reshape(b, n // heads, heads, c) * own).sum(axis=2)


def _projected(proj: nnx.Linear, x: jax.Array, pe: jax.Array | None) -> jax.Array:
    """Of x and the positions that belong to it."""
    if pe is None:
        return proj(x)
    if x.shape[0] == 1:
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
            image, tokens + token_pe, tokens, valid, q_pe=image_pe, few_keys=True
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

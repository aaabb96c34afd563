"""Self-attention over a map of tokens, by the kernels of `pallas_kernels`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels import chain, dilated_attention_qkvpacked, window_attention
from pallas_kernels.dilated_attention.groups import fit
from samlight_jax.config import Pattern, SamConfig, ViTConfig, attention_scale
from samlight_jax.layers import layer_norm

TRAINED_GRID = 64  # tokens on a side at 1024 pixels, where every checkpoint was trained


class Attention(nnx.Module):
    """Attention of one block, by its pattern, with SAM's relative positions where asked for.

    Source: segment-anything, `modeling/image_encoder.py`, `Attention`; DESIGN of the patterns:
    `pallas_kernels.dilated_attention`.
    """

    def __init__(self, config: SamConfig, pattern: Pattern, *, rngs: nnx.Rngs):
        encoder = config.encoder
        assert isinstance(encoder, ViTConfig)
        self.config, self.pattern, self.heads = config, pattern, encoder.heads
        self.qkv = nnx.Linear(encoder.width, 3 * encoder.width, rngs=rngs)
        self.proj = nnx.Linear(encoder.width, encoder.width, rngs=rngs)
        if not encoder.rel_pos:
            self.rel_pos_h = self.rel_pos_w = None
        else:
            head_dim = encoder.width // encoder.heads
            rows, columns = group_shape(pattern, config.grid)
            self.rel_pos_h = nnx.Param(jnp.zeros((2 * rows - 1, head_dim)))
            self.rel_pos_w = nnx.Param(jnp.zeros((2 * columns - 1, head_dim)))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, height, width, c = x.shape
        pattern = self.pattern
        if pattern.attend_padding:  # before the projection: SAM's padding carries its bias
            assert isinstance(pattern.segment, tuple)
            bottom, right = (-s % p for s, p in zip(x.shape[1:3], pattern.segment, strict=True))
            x = jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)))
        qkv = self.qkv(x).reshape(*x.shape[:3], 3, self.heads, c // self.heads)
        keys, trained = (
            np.prod(group_shape(pattern, grid)) for grid in (self.config.grid, TRAINED_GRID)
        )
        scale = attention_scale(self.config, c // self.heads, int(keys), int(trained))
        if isinstance(pattern.segment, int):
            qkv = qkv.reshape(b, -1, *qkv.shape[3:])
        segment = pattern.segment or (height, width)
        y = dilated_attention_qkvpacked(
            qkv, segment=segment, dilation=pattern.dilation, scale=scale, **self._rel_pos(qkv)
        )
        return self.proj(y.reshape(*x.shape[:3], c)[:, :height, :width])

    def _rel_pos(self, qkv: Array) -> dict[str, Any]:
        """The decomposed relative positions of every query, from the unscaled q."""
        if self.rel_pos_h is None or self.rel_pos_w is None:
            return {}
        q = qkv[..., 0, :, :]
        (height, width), dilation = q.shape[1:3], self.pattern.dilation
        rows, columns = self.pattern.segment or (height, width)  # type: ignore[misc]
        by_row = _relative(self.rel_pos_h[...], height, rows, dilation)
        by_column = _relative(self.rel_pos_w[...], width, columns, dilation)
        return {
            "rel_h": jnp.einsum("bhwnd,hkd->bhwnk", q, by_row),
            "rel_w": jnp.einsum("bhwnd,wkd->bhwnk", q, by_column),
        }


def group_shape(pattern: Pattern, grid: int) -> tuple[int, int]:
    """(rows, columns) of keys that one query sees on a square grid of tokens."""
    r = pattern.dilation
    if isinstance(pattern.segment, int):
        return 1, _clamped(pattern.segment, grid * grid, r) // r
    rows, columns = pattern.segment or (grid, grid)
    if not pattern.attend_padding:
        rows, columns = _clamped(rows, grid, r), _clamped(columns, grid, r)
    return rows // r, columns // r


def backends(config: SamConfig, pattern: Pattern, dtype: Any) -> dict[str, str | None]:
    """Why each back end would not run a pattern's attention of one image; None where it would.

    They come in the order in which they are asked: the first None is what runs.
    """
    encoder, side = config.encoder, config.grid
    assert isinstance(encoder, ViTConfig)
    raster = isinstance(pattern.segment, int)
    size, segment = (1, side * side) if raster else (side, side), pattern.segment
    segment = (1, segment) if isinstance(segment, int) else segment or size
    if pattern.attend_padding:
        size = -(-side // segment[0]) * segment[0], -(-side // segment[1]) * segment[1]
    grid = fit(size, segment, (1 if raster else pattern.dilation, pattern.dilation))
    heads, head_dim = encoder.heads, encoder.width // encoder.heads
    qkv = jax.ShapeDtypeStruct((1, *size, 3, heads, head_dim), dtype)
    keys = grid.group if encoder.rel_pos else ()
    rel = tuple(jax.ShapeDtypeStruct((1, *size, heads, m), dtype) for m in keys)
    trained = int(np.prod(group_shape(pattern, TRAINED_GRID)))
    scale = attention_scale(config, head_dim, int(np.prod(grid.group)), trained)
    return chain.explain((qkv,), rel, grid=grid, offsets="all", scale=scale)


def _clamped(segment: int, axis: int, dilation: int) -> int:
    return min(segment, -(-axis // dilation) * dilation)


def _relative(table: Array, size: int, segment: int, dilation: int) -> Array:
    """(size, keys, d): row [query position, key of its group] of a (2 keys - 1, d) table."""
    keys = (table.shape[0] + 1) // 2
    place = np.arange(size) % segment // dilation
    return table[place[:, None] - np.arange(keys)[None] + keys - 1]


def resize_rel_pos(table: np.ndarray, keys: int) -> np.ndarray:
    """Resizes a (2 n - 1, d) table to (2 keys - 1, d), linearly as SAM does.

    Source: segment-anything, `modeling/image_encoder.py`, `get_rel_pos`.
    """
    shape = (2 * keys - 1, table.shape[1])
    return np.asarray(jax.image.resize(table, shape, "linear", antialias=False))


class WindowAttention(nnx.Module):
    """TinyViT's: within windows that divide the map, a learned bias for every pair of |offsets|.

    Source: MobileSAM, `modeling/tiny_vit_sam.py`, `Attention`.
    """

    def __init__(self, width: int, heads: int, window: int, *, rngs: nnx.Rngs):
        self.heads, self.window = heads, window
        self.norm = layer_norm(width, 1e-5, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.proj = nnx.Linear(width, width, rngs=rngs)
        self.attention_biases = nnx.Param(jnp.zeros((heads, window * window)))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        qkv = self.qkv(self.norm(x))
        # Each head's q, k and v lie side by side, unlike SAM's packing.
        qkv = qkv.reshape(*x.shape[:3], self.heads, 3, x.shape[3] // self.heads)
        bias = self.attention_biases[...][:, _offsets(self.window)].astype(qkv.dtype)
        return self.proj(window_attention(qkv, bias, window=self.window).reshape(x.shape))


def _offsets(window: int) -> np.ndarray:
    """(n, n): the index of |row offset|, |column offset| for every pair of a window's tokens."""
    rows, columns = np.divmod(np.arange(window * window), window)
    return abs(rows[:, None] - rows) * window + abs(columns[:, None] - columns)

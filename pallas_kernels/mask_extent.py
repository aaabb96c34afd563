"""How large masks are and where they lie, at a photograph's resolution, without making them.

A Triton kernel (through Pallas, sm80 and later) resizes the logits row after row in registers and
keeps counts and borders alone.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import device
from pallas_kernels.dilated_attention import triton
from pallas_kernels.dilated_attention.triton_kernels import div_rem, plt

COLUMNS = 512  # of a program
SEEN = 3  # low-resolution pixels that one of the photograph is made of, at most
FAR = 1 << 30


class Resize(NamedTuple):
    """One axis of a linear resizing from n pixels to `length`, padded.

    Attributes:
      begins: (n + 1,) int32, for each of the n the first pixel that it is the first to be seen by.
      first: (padded,) int32, of each pixel the first of the n that it sees.
      weights: (3, padded) float32, of what it sees: that one and the two after it.
      length: () int32.
    """

    begins: Any
    first: Any
    weights: Any
    length: Any

    @classmethod
    def of(cls, matrix: np.ndarray, padded: int) -> Resize | None:
        """Of a (length, n) matrix, no row of which starts before the one above.

        None where one sees more than three pixels, or the padded length is no multiple of 512.
        """
        (length, n), real = matrix.shape, matrix != 0
        first = np.minimum(real.argmax(1), max(n - SEEN, 0))
        columns = np.minimum(first[:, None] + np.arange(SEEN), n - 1)
        weights = np.take_along_axis(matrix, columns, 1)
        repeated = np.arange(SEEN) >= n
        weights[:, repeated] = 0
        if (weights != 0).sum() < real.sum() or padded % COLUMNS or (np.diff(first) < 0).any():
            return None
        more = padded - length
        return cls(
            np.searchsorted(first, np.arange(n + 1)).astype(np.int32),
            np.pad(first, (0, more)).astype(np.int32),
            np.pad(weights.T, ((0, 0), (0, more))).astype(np.float32),
            np.int32(length),
        )


def unsupported(dtype: Any) -> str | None:
    """One sentence that says why the kernel of logits of a dtype would not do, or None."""
    return triton.missing(dtype)


def mask_extent(
    low: jax.Array, wanted: jax.Array, rows: Resize, columns: Resize, levels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Counts of pixels and the outermost ones of masks, resized.

    Args:
      low: (k, n, n) logits.
      wanted: (k,) bool; of the others nothing is computed.
      rows: how they are resized.
      columns: the same.
      levels: (3,) float32.

    Returns:
      (k, 3) int32, pixels above each level; (k, 4) int32, x1, y1, x2, y2 of the outermost ones
      above the middle level, those included; zeros where there are none or the mask is not wanted.

    Raises:
      ValueError: no such device; see `unsupported`.
    """
    if (reason := unsupported(low.dtype)) is not None:
        raise ValueError(f"mask_extent {reason}")
    k, n, _ = low.shape
    blocks, here = columns.first.shape[0] // COLUMNS, device.current()
    sizes = jnp.stack([jnp.asarray(x, jnp.int32) for x in (rows.length, columns.length)])
    shared = rows.begins, rows.weights, columns.first, columns.weights, sizes, levels
    whole = [pl.BlockSpec(x.shape) for x in (wanted, *shared)]
    found = pl.pallas_call(
        functools.partial(_body, n=n, blocks=blocks, interpret=here.interpret),
        grid=(k * blocks,),
        in_specs=[pl.BlockSpec((None, n * n), lambda i: (div_rem(i, blocks)[0], 0)), *whole],
        out_specs=pl.BlockSpec((None, None, 8), lambda i: (*div_rem(i, blocks), 0)),
        out_shape=jax.ShapeDtypeStruct((k, blocks, 8), jnp.int32),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        name="mask_extent",
        interpret=here.interpret,
    )(low.reshape(k, n * n), wanted.astype(jnp.int32), *shared)
    counts, ends = found[..., :3].sum(1), found[..., 3:7].min(1)
    signs = jnp.array([[1, 1, -1, -1]], jnp.int32)
    box = jnp.where(ends[:, :1] == FAR, 0, ends * signs)
    return counts, box


def _body(
    low: Any, wanted: Any, begins: Any, row_weights: Any, first: Any, weights: Any, sizes: Any,
    levels: Any, out: Any, *, n: int, blocks: int, interpret: bool,
) -> None:  # fmt: skip
    """Some columns of one mask; refs of (n n,), then of what `mask_extent` is given, then (8,)."""
    mask, block = div_rem(pl.program_id(0), blocks)
    lane = lax.broadcasted_iota(jnp.int32, (COLUMNS,), 0)
    x = block * COLUMNS + lane
    width = plt.load(sizes.at[jnp.int32(1)])
    seen_from, across = plt.load(first.at[x]), [_row(weights, t, x) for t in range(SEEN)]
    level = [plt.load(levels.at[jnp.int32(i)]) for i in range(3)]
    asked = (plt.load(wanted.at[mask]) > 0) & (block * COLUMNS < width)
    steps = asked.astype(jnp.int32) * n

    def resized(row: Any) -> jax.Array:
        """A low-resolution row, across."""
        at = jnp.minimum(row, n - 1) * n
        seen = (plt.load(low.at[at + jnp.minimum(seen_from + t, n - 1)]) for t in range(SEEN))
        terms = [w * each.astype(jnp.float32) for w, each in zip(across, seen, strict=True)]
        return terms[0] + terms[1] + terms[2]

    def by_row(row: Any, state: Any) -> Any:
        upper, middle, *found = state
        lower = resized(row + 2)

        def pixel(y: Any, found: Any) -> Any:
            *counts, top, bottom = found
            share = [plt.load(row_weights.at[jnp.int32(t), y]) for t in range(SEEN)]
            value = share[0] * upper + share[1] * middle + share[2] * lower
            above = [value > each for each in level]
            counts = [c + a.astype(jnp.int32) for c, a in zip(counts, above, strict=True)]
            top = jnp.minimum(top, jnp.where(above[1], y, FAR))
            return *counts, top, jnp.minimum(bottom, jnp.where(above[1], -y, FAR))

        start, end = (plt.load(begins.at[jnp.asarray(row + i, jnp.int32)]) for i in (0, 1))
        return middle, lower, *lax.fori_loop(start, end, pixel, tuple(found))

    none, far = jnp.zeros_like(lane), jnp.full_like(lane, FAR)
    state = resized(jnp.int32(0)), resized(jnp.int32(1)), none, none, none, far, far
    _, _, *counts, top, bottom = lax.fori_loop(jnp.int32(0), steps, by_row, state)
    real = x < width
    counts = [jnp.where(real, each, 0).sum() for each in counts]
    some = real & (top < FAR)
    ends = (jnp.where(some, x, FAR), top, jnp.where(some, -x, FAR), bottom)
    ends = [jnp.where(some, each, FAR).min() for each in ends]
    for i, each in enumerate((*counts, *ends)):
        plt.store(out.at[jnp.int32(i)], each)


def _row(ref: Any, row: int, x: jax.Array) -> jax.Array:
    return plt.load(ref.at[jnp.full_like(x, row), x])

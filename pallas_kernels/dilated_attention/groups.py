"""Groups as strided views: tokens of one segment that share one residue modulo the dilation."""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = TypeVar("Array", jax.Array, np.ndarray)


@dataclasses.dataclass(frozen=True)
class Grid:
    """A grid of tokens and how it is cut into groups; static and hashable.

    Attributes:
      size: (H, W), the real tokens.
      segment: (sh, sw), tokens; exceeds `size` where that is no multiple of the dilation.
      dilation: (rh, rw); divides the segment.
    """

    size: tuple[int, int]
    segment: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def padded(self) -> tuple[int, int]:
        """`size` rounded up to whole segments."""
        (h, w), (sh, sw) = self.size, self.segment
        return -(-h // sh) * sh, -(-w // sw) * sw

    @property
    def group(self) -> tuple[int, int]:
        """(mh, mw), the rows and columns of one group."""
        (sh, sw), (rh, rw) = self.segment, self.dilation
        return sh // rh, sw // rw

    @property
    def keys(self) -> int:
        """Tokens of a group: what every query sees."""
        return self.group[0] * self.group[1]

    @property
    def segments(self) -> tuple[int, int]:
        """Segments down and across the padded map."""
        (h, w), (sh, sw) = self.padded, self.segment
        return h // sh, w // sw

    @property
    def residues(self) -> int:
        """Groups in a segment."""
        return self.dilation[0] * self.dilation[1]


def fit(size: tuple[int, int], segment: tuple[int, int], dilation: tuple[int, int]) -> Grid:
    """Clamps a segment longer than its axis to the axis rounded up to whole dilations."""
    (h, w), (sh, sw), (rh, rw) = size, segment, dilation
    return Grid(size, (min(sh, -(-h // rh) * rh), min(sw, -(-w // rw) * rw)), dilation)


def real_tokens(grid: Grid, heads: int) -> np.ndarray | None:
    """Which of a group's tokens are not padding, as `group` lays them out; None if all are.

    Returns:
      (1, segments, residues, n, mh * mw, 1) bool.
    """
    if grid.size == grid.padded:
        return None
    return group(np.ones((1, *grid.size, heads, 1), bool), grid)


def group(x: Array, grid: Grid) -> Array:
    """Brings each group's tokens together; what `grid` pads is zero.

    Args:
      x: (b, H, W, n, c), with H, W = `grid.size`.
      grid: how the tokens are cut.

    Returns:
      (b, segments, residues, n, mh * mw, c); segments, residues and tokens in raster order.
    """
    b, h, w, n, c = x.shape
    (height, width), (rh, rw), (mh, mw) = grid.padded, grid.dilation, grid.group
    if grid.size != grid.padded:
        pads = ((0, 0), (0, height - h), (0, width - w), (0, 0), (0, 0))
        x = np.pad(x, pads) if isinstance(x, np.ndarray) else jnp.pad(x, pads)
    # Of a position p: segment p // s, place in the group (p % s) // r, residue p % r.
    x = x.reshape(b, height // (mh * rh), mh, rh, width // (mw * rw), mw, rw, n, c)
    x = x.transpose(0, 1, 4, 3, 6, 7, 2, 5, 8)
    return x.reshape(b, -1, rh * rw, n, mh * mw, c)


def ungroup(x: Array, grid: Grid) -> Array:
    """Undoes `group`: (b, segments, residues, n, mh * mw, c) -> (b, H, W, n, c)."""
    b, _, _, n, _, c = x.shape
    (h, w), (rh, rw), (mh, mw) = grid.padded, grid.dilation, grid.group
    x = x.reshape(b, h // (mh * rh), w // (mw * rw), rh, rw, n, mh, mw, c)
    x = x.transpose(0, 1, 6, 3, 2, 7, 4, 5, 8)
    return x.reshape(b, h, w, n, c)[:, : grid.size[0], : grid.size[1]]


def unpack(qkv: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Three arrays (b, H, W, n, d) of three, or of the packed one (b, H, W, 3, n, d)."""
    return qkv if len(qkv) == 3 else tuple(qkv[0][:, :, :, i] for i in range(3))


def take_own(x: Array) -> Array:
    """Keeps residue `h % residues` of head h: axis 2 of a grouped array becomes 1 long."""
    heads = np.arange(x.shape[3])
    return x[:, :, heads % x.shape[2], heads][:, :, None]


def put_own(x: jax.Array, grid: Grid, elsewhere: float) -> jax.Array:
    """Undoes `take_own`; the residues that a head does not own are filled with `elsewhere`."""
    heads = np.arange(x.shape[3])
    full = jnp.full((*x.shape[:2], grid.residues, *x.shape[3:]), elsewhere, x.dtype)
    return full.at[:, :, heads % grid.residues, heads].set(x[:, :, 0])

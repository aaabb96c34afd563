"""The generator's device part: jitted functions whose memory no photograph's size moves.

A mask of the photograph's size is only ever made in tiles of `TILE` x `TILE` pixels, a few masks
at once, by two small products with bands of the resizing matrices of `postprocess`. The tiles are
counted at run time, so one compilation serves all photographs of up to `MIN_TILES` tiles a side.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from pallas_kernels.mask_extent import Resize, mask_extent, unsupported
from samlight_jax.config import PATCH
from samlight_jax.postprocess import LOW_RES, MASK_THRESHOLD, resize_weights
from samlight_jax.preprocess import PIXEL_MEAN, PIXEL_STD, Frame
from samlight_jax.prompts import Prompts
from samlight_jax.sam import Sam

TILE = 512  # pixels; a multiple of 8, for the bits
BAND = TILE // LOW_RES + 4  # low-res pixels that a tile sees where the photograph fills the frame
MIN_TILES = 4  # a side, padded to it; beyond, to powers of two: each is one more compilation
AT_ONCE = 32  # masks of one tile in memory
EDGE = 20  # pixels; a box this close to a crop's edge, not the photograph's, is cut off
FAR = 1 << 30

Box = tuple[int, int, int, int]  # x1, y1, x2, y2


class Axis(NamedTuple):
    """The pixels of one axis, in tiles, as bands of the low-resolution ones.

    Attributes:
      starts: (t,) int32, the first low-resolution pixel of each tile's band.
      weights: (t, TILE, band) float32; of a pixel outside the crop, zeros.
      length: () int32, pixels; the tiles beyond are padding.
    """

    starts: Any
    weights: Any
    length: Any


class Limits(NamedTuple):
    """What a mask must pass; scalars, and the boxes of the crop and of the photograph, (4,)."""

    iou: Any
    stability: Any
    offset: Any
    crop: Any
    photo: Any


class Measured(NamedTuple):
    """Of the masks of p points, point by point: (3 p,), boxes (3 p, 4) XYXY in the crop."""

    keep: Any
    iou: Any
    stability: Any
    box: Any


def _jit(function: Any) -> Any:
    """`jit` of a function whose first argument is a `Sam`, to be called with a `Flat`."""
    return jax.jit(lambda model, *args: function(model.model(), *args))


@functools.lru_cache(maxsize=16)
def axes(frame: Frame, box: Box, photo: tuple[int, int]) -> tuple[Axis, Axis]:
    """Rows and columns of a photograph (height, width) that a crop at `box` fills in part."""
    matrices = _matrices(frame)
    low_res = matrices[0].shape[1]
    placed = [
        _placed(matrix, start, total)
        for matrix, start, total in zip(matrices, (box[1], box[0]), photo, strict=True)
    ]
    firsts, spans = zip(*map(_bands, placed), strict=True)
    narrow = min(BAND, low_res)
    band = narrow if max(spans) <= narrow else low_res
    tiles = _padded(max(photo))
    rows, columns = (_axis(*each, band, tiles) for each in zip(placed, firsts, photo, strict=True))
    return rows, columns


def _matrices(frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    return resize_weights(frame, LOW_RES * frame.image_size // PATCH)


def _padded(length: int) -> int:
    """Tiles of an axis of so many pixels and those that pad it."""
    return max(MIN_TILES, 1 << (-(-length // TILE) - 1).bit_length())


@functools.lru_cache(maxsize=16)
def resizes(frame: Frame) -> tuple[Resize, Resize] | None:
    """Rows and columns of a crop by itself as the kernel takes them; None where it does not."""
    padded = TILE * _padded(max(frame.original))
    rows, columns = (Resize.of(matrix, padded) for matrix in _matrices(frame))
    return None if rows is None or columns is None else (rows, columns)


def measures(frame: Frame) -> tuple[Axis, Axis] | tuple[Resize, Resize]:
    """Rows and columns of a crop by itself, for `measure`: the kernel's where it runs, or tiles."""
    found = resizes(frame) if unsupported(np.float32) is None else None
    height, width = frame.original
    return found or axes(frame, (0, 0, width, height), frame.original)


def _placed(matrix: np.ndarray, start: int, total: int) -> np.ndarray:
    """(tiles, TILE, n): a crop's rows at `start`; behind the end the last one, again and again.

    So a mask's padded bits never differ from its last pixel's.
    """
    tiles = -(-total // TILE)
    whole = np.zeros((tiles * TILE, matrix.shape[1]), np.float32)
    whole[start : start + len(matrix)] = matrix
    whole[total:] = whole[total - 1]
    return whole.reshape(tiles, TILE, -1)


def _bands(tiles: np.ndarray) -> tuple[np.ndarray, int]:
    """The first low-resolution pixel that each tile sees, and how many the widest sees."""
    seen = (tiles != 0).any(axis=1)
    first = seen.argmax(axis=1)
    last = seen.shape[1] - 1 - seen[:, ::-1].argmax(axis=1)
    return first, int(np.where(seen.any(axis=1), last - first + 1, 0).max())


def _axis(placed: np.ndarray, first: np.ndarray, length: int, band: int, tiles: int) -> Axis:
    starts = np.zeros(tiles, np.int32)
    weights = np.zeros((tiles, TILE, band), np.float32)
    starts[: len(placed)] = np.minimum(first, placed.shape[2] - band)
    for i, tile in enumerate(placed):
        weights[i] = tile[:, starts[i] : starts[i] + band]
    return Axis(starts, weights, np.int32(length))


@_jit
def encode(
    model: Sam, pixels: UInt8[Array, "b s s 3"], inputs: Int[Array, "b 2"]
) -> Float[Array, "b h w 256"]:
    """Resized photographs at the top left of their frames, and their (height, width) there."""
    place = jnp.arange(pixels.shape[1])
    inside = (place[:, None] < inputs[:, 0, None, None]) & (place < inputs[:, 1, None, None])
    x = (pixels.astype(jnp.float32) - PIXEL_MEAN) / PIXEL_STD
    return model.encode(jnp.where(inside[..., None], x, 0))[0]


def _decode(
    model: Sam, embedding: Float[Array, "h w 256"], points: Float[Array, "p 2"]
) -> tuple[Float[Array, "p 3 n n"], Float[Array, "p 3"]]:
    """Foreground points of the frame, each with SAM's pad point, to the multimask output."""
    p = len(points)
    coords = jnp.stack([points, jnp.zeros_like(points)], axis=1)
    labels = jnp.broadcast_to(jnp.array([1, -1]), (p, 2))
    logits, iou = model.decode(embedding, Prompts(coords, labels, jnp.ones((p, 2), bool)))
    return logits[:, 1:].astype(jnp.float32), iou[:, 1:].astype(jnp.float32)


def _tile(low: Float[Array, "k n n"], rows: Axis, columns: Axis, y: Any, x: Any) -> Array:
    """(k, TILE, TILE) logits of tile (y, x)."""
    start = (0, rows.starts[y], columns.starts[x])
    size = (len(low), rows.weights.shape[2], columns.weights.shape[2])
    seen = jax.lax.dynamic_slice(low, start, size)
    exact = jax.lax.Precision.HIGHEST  # tf32 would shift a mask's edge
    full = jnp.einsum("ya,kab->kyb", rows.weights[y], seen, precision=exact)
    return jnp.einsum("kyb,xb->kyx", full, columns.weights[x], precision=exact)


def _measure(
    low: Float[Array, "k n n"], rows: Axis, columns: Axis, offset: Any
) -> tuple[Float[Array, "k"], Int[Array, "k 4"]]:
    """Stability score and box (x1, y1, x2, y2 of the outermost pixels; zeros if empty)."""
    across = -(-columns.length // TILE)
    place = jnp.arange(TILE)

    def step(t: Any, found: tuple) -> tuple:
        y, x = t // across, t % across
        full = _tile(low, rows, columns, y, x)
        at_y, at_x = y * TILE + place, x * TILE + place
        inside = (at_y < rows.length)[:, None] & (at_x < columns.length)
        counts = [
            ((full > MASK_THRESHOLD + shift) & inside).sum(axis=(1, 2))
            for shift in (offset, -offset)
        ]
        mask = (full > MASK_THRESHOLD) & inside
        ends = []
        for at, some in ((at_x, mask.any(axis=1)), (at_y, mask.any(axis=2))):
            ends.append(jnp.where(some, at, FAR).min(axis=1))
            ends.append(jnp.where(some, -at, FAR).min(axis=1))
        return found[0] + jnp.stack(counts), jnp.minimum(found[1], jnp.stack(ends))

    start = jnp.zeros((2, len(low)), jnp.int32), jnp.full((4, len(low)), FAR, jnp.int32)
    tiles = -(-rows.length // TILE) * across
    (small, large), (x1, x2, y1, y2) = jax.lax.fori_loop(0, tiles, step, start)
    box = jnp.where(x1 == FAR, 0, jnp.stack([x1, y1, -x2, -y2]))
    return small / jnp.maximum(large, 1), box.T


def _measure_passed(
    low: Float[Array, "k n n"], passed: Bool[Array, "k"], rows: Axis, columns: Axis, offset: Any
) -> tuple[Float[Array, "k"], Int[Array, "k 4"]]:
    """`_measure` of the masks that passed; zeros for the others."""
    order = jnp.argsort(~passed, stable=True)  # what passed comes first, and is all that is looped
    order = jnp.pad(order, (0, -len(order) % AT_ONCE), mode="edge")

    def step(i: Any, found: tuple) -> tuple:
        chosen = jax.lax.dynamic_slice(order, (i * AT_ONCE,), (AT_ONCE,))
        new = _measure(low[chosen], rows, columns, offset)
        return jax.tree.map(lambda all_, x: all_.at[chosen].set(x), found, new)

    nothing = jnp.zeros(len(low)), jnp.zeros((len(low), 4), jnp.int32)
    return jax.lax.fori_loop(0, -(-passed.sum() // AT_ONCE), step, nothing)


@_jit
def measure(
    model: Sam,
    embedding: Float[Array, "h w 256"],
    points: Float[Array, "p 2"],
    rows: Any,
    columns: Any,
    limits: Limits,
) -> Measured:
    """Decodes one batch of points and measures those of its masks whose predicted IoU passes.

    SAM's order: predicted IoU, stability score, box, crop's edge. A threshold of 0 or less passes
    everything but NaN; the stability score of a mask that is empty at both levels is 0. Rows and
    columns are those of `measures`.
    """
    low, iou = _decode(model, embedding, points)
    low, iou = low.reshape(-1, *low.shape[2:]), iou.reshape(-1)
    passed = jnp.isfinite(iou) & ((iou > limits.iou) | (limits.iou <= 0))
    if isinstance(rows, Resize):
        levels = MASK_THRESHOLD + limits.offset * jnp.array([1.0, 0, -1])
        counts, box = mask_extent(low, passed, rows, columns, levels)
        stability = counts[:, 0] / jnp.maximum(counts[:, 2], 1)
    else:
        stability, box = _measure_passed(low, passed, rows, columns, limits.offset)
    stable = (stability >= limits.stability) | (limits.stability <= 0)
    placed = box + jnp.tile(limits.crop[:2], 2)
    near = [jnp.abs(placed - edges) <= EDGE for edges in (limits.crop, limits.photo)]
    cut = (near[0] & ~near[1]).any(axis=1)
    return Measured(passed & stable & ~cut, iou, stability, box)


@jax.jit
def suppress(
    boxes: Float[Array, "m 4"], count: Int[Array, ""], threshold: Float[Array, ""]
) -> Bool[Array, "m"]:
    """Greedy non-maximum suppression of the first `count` boxes, XYXY, best first.

    A box stays if no better box that stays overlaps it by more than the threshold. All are decided
    at once, again and again until nothing changes: after t rounds the first t are as in the greedy
    order, and in practice a few rounds do.
    """
    area = jnp.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    low = jnp.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = jnp.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    both = jnp.prod(jnp.maximum(high - low, 0), axis=2)
    overlap = both / (area[:, None] + area - both)  # NaN, two empty boxes: both stay
    place = jnp.arange(len(boxes))
    beaten = (overlap > threshold) & (place[:, None] < place)
    valid = place < count

    def decide(state: tuple) -> tuple:
        _, keep = state
        return keep, valid & ~(beaten & keep[:, None]).any(axis=0)

    changed = lambda state: (state[0] != state[1]).any()  # noqa: E731
    return jax.lax.while_loop(changed, decide, decide((valid, valid)))[1]


@_jit
def decode_chosen(
    model: Sam,
    embedding: Float[Array, "h w 256"],
    points: Float[Array, "p 2"],
    which: Int[Array, "p"],
) -> Float[Array, "p n n"]:
    """Low-resolution logits: of each point the mask `which`, 0 to 2."""
    low, _ = _decode(model, embedding, points)
    return low[jnp.arange(len(low)), which]


@jax.jit
def tile_bits(
    low: Float[Array, "p n n"], rows: Axis, columns: Axis, y: Any, x: Any
) -> UInt8[Array, "p x y8"]:
    """The masks' bits in tile (y, x), column by column."""

    def one(low: Any) -> Any:
        return jnp.packbits(_tile(low[None], rows, columns, y, x)[0].T > MASK_THRESHOLD, axis=1)

    return jax.lax.map(one, low, batch_size=min(AT_ONCE, len(low)))

"""The evaluator's device part: pure functions on the photographs of one device.

A photograph's prompts lie in rows of a few slots, and a device walks over its rows, some at once:
any number of instances takes the same memory and the same compilation. Masks are made at the
photograph's resolution inside a canvas of one of a few sizes, and are counted there.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from samlight_jax.config import PATCH
from samlight_jax.postprocess import MASK_THRESHOLD
from samlight_jax.preprocess import PIXEL_MEAN, PIXEL_STD
from samlight_jax.prompts import Prompts
from samlight_jax.sam import Sam

STABILITY_OFFSET = 1.0
SLOT_PIXELS = 1 << 26  # canvas pixels at once on a device, over rows, slots and candidates


class Settings(NamedTuple):
    """What a compilation depends on; `masks` and `low_res`: also return them."""

    select: str
    rows: int  # at once
    boundary: bool = False
    masks: bool = False
    low_res: bool = False


class Places(NamedTuple):
    """b photographs in a canvas of (height, width).

    Attributes:
      by_row, by_column: (b, height, m), (b, width, m) float32 of `resize_weights`, zero outside.
      size: (b, 2) int32, height and width of the photograph.
      boundary: (b,) int32, how far a boundary reaches into a mask, pixels.
    """

    by_row: Any
    by_column: Any
    size: Any
    boundary: Any


class Rows(NamedTuple):
    """r rows of q slots, all slots of a row on one photograph.

    Attributes:
      image: (r,) int32, which photograph of the device.
      coords, labels, valid: (r, q, n, ...) as in `Prompts`.
      box: (r, q, 4) float32, the prompt's box in photograph pixels; zeros where there is none.
      truth: (r, q, width, height / 8) uint8, bits column by column; see `pack`.
    """

    image: Any
    coords: Any
    labels: Any
    valid: Any
    box: Any
    truth: Any


class Scores(NamedTuple):
    """Of r rows of q slots; pairs are the pixels of intersection and union, int32.

    Attributes:
      overlap: (r, q, 2) with the truth.
      boundary: (r, q, 2) of the two boundaries, or None.
      agreement: (r, q, 2) with the teacher's mask, or None.
      iou: (r, q) float32, the predicted IoU of the chosen mask.
      choice: (r, q) int32, which of the model's four masks.
      low_res: (r, q, m, m) float32 logits, or None.
      mask: (r, q, width, height / 8) uint8 as `Rows.truth`, or None.
    """

    overlap: Any
    boundary: Any
    agreement: Any
    iou: Any
    choice: Any
    low_res: Any
    mask: Any


def pack(mask: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """(height, width) 0/1 to the canvas's (width, height / 8) bits, fast if column-major."""
    height, width = mask.shape
    bits = np.zeros((canvas[1], canvas[0] // 8), np.uint8)
    bits[:width, : -(-height // 8)] = np.packbits(mask.T, axis=1)
    return bits


def unpack(bits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Inverse of `pack`: a column-major (height, width) uint8 mask of `size`."""
    height, width = size
    return np.unpackbits(bits[:width], axis=1, count=height).T


def _unpack(bits: UInt8[Array, "x y8"]) -> Bool[Array, "y x"]:
    return jnp.unpackbits(bits, axis=1).T.astype(bool)


def embed(
    models: tuple[Sam, Sam | None],
    pixels: UInt8[Array, "b s s 3"],
    inputs: Int[Array, "b 2"],
    dtype: Any,
) -> tuple[tuple[Any, Any], Any]:
    """Photographs resized on the host to their embeddings by both models, and how these agree.

    Args:
      models: the model and its teacher, or None.
      pixels: each photograph at the top left of its frame.
      inputs: (height, width) of each within the frame.
      dtype: static, of the models.
    """
    x = (pixels.astype(jnp.float32) - PIXEL_MEAN) / PIXEL_STD
    x = jnp.where(_within(inputs, pixels.shape[1])[..., None], x, 0).astype(dtype)
    ours = models[0].encode(x)[0]
    if models[1] is None:
        return (ours, None), None
    teacher = models[1].encode(x)[0]
    return (ours, teacher), embedding_agreement(ours, teacher, inputs)


def _within(sizes: Int[Array, "b 2"], side: int) -> Bool[Array, "b s s"]:
    place = jnp.arange(side)
    return (place[:, None] < sizes[:, 0, None, None]) & (place < sizes[:, 1, None, None])


def embedding_agreement(
    ours: Float[Array, "b h w c"], teacher: Float[Array, "b h w c"], inputs: Int[Array, "b 2"]
) -> Float[Array, "b 2"]:
    """(mean squared error, mean cosine) over the tokens that see the photograph."""
    a, b = ours.astype(jnp.float32), teacher.astype(jnp.float32)
    inside = _within(-(-inputs // PATCH), a.shape[1])
    error = jnp.square(a - b).mean(axis=-1)
    length = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    cosine = (a * b).sum(axis=-1) / jnp.maximum(length, 1e-12)
    each = jnp.where(inside[..., None], jnp.stack([error, cosine], axis=-1), 0)
    return each.sum(axis=(1, 2)) / jnp.maximum(inside.sum(axis=(1, 2)), 1)[:, None]


def score(
    models: tuple[Sam, Sam | None],
    embeddings: tuple[Any, Any],
    places: Places,
    rows: Rows,
    count: Int[Array, "1"],
    low_res: Float[Array, "r q m m"] | None,
    settings: Settings,
) -> Scores:
    """Answers and scores the first `count` rows; the others hold nothing of use.

    Args:
      models: the model and (or None) the teacher to agree with.
      embeddings: of each.
      places: of the device's photographs.
      rows: of prompts, a multiple of `settings.rows`.
      count: of the rows that hold any.
      low_res: logits of an earlier answer, as mask prompts; None for none.
      settings: static.
    """

    def one(row: Rows, low: Any) -> Scores:
        place = jax.tree.map(lambda x: x[row.image], places)
        each = [
            None if model is None else _decode(model, embedding[row.image], row, low, settings)
            for model, embedding in zip(models, embeddings, strict=True)
        ]
        return _score_row(each, row, place, settings)

    def some(first: Any) -> Scores:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=settings.rows)
        return jax.vmap(one)(*jax.tree.map(lambda x: cut(x, first), (rows, low_res)))

    def step(i: Any, scores: Scores) -> Scores:
        first, put = i * settings.rows, jax.lax.dynamic_update_slice_in_dim
        return jax.tree.map(lambda all_, x: put(all_, x, first, 0), scores, some(first))

    shapes = jax.eval_shape(some, 0)
    blank = jax.tree.map(lambda x: jnp.zeros((len(rows.image), *x.shape[1:]), x.dtype), shapes)
    return jax.lax.fori_loop(0, -(-count[0] // settings.rows), step, blank)


def _decode(
    model: Sam, embedding: Array, row: Rows, low_res: Array | None, settings: Settings
) -> tuple[Array, Array, Array]:
    """The candidates of a row: (q, c, m, m) logits, (q, c) predicted IoU, (q, c) mask numbers."""
    q = len(row.labels)
    masks = () if low_res is None else (low_res, jnp.ones(q, bool))
    logits, iou = model.decode(embedding, Prompts(row.coords, row.labels, row.valid, *masks))
    logits, iou = logits.astype(jnp.float32), iou.astype(jnp.float32)
    numbers = jnp.broadcast_to(jnp.arange(4), (q, 4))
    if settings.select == "single":
        return logits[:, :1], iou[:, :1], numbers[:, :1]
    logits, iou, numbers = logits[:, 1:], iou[:, 1:], numbers[:, 1:]
    if settings.select == "pred-iou":  # chosen before any is resized
        logits, iou, numbers = _take(jnp.argmax(iou, axis=1), logits, iou, numbers)
    return logits, iou, numbers


def _take(best: Int[Array, "q"], *candidates: Array) -> tuple[Array, ...]:
    """One candidate of each slot, the axis kept."""
    q = jnp.arange(len(best))
    return tuple(each[q, best][:, None] for each in candidates)


def _score_row(each: list[Any], row: Rows, place: Places, settings: Settings) -> Scores:
    def slot(x: Any) -> Scores:
        candidates, box, bits = x
        truth = _unpack(bits)
        chosen = [
            None if c is None else _choose(c, truth, box, place, settings.select)
            for c in candidates
        ]
        mask, low, iou, number = chosen[0]  # type: ignore[misc]
        agreement = None if chosen[1] is None else _overlap(mask, chosen[1][0])
        boundary = None
        if settings.boundary:
            boundary = _overlap(*(_boundary(m, place.boundary) for m in (mask, truth)))
        packed = jnp.packbits(mask.T, axis=1) if settings.masks else None
        low = low if settings.low_res else None
        return Scores(_overlap(mask, truth), boundary, agreement, iou, number, low, packed)

    slots = len(row.labels)
    candidates, height, width = each[0][0].shape[1], len(place.by_row), len(place.by_column)
    pixels = settings.rows * candidates * height * width
    at_once = max(1, min(slots, SLOT_PIXELS // pixels))
    return jax.lax.map(slot, (each, row.box, row.truth), batch_size=at_once)


def _choose(candidates: Any, truth: Array, box: Array, place: Places, select: str) -> tuple:
    """(mask, low-res logits, predicted IoU, number) of the candidate that `select` takes."""
    low, iou, number = candidates
    exact = jax.lax.Precision.HIGHEST  # tf32 would shift a mask's edge
    rows = jnp.einsum("ym,cmn->cyn", place.by_row, low, precision=exact)
    full = jnp.einsum("cyn,xn->cyx", rows, place.by_column, precision=exact)
    masks = full > MASK_THRESHOLD
    if len(low) == 1:
        return masks[0], low[0], iou[0], number[0]
    if select == "oracle":
        pairs = jax.vmap(_overlap, (0, None))(masks, truth)
        merit = pairs[:, 0] / jnp.maximum(pairs[:, 1], 1)
    elif select == "stability":
        merit = _stability(full, place.size)
    else:
        merit = jax.vmap(_box_iou, (0, None))(masks, box)
    best = jnp.argmax(merit)
    return masks[best], low[best], iou[best], number[best]


def _stability(full: Float[Array, "c y x"], size: Int[Array, "2"]) -> Float[Array, "c"]:
    """SAM's stability score: IoU of the masks at thresholds +1 and -1; 0 where both are empty."""
    inside = (jnp.arange(full.shape[1]) < size[0])[:, None] & (jnp.arange(full.shape[2]) < size[1])
    small = (full > MASK_THRESHOLD + STABILITY_OFFSET).sum(axis=(1, 2))
    large = ((full > MASK_THRESHOLD - STABILITY_OFFSET) & inside).sum(axis=(1, 2))
    return small / jnp.maximum(large, 1)


def tight_box(mask: Bool[Array, "y x"]) -> Float[Array, "4"]:
    """x1, y1, x2, y2 of the mask's pixels, their far edges included; zeros if it is empty."""
    ends = []
    for axis in (0, 1):
        some = mask.any(axis=axis)
        ends += [jnp.argmax(some), (len(some) - jnp.argmax(some[::-1])) * some.any()]
    return jnp.stack([ends[0], ends[2], ends[1], ends[3]]).astype(jnp.float32)


def _box_iou(mask: Bool[Array, "y x"], box: Float[Array, "4"]) -> Float[Array, ""]:
    tight = tight_box(mask)
    sides = jnp.minimum(tight[2:], box[2:]) - jnp.maximum(tight[:2], box[:2])
    both = jnp.prod(jnp.maximum(sides, 0))
    areas = jnp.prod(tight[2:] - tight[:2]) + jnp.prod(box[2:] - box[:2])
    return both / jnp.maximum(areas - both, 1e-6)


def _overlap(a: Bool[Array, "y x"], b: Bool[Array, "y x"]) -> Int[Array, "2"]:
    return jnp.stack([(a & b).sum(), (a | b).sum()]).astype(jnp.int32)


def _boundary(mask: Bool[Array, "y x"], reach: Int[Array, ""]) -> Bool[Array, "y x"]:
    """The mask's pixels within `reach` steps of the background or of the photograph's edge.

    A pixel survives `reach` erosions by 3x3 exactly if its square of 2 reach + 1 pixels is full.
    """
    inner = mask
    for axis in (0, 1):
        n = mask.shape[axis]
        before = jnp.cumsum(jnp.pad(inner, [(1, 0) if a == axis else (0, 0) for a in (0, 1)]), axis)
        place = jnp.arange(n)
        high = jnp.take(before, jnp.minimum(place + reach + 1, n), axis)
        low = jnp.take(before, jnp.maximum(place - reach, 0), axis)
        inner = high - low == 2 * reach + 1
    return mask & ~inner

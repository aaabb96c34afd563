"""Prompts of a user -> the arrays that the prompt encoder takes, checked, scaled and padded.

The tokens of one prompt lie in slots: its points, SAM's pad point, the two corners of its box. The
number of slots is one of a few buckets, so that one compilation serves any mix of prompts; a slot
that holds nothing is not `valid` and no token ever attends it. That is not SAM's label -1, which is
a token like any other.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from samlight_jax.config import SamConfig
from samlight_jax.errors import InputError
from samlight_jax.postprocess import LOW_RES
from samlight_jax.preprocess import Frame

LABELS = (-1, 0, 1, 2, 3)  # pad, background, foreground, a box's top left, its bottom right
# Slots; beyond the last, multiples of it. With the decoder's own five, 3 are the 8 that its kernels
# take: a point, a box, or both.
BUCKETS = (3, 8, 32, 128, 512)
ABSENT = -1  # of `predict_batch`: a label, a whole box or a whole mask


class Prompts(NamedTuple):
    """q prompts of n slots in the model's frame; a pytree.

    Attributes:
      coords: (q, n, 2) float32, x then y, frame pixels.
      labels: (q, n) int32, of `LABELS`.
      valid: (q, n) bool, the slots that hold a token.
      masks: (q, m, m) float32 low-resolution logits, zeros where there is none; None where no
        prompt has one, which is the faster program.
      has_mask: (q,) bool, or None.
    """

    coords: Any
    labels: Any
    valid: Any
    masks: Any = None
    has_mask: Any = None


def is_host(*arrays: Any) -> bool:
    """True if none of them lives on a device or is being traced."""
    return not any(isinstance(array, jax.Array) for array in arrays)


def check(
    frame: Frame,
    config: SamConfig,
    point_coords: Any,
    point_labels: Any,
    boxes: Any,
    masks: Any,
    *,
    absent: bool,
) -> None:
    """Refuses prompts of a wrong shape, and (unless they are traced) of a wrong value.

    Args:
      frame: of the photograph.
      config: the model's.
      point_coords: (q, n, 2) photograph pixels, or None; the others likewise.
      point_labels: (q, n).
      boxes: (q, 4).
      masks: (q, m, m).
      absent: whether -1 marks what is absent, as in `predict_batch`.

    Raises:
      InputError: in one sentence.
    """
    if (point_coords is None) != (point_labels is None):
        got, missing = ("point_coords", "point_labels")[:: 1 if point_labels is None else -1]
        raise InputError(
            f"Got `{got}` without `{missing}`: every point needs a label, 1 (foreground) or 0 "
            "(background)."
        )
    side = LOW_RES * config.grid
    if masks is not None and masks.shape[-2:] != (side, side):
        raise InputError(
            f"`mask_input` has masks of shape {masks.shape[-2:]}; expected ({side}, {side}) "
            "low-resolution logits. samlight_jax.mask_to_input(mask) makes them from a full-size "
            "mask."
        )
    if point_coords is not None:
        if point_coords.shape[:-1] != point_labels.shape:
            raise InputError(
                f"`point_coords` has shape {point_coords.shape} and `point_labels` "
                f"{point_labels.shape}; expected one label a point."
            )
        _check_points(frame, point_coords, point_labels, absent)
    if boxes is not None:
        _check_boxes(boxes, absent)
    if _concrete(masks) and not np.isfinite(np.asarray(masks)).all():
        raise InputError("`mask_input` holds NaN or infinite values; expected finite logits.")


def _concrete(array: Any) -> bool:
    return array is not None and not isinstance(array, Tracer)


def _check_points(frame: Frame, coords: Any, labels: Any, absent: bool) -> None:
    present = np.ones(labels.shape, bool)
    if _concrete(labels):
        labels = np.asarray(labels)
        if bad := sorted(set(labels[~np.isin(labels, LABELS)].tolist())):
            raise InputError(
                f"`point_labels` holds {bad}; expected 1 (foreground), 0 (background), -1 (no "
                "point), or 2 and 3 (a box's corners)."
            )
        present = labels != ABSENT
    if not _concrete(coords):
        return
    coords = np.asarray(coords)
    wrong = ~np.isfinite(coords).all(axis=-1)
    if (wrong & present if absent else wrong).any():
        raise InputError(
            f"`point_coords` holds NaN or infinite values ({coords[wrong][0].tolist()}); expected "
            "x, y in photograph pixels."
        )
    height, width = frame.original
    outside = ((coords < 0) | (coords > (width, height))).any(axis=-1) & present
    if outside.any():
        x, y = coords[outside][0].tolist()
        warnings.warn(
            f"A point lies outside the image: x={x:g}, y={y:g} of {width}x{height} pixels. Points "
            "are (x, y), not (row, column).",
            stacklevel=5,
        )


def _check_boxes(boxes: Any, absent: bool) -> None:
    if not _concrete(boxes):
        return
    boxes = np.asarray(boxes)
    here = boxes[~(boxes == ABSENT).all(axis=-1)] if absent else boxes
    if not np.isfinite(here).all():
        raise InputError(
            f"A box holds NaN or infinite values ({here.tolist()}); expected x1, y1, x2, y2."
        )
    wrong = (here[..., 2] <= here[..., 0]) | (here[..., 3] <= here[..., 1])
    if wrong.any():
        raise InputError(
            f"The box {here[wrong][0].tolist()} is empty; expected x1, y1, x2, y2 in photograph "
            "pixels with x1 < x2 and y1 < y2. From x, y, width, height: [x, y, x + w, y + h]."
        )


def assemble(
    frame: Frame,
    config: SamConfig,
    count: int,
    point_coords: Any = None,
    point_labels: Any = None,
    boxes: Any = None,
    masks: Any = None,
    *,
    absent: bool,
    roomy: bool = False,
) -> Prompts:
    """Checked prompts (see `check`) of one photograph to `count` rows of padded slots.

    `roomy` gives a point as many slots as seven, so that both share a compilation. In NumPy if all
    of them are, else in jnp; then traceable and differentiable.
    """
    xp = np if is_host(point_coords, point_labels, boxes, masks) else jnp
    scale = np.array(frame.scale)
    present = xp.ones(count, bool)
    has_box = xp.zeros((count, 1), bool)
    coords = xp.zeros((count, 0, 2), xp.float32)
    labels, valid = xp.zeros((count, 0), xp.int32), xp.zeros((count, 0), bool)
    if boxes is not None:
        has_box = present[:, None]
        if absent:
            has_box = ~(boxes == ABSENT).all(axis=-1)[:, None]
    if point_coords is not None:
        labels = point_labels.astype(xp.int32)
        valid = labels != ABSENT if absent else xp.ones(labels.shape, bool)
        coords = xp.where(valid[..., None], point_coords, 0) * scale
        if boxes is None or absent:  # SAM's pad point: where there are points and no box
            pad = valid.any(axis=1, keepdims=True) & ~has_box
            origin = xp.zeros((count, 1, 2), xp.float32)
            coords, labels, valid = _append(xp, (coords, labels, valid), origin, -1, pad)
    if boxes is not None:
        corners = xp.where(has_box[..., None], boxes.reshape(count, 2, 2), 0) * scale
        kinds = np.array([[2, 3]])
        coords, labels, valid = _append(xp, (coords, labels, valid), corners, kinds, has_box)
    free = _bucket(labels.shape[1], roomy) - labels.shape[1]
    rest = xp.zeros((count, free, 2), xp.float32)
    coords, labels, valid = _append(xp, (coords, labels, valid), rest, -1, ~present[:, None])

    if absent:  # what is there comes first, so that what is not moves no sum by a bit
        order: Any = xp.argsort(~valid, axis=1, stable=True)
        labels, valid = (xp.take_along_axis(x, order, axis=1) for x in (labels, valid))
        coords = xp.take_along_axis(coords, order[..., None], axis=1)
    slots = coords.astype(xp.float32), labels.astype(xp.int32), valid
    if masks is None:
        return Prompts(*slots)
    has_mask = ~(masks == ABSENT).all(axis=(-2, -1)) if absent else present
    side = LOW_RES * config.grid
    return Prompts(*slots, masks.reshape(count, side, side).astype(xp.float32), has_mask)


def _append(xp: Any, slots: tuple, coords: Any, labels: Any, valid: Any) -> tuple:
    """More slots behind the ones there are; labels and valid are broadcast."""
    shape = coords.shape[:-1]
    more = (coords, xp.broadcast_to(labels, shape), xp.broadcast_to(valid, shape))
    return tuple(xp.concatenate([a, b], axis=1) for a, b in zip(slots, more, strict=True))


def _bucket(slots: int, roomy: bool) -> int:
    last = BUCKETS[-1]
    return next((size for size in BUCKETS[roomy:] if slots <= size), -(-slots // last) * last)


def mask_to_input(mask: Any, *, image_size: int = 1024) -> np.ndarray:
    """A full-size mask as the low-resolution logits that `mask_input` takes.

    Args:
      mask: (height, width) bool, or numbers from 0 to 1; the photograph's size.
      image_size: side of the model's frame in pixels.

    Returns:
      (1, image_size / 4, image_size / 4) float32 logits; a pixel's share of the mask, from
      -6.9 (none) to 6.9 (all).

    Raises:
      InputError: not a 2-D mask, or values outside 0 to 1.
    """
    mask = np.asarray(mask, np.float32)
    if mask.ndim != 2:
        raise InputError(f"`mask` has shape {mask.shape}; expected (height, width).")
    if mask.size and not (mask.min() >= 0 and mask.max() <= 1):
        raise InputError(
            f"`mask` holds values from {mask.min():g} to {mask.max():g}; expected False and True, "
            "or 0 to 1."
        )
    frame = Frame((mask.shape[0], mask.shape[1]), image_size)
    x, y = frame.scale
    side = image_size // LOW_RES
    share = jax.image.scale_and_translate(
        mask, (side, side), (0, 1), jnp.array([y, x]) / LOW_RES, jnp.zeros(2), "linear"
    )
    share = np.clip(share, 1e-3, 1 - 1e-3)
    return np.log(share / (1 - share))[None].astype(np.float32)

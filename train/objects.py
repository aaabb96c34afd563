"""Prompts of stages 2 and 3, made on the device from the teacher's own masks.

A random point of the view asks the teacher for an object; half of the objects are then asked for
by their box, the rest by that point. A prompt has a fixed number of slots (`samlight_jax.prompts`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from samlight_jax.postprocess import LOW_RES
from samlight_jax.prompts import Prompts

SLOTS = 4  # a point and SAM's pad point, or two corners; a later click; one is free
SURE = 0.75  # the least predicted IoU of an object, and its least and most share of the view
SHARE = (0.002, 0.7)
JITTER = 0.1, 20.0  # a box's corners move by this share of its sides, up to these pixels (SAM's)

Decode = Callable[[Prompts], tuple[Array, Array]]


class Objects(NamedTuple):
    """What one photograph's prompts ask for.

    Attributes:
      prompts: q of them; the first half are boxes.
      target: (q, m, m) bool, the teacher's mask.
      single: (q,) bool, whether one mask answers; boxes.
      counts: (q,) bool, whether the teacher saw an object there.
      logits: (q, 4, m, m), all that the teacher answers, by token; None where it was not asked.
      iou: (q, 4) float32, as it predicts of them.
    """

    prompts: Prompts
    target: Array
    single: Array
    counts: Array
    logits: Array | None = None
    iou: Array | None = None


def inside(size: Array, side: int) -> Array:
    """(side, side) bool: the low-resolution pixels of a view of (height, width)."""
    centres = (jnp.arange(side) + 0.5) * LOW_RES
    return (centres[:, None] < size[0]) & (centres[None] < size[1])


def points(coords: Array) -> Prompts:
    """(q, 2) frame pixels to prompts of one foreground point each."""
    return _prompts(coords[:, None], jnp.ones((len(coords), 1), jnp.int32), pad=True)


def boxes(corners: Array) -> Prompts:
    """(q, 4) frame pixels to prompts of one box each."""
    labels = jnp.broadcast_to(jnp.array([2, 3]), (len(corners), 2))
    return _prompts(corners.reshape(-1, 2, 2), labels, pad=False)


def _prompts(coords: Array, labels: Array, *, pad: bool) -> Prompts:
    q, used = labels.shape
    free = SLOTS - used
    coords = jnp.pad(coords.astype(jnp.float32), ((0, 0), (0, free), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, free)), constant_values=-1).astype(jnp.int32)
    valid = jnp.broadcast_to(jnp.arange(SLOTS) < used + pad, (q, SLOTS))
    return Prompts(coords, labels, valid)


def best(logits: Array, iou: Array) -> tuple[Array, Array]:
    """Of (q, 4, m, m) and (q, 4): the mask and IoU of the three that the model is surest of."""
    choice = 1 + jnp.argmax(iou[:, 1:], axis=1)
    mask = jnp.take_along_axis(logits, choice[:, None, None, None], axis=1)[:, 0]
    return mask, jnp.take_along_axis(iou, choice[:, None], axis=1)[:, 0]


def tight_box(mask: Array) -> Array:
    """(m, m) bool to its box x1, y1, x2, y2 in frame pixels; zeros where it is empty."""
    rows, columns = mask.any(1), mask.any(0)
    low = jnp.stack([jnp.argmax(columns), jnp.argmax(rows)])
    high = jnp.stack([len(columns) - jnp.argmax(columns[::-1]), len(rows) - jnp.argmax(rows[::-1])])
    return LOW_RES * jnp.where(mask.any(), jnp.concatenate([low, high]), 0).astype(jnp.float32)


def jittered(box: Array, size: Array, key: Array) -> Array:
    """A box whose corners moved, within the view and at least two pixels wide and high."""
    share, most = JITTER
    sides = jnp.tile(box[2:] - box[:2], 2)
    moved = box + jnp.clip(share * sides * jax.random.normal(key, (4,)), -most, most)
    width_height = jnp.flip(size).astype(jnp.float32)
    low = jnp.clip(jnp.minimum(moved[:2], moved[2:]), 0, width_height - 2)
    high = jnp.clip(jnp.maximum(moved[:2], moved[2:]), low + 2, width_height)
    return jnp.concatenate([low, high])


def of_teacher(decode: Decode, size: Array, key: Array, count: int, low_res: int) -> Objects:
    """Objects of one view.

    Args:
      decode: the teacher's, with the view's embedding.
      size: (height, width) of the view.
      key: random.
      count: of prompts, even.
      low_res: side of a low-resolution mask.
    """
    place, shake = jax.random.split(key)
    width_height = jnp.flip(size).astype(jnp.float32)
    coords = jax.random.uniform(place, (count, 2)) * width_height
    asked = points(coords)
    all_logits, all_iou = decode(asked)
    logits, iou = best(all_logits, all_iou)
    seen = inside(size, low_res)
    masks = (logits > 0) & seen
    share = masks.sum((1, 2)) / seen.sum()
    counts = (iou > SURE) & (share >= SHARE[0]) & (share <= SHARE[1])

    half = count // 2
    keys = jax.random.split(shake, half)
    frames = jax.vmap(lambda mask, key: jittered(tight_box(mask), size, key))(masks[:half], keys)
    framed = boxes(frames)
    # Boxes first, then what the points behind them were answered.
    prompts, answers, iou = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b[half:]]),
        (framed, *decode(framed)),
        (asked, all_logits, all_iou),
    )
    target = jnp.concatenate([(answers[:half, 0] > 0) & seen, masks[half:]])
    counts &= target.any((1, 2))
    single = jnp.arange(count) < half
    return Objects(prompts, target, single, counts, answers, iou.astype(jnp.float32))


def of_annotations(masks: Array, size: Array, key: Array, count: int) -> Objects:
    """Objects of one view, of its data's own masks.

    Args:
      masks: (k, m, m) bool, in the view; the empty ones are none.
      size: (height, width) of the view.
      key: random.
      count: of prompts, even; where there are fewer objects, some are asked for again.
    """
    pick, place, shake = jax.random.split(key, 3)
    seen = inside(size, masks.shape[-1])
    masks = masks & seen
    share = masks.sum((1, 2)) / seen.sum()
    there = (share >= SHARE[0]) & (share <= SHARE[1])
    # All of them once, in some order, then again.
    order = jnp.argsort(jnp.where(there, jax.random.uniform(pick, there.shape), 2.0))
    which = order[jnp.arange(count) % jnp.maximum(there.sum(), 1)]
    target = masks[which]

    half = count // 2
    keys = jax.random.split(shake, half)
    frames = jax.vmap(lambda mask, key: jittered(tight_box(mask), size, key))(target[:half], keys)
    spots = jax.vmap(_somewhere)(target[half:], jax.random.split(place, count - half))
    framed, pointed = boxes(frames), points(spots)
    prompts = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), framed, pointed)
    return Objects(prompts, target, jnp.arange(count) < half, there[which])


def _somewhere(mask: Array, key: Array) -> Array:
    """The centre of a random cell of an (m, m) mask, (x, y) in frame pixels."""
    score = jnp.where(mask, jax.random.uniform(key, mask.shape), -1)
    row, column = jnp.unravel_index(jnp.argmax(score), mask.shape)
    return LOW_RES * (jnp.stack([column, row]) + 0.5)


def corrected(objects: Objects, logits: Array, choice: Array, seen: Array, key: Array) -> Objects:
    """The prompts with a click in what is wrong, and with the masks to start from.

    Args:
      objects: what was asked.
      logits: (q, 4, m, m), the student's answer.
      choice: (q,), which of the four it would give.
      seen: (m, m) bool, of `inside`.
      key: random.
    """
    logits = jnp.take_along_axis(logits, choice[:, None, None, None], axis=1)[:, 0]
    keys = jax.random.split(key, len(logits))

    def click(logits: Array, target: Array, key: Array) -> tuple[Array, Array, Array]:
        missed, added = target & ~(logits > 0) & seen, ~target & (logits > 0) & seen
        wrong = jnp.where(missed.sum() >= added.sum(), missed, added)
        label = missed.sum() >= added.sum()
        return _somewhere(wrong, key), label.astype(jnp.int32), wrong.any()

    places, labels, there = jax.vmap(click)(logits, objects.target, keys)
    prompts, last = objects.prompts, SLOTS - 1
    prompts = Prompts(
        prompts.coords.at[:, last].set(jnp.where(there[:, None], places, 0)),
        prompts.labels.at[:, last].set(jnp.where(there, labels, -1)),
        prompts.valid.at[:, last].set(there),
        jnp.clip(logits.astype(jnp.float32), -32, 32),
        jnp.ones(len(logits), bool),
    )
    # Two prompts leave no doubt: SAM then asks for one mask.
    return Objects(prompts, objects.target, jnp.ones_like(objects.single), objects.counts)

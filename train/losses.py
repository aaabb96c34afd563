"""Distillation losses: pure functions of arrays, float32 inside, each a mean over what counts.

Masks of what counts come first to mind: a photograph fills only a part of its square frame, and
what the models make of the padding is nobody's business.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from train.config import Channels, Loss, MaskLoss

POWER = {"plain": 0, "half": 1, "full": 2}  # of the deviation that a squared error is divided by
HUBER = 1.0  # deviations, where a Huber loss turns from square to straight


class Moments(NamedTuple):
    """Of a teacher's features over unpadded tokens.

    Attributes:
      mean: (c,) float32.
      deviation: (c,) float32, above 0.
    """

    mean: Array | np.ndarray
    deviation: Array | np.ndarray


def mean(values: Array, counts: Array) -> Array:
    """The mean of `values`, weighted by `counts` (of its first axes); 0 where nothing counts."""
    counts = counts.astype(jnp.float32).reshape(counts.shape + (1,) * (values.ndim - counts.ndim))
    total = jnp.broadcast_to(counts, values.shape).sum()
    return (values * counts).sum() / jnp.maximum(total, 1e-6)


def features(
    student: Array, teacher: Array, inside: Array, moments: Moments, kind: Loss, channels: Channels
) -> Array:
    """How far a student's features are from its teacher's; MSE is 1 for one that gives the mean.

    Args:
      student: (b, h, w, c).
      teacher: the same.
      inside: (b, h, w) bool, tokens that count.
      moments: of the teacher's features.
      kind: of the error. Cosine is 1 minus the cosine of a token's two vectors.
      channels: with "plain" every channel counts by its size, so that those which vary most
        decide; "full" divides each error by its channel's deviation; "half" lies between (the
        square divided by the deviation once).
    """
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    power = POWER[channels] / 2
    size = moments.deviation**power
    if kind == "cosine":
        a, b = student / size, teacher / size
        dot = (a * b).sum(-1)
        norms = jnp.sqrt((a * a).sum(-1) * (b * b).sum(-1) + 1e-12)
        return mean(1 - dot / norms, inside)
    error = (student - teacher) / size
    # In units of what a constant guess errs by, so that one rate suits every choice.
    typical = jnp.sqrt(jnp.mean((moments.deviation / size) ** 2))
    error = error / typical
    if kind == "mse":
        each = error**2
    elif kind == "l1":
        each = jnp.abs(error)
    else:
        small = jnp.abs(error) <= HUBER
        each = jnp.where(small, error**2, 2 * HUBER * jnp.abs(error) - HUBER**2)
    return mean(each, inside)


def focal(logits: Array, target: Array, inside: Array, gamma: float = 2.0) -> Array:
    """(..., y, x) logits and bool targets to (...): binary cross entropy, sure pixels fading.

    Source: arXiv 1708.02002, without its class weight.
    """
    logits = logits.astype(jnp.float32)
    sign = jnp.where(target, 1.0, -1.0)
    surprise = jax.nn.softplus(-sign * logits)  # minus the log of the probability of the truth
    each = surprise * jax.nn.sigmoid(-sign * logits) ** gamma
    return _over_pixels(each, inside)


def cross_entropy(logits: Array, target: Array, inside: Array) -> Array:
    """(..., y, x) logits and bools or probabilities to (...): binary cross entropy."""
    logits = logits.astype(jnp.float32)
    return _over_pixels(jax.nn.softplus(logits) - target * logits, inside)


def dice(logits: Array, target: Array, inside: Array) -> Array:
    """(..., y, x) to (...): one minus the soft overlap, 0 where both agree on nothing."""
    share = jax.nn.sigmoid(logits.astype(jnp.float32)) * inside
    truth = (target & inside).astype(jnp.float32)
    both = (share * truth).sum((-2, -1))
    return 1 - (2 * both + 1) / (share.sum((-2, -1)) + truth.sum((-2, -1)) + 1)


def overlap(prediction: Array, target: Array, inside: Array) -> Array:
    """IoU of bool masks (..., y, x) within `inside`; 1 where both are empty."""
    prediction, target = prediction & inside, target & inside
    both = (prediction & target).sum((-2, -1))
    either = (prediction | target).sum((-2, -1))
    return jnp.where(either > 0, both / jnp.maximum(either, 1), 1.0)


def _over_pixels(each: Array, inside: Array) -> Array:
    inside = jnp.broadcast_to(inside, each.shape)
    return (each * inside).sum((-2, -1)) / jnp.maximum(inside.sum((-2, -1)), 1)


class MaskTerms(NamedTuple):
    """Losses of decoded masks, each a mean over prompts.

    Attributes:
      pixels: of `PIXELS`, without its weight.
      dice: of the same mask.
      iou: of the head that predicts it.
      agreement: IoU with the target of the mask that the model itself would choose; a measure.
    """

    pixels: Array
    dice: Array
    iou: Array
    agreement: Array


PIXELS = {  # the loss of a mask's pixels, and its weight to 1 of Dice
    "focal": (focal, 20.0),  # SAM's (arXiv 2304.02643, section 3)
    "bce": (cross_entropy, 1.0),  # EdgeSAM's
    "soft": (cross_entropy, 5.0),  # against the teacher's probabilities
}


def tokens(
    logits: Array,
    predicted_iou: Array,
    target_logits: Array,
    target_iou: Array,
    single: Array,
    counts: Array,
    inside: Array,
    kind: MaskLoss = "focal",
) -> MaskTerms:
    """Losses of one image's prompts, each of the four masks against the teacher's same one.

    A mask counts by the IoU that the teacher predicts of it, and the more the two differ.

    Args:
      logits: (q, 4, y, x) of the student.
      predicted_iou: (q, 4) of the student.
      target_logits: (q, 4, y, x) of the teacher.
      target_iou: (q, 4) of the teacher.
      single: as for `masks`, and what follows.
    """
    loss, _ = PIXELS[kind]
    target = target_logits > 0
    wanted = jax.nn.sigmoid(target_logits.astype(jnp.float32)) if kind == "soft" else target
    reached = jax.lax.stop_gradient(overlap(logits > 0, target, inside))
    hard = counts[:, None] * jnp.clip(target_iou, 0, 1) * (0.5 + 1.0 - reached)
    allowed = jnp.where(single[:, None], jnp.arange(4) == 0, jnp.arange(4) > 0)
    ours, theirs = (
        jnp.argmax(jnp.where(allowed, x, -jnp.inf), axis=1) for x in (predicted_iou, target_iou)
    )
    q = jnp.arange(len(logits))
    agreement = overlap(logits[q, ours] > 0, target[q, theirs], inside)
    wrong = jnp.square(predicted_iou.astype(jnp.float32) - target_iou)
    return MaskTerms(
        mean(loss(logits, wanted, inside), hard),
        mean(dice(logits, target, inside), hard),
        mean(wrong, jnp.broadcast_to(counts[:, None], wrong.shape)),
        mean(agreement, counts),
    )


def masks(
    logits: Array,
    predicted_iou: Array,
    target: Array,
    single: Array,
    counts: Array,
    inside: Array,
    kind: MaskLoss = "focal",
) -> MaskTerms:
    """Losses of one image's prompts.

    The single mask is trained for prompts that leave no doubt, the one of the other three that is
    nearest for the rest, as in SAM; prompts on which student and teacher differ most count most.

    Args:
      logits: (q, 4, y, x) of the student.
      predicted_iou: (q, 4) of the student.
      target: (q, y, x) bool, the teacher's mask or the truth.
      single: (q,) bool, prompts that ask for one mask.
      counts: (q,) bool, prompts that count.
      inside: (y, x) bool, pixels that count.
      kind: of the pixels' loss.
    """
    target = target[:, None]
    loss, weight = PIXELS[kind]
    pixel, shape = loss(logits, target, inside), dice(logits, target, inside)
    allowed = jnp.where(single[:, None], jnp.arange(4) == 0, jnp.arange(4) > 0)
    nearest = jnp.argmin(jnp.where(allowed, weight * pixel + shape, jnp.inf), axis=1)

    def of(choice: Array, each: Array) -> Array:
        return jnp.take_along_axis(each, choice[:, None], axis=1)[:, 0]

    reached = jax.lax.stop_gradient(overlap(logits > 0, target, inside))
    hard = counts * (0.5 + 1.0 - of(nearest, reached))
    surest = jnp.argmax(jnp.where(allowed, predicted_iou, -jnp.inf), axis=1)
    wrong = jnp.square(predicted_iou.astype(jnp.float32) - reached)
    return MaskTerms(
        mean(of(nearest, pixel), hard),
        mean(of(nearest, shape), hard),
        mean(wrong, allowed & counts[:, None]),
        mean(of(surest, reached), counts),
    )

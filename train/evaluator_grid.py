"""The agreement of two models on unlabelled photographs: a grid of points that one answers first.

The rule, for each photograph: 4 x 4 points at (i + 0.5) / 4 of its part of the frame, in raster
order. The teacher's best of three masks by predicted IoU, as low-resolution logits above 0 within
that part, is kept if the predicted IoU is above 0.75 and its area is 0.2 % to 70 % of the part; one
that overlaps an earlier kept one with an IoU of 0.8 or more is dropped. Each kept mask gives two
prompts for both models: its point (three masks, highest predicted IoU) and its tight box (single
mask). The agreement is the IoU of the two models' low-resolution masks. From the point it is also
given for one and the same of the three masks, that of the teacher's choice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from pycocotools import mask as coco_mask

from samlight_jax.postprocess import LOW_RES, MASK_THRESHOLD
from samlight_jax.preprocess import Frame
from samlight_jax.prompts import BUCKETS, Prompts
from samlight_jax.sam import Sam
from train.evaluator_device import tight_box

POINTS = 4  # on a side
MIN_PREDICTED_IOU = 0.75
MIN_SHARE, MAX_SHARE = 0.002, 0.7
SAME = 0.8  # IoU of two masks that count as one


class Grid(NamedTuple):
    """Of one photograph's g points; pairs are the pixels of intersection and union.

    Attributes:
      kept: (g,) bool.
      iou: (g,) float32, as the teacher predicts it.
      area: (g,) int32, pixels of the teacher's mask.
      box: (g, 4) float32, its tight box in frame pixels.
      by_box, by_point, by_token: (g, 2) int32, the two models' masks.
      masks: (g, 2, m, m / 8) uint8, the teacher's and the model's for the box, bits by row.
    """

    kept: Any
    iou: Any
    area: Any
    box: Any
    by_box: Any
    by_point: Any
    by_token: Any
    masks: Any


def grid_agreement(
    models: tuple[Sam, Sam], embeddings: tuple[Array, Array], inputs: Int[Array, "b 2"]
) -> Grid:
    """Applies the rule to b photographs, one after the other.

    Args:
      models: the model and its teacher.
      embeddings: of each, (b, h, w, 256).
      inputs: (height, width) of each photograph within the frame.
    """
    return jax.lax.map(lambda one: _one(models, one[0], one[1]), (embeddings, inputs))


def grid_points(size: Any) -> Float[Array, "g 2"]:
    """(x, y) of the grid on a (height, width), in raster order."""
    steps = (jnp.arange(POINTS) + 0.5) / POINTS
    y, x = jnp.meshgrid(steps * size[0], steps * size[1], indexing="ij")
    return jnp.stack([x.ravel(), y.ravel()], axis=1)


def _one(models: tuple[Sam, Sam], embeddings: tuple[Array, Array], size: Int[Array, "2"]) -> Grid:
    student, teacher = zip(models, embeddings, strict=True)
    side = embeddings[0].shape[0] * LOW_RES
    inside = jnp.arange(side) * LOW_RES
    inside = (inside < size[0])[:, None] & (inside < size[1])
    points = _prompts(grid_points(size)[:, None], (1,))
    three, predicted = _three(teacher, points, inside)
    choice, g = jnp.argmax(predicted, axis=1), jnp.arange(len(predicted))
    masks, iou = three[g, choice], predicted[g, choice]
    ours, our_iou = _three(student, points, inside)
    area = masks.sum(axis=(1, 2))
    share = area / inside.sum()
    good = (iou > MIN_PREDICTED_IOU) & (share >= MIN_SHARE) & (share <= MAX_SHARE)

    boxes = jax.vmap(tight_box)(masks) * LOW_RES
    corners = _prompts(boxes.reshape(-1, 2, 2), (2, 3))
    by_box = [_single(each, corners, inside) for each in (teacher, student)]
    return Grid(
        distinct(masks, good),
        iou,
        area.astype(jnp.int32),
        boxes,
        _pairs(*by_box),
        _pairs(masks, ours[g, jnp.argmax(our_iou, axis=1)]),
        _pairs(masks, ours[g, choice]),
        jnp.packbits(jnp.stack(by_box, axis=1), axis=-1),
    )


def distinct(masks: Bool[Array, "g y x"], good: Bool[Array, "g"]) -> Bool[Array, "g"]:
    """The good masks that overlap no earlier kept one."""
    flat = masks.reshape(len(masks), -1).astype(jnp.float32)
    both = jnp.dot(flat, flat.T, precision=jax.lax.Precision.HIGHEST)  # exact: below 2 ** 24
    area = jnp.diagonal(both)
    same = both >= SAME * (area[:, None] + area - both)

    def keep(i: Any, kept: Array) -> Array:
        return kept.at[i].set(good[i] & ~(same[i] & kept).any())

    return jax.lax.fori_loop(0, len(masks), keep, jnp.zeros(len(masks), bool))


def _prompts(coords: Float[Array, "g k 2"], labels: tuple[int, ...]) -> Prompts:
    """Prompts of the same k tokens each; SAM's pad point follows a single point."""
    (g, k), slots = coords.shape[:2], BUCKETS[0]
    tokens = k + 1 if labels == (1,) else k
    row = np.full(slots, -1, np.int32)
    row[:k] = labels
    return Prompts(
        jnp.zeros((g, slots, 2)).at[:, :k].set(coords),
        jnp.broadcast_to(row, (g, slots)),
        jnp.broadcast_to(np.arange(slots) < tokens, (g, slots)),
    )


def _three(model: tuple[Sam, Array], prompts: Prompts, inside: Array) -> tuple[Array, Array]:
    logits, iou = model[0].decode(model[1], prompts)
    return (logits[:, 1:] > MASK_THRESHOLD) & inside, iou[:, 1:].astype(jnp.float32)


def _single(model: tuple[Sam, Array], prompts: Prompts, inside: Array) -> Array:
    return (model[0].decode(model[1], prompts)[0][:, 0] > MASK_THRESHOLD) & inside


def _pairs(a: Bool[Array, "g y x"], b: Bool[Array, "g y x"]) -> Int[Array, "g 2"]:
    sums = [(a & b).sum(axis=(1, 2)), (a | b).sum(axis=(1, 2))]
    return jnp.stack(sums, axis=1).astype(jnp.int32)


def grid_record(grid: Grid, frame: Frame, masks: bool) -> list[dict[str, Any]]:
    """The kept prompts of one photograph, as JSON has them; in photograph pixels.

    With `masks` also both models' masks for the box as COCO's RLE, "truth" being the teacher's.
    """
    x, y = frame.scale
    points = np.asarray(grid_points(np.array(frame.input, np.float32))) / (x, y)
    pixel = LOW_RES * LOW_RES / (x * y)  # photograph pixels of a low-resolution one
    return [
        {
            "id": str(i),
            "category": None,
            "area": round(float(grid.area[i] * pixel), 1),
            "box": [round(float(side), 3) for side in grid.box[i] / (x, y, x, y)],
            "points": [[round(float(points[i, 0]), 3), round(float(points[i, 1]), 3), 1]],
            "predicted_iou": round(float(grid.iou[i]), 6),
            "agreement": ratio(grid.by_box[i]),
            "agreement_point": ratio(grid.by_point[i]),
            "agreement_token": ratio(grid.by_token[i]),
            **(_rles(grid.masks[i], frame) if masks else {}),
        }
        for i in np.flatnonzero(grid.kept)
    ]


def _rles(bits: np.ndarray, frame: Frame) -> dict[str, Any]:
    """The two masks enlarged to the photograph, nearest pixel."""
    rles = {}
    for name, mask in zip(("truth", "rle"), np.unpackbits(bits, axis=-1), strict=True):
        rows, columns = (
            ((np.arange(size) + 0.5) * scale / LOW_RES).astype(int)
            for size, scale in zip(frame.original, frame.scale[::-1], strict=True)
        )
        found: Any = coco_mask.encode(np.asfortranarray(mask[rows][:, columns]))
        rles[name] = {"size": found["size"], "counts": found["counts"].decode()}
    return rles


def ratio(pair: Any) -> float:
    """Intersection over union; 1 where both masks are empty, since they are equal."""
    intersection, union = (int(pixels) for pixels in pair)
    return round(intersection / union, 6) if union else 1.0

"""Scores of masks, and how sure they are: pure functions in NumPy; AP is pycocotools'."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from samlight_jax.errors import InputError
from train.annotations import Photo

SMALL, LARGE = 32**2, 96**2
AP_NAMES = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)


class Interval(NamedTuple):
    """A mean of `n` values and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    n: int


def mask_iou(intersection: Any, union: Any) -> np.ndarray:
    """Counts of pixels, of any shape, to IoU in float64; two empty masks are equal: 1."""
    intersection, union = np.asarray(intersection, np.float64), np.asarray(union, np.float64)
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0)


def boundary_reach(size: tuple[int, int], dilation_ratio: float = 0.02) -> int:
    """Pixels from the edge that count as boundary: a share of the diagonal, 1 at least."""
    return max(1, round(dilation_ratio * math.hypot(*size)))


def boundary(mask: np.ndarray, dilation_ratio: float = 0.02) -> np.ndarray:
    """The pixels of a (height, width) bool mask that are near its edge.

    The mask without its erosion by 3x3, `boundary_reach` times; beyond the photograph is
    background.

    Source: Boundary IoU (arXiv 2103.16562), section 4.
    """
    padded = np.pad(mask.astype(np.uint8), 1)
    reach = boundary_reach((mask.shape[0], mask.shape[1]), dilation_ratio)
    inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=reach)[1:-1, 1:-1]
    return mask & (inner == 0)


def boundary_iou(mask: np.ndarray, truth: np.ndarray, dilation_ratio: float = 0.02) -> float:
    """The IoU of the boundaries of two (height, width) bool masks."""
    ours, theirs = boundary(mask, dilation_ratio), boundary(truth, dilation_ratio)
    return float(mask_iou((ours & theirs).sum(), (ours | theirs).sum()))


def area_class(area: float) -> Literal["small", "medium", "large"]:
    """COCO's classes: below 32**2, below 96**2, and beyond; area in pixels.

    In COCOeval, an area of exactly 32**2 or 96**2 is of both classes.
    """
    return "small" if area < SMALL else "medium" if area < LARGE else "large"


def mean_interval(values: Any, *, seed: int = 0, resamples: int = 2000) -> Interval:
    """The mean of (n,) values and its 95 % percentile bootstrap interval.

    The values are drawn again one by one: that instances of one photograph resemble each other is
    not considered.

    Raises:
      InputError: there are no values, or some are not finite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise InputError(f"No mean of values of shape {values.shape}; expected (n,) finite ones.")
    rng = np.random.default_rng(seed)
    n = len(values)
    means = [values[rng.integers(n, size=n)].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high), n)


def paired_difference(a: Any, b: Any, *, seed: int = 0, resamples: int = 2000) -> Interval:
    """The mean of a - b over the same (n,) instances, and its interval as in `mean_interval`."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise InputError(f"No differences of {a.shape} and {b.shape} values; expected pairs.")
    return mean_interval(a - b, seed=seed, resamples=resamples)


def average_precision(
    photos: Sequence[Photo], results: Sequence[Mapping[str, Any]]
) -> dict[str, float | None]:
    """COCO's twelve numbers for masks, by pycocotools' COCOeval.

    Data without categories is scored as one category. For LVIS these are COCO's numbers (100 masks
    a photograph, every category everywhere), not LVIS's federated ones.

    Args:
      photos: the truth; crowds count as in COCO.
      results: as in COCO's results files: "image_id" (`Photo.id`), "category_id" (or None),
        "segmentation" (compressed RLE), "score".

    Returns:
      By name, of `AP_NAMES`; None where there is no such instance.

    Raises:
      InputError: a result's photo is unknown.
    """
    # COCOeval keeps ids in float arrays, with 0 for "none": our own, from 1 on.
    image_ids = {photo.id: i for i, photo in enumerate(photos, 1)}
    truth = [
        {
            "image_id": image_ids[photo.id],
            "category_id": instance.category,
            "segmentation": instance.rle,
            "bbox": _xywh(instance.box),
            "area": instance.area,
            "iscrowd": int(instance.crowd),
        }
        for photo in photos
        for instance in photo.instances
    ]
    if unknown := [r["image_id"] for r in results if r["image_id"] not in image_ids]:
        raise InputError(f"A result is of photo {unknown[0]!r}, which the data set has not.")
    found = [
        {
            "image_id": image_ids[result["image_id"]],
            "category_id": result["category_id"],
            "segmentation": result["segmentation"],
            "score": float(result["score"]),
        }
        for result in results
    ]
    return _evaluate(sorted(image_ids.values()), truth, found)


def _evaluate(images: list[int], truth: list[dict], found: list[dict]) -> dict[str, float | None]:
    categories: dict[int | None, int] = {}
    for i, annotation in enumerate(truth + found):
        key = annotation["category_id"]
        annotation["id"] = i + 1
        annotation["category_id"] = categories.setdefault(key, len(categories) + 1)
    with contextlib.redirect_stdout(io.StringIO()):
        coco: Any = COCO()
        coco.dataset = {
            # The sizes are read and, with masks as RLE, not used.
            "images": [{"id": i, "height": 0, "width": 0} for i in images],
            "annotations": truth,
            "categories": [{"id": i} for i in categories.values()],
        }
        coco.createIndex()
        detections: Any = coco.loadRes(found) if found else COCO()
        evaluation = COCOeval(coco, detections, "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = np.asarray(evaluation.stats, np.float64).tolist()
    return {name: None if value < 0 else value for name, value in zip(AP_NAMES, stats, strict=True)}


def _xywh(box: tuple[float, float, float, float]) -> list[float]:
    x1, y1, x2, y2 = box
    return [x1, y1, x2 - x1, y2 - y1]

"""The masks that are left: duplicates and small regions go; the records have SAM's form."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from samlight_jax import automatic_mask_generator_device as on
from samlight_jax import automatic_mask_generator_runs as runs

MAX_MASKS = 8192  # that enter one suppression
MIN_PADDED = 64  # boxes; beyond, padded to powers of two: each is a small compilation

Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Mask:
    """Photograph pixels: run lengths; the box and the crop as x1, y1, x2, y2."""

    counts: np.ndarray
    box: Box
    iou: float
    stability: float
    point: list[float]
    crop: Box


def survivors(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """The numbers of the boxes (m, 4) that no better one suppresses, best first.

    Of more than `MAX_MASKS` those with the highest scores are considered, and a warning says so.
    """
    order = np.argsort(-scores, kind="stable")
    if len(order) > MAX_MASKS:
        warnings.warn(
            f"{len(order)} masks passed the filters; the {MAX_MASKS} with the highest score go on. "
            "Raise pred_iou_thresh or stability_score_thresh, or use fewer points.",
            stacklevel=5,
        )
        order = order[:MAX_MASKS]
    count = len(order)
    padded = np.zeros((max(MIN_PADDED, 1 << max(count - 1, 0).bit_length()), 4), np.float32)
    padded[:count] = boxes[order]
    keep = on.suppress(padded, np.int32(count), np.float32(threshold))
    return order[np.asarray(keep)[:count]]


def across_crops(masks: Sequence[Mask], threshold: float) -> list[Mask]:
    """Without the duplicates between crops; a mask of a smaller crop is the better one."""
    sides = np.array([mask.crop for mask in masks]).reshape(-1, 4)
    areas = (sides[:, 2:] - sides[:, :2]).prod(axis=1)
    kept = survivors(_boxes(masks), 1 / areas.astype(np.float32), threshold)
    return [masks[i] for i in kept]


def cleaned(
    masks: Sequence[Mask], size: tuple[int, int], area: float, threshold: float
) -> list[Mask]:
    """Without small regions; then without duplicates, the unchanged masks being the better ones."""
    scores = np.ones(len(masks), np.float32)
    new = list(masks)
    for i, mask in enumerate(masks):
        pixels, changed = runs.without_small_regions(runs.mask_of(mask.counts, size), area)
        if changed:
            counts = runs.runs_of(pixels)
            box = runs.box_of(counts, size[0])
            new[i] = dataclasses.replace(mask, counts=counts, box=box)
            scores[i] = 0
    return [new[i] for i in survivors(_boxes(new), scores, threshold)]


def _boxes(masks: Sequence[Mask]) -> np.ndarray:
    return np.array([mask.box for mask in masks]).reshape(-1, 4)


def record(mask: Mask, size: tuple[int, int], output_mode: str) -> dict[str, Any]:
    """SAM's dict of a mask; see `SamAutomaticMaskGenerator.generate`."""
    if output_mode == "binary_mask":
        segmentation: Any = runs.mask_of(mask.counts, size)
    elif output_mode == "coco_rle":
        segmentation = runs.compressed(mask.counts, size)
    else:
        segmentation = {"size": list(size), "counts": mask.counts.tolist()}
    return {
        "segmentation": segmentation,
        "area": runs.area_of(mask.counts),
        "bbox": _corner_and_extent(mask.box),
        "predicted_iou": min(max(mask.iou, 0.0), 1.0),
        "point_coords": [mask.point],
        "stability_score": mask.stability,
        "crop_box": _corner_and_extent(mask.crop),
    }


def _corner_and_extent(box: Box) -> list[int]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

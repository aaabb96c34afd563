"""Many masks on one page of `samlight demo`: their numbers, their colours, COCO's entries."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from samlight_jax import automatic_mask_generator_runs as runs

GOLDEN = 0.618034  # steps of the hue that keep neighbours in the list apart


def label_map(counts: Sequence[Sequence[int]], size: tuple[int, int]) -> np.ndarray:
    """For each pixel the number of a mask, from 1 on, or 0; where several lie, the smallest's.

    Args:
      counts: for each mask COCO's run lengths.
      size: (height, width) of the photograph.

    Returns:
      (height, width) uint16.
    """
    flat = np.zeros(size[0] * size[1], np.uint16)  # column by column
    areas = [sum(lengths[1::2]) for lengths in counts]
    for mask in np.argsort(areas)[::-1]:
        ends = np.cumsum(counts[mask])
        for start, end in ends[: len(ends) // 2 * 2].reshape(-1, 2):
            flat[start:end] = mask + 1
    return flat.reshape(size[::-1]).T


def coloured(image: np.ndarray, labels: np.ndarray) -> Image.Image:
    """An image with each mask in a colour of its own, and white lines around them.

    Args:
      image: (rows, columns, 3) uint8; the photograph, or the same smaller.
      labels: (height, width) of `label_map`, of the photograph.
    """
    rows, columns = (
        (np.arange(shown) * whole) // shown
        for shown, whole in zip(image.shape[:2], labels.shape, strict=True)
    )
    labels = labels[rows[:, None], columns]
    hues = np.arange(int(labels.max(initial=0)) + 1) * GOLDEN % 1
    colours = np.array([colorsys.hsv_to_rgb(hue, 0.75, 1.0) for hue in hues], np.float32) * 255
    shown = image.astype(np.float32)
    inside = labels > 0
    shown[inside] = 0.5 * shown[inside] + 0.5 * colours[labels[inside]]
    edge = np.zeros(labels.shape, bool)
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    shown[edge] = 255
    return Image.fromarray(shown.astype(np.uint8))


def annotation(counts: Sequence[int] | np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's entry of a mask given by its run lengths: segmentation, area, box in pixels."""
    lengths = np.asarray(counts)
    area = runs.area_of(lengths)
    x1, y1, x2, y2 = runs.box_of(lengths, size[0])
    return {
        "segmentation": {"size": list(size), "counts": lengths.tolist()},
        "area": area,
        "bbox": [x1, y1, x2 - x1 + 1, y2 - y1 + 1] if area else [0, 0, 0, 0],
    }

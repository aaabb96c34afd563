"""Overlays: a mask, its outline and the prompt, on the photograph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

MASK = np.array([30, 144, 255])
OUTLINE = (255, 255, 255)
FOREGROUND, BACKGROUND = (46, 204, 64), (255, 65, 54)


def overlay(
    image: np.ndarray,
    mask: np.ndarray,
    *,
    points: Sequence[tuple[float, float, int]] = (),
    box: Sequence[float] | None = None,
) -> Image.Image:
    """The photograph with a mask in blue, foreground points in green, background in red.

    Args:
      image: (height, width, 3) uint8.
      mask: (height, width) bool.
      points: (x, y, label) each, photograph pixels.
      box: x1, y1, x2, y2.
    """
    shown = image.astype(np.float32)
    shown[mask] = 0.5 * shown[mask] + 0.5 * MASK
    width = max(1, round(max(mask.shape) / 400))
    shown[_outline(mask, width)] = OUTLINE
    picture = Image.fromarray(shown.astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    if box is not None:
        pen.rectangle(tuple(box), outline=FOREGROUND, width=2 * width)
    radius = 5 * width
    for x, y, label in points:
        circle = (x - radius, y - radius, x + radius, y + radius)
        pen.ellipse(circle, fill=FOREGROUND if label else BACKGROUND, outline=OUTLINE, width=width)
    return picture


def _outline(mask: np.ndarray, width: int) -> np.ndarray:
    """The mask's pixels within `width` of its edge; the picture's border is no edge."""
    inner = np.pad(mask, width, mode="edge")
    height, length = mask.shape
    views = [
        inner[width + dy : width + dy + height, width + dx : width + dx + length]
        for dy, dx in ((width, 0), (-width, 0), (0, width), (0, -width))
    ]
    return mask & ~np.logical_and.reduce(views)

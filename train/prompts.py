"""Prompts from one annotated mask, as a user could give them: pure functions in NumPy.

Masks are (height, width) bool and not empty; points are pixels (x, y) as integers. What is random
takes a generator: seed it by (seed, photo, instance), and the order of the photographs is of no
account. The prompt "box" is `Instance.box` itself.
"""

from __future__ import annotations

import cv2
import numpy as np

Point = tuple[int, int]


def point_center(mask: np.ndarray) -> Point:
    """The pixel of the mask nearest to its centroid; of several the first, row by row."""
    rows, columns = np.nonzero(mask)
    # n times the squared distance but for a constant, in integers: a tie is a tie.
    along = rows * rows.sum() + columns * columns.sum()
    nearest = int((len(rows) * (rows**2 + columns**2) - 2 * along).argmin())
    return int(columns[nearest]), int(rows[nearest])


def point_random(mask: np.ndarray, rng: np.random.Generator) -> Point:
    """A pixel of the mask, each equally likely."""
    ((x, y),) = points_n(mask, 1, rng).tolist()
    return x, y


def points_n(mask: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, 2) int64: different pixels of the mask at random; all of them if it has fewer."""
    pixels = np.flatnonzero(mask)
    chosen = rng.choice(pixels, min(n, len(pixels)), replace=False)
    rows, columns = np.divmod(chosen, mask.shape[1])
    return np.stack([columns, rows], axis=1)


def point_dt(mask: np.ndarray) -> Point:
    """The pixel of the mask farthest from its edge; of several the first, row by row.

    The distance is OpenCV's with a mask of 5x5 (about L2); beyond the photograph is background.
    """
    pixels = mask.astype(np.uint8)
    left, top, width, height = cv2.boundingRect(pixels)  # the rest is background: time saved
    padded = np.pad(pixels[top : top + height, left : left + width], 1)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return left + int(x), top + int(y)


def box_jitter(
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    share: float = 0.1,
    limit: float = 20.0,
) -> tuple[float, float, float, float]:
    """A box as a user would draw it: every side moved by its own normal noise.

    Args:
      box: x1, y1, x2, y2, within the photograph at least in part.
      size: (height, width) of the photograph; the result lies within.
      rng: draws four numbers.
      share: standard deviation, of the box's width (x) or height (y).
      limit: no side moves farther, in pixels; nor more than 0.45 of the box, so that none crosses
        the opposite one.

    Source: SAM (arXiv 2304.02643), appendix A, "Training algorithm": 10 %, at most 20 pixels; there
      of the 1024-pixel frame, here of the photograph.
    """
    corners = np.clip(np.asarray(box, np.float64), 0, [size[1], size[0]] * 2)
    sides = np.tile(corners[2:] - corners[:2], 2)
    farthest = np.minimum(limit, 0.45 * sides)
    noise = np.clip(rng.normal(size=4) * share * sides, -farthest, farthest)
    x1, y1, x2, y2 = np.clip(corners + noise, 0, [size[1], size[0]] * 2).tolist()
    return x1, y1, x2, y2


def corrective_click(prediction: np.ndarray, truth: np.ndarray) -> tuple[int, int, int] | None:
    """The click that mends the largest error.

    The errors are the connected regions (8 neighbours) of missed and of wrongly covered pixels. The
    largest region by pixels is clicked at its point farthest from the edge; of equal ones, a missed
    one before a wrong one.

    Returns:
      (x, y, label): label 1 if the pixels were missed, 0 if they are wrong; None if the masks are
      equal.
    """
    missed_size, missed = _largest_region(truth & ~prediction)
    wrong_size, wrong = _largest_region(prediction & ~truth)
    if not missed_size + wrong_size:
        return None
    label = int(missed_size >= wrong_size)
    return *point_dt(missed if label else wrong), label


def _largest_region(mask: np.ndarray) -> tuple[int, np.ndarray]:
    """(pixels, mask) of the largest connected region; (0, the empty mask) if there is none."""
    _, regions, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA]
    if not len(areas):
        return 0, mask
    best = int(areas.argmax())
    return int(areas[best]), regions == best + 1

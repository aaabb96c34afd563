"""Masks as COCO's uncompressed run lengths: made of packed bits, measured, cleaned, unfolded.

Runs go column by column and begin with background. Source of `without_small_regions`:
segment-anything, `utils/amg.py`, `remove_small_regions`.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from samlight_jax.errors import InputError

EXTRA = "pip install 'samlight-jax[amg]'"


class Runs:
    """Collects the runs of q masks, given their bits in stripes of columns from left to right.

    Args:
      masks: q.
      size: (height, width) of the photograph.
    """

    def __init__(self, masks: int, size: tuple[int, int]):
        self.size = size
        self._last = np.zeros((masks, 1), np.uint8)  # of the bits so far, each mask's last
        self._changes: list[list[np.ndarray]] = [[] for _ in range(masks)]

    def add(self, bits: np.ndarray, first: int) -> None:
        """(masks, columns, bytes of a column) uint8 from column `first` on; bytes in eights.

        A column's bits beyond the photograph repeat its last pixel; columns beyond do not count.
        """
        height, width = self.size
        stride = bits.shape[2]
        masks = len(self._changes)
        flat = bits[:masks].reshape(masks, -1)
        before = np.concatenate([self._last, flat[:, :-1]], axis=1)
        self._last = flat[:, -1:]
        # Bits that differ from the one before; few words of 64 hold any.
        words = (flat ^ (flat >> 1 | before << 7)).reshape(-1).view(np.uint64)
        some = np.flatnonzero(words)
        ones = np.flatnonzero(np.unpackbits(words[some].view(np.uint8)).view(bool))
        mask, bit = np.divmod(64 * some[ones >> 6] + (ones & 63), 8 * flat.shape[1])
        column, row = np.divmod(bit, 8 * stride)
        at = (first + column) * height + row
        ends = np.cumsum(np.bincount(mask, minlength=masks))[:-1]
        for changes, found in zip(self._changes, np.split(at, ends), strict=True):
            changes.append(found[found < height * width])

    def counts(self) -> list[np.ndarray]:
        """Each mask's run lengths."""
        end = self.size[0] * self.size[1]
        return [np.diff(np.concatenate([[0], *changes, [end]])) for changes in self._changes]


def runs_of(mask: np.ndarray) -> np.ndarray:
    """(height, width) bool to run lengths."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], changes, [mask.size]]))


def mask_of(counts: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Run lengths to (height, width) bool; columns lie together in memory, as in SAM."""
    pixels = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return pixels.reshape(size[::-1]).T


def _spans(counts: np.ndarray) -> np.ndarray:
    """(runs, 2): where each run of the mask begins and ends in its column-major pixels."""
    ends = np.cumsum(counts)
    return ends[: len(ends) // 2 * 2].reshape(-1, 2)


def area_of(counts: np.ndarray) -> int:
    """The mask's pixels."""
    return int(counts[1::2].sum())


def box_of(counts: np.ndarray, height: int) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 of the outermost pixels; zeros if the mask is empty."""
    spans = _spans(counts)
    if not len(spans):
        return 0, 0, 0, 0
    (x1, *_), (*_, x2) = spans[:, 0] // height, (spans[:, 1] - 1) // height
    top, bottom = spans[:, 0] % height, (spans[:, 1] - 1) % height
    whole = (spans[:, 0] // height != (spans[:, 1] - 1) // height).any()
    if whole:  # a run that goes on in the next column touches both borders
        return int(x1), 0, int(x2), height - 1
    return int(x1), int(top.min()), int(x2), int(bottom.max())


def compressed(counts: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's compressed form, `counts` as text."""
    coder = library("pycocotools.mask", "output_mode='coco_rle'")
    rle = coder.frPyObjects({"size": list(size), "counts": counts.tolist()}, *size)
    return {"size": list(size), "counts": rle["counts"].decode()}


def without_small_regions(mask: np.ndarray, area: float) -> tuple[np.ndarray, bool]:
    """The mask with its holes and then its islands below `area` pixels gone, and if any were.

    Neighbours are the eight around a pixel. If every island is small, the largest stays.
    """
    changed = False
    for holes in (True, False):
        labels, sizes = _regions(mask ^ holes)
        small = 1 + np.flatnonzero(sizes < area)
        if not len(small):
            continue
        if not holes and len(small) == len(sizes):
            small = np.setdiff1d(small, 1 + np.argmax(sizes))
        lookup = np.zeros(len(sizes) + 1, bool)
        lookup[small] = True
        mask = mask | lookup[labels] if holes else mask & ~lookup[labels]
        changed = True
    return mask, changed


def _regions(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every pixel's region, 0 for none, and the sizes of the regions from 1 on."""
    cv2 = library("cv2", "min_mask_region_area")
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    return labels, stats[1:, -1]


def library(name: str, purpose: str) -> Any:
    """A library of the extra `amg`, imported when it is needed.

    Raises:
      InputError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        package = {"cv2": "opencv-python-headless"}.get(name, name.partition(".")[0])
        raise InputError(
            f"{purpose} needs {package}, which is not installed; {EXTRA}, or {package} alone."
        ) from None

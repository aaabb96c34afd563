"""Where the generator looks: crops of a photograph, grids of points.

Source: segment-anything, `utils/amg.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from samlight_jax.errors import InputError
from samlight_jax.preprocess import Frame


@dataclasses.dataclass(frozen=True)
class Crop:
    """A part of a photograph, and where it lies in the model's frame.

    Attributes:
      photo: which of the photographs.
      size: (height, width) of the photograph.
      box: x1, y1, x2, y2 in it, the far edges not included.
      layer: of crops, 0 is the whole photograph.
      frame: of the crop.
      pixels: (height, width, 3) uint8, resized to the frame's `input`.
    """

    photo: int
    size: tuple[int, int]
    box: tuple[int, int, int, int]
    layer: int
    frame: Frame
    pixels: np.ndarray


def crops_of(
    photo: int, image: np.ndarray, layers: int, overlap_ratio: float, image_size: int
) -> Iterator[Crop]:
    """The whole photograph, then 4**i crops for each layer i, made one by one.

    Raises:
      InputError: the photograph is too small or too narrow for them.
    """
    size = image.shape[0], image.shape[1]
    for layer, (x1, y1, x2, y2) in boxes(size, layers, overlap_ratio):
        if x1 >= x2 or y1 >= y2:
            raise InputError(
                f"The image of {size[1]}x{size[0]} pixels is too small for crop_n_layers={layers}."
            )
        frame = Frame((y2 - y1, x2 - x1), image_size)
        part = image[y1:y2, x1:x2]
        if frame.input != frame.original:
            height, width = frame.input
            resized = Image.fromarray(part).resize((width, height), Image.Resampling.BILINEAR)
            part = np.asarray(resized)
        yield Crop(photo, size, (x1, y1, x2, y2), layer, frame, part)


def boxes(
    size: tuple[int, int], layers: int, overlap_ratio: float
) -> list[tuple[int, tuple[int, int, int, int]]]:
    """(layer, box) of every crop of a photograph of (height, width)."""
    height, width = size
    found = [(0, (0, 0, width, height))]
    for layer in range(1, layers + 1):
        side = 2**layer
        overlap = int(overlap_ratio * min(size) * (2 / side))
        w, h = (math.ceil((overlap * (side - 1) + length) / side) for length in (width, height))
        for i, j in itertools.product(range(side), repeat=2):
            x, y = i * (w - overlap), j * (h - overlap)
            found.append((layer, (x, y, min(x + w, width), min(y + h, height))))
    return found


def grids_of(
    points_per_side: int | None,
    layers: int,
    downscale_factor: int,
    point_grids: Sequence[Any] | None,
) -> list[np.ndarray]:
    """A grid of points for each layer, (n, 2), x then y, 0 to 1.

    Raises:
      InputError: both kinds of grid or none, or a grid that is none.
    """
    if (points_per_side is None) == (point_grids is None):
        raise InputError(
            f"Got points_per_side={points_per_side} and point_grids "
            f"{'too' if point_grids is not None else 'None'}; expected exactly one of them, the "
            "other None."
        )
    if point_grids is None:
        assert points_per_side is not None
        sides = [int(points_per_side / downscale_factor**i) for i in range(layers + 1)]
        if min(sides) < 1:
            raise InputError(
                f"points_per_side={points_per_side} divided by "
                f"crop_n_points_downscale_factor={downscale_factor} in each of {layers} layers "
                "leaves no point; use a larger grid or a smaller factor."
            )
        return [_grid(side) for side in sides]
    grids = [np.asarray(grid, np.float64) for grid in point_grids]
    if len(grids) <= layers:
        raise InputError(
            f"`point_grids` holds {len(grids)} grids; expected {layers + 1}, one for each layer of "
            "crops and one for the whole image."
        )
    for grid in grids:
        if grid.ndim != 2 or grid.shape[1] != 2 or not len(grid):
            raise InputError(f"A grid of `point_grids` has shape {grid.shape}; expected (n, 2).")
        if not ((grid >= 0) & (grid <= 1)).all():
            raise InputError("`point_grids` holds values outside 0 to 1; expected x / width.")
    return grids


def _grid(side: int) -> np.ndarray:
    places = np.linspace(1 / (2 * side), 1 - 1 / (2 * side), side)
    x, y = np.meshgrid(places, places)
    return np.stack([x, y], axis=-1).reshape(-1, 2)

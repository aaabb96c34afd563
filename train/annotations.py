"""Photographs with object masks, whatever the format they came in: one `Dataset`.

What is wrong in the annotations is collected as `Problem`s, and the annotation is left out; a data
set of which nothing is left, or that cannot be read, is an `InputError`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pycocotools.mask

from samlight_jax.errors import InputError
from train.photographs import Root, open_photographs

Kind = Literal["coco", "lvis", "sa1b", "folder", "tfds"]
Box = tuple[float, float, float, float]
mask_utils: Any = pycocotools.mask  # its stubs name a private type


@dataclasses.dataclass(frozen=True)
class Problem:
    """What was left out, and why, in a sentence."""

    what: str
    why: str


@dataclasses.dataclass(frozen=True)
class Instance:
    """One annotated object.

    Attributes:
      id: unique in the data set.
      rle: pycocotools' compressed RLE of the mask, {"size": [height, width], "counts": bytes}.
      box: x1, y1, x2, y2 in photograph pixels, as annotated, not rounded; else the mask's.
      area: pixels, as annotated; else the mask's.
      crowd: whether it stands for a group of objects (COCO's `iscrowd`).
      category: a key of `Dataset.categories`, or None.
    """

    id: str
    rle: dict[str, Any]
    box: Box
    area: float
    crowd: bool = False
    category: int | None = None

    def mask(self) -> np.ndarray:
        """(height, width) bool."""
        return mask_utils.decode(self.rle).astype(bool)


@dataclasses.dataclass(frozen=True)
class Photo:
    """One photograph: `name` is as in the data and unique; `size` is (height, width) if known."""

    id: str
    name: str
    size: tuple[int, int] | None = None
    instances: tuple[Instance, ...] = ()


@dataclasses.dataclass
class Dataset:
    """Photographs in a fixed order; their pixels are read when asked for.

    Attributes:
      name: such as "coco/val2017", for reports.
      kind: of `Kind`.
      photos: in the order of the data.
      categories: names by id.
      problems: what the annotations had to leave out.
      fingerprint: sha256 of what identifies the data.
      pixels: a photograph's (height, width, 3) uint8 RGB by `Photo.name`.
    """

    name: str
    kind: Kind
    photos: tuple[Photo, ...]
    categories: dict[int, str]
    problems: list[Problem]
    fingerprint: str
    pixels: Callable[[str], np.ndarray] = dataclasses.field(repr=False)

    def read(self, photo: Photo) -> np.ndarray:
        """(height, width, 3) uint8 RGB; may be called from many threads.

        Raises:
          InputError: missing, damaged, or of another size than its annotations say.
        """
        image = self.pixels(photo.name)
        if photo.size not in (None, image.shape[:2]):
            height, width = photo.size
            raise InputError(
                f"{photo.name} has {image.shape[1]}x{image.shape[0]} pixels; its annotations are "
                f"for {width}x{height}: they belong to another copy of the photograph."
            )
        return image


def open_dataset(data: str, root: Root | None = None, split: str | None = None) -> Dataset:
    """Opens a data set; pixels are read later.

    Args:
      data: "coco", "lvis", "sa1b", "folder" (photographs without annotations), "tfds:NAME" such as
        "tfds:coco/2017", or the path of a JSON file in COCO's format.
      root: the folder of the data, or tars of photographs (a path, a pattern, or several). For a
        JSON file: of the photographs; without it they are sought beside the file.
      split: such as "val2017"; not needed where the root holds one split.

    Raises:
      InputError: no such data, nothing in it, or a file that cannot be read.
    """
    from train import coco, sa1b, tfds_data  # each builds on the types above

    if data.startswith("tfds:"):
        return tfds_data.open_tfds(data.removeprefix("tfds:"), _single(root), split)
    if data.lower().endswith(".json"):
        return coco.open_json(Path(data), root)
    if data not in ("coco", "lvis", "sa1b", "folder"):
        raise InputError(
            f"data={data!r}: expected 'coco', 'lvis', 'sa1b', 'folder', 'tfds:NAME' or the path "
            "of a COCO-format .json file."
        )
    if not root:
        raise InputError(f"data={data!r} needs a root: the folder (or tars) that holds the data.")
    if data == "sa1b":
        return sa1b.open_sa1b(open_photographs(root))
    if data == "folder":
        return _open_folder(root)
    return coco.open_layout(data, Path(_single(root) or ""), split)


def _single(root: Root | None) -> Path | None:
    if root is None or isinstance(root, (str, os.PathLike)):
        return root if root is None else Path(root)
    raise InputError(f"root={root!r}: this kind of data takes one folder.")


def _open_folder(root: Root) -> Dataset:
    photographs = open_photographs(root)
    first, *others = [root] if isinstance(root, (str, os.PathLike)) else root
    photos = tuple(Photo(id=name, name=name) for name in photographs.names)
    if not photos:
        raise InputError(f"{photographs.source} holds no photographs (.jpg, .png, .webp ...).")
    entries = (f"{name} {photographs.entries[name].size}" for name in photographs.names)
    return Dataset(
        name=Path(first).name + (f" and {len(others)} more" if others else ""),
        kind="folder",
        photos=photos,
        categories={},
        problems=[],
        fingerprint=fingerprint(entries),
        pixels=lambda name: photographs.read(name, upright=True),
    )


def fingerprint(parts: Iterable[str | bytes]) -> str:
    """Sha256 of several texts, in order; where one ends counts."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()


def make_instance(
    *, id: Any, segmentation: Any, size: tuple[int, int], bbox: Any, area: Any, **rest: Any
) -> Instance:
    """An instance from the fields of an annotation in COCO's format.

    Args:
      id: becomes text.
      segmentation: see `to_rle`.
      size: (height, width) of the photograph.
      bbox: x, y, width, height, or None.
      area: pixels, or None.
      **rest: `crowd` and `category`.

    Raises:
      InputError: the mask is empty, or something is not what it should be.
    """
    rle = to_rle(segmentation, size)
    pixels = float(mask_utils.area(rle))
    if not pixels:
        raise InputError("its mask is empty")
    x, y, width, height = _numbers(mask_utils.toBbox(rle) if bbox is None else bbox, 4, "bbox")
    box = x, y, x + width, y + height
    if min(width, height) <= 0:
        raise InputError(f"its box is degenerate: {width:g}x{height:g}")
    if box[0] >= size[1] or box[1] >= size[0] or box[2] <= 0 or box[3] <= 0:
        raise InputError(f"its box {box} lies outside the photograph of {size[1]}x{size[0]}")
    (area,) = (pixels,) if area is None else _numbers([area], 1, "area")
    return Instance(id=str(id), rle=rle, box=box, area=area, **rest)


def _numbers(values: Any, count: int, name: str) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise InputError(f"its {name} is {values!r}; expected {count} finite numbers")
    return numbers


def to_rle(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """A mask as the compressed RLE of pycocotools.

    Args:
      segmentation: polygons [[x, y, x, y, ...], ...], or an RLE {"size", "counts"} with counts as
        run lengths, as text or as bytes.
      size: (height, width) of the photograph.

    Raises:
      InputError: neither of these, or an RLE of another size.
    """
    if isinstance(segmentation, list) and segmentation:
        for ring in segmentation:
            _check_ring(ring, size)
        return mask_utils.merge(mask_utils.frPyObjects(segmentation, *size))
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise InputError("it has no segmentation: neither polygons nor an RLE")
    if segmentation["size"] not in (list(size), tuple(size)):
        raise InputError(
            f"its RLE has (height, width) {segmentation['size']}; the photograph {list(size)}"
        )
    counts = segmentation["counts"]
    if isinstance(counts, str):
        counts = counts.encode("ascii", "replace")
    runs = _runs(counts) if isinstance(counts, bytes) else _integers(counts)
    # pycocotools reads beyond a short RLE into memory that nobody has written.
    if (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise InputError(
            f"its RLE is damaged: its runs do not add up to {size[0] * size[1]} pixels"
        )
    if isinstance(counts, bytes):
        return {"size": list(size), "counts": counts}
    return mask_utils.frPyObjects({"size": list(size), "counts": runs.tolist()}, *size)


def _check_ring(ring: Any, size: tuple[int, int]) -> None:
    # pycocotools would take four numbers for a box, and walks along every edge pixel by pixel.
    if not isinstance(ring, list) or len(ring) < 6 or len(ring) % 2:
        raise InputError("a polygon of its segmentation has not three points x, y at least")
    if max(map(abs, _numbers(ring, len(ring), "segmentation"))) > 4 * max(size):
        raise InputError(f"a polygon of its segmentation leaves the photograph {size} far behind")


_DAMAGED = np.full(1, -1)


def _integers(counts: Any) -> np.ndarray:
    if isinstance(counts, list) and all(isinstance(count, int) for count in counts):
        if counts and max(map(abs, counts)) < 1 << 31:
            return np.asarray(counts, np.int64)
    return _DAMAGED


def _runs(counts: bytes) -> np.ndarray:
    """The run lengths of compressed counts: of pixels outside, inside, outside ... by columns.

    Digits of 5 bits from chr(48) on, low ones first, 32 for "more follow", the last digit signed;
    from the fourth number on each is the difference to the last but one.
    Source: cocoapi, `maskApi.c`, `rleToString`.
    """
    digits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(digits & 32 == 0)
    if not len(ends) or ends[-1] != len(digits) - 1 or not ((digits >= 0) & (digits < 64)).all():
        return _DAMAGED
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 12:  # beyond 64 bits
        return _DAMAGED
    places = np.arange(len(digits)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((digits & 31) << (5 * places), starts)
    runs -= np.where(digits[ends] & 16, np.left_shift(1, 5 * lengths), 0)
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs

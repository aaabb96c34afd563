"""The evaluator's host part: photographs in batches, resized, their prompts drawn.

Everything here runs in grain's threads, ahead of the device.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from PIL import Image

from samlight_jax.config import SamConfig
from samlight_jax.errors import InputError
from samlight_jax.postprocess import LOW_RES, resize_weights
from samlight_jax.preprocess import Frame
from samlight_jax.prompts import assemble
from train import prompts
from train.annotations import Dataset, Instance, Photo, Problem
from train.detections import Detection, Detections
from train.protocol import Protocol

SIDES = (256, 512, 640, 768, 1024, 1536, 2048)  # of canvases; beyond, multiples of the last
THREADS = 8


class Tokens(NamedTuple):
    """The prompt encoder's slots of q prompts: coords (q, n, 2), labels and valid (q, n)."""

    coords: np.ndarray
    labels: np.ndarray
    valid: np.ndarray


@dataclasses.dataclass
class Item:
    """One prompt, photograph pixels, and what it is scored against.

    Attributes:
      source: the annotation or the detection that it comes from.
      points: (x, y, label) each; corrective clicks are added behind.
      box: x1, y1, x2, y2, or None.
      clicks: how many corrective ones were added.
    """

    source: Instance | Detection
    points: list[tuple[float, float, int]]
    box: tuple[float, float, float, float] | None
    clicks: int = 0

    @property
    def rle(self) -> Any:
        """Of the truth; None for a detection. Decoded when needed: masks of many take memory."""
        return self.source.rle if isinstance(self.source, Instance) else None


@dataclasses.dataclass
class Loaded:
    """A photograph ready for the device; `frame` None: nothing of it can be evaluated."""

    photo: Photo
    canvas: tuple[int, int]
    frame: Frame | None = None
    pixels: np.ndarray | None = None  # (height, width, 3) uint8, the frame's `input` size
    items: list[Item] = dataclasses.field(default_factory=list)
    tokens: list[Tokens] = dataclasses.field(default_factory=list)  # rows of `slots` items
    problems: list[Problem] = dataclasses.field(default_factory=list)


def sources(
    photo: Photo, protocol: Protocol, detections: Detections | None
) -> Sequence[Instance | Detection]:
    """What the protocol asks about on a photograph."""
    if protocol.prompt == "teacher-grid":
        return ()
    if detections is not None:
        return detections.by_photo.get(photo.id, ())
    return [
        instance
        for instance in photo.instances
        if (protocol.crowd or not instance.crowd) and instance.area >= protocol.min_area
    ]


def canvas_of(photo: Photo) -> tuple[int, int]:
    """(height, width) of the canvas; a square, unless it is so large that memory counts."""
    height, width = (_side(length) for length in photo.size or (1, 1))
    if max(height, width) <= SIDES[-1]:
        height = width = max(height, width)
    return height, width


def _side(length: int) -> int:
    return next((side for side in SIDES if length <= side), -(-length // SIDES[-1]) * SIDES[-1])


def plan(photos: Iterable[Photo], size: int) -> list[list[Photo]]:
    """Batches of at most `size` photographs of one canvas; always the same for the same list."""
    by_canvas: dict[tuple[int, int], list[Photo]] = {}
    for photo in photos:
        by_canvas.setdefault(canvas_of(photo), []).append(photo)
    return [
        each[start : start + size]
        for _, each in sorted(by_canvas.items())
        for start in range(0, len(each), size)
    ]


@dataclasses.dataclass(frozen=True)
class Loader:
    """Makes a `Loaded` of a photograph; called from many threads.

    Attributes:
      dataset: to read from.
      protocol: what to ask.
      config: of the model, for the frame and the slots.
      slots: prompts in a row.
      detections: for the prompt "detector".
    """

    dataset: Dataset
    protocol: Protocol
    config: SamConfig
    slots: int
    detections: Detections | None = None

    def batches(self, plan: Sequence[Sequence[Photo]]) -> Iterator[list[Loaded]]:
        """The batches of a plan in its order, loaded ahead by threads."""
        photos = [photo for batch in plan for photo in batch]
        ahead = 2 * max(map(len, plan), default=1)
        options = grain.ReadOptions(num_threads=min(THREADS, ahead), prefetch_buffer_size=ahead)
        if not photos:
            return
        loaded = iter(grain.MapDataset.source(photos).map(self).to_iter_dataset(options))
        for batch in plan:
            yield [next(loaded) for _ in batch]

    def __call__(self, photo: Photo) -> Loaded:
        """Reads, resizes, draws prompts; what cannot be used becomes a problem of the photo."""
        loaded = Loaded(photo, canvas_of(photo))
        wanted = sources(photo, self.protocol, self.detections)
        if not wanted and self.protocol.prompt != "teacher-grid":
            return loaded  # nothing is asked, so nothing is read
        try:
            image = self.dataset.read(photo)
            frame = Frame((image.shape[0], image.shape[1]), self.config.image_size)
        except InputError as error:
            loaded.problems.append(Problem(photo.name, str(error)))
            return loaded
        loaded.items = [
            Item(source, *draw(self.protocol, photo, source, frame.original)) for source in wanted
        ]
        loaded.frame, loaded.pixels = frame, resized(image, frame)
        weights_of(frame, LOW_RES * self.config.grid)  # computed here, in a thread
        rows = range(0, len(loaded.items), self.slots)
        loaded.tokens = [
            self.tokens(frame, loaded.items[start : start + self.slots]) for start in rows
        ]
        return loaded

    def tokens(self, frame: Frame, items: Sequence[Item]) -> Tokens:
        """The slots of one row; their number depends on the protocol alone."""
        most = (self.protocol.points or 0) + self.protocol.refine
        coords = np.zeros((len(items), most, 2))
        labels = np.full((len(items), most), -1)
        for i, item in enumerate(items):
            for j, (x, y, label) in enumerate(item.points):
                coords[i, j], labels[i, j] = (x, y), label
        boxes = [item.box for item in items] if self.protocol.has_box else None
        part = assemble(
            frame,
            self.config,
            len(items),
            coords if most else None,
            labels if most else None,
            None if boxes is None else np.array(boxes, np.float64),
            absent=True,
        )
        return Tokens(part.coords, part.labels, part.valid)


@functools.lru_cache(maxsize=128)
def weights_of(frame: Frame, low_res: int) -> tuple[np.ndarray, np.ndarray]:
    """`resize_weights`, kept for the photographs of the same size."""
    return resize_weights(frame, low_res)


def resized(image: np.ndarray, frame: Frame) -> np.ndarray:
    """PIL's bilinear to the frame, as `preprocess.host_pixels` does before it normalises."""
    if image.shape[:2] == frame.input:
        return image
    height, width = frame.input
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def generator(*names: object) -> np.random.Generator:
    """Random numbers of their own for whatever is named, so that order does not matter."""
    digest = hashlib.sha256("\0".join(map(str, names)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def draw(
    protocol: Protocol, photo: Photo, source: Instance | Detection, size: tuple[int, int]
) -> tuple[list[tuple[float, float, int]], Any]:
    """(points, box) of the protocol's prompt for one instance, in photograph pixels."""
    rng = functools.partial(generator, protocol.seed, photo.id, source.id)
    if protocol.prompt == "box-jitter":
        return [], prompts.box_jitter(source.box, size, rng())
    if protocol.has_box or isinstance(source, Detection):
        return [], source.box
    mask = source.mask()
    if protocol.prompt == "point-center":
        places = [prompts.point_center(mask)]
    elif protocol.prompt == "point-dt":
        places = [prompts.point_dt(mask)]
    elif protocol.prompt == "point-random":
        places = [prompts.point_random(mask, rng())]
    else:
        places = prompts.points_n(mask, protocol.points or 1, rng())
    return [(float(x), float(y), 1) for x, y in places], None

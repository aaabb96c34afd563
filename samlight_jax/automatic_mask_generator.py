"""`SamAutomaticMaskGenerator`: the masks of everything in a photograph, found by grids of points.

Each crop is embedded, and its grid decoded and measured on the device in batches of one size; only
scores and boxes come back. What survives the suppression is decoded a second time, by tiles of
bits, into run lengths. So neither the device nor the host ever holds all candidates' masks.

Source of names, order and units: segment-anything, `automatic_mask_generator.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from samlight_jax import automatic_mask_generator_device as on
from samlight_jax import automatic_mask_generator_runs as runs
from samlight_jax.automatic_mask_generator_crops import Crop, crops_of, grids_of
from samlight_jax.automatic_mask_generator_masks import (
    Mask,
    across_crops,
    cleaned,
    record,
    survivors,
)
from samlight_jax.build_sam import default_model
from samlight_jax.errors import InputError
from samlight_jax.flat import DECODER, ENCODER, flat
from samlight_jax.pipeline import ModelLike
from samlight_jax.preprocess import ImageLike, as_array

OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")
MASKS = 3  # of one point
CROPS_AT_ONCE = 4  # through the encoder; one on a CPU, where more are no faster

_T = TypeVar("_T")


class SamAutomaticMaskGenerator:
    """SAM's generator: the same arguments, steps and results.

    Of the masks that pass the filters in one crop, and of those that its suppression leaves in all
    crops together, at most 8192 go on, the best first; a warning says if there were
    more. Photographs of up to 2048 pixels a side share one compilation (two where some are smaller
    than the frame), and each doubling takes one more.

    Args:
      model: a `Sam`, a name or path for `load`, or None for the default.
      points_per_side: of the grid; None with `point_grids`.
      points_per_batch: decoded at once; a matter of memory and speed alone.
      pred_iou_thresh: masks with a predicted IoU above it stay; 0 keeps all.
      stability_score_thresh: masks with this score or more stay; 0 keeps all.
      stability_score_offset: how far the score moves the threshold of the logits.
      box_nms_thresh: box IoU above which the worse mask of a crop goes.
      crop_n_layers: layer i looks again at 4**i crops of the photograph.
      crop_nms_thresh: box IoU above which, of two crops' masks, that of the larger crop goes.
      crop_overlap_ratio: how much the first layer's crops overlap, of the short side.
      crop_n_points_downscale_factor: the grid's side is divided by it in each layer.
      point_grids: for each layer (n, 2), x then y, 0 to 1, instead of `points_per_side`.
      min_mask_region_area: holes and islands of fewer pixels are removed; needs OpenCV.
      output_mode: of `segmentation`: "binary_mask", (height, width) bool; "uncompressed_rle",
        COCO's dict; "coco_rle", its compressed form, needs pycocotools.

    Raises:
      InputError: a value that makes no sense, or a library that is missing.
    """

    def __init__(
        self,
        model: ModelLike = None,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: Sequence[Any] | None = None,
        min_mask_region_area: int = 0,
        output_mode: str = "binary_mask",
    ):
        _check_whole(1, points_per_batch=points_per_batch)
        _check_whole(0, crop_n_layers=crop_n_layers)
        _check_whole(1, crop_n_points_downscale_factor=crop_n_points_downscale_factor)
        if points_per_side is not None:
            _check_whole(1, points_per_side=points_per_side)
        _check_finite(
            pred_iou_thresh=pred_iou_thresh,
            stability_score_thresh=stability_score_thresh,
            stability_score_offset=stability_score_offset,
            box_nms_thresh=box_nms_thresh,
            crop_nms_thresh=crop_nms_thresh,
            min_mask_region_area=min_mask_region_area,
        )
        if stability_score_offset < 0 or not 0 <= crop_overlap_ratio < 1:
            raise InputError(
                f"{stability_score_offset=}, {crop_overlap_ratio=}: expected 0 or more, and from 0 "
                "to below 1."
            )
        if output_mode not in OUTPUT_MODES:
            raise InputError(f"{output_mode=}: expected one of {', '.join(OUTPUT_MODES)}.")
        if output_mode == "coco_rle":
            runs.library("pycocotools.mask", "output_mode='coco_rle'")
        if min_mask_region_area > 0:
            runs.library("cv2", f"{min_mask_region_area=}")
        self.point_grids = grids_of(
            points_per_side, crop_n_layers, crop_n_points_downscale_factor, point_grids
        )
        self.model = default_model(model)
        self.points_per_batch = points_per_batch
        self.pred_iou_thresh = pred_iou_thresh
        self.stability_score_thresh = stability_score_thresh
        self.stability_score_offset = stability_score_offset
        self.box_nms_thresh = box_nms_thresh
        self.crop_n_layers = crop_n_layers
        self.crop_nms_thresh = crop_nms_thresh
        self.crop_overlap_ratio = crop_overlap_ratio
        self.min_mask_region_area = min_mask_region_area
        self.output_mode = output_mode
        self._encoder, self._decoder = (flat(self.model, part) for part in (ENCODER, DECODER))
        self._batch = min(points_per_batch, max(map(len, self.point_grids)))

    def generate(self, image: ImageLike, image_format: str = "RGB") -> list[dict[str, Any]]:
        """The masks of one image, best first (with crops: of the smallest crops first).

        Args:
          image: a path, a PIL image, or (height, width, 3) uint8; see `preprocess.as_array`.
          image_format: "RGB" or "BGR".

        Returns:
          For each mask a dict: `segmentation`, see `output_mode`; `area` in pixels; `bbox`, x, y
          of the first pixel and the distances to the last one; `predicted_iou`, the model's,
          clipped to 0 to 1; `point_coords`, [[x, y]]; `stability_score`; `crop_box`, x, y, width,
          height.

        Raises:
          InputError: a bad image, in one sentence.
        """
        return self.generate_batch([image], image_format)[0]

    def generate_batch(
        self, images: Iterable[ImageLike], image_format: str = "RGB"
    ) -> list[list[dict[str, Any]]]:
        """`generate` for several images of any sizes; they are read one after the other.

        The device works on the next crop while the host unfolds the masks of the last.
        """
        if isinstance(images, (str, os.PathLike)) or getattr(images, "ndim", 4) < 4:
            raise InputError("`images` is a single image; expected several. For one: generate().")
        found: list[list[Mask]] = []
        sizes = []
        for crop, embedding, measured in _one_ahead(self._measured(images, image_format)):
            if crop.photo == len(found):
                found.append([])
                sizes.append(crop.size)
            found[-1] += self._masks_of(crop, embedding, measured)
        return [self._finished(masks, size) for masks, size in zip(found, sizes, strict=True)]

    def _measured(
        self, images: Iterable[ImageLike], image_format: str
    ) -> Iterator[tuple[Crop, jax.Array, on.Measured]]:
        """Every crop, embedded and measured; the device may still be at it."""
        at_once = 1 if jax.default_backend() == "cpu" else CROPS_AT_ONCE
        for crops in _groups(self._crops(images, image_format), at_once):
            # One crop alone, or a full batch: two compilations.
            count = at_once if len(crops) > 1 else 1
            side = self.model.config.image_size
            pixels = np.zeros((count, side, side, 3), np.uint8)
            inputs = np.zeros((count, 2), np.int32)
            for i, crop in enumerate(crops):
                height, width = inputs[i] = crop.frame.input
                pixels[i, :height, :width] = crop.pixels
            embeddings = on.encode(self._encoder, pixels, inputs)
            for crop, embedding in zip(crops, embeddings, strict=False):
                yield crop, embedding, self._measure(crop, embedding)

    def _crops(self, images: Iterable[ImageLike], image_format: str) -> Iterator[Crop]:
        for number, image in enumerate(images):
            array = np.asarray(as_array(image, image_format))
            if array.dtype != np.uint8:  # floats of a jax.Array
                array = np.clip(np.rint(array), 0, 255).astype(np.uint8)
            yield from crops_of(
                number,
                array,
                self.crop_n_layers,
                self.crop_overlap_ratio,
                self.model.config.image_size,
            )

    def _measure(self, crop: Crop, embedding: jax.Array) -> on.Measured:
        limits = on.Limits(
            np.float32(self.pred_iou_thresh),
            np.float32(self.stability_score_thresh),
            np.float32(self.stability_score_offset),
            np.array(crop.box, np.int32),
            np.array((0, 0, *crop.size[::-1]), np.int32),
        )
        given = (*on.measures(crop.frame), limits)
        rows, columns, limits = jax.device_put(given)  # once for all batches
        points = self._frame_points(crop)
        batches = [
            on.measure(self._decoder, embedding, batch, rows, columns, limits)
            for batch in _batches(points, self._batch)
        ]
        return on.Measured(*zip(*batches, strict=True))

    def _frame_points(self, crop: Crop) -> np.ndarray:
        scale = np.array(crop.frame.scale)
        return (self._points(crop) * scale).astype(np.float32)

    def _points(self, crop: Crop) -> np.ndarray:
        """The grid in pixels of the crop."""
        return self.point_grids[crop.layer] * np.array(crop.frame.original[::-1])

    def _masks_of(self, crop: Crop, embedding: jax.Array, measured: on.Measured) -> list[Mask]:
        """What survives the suppression within the crop, best first."""
        points = self._points(crop)
        count = MASKS * len(points)
        keep, iou, stability, box = (
            np.concatenate(parts)[:count] for parts in jax.device_get(measured)
        )
        passed = np.flatnonzero(keep)
        passed = passed[survivors(box[passed], iou[passed], self.box_nms_thresh)]
        x, y = crop.box[:2]
        each = self._runs_of(crop, embedding, passed)
        return [
            Mask(
                counts,
                runs.box_of(counts, crop.size[0]),
                iou[i].item(),
                stability[i].item(),
                (points[i // MASKS] + (x, y)).tolist(),
                crop.box,
            )
            for i, counts in zip(passed, each, strict=True)
        ]

    def _runs_of(self, crop: Crop, embedding: jax.Array, masks: np.ndarray) -> Iterator[np.ndarray]:
        """Run lengths in the photograph of masks by their number in the crop, decoded anew."""
        rows, columns = jax.device_put(on.axes(crop.frame, crop.box, crop.size))
        down = range(-(-crop.size[0] // on.TILE))
        last = (crop.size[1] - 1) // on.TILE
        # To the crop's end and a pixel further, where its last run ends.
        across = range(crop.box[0] // on.TILE, min(crop.box[2] // on.TILE, last) + 1)
        points = self._frame_points(crop)[masks // MASKS]
        size = min(self._batch, on.AT_ONCE)
        starts = range(0, len(masks), size)
        for start, batch, which in zip(
            starts, _batches(points, size), _batches(masks % MASKS, size), strict=True
        ):
            low = on.decode_chosen(self._decoder, embedding, batch, which)
            collected = runs.Runs(min(size, len(masks) - start), crop.size)
            stripes = ((x, [on.tile_bits(low, rows, columns, y, x) for y in down]) for x in across)
            for x, tiles in _one_ahead(stripes):
                bits = np.concatenate(jax.device_get(tiles), axis=2)
                collected.add(bits, x * on.TILE)
            yield from collected.counts()

    def _finished(self, masks: list[Mask], size: tuple[int, int]) -> list[dict[str, Any]]:
        """The steps over all crops of one photograph, and the records."""
        if self.crop_n_layers:
            masks = across_crops(masks, self.crop_nms_thresh)
        if self.min_mask_region_area > 0:
            threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
            masks = cleaned(masks, size, self.min_mask_region_area, threshold)
        return [record(mask, size, self.output_mode) for mask in masks]


def _check_whole(least: int, **values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, (int, np.integer)) or value < least:
            raise InputError(f"{name}={value!r}: expected a whole number from {least} on.")


def _check_finite(**values: Any) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise InputError(f"{name}={value!r}: expected a finite number.")


def _batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Batches of `size` rows; the last one is filled up with its last row."""
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        yield np.pad(batch, [(0, size - len(batch))] + [(0, 0)] * (rows.ndim - 1), mode="edge")


def _groups(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _one_ahead(items: Iterable[_T]) -> Iterator[_T]:
    """The items, each given out when the next one has been asked for already."""
    waiting: list[_T] = []
    for item in items:
        if waiting:
            yield waiting.pop()
        waiting.append(item)
    yield from waiting

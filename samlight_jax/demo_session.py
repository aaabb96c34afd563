"""What one visitor of `samlight demo` has: a photograph, prompts, and the masks they give.

A photograph is embedded once for each model; a prompt is decoded and shown at the size of the
screen, and only a download makes masks of the photograph's own size. Nothing here knows gradio.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from samlight_jax import automatic_mask_generator_runs as runs
from samlight_jax.automatic_mask_generator import SamAutomaticMaskGenerator
from samlight_jax.build_sam import default_model
from samlight_jax.demo_masks import annotation, coloured, label_map
from samlight_jax.draw import overlay
from samlight_jax.errors import InputError
from samlight_jax.pipeline import encode, predict
from samlight_jax.postprocess import MASK_THRESHOLD, photo_logits
from samlight_jax.preprocess import Frame, as_array

MAX_PIXELS = 50_000_000  # of a photograph that a visitor may keep here
VIEW = 1280  # long side of what is shown
FILES = {"mask": "_mask.png", "overlay": "_overlay.png", "coco": "_coco.json"}


@dataclasses.dataclass(frozen=True)
class Photo:
    """A photograph, (height, width, 3) uint8, and its view: the same with a long side of `VIEW`."""

    name: str
    pixels: np.ndarray
    view: np.ndarray

    @classmethod
    def read(cls, path: Path) -> Photo:
        """Reads a file, upright; its own folders are nobody's business.

        Raises:
          InputError: no such photograph, or one of more than `MAX_PIXELS`.
        """
        try:
            pixels = np.asarray(as_array(path))
        except InputError as error:
            raise InputError(str(error).replace(str(path), path.name)) from None
        height, width = pixels.shape[:2]
        if height * width > MAX_PIXELS:
            raise InputError(
                f"{path.name} has {width}x{height} pixels; this page takes {MAX_PIXELS:,}. "
                "Make it smaller first."
            )
        share = VIEW / max(height, width)
        size = (max(1, round(width * share)), max(1, round(height * share)))
        return cls(path.name, pixels, np.asarray(Image.fromarray(pixels).resize(size)))

    @property
    def scale(self) -> tuple[float, float]:
        """View pixels for one photograph pixel, (x, y)."""
        (height, width), (rows, columns) = self.pixels.shape[:2], self.view.shape[:2]
        return columns / width, rows / height


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Points (x, y, label) and a box x1, y1, x2, y2, in photograph pixels."""

    points: tuple[tuple[float, float, int], ...] = ()
    box: tuple[float, float, float, float] | None = None

    def scaled(self, x: float, y: float) -> Prompt:
        """The same in pixels of another size."""
        points = tuple((px * x, py * y, label) for px, py, label in self.points)
        box = self.box and (self.box[0] * x, self.box[1] * y, self.box[2] * x, self.box[3] * y)
        return Prompt(points, box)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model made of a prompt.

    Attributes:
      masks: (c, rows, columns) bool, of the view; three for one point alone, else one.
      iou: (c,) float32, predicted.
      low_res: (c, n, n) float32 logits.
      seconds: what it took.
    """

    masks: np.ndarray
    iou: np.ndarray
    low_res: np.ndarray
    seconds: float

    @property
    def scores(self) -> list[float]:
        """The predicted IoU to show, from 0 to 1; the model's own may leave that."""
        return np.clip(self.iou, 0, 1).tolist()


class Session:
    """One visitor's state. After each call, what is to be shown fits what was asked.

    Positions are shares of the photograph, 0 to 1 from its top left corner.

    Args:
      model: a name or path for `load`.
    """

    def __init__(self, model: str):
        self.model = model
        self.photo: Photo | None = None
        self.prompts: list[Prompt] = []  # the last one counts; the others are for `undo`
        self.answer: Answer | None = None
        self.chosen = 0  # of the answer's masks
        self.everything: list[dict[str, Any]] | None = None  # the generator's records
        self._labels = np.zeros((0, 0), np.uint16)  # of them, the photograph's size
        self._embeddings: dict[str, jax.Array] = {}  # of the photograph, by model

    def open(self, path: Path) -> None:
        """Another photograph; if it cannot be used, the one before stays."""
        photo = Photo.read(path)
        embedding = encode(photo.pixels, model=default_model(self.model))
        embedding.block_until_ready()
        self.clear()
        self.photo, self._embeddings = photo, {self.model: embedding}

    def use(self, model: str) -> None:
        """Another model, for the same photograph and prompts; masks of everything go."""
        if model == self.model:
            return
        default_model(model)  # may refuse; then the one before stays
        self.model = model
        self._decode()

    def add_point(self, x: float, y: float, foreground: bool) -> None:
        """A click."""
        height, width = self._photo().pixels.shape[:2]
        last = self.prompt
        points = (*last.points, (x * width, y * height, int(foreground)))
        self._ask(dataclasses.replace(last, points=points))

    def set_box(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """Two opposite corners, in any order; the points so far stay, a box before goes."""
        height, width = self._photo().pixels.shape[:2]
        (left, right), (top, bottom) = sorted((x1, x2)), sorted((y1, y2))
        box = (left * width, top * height, right * width, bottom * height)
        self._ask(dataclasses.replace(self.prompt, box=box))

    def undo(self) -> None:
        """Takes the last click or box back, or the masks of everything."""
        del self.prompts[-1:]
        self._decode()

    def clear(self) -> None:
        """Only the photograph stays."""
        self.prompts.clear()
        self._decode()

    def choose(self, mask: int) -> None:
        """Another of the answer's masks than the one with the highest predicted IoU."""
        if self.answer is not None and 0 <= mask < len(self.answer.masks):
            self.chosen = mask

    def find_everything(self, points_per_side: int) -> None:
        """All masks without a prompt; the prompts so far go."""
        photo = self._photo()
        generator = SamAutomaticMaskGenerator(
            default_model(self.model),
            points_per_side=points_per_side,
            output_mode="uncompressed_rle",
        )
        found = generator.generate(photo.pixels)
        self.clear()
        self.everything = found
        counts = [record["segmentation"]["counts"] for record in found]
        self._labels = label_map(counts, photo.pixels.shape[:2])

    @property
    def prompt(self) -> Prompt:
        """The one that counts."""
        return self.prompts[-1] if self.prompts else Prompt()

    def picture(self) -> Image.Image | None:
        """What is to be shown: the view, with masks and prompts on it."""
        photo = self.photo
        if photo is None:
            return None
        if self.everything is not None:
            return coloured(photo.view, self._labels)
        if self.answer is None:
            return Image.fromarray(photo.view)
        prompt = self.prompt.scaled(*photo.scale)
        mask = self.answer.masks[self.chosen]
        return overlay(photo.view, mask, points=prompt.points, box=prompt.box)

    def save(self, kind: str, folder: Path) -> Path:
        """Writes one of `FILES`, of the photograph's own size, and says where.

        Of one mask: its pixels 255 of 0; the photograph with mask and prompts; COCO's JSON with
        run lengths and the prompts. Of everything: the number of the smallest mask at each pixel, 0
        for none, 16 bits if there are more than 255; all masks in colours; all of them in COCO's
        JSON.

        Raises:
          InputError: there is nothing to save yet.
        """
        photo = self._photo()
        if self.everything is None and self.answer is None:
            raise InputError("There is no mask yet: click on the photograph first.")
        path = folder / (Path(photo.name).stem + FILES[kind])
        if kind == "coco":
            path.write_text(json.dumps(self._coco()))
        elif kind == "mask":
            self._mask_picture().save(path)
        elif self.everything is not None:
            coloured(photo.pixels, self._labels).save(path)
        else:
            points, box = self.prompt.points, self.prompt.box
            overlay(photo.pixels, self._mask(), points=points, box=box).save(path)
        return path

    def _photo(self) -> Photo:
        if self.photo is None:
            raise InputError("There is no photograph here, or no longer: open one first.")
        return self.photo

    def _ask(self, prompt: Prompt) -> None:
        """The prompt that counts from now on; a bad one changes nothing."""
        answer = self._answer(prompt)
        self.prompts.append(prompt)
        self._show(answer)

    def _decode(self) -> None:
        """The masks of the prompt that counts, if any; those of everything go."""
        self._show(self._answer(self.prompt) if self.prompts else None)

    def _show(self, answer: Answer | None) -> None:
        self.answer, self.everything = answer, None
        self.chosen = 0 if answer is None else int(np.argmax(answer.iou))

    def _answer(self, prompt: Prompt) -> Answer:
        """Decoded at the view's size; SAM advises three masks for a single point only."""
        photo, model = self._photo(), default_model(self.model)
        if self.model not in self._embeddings:
            self._embeddings[self.model] = encode(photo.pixels, model=model)
        embedding = self._embeddings[self.model]
        points, box = (shown := prompt.scaled(*photo.scale)).points, shown.box
        start = time.perf_counter()
        masks, iou, low_res = predict(
            photo.view,
            [point[:2] for point in points] if points else None,
            [point[2] for point in points] if points else None,
            box,
            multimask_output=box is None and len(points) == 1,
            model=model,
            image_embedding=embedding,
        )
        return Answer(masks, iou, low_res, time.perf_counter() - start)

    def _mask(self) -> np.ndarray:
        """The chosen mask, (height, width) bool, of the photograph's size."""
        assert self.answer is not None
        frame = Frame(self._photo().pixels.shape[:2], default_model(self.model).config.image_size)
        return photo_logits(self.answer.low_res[self.chosen], frame) > MASK_THRESHOLD

    def _mask_picture(self) -> Image.Image:
        if self.everything is None:
            return Image.fromarray(self._mask().astype(np.uint8) * 255)
        few = len(self.everything) < 256
        return Image.fromarray(self._labels.astype(np.uint8) if few else self._labels)

    def _coco(self) -> dict[str, Any]:
        photo = self._photo()
        height, width = size = photo.pixels.shape[:2]
        if self.everything is not None:
            records = [
                {**record, **annotation(record["segmentation"]["counts"], size)}
                for record in self.everything
            ]
        else:
            assert self.answer is not None
            iou = self.answer.scores[self.chosen]
            prompt = {"points": self.prompt.points, "box": self.prompt.box}
            mask = annotation(runs.runs_of(self._mask()), size)
            records = [{**mask, "predicted_iou": iou, **prompt}]
        ids = {"image_id": 1, "category_id": 1, "iscrowd": 0}
        return {
            "categories": [{"id": 1, "name": "object"}],
            "images": [{"id": 1, "file_name": photo.name, "height": height, "width": width}],
            "annotations": [{"id": i, **ids, **record} for i, record in enumerate(records, 1)],
        }

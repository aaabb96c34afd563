"""A picture of where a run is: photographs, the teacher's masks and the student's, one prompt each."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax import Array
from PIL import Image, ImageDraw

from samlight_jax import weights
from samlight_jax.config import SamConfig
from samlight_jax.draw import overlay
from samlight_jax.postprocess import LOW_RES
from samlight_jax.preprocess import PIXEL_MEAN, PIXEL_STD
from samlight_jax.sam import Sam
from train import objects
from train.augment import Views

SIDE = 256  # pixels of one picture
PROMPTS = 8  # tried on each photograph, for one that the teacher answers
GAP = 8


@functools.partial(jax.jit, static_argnames="config")
def answers(config: SamConfig, arrays: Any, teacher: Sam, views: Views, key: Array) -> Any:
    """Each view's objects, and the student's masks (b, q, m, m) for the same prompts."""
    low_res = LOW_RES * config.grid
    student = weights.build(config, arrays, folded=False)
    pixels = views.pixels
    taught, _ = teacher.encode(pixels)
    learnt, _ = student.encode(pixels)

    def one(taught: Array, learnt: Array, size: Array, key: Array) -> Any:
        def decode(prompts: Any) -> Any:
            return teacher.decode(taught, prompts)

        asked = objects.of_teacher(decode, size, key, PROMPTS, low_res)
        logits, iou = student.decode(learnt, asked.prompts)
        mask, _ = objects.best(logits, iou)
        chosen = jax.numpy.where(asked.single[:, None, None], logits[:, 0], mask)
        return asked, chosen > 0

    return jax.vmap(one)(taught, learnt, views.size, jax.random.split(key, len(views.size)))


def draw(views: Views, asked: objects.Objects, masks: Array, caption: str) -> Image.Image:
    """A row a view: the photograph, the teacher's mask, the student's, and their IoU."""
    views, asked, masks = jax.device_get((views, asked, masks))
    count = len(views.size)
    width = 3 * SIDE + 4 * GAP
    sheet = Image.new("RGB", (width, count * (SIDE + GAP) + 3 * GAP + 12), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), caption, fill="black")
    for row in range(count):
        size = views.size[row]
        photo = views.pixels[row] * PIXEL_STD + PIXEL_MEAN
        photo = np.clip(photo[: size[0], : size[1]] + 0.5, 0, 255).astype(np.uint8)
        best = int(np.argmax(asked.counts[row]))  # the first that counts
        top = 3 * GAP + 12 + row * (SIDE + GAP)
        pictures = [Image.fromarray(photo)]
        for mask in (asked.target[row, best], masks[row, best]):
            large = np.repeat(np.repeat(mask, LOW_RES, 0), LOW_RES, 1)[: size[0], : size[1]]
            pictures.append(overlay(photo, large, **_prompt(asked, row, best)))
        for column, picture in enumerate(pictures):
            picture.thumbnail((SIDE, SIDE))
            sheet.paste(picture, (GAP + column * (SIDE + GAP), top))
        both = asked.target[row, best] & masks[row, best]
        either = asked.target[row, best] | masks[row, best]
        text = f"IoU {both.sum() / max(either.sum(), 1):.2f}"
        at = (2 * (SIDE + GAP) + 2 * GAP, top + 4)
        pen.rectangle((at[0] - 2, at[1] - 1, at[0] + 52, at[1] + 12), fill="black")
        pen.text(at, text, fill="white")
    return sheet


def _prompt(asked: objects.Objects, row: int, which: int) -> dict[str, Any]:
    coords = asked.prompts.coords[row, which]
    if asked.single[row, which]:
        return {"box": coords[:2].ravel().tolist()}
    return {"points": [(*coords[0].tolist(), 1)]}

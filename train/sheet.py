"""A picture of where a run is: photographs, the teacher's masks and the student's, same prompts."""

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

SIDE, GAP, LINE = 240, 8, 14  # pixels: a picture's long side, between pictures, a line of text
PROMPTS = 16  # tried on each photograph, half of them boxes, for objects that the teacher sees
HEADS = ("photograph", "teacher, box", "student, box", "teacher, point", "student, point")


@functools.partial(jax.jit, static_argnames="config")
def answers(config: SamConfig, arrays: Any, teacher: Sam, views: Views, key: Array) -> Any:
    """Each view's objects, and the student's masks (b, q, m, m) for the same prompts."""
    low_res = LOW_RES * config.grid
    student = weights.build(config, arrays, folded=False)
    taught, _ = teacher.encode(views.pixels)
    learnt, _ = student.encode(views.pixels)

    def one(taught: Array, learnt: Array, size: Array, key: Array) -> Any:
        def decode(prompts: Any) -> Any:
            return teacher.decode(taught, prompts)

        asked = objects.of_teacher(decode, size, key, PROMPTS, low_res)
        logits, iou = student.decode(learnt, asked.prompts)
        mask, _ = objects.best(logits, iou)
        return asked, jax.numpy.where(asked.single[:, None, None], logits[:, 0], mask) > 0

    return jax.vmap(one)(taught, learnt, views.size, jax.random.split(key, len(views.size)))


def make(config: SamConfig, arrays: Any, teacher: Sam, views: Views, caption: str) -> Image.Image:
    """The sheet of some views.

    Args:
      config: the student's.
      arrays: the student's, by name.
      teacher: of which the student learns.
      views: a row each.
      caption: above all.
    """
    teacher = weights.replaced(teacher, lambda _, x: x.astype(np.float32))
    asked, masks = answers(config, arrays, teacher, views, jax.random.key(0))
    views, asked, masks = jax.device_get((views, asked, masks))
    rows = [
        _row(*jax.tree.map(lambda x, i=i: x[i], (views, asked, masks))) for i in range(len(masks))
    ]
    head = GAP + 2 * LINE
    height = head + sum(GAP + max(picture.height for picture in row) for row in rows) + GAP
    sheet = Image.new("RGB", (len(HEADS) * (SIDE + GAP) + GAP, height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), caption, fill="black")
    for column, text in enumerate(HEADS):
        pen.text((GAP + column * (SIDE + GAP), GAP + LINE), text, fill="black")
    top = head
    for row in rows:
        for column, picture in enumerate(row):
            sheet.paste(picture, (GAP + column * (SIDE + GAP), top + GAP))
        top += GAP + max(picture.height for picture in row)
    return sheet


def _row(views: Views, asked: objects.Objects, masks: np.ndarray) -> list[Image.Image]:
    """One view's pictures, in the order of `HEADS`."""
    height, width = views.size
    photo = views.pixels[:height, :width] * PIXEL_STD + PIXEL_MEAN
    photo = np.clip(photo + 0.5, 0, 255).astype(np.uint8)
    row = [Image.fromarray(photo)]
    inside = objects.inside(views.size, masks.shape[-1])
    for boxes in (True, False):  # the largest object that was asked for so
        sizes = asked.target.sum((1, 2)) * asked.counts * (asked.single == boxes)
        which = int(np.argmax(sizes))
        if not sizes[which]:
            row += [_with_text(Image.fromarray(photo), "nothing found")] * 2
            continue
        coords = asked.prompts.coords[which]
        prompt: dict[str, Any] = {"box": coords[:2].ravel().tolist()}
        if not boxes:
            prompt = {"points": [(*coords[0].tolist(), 1)]}
        truth, guess = asked.target[which], masks[which] & np.asarray(inside)
        iou = (truth & guess).sum() / max((truth | guess).sum(), 1)
        for mask, text in ((truth, ""), (guess, f"IoU {iou:.2f}")):
            large = np.asarray(mask).repeat(LOW_RES, 0).repeat(LOW_RES, 1)[:height, :width]
            row.append(_with_text(overlay(photo, large, **prompt), text))
    for picture in row:
        picture.thumbnail((SIDE, SIDE))
    return row


def _with_text(picture: Image.Image, text: str) -> Image.Image:
    picture.thumbnail((SIDE, SIDE))
    pen = ImageDraw.Draw(picture)
    if text:
        pen.rectangle((0, 0, pen.textlength(text) + 8, LINE + 2), fill="black")
        pen.text((4, 2), text, fill="white")
    return picture

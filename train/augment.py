"""Random views of photographs, made on the device from the whole batch at once.

Each photograph has a key of its own, so that a view does not depend on how many devices share the
batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from samlight_jax.preprocess import PIXEL_MEAN, PIXEL_STD
from train.config import Augment
from train.data import MASK_STEP

GREY = (0.299, 0.587, 0.114)  # of red, green, blue; ITU-R BT.601


class Views(NamedTuple):
    """What the models see.

    Attributes:
      pixels: (b, s, s, 3) float32, normalised, zero beyond `size`.
      size: (b, 2) int32, (height, width) of the view within the frame.
    """

    pixels: Array
    size: Array

    def inside(self, side: int) -> Array:
        """(b, side, side) bool: the cells of a coarser grid whose centres lie in the view."""
        centres = (jnp.arange(side) + 0.5) * (self.pixels.shape[1] / side)
        rows, columns = (centres < self.size[:, i, None] for i in range(2))
        return rows[:, :, None] & columns[:, None, :]


def views(
    photos: Array, sizes: Array, keys: Array, augment: Augment | None, image_size: int
) -> Views:
    """Views of a batch of photographs.

    Args:
      photos: (b, c, c, 3) uint8, each in the top left corner of its canvas.
      sizes: (b, 2) int32, (height, width) of each photograph.
      keys: (b,) random keys, one a photograph.
      augment: what to vary; None shows each photograph whole and as it is.
      image_size: side of the frame.
    """
    boxes, flips = jax.vmap(_crop, (0, 0, None))(sizes, keys, augment)
    pixels, size = jax.vmap(_render, (0, 0, 0, 0, None))(photos, sizes, boxes, flips, image_size)
    seen = Views(pixels, size)
    if augment is not None:
        inside = seen.inside(image_size)
        pixels = jax.vmap(_colour, (0, 0, 0, None))(pixels, inside, keys, augment)
        pixels = _mixed(pixels, inside, size, keys, augment)
        seen = Views(pixels, size)
    pixels = (seen.pixels - PIXEL_MEAN) / PIXEL_STD
    return Views(jnp.where(seen.inside(image_size)[..., None], pixels, 0), size)


def _key(key: Array, use: int) -> Array:
    return jax.random.fold_in(key, use)


def _crop(size: Array, key: Array, augment: Augment | None) -> tuple[Array, Array]:
    """One photograph's ((top, left, height, width), whether it is mirrored)."""
    size = size.astype(jnp.float32)
    if augment is None:
        return jnp.concatenate([jnp.zeros(2), size]), jnp.array(False)
    area, aspect, place, whole, flip = (_key(key, i) for i in range(5))
    share = jax.random.uniform(area, (), minval=augment.scale[0], maxval=augment.scale[1])
    turn = jnp.log(augment.aspect) * jax.random.uniform(aspect, (), minval=-1.0)
    turn = jnp.clip(turn, jnp.log(share), -jnp.log(share))  # beyond, a side would be too long
    # The photograph's own shape, turned by up to `aspect`.
    sides = size * jnp.sqrt(share) * jnp.exp(jnp.stack([-turn, turn]) / 2)
    sides = jnp.clip(sides, 1, size)
    sides = jnp.where(jax.random.uniform(whole) < augment.whole, size, sides)
    corner = jax.random.uniform(place, (2,)) * (size - sides)
    return jnp.concatenate([corner, sides]), jax.random.uniform(flip) < augment.flip


def _render(
    photo: Array, limits: Array, box: Array, flip: Array, image_size: int
) -> tuple[Array, Array]:
    """One crop with its long side at `image_size`, as (s, s, 3) from 0 to 255, and its size."""
    rows, columns, size = _both_axes(len(photo), limits, box, flip, image_size, image_size, 1)
    # In the device's own precision: tf32 errs by less than a level.
    pixels = jnp.einsum("yr,rck->yck", rows, photo.astype(jnp.float32))
    return jnp.einsum("xc,yck->yxk", columns, pixels), size.astype(jnp.int32)


def masks(
    masks: Array, sizes: Array, keys: Array, augment: Augment, image_size: int, side: int
) -> Array:
    """Masks as `views` with the same keys shows their photographs.

    Args:
      masks: (b, k, m, m) uint8 of 0 and 1, on canvases made smaller.
      sizes: (b, 2) int32, (height, width) of each photograph on its own canvas.
      keys: (b,), of the views.
      augment: of the views, without mosaic and paste.
      image_size: side of the frame.
      side: of a low-resolution mask.

    Returns:
      (b, k, side, side) bool.
    """
    step = MASK_STEP

    def one(masks: Array, size: Array, key: Array) -> Array:
        box, flip = _crop(size, key, augment)
        axes = masks.shape[-1], size / step, box / step, flip, image_size, side, step
        rows, columns, _ = _both_axes(*axes)
        shares = jnp.einsum("yr,krc,xc->kyx", rows, masks.astype(jnp.float32), columns)
        return shares > 0.5

    return jax.vmap(one)(masks, sizes, keys)


def _both_axes(
    before: int, limits: Array, box: Array, flip: Array, image_size: int, after: int, step: int
) -> tuple[Array, Array, Array]:
    """Weights of rows and of columns, and the view's (height, width) in the frame.

    Args:
      before: side of the canvas.
      limits: (height, width) of the photograph on it.
      box: (top, left, height, width) on it.
      flip: whether the view is mirrored.
      image_size: side of the frame.
      after: side of what is made, a frame or a coarser grid over one.
      step: of the canvas, made smaller: photograph pixels for one of it.
    """
    corner, sides = box[:2], box[2:]
    # From the whole photograph's pixels, so that photographs and masks agree.
    size = jnp.maximum(jnp.floor(sides * step / (sides * step).max() * image_size + 0.5), 1)
    pace = sides / size * (image_size / after)
    start = jnp.where(flip, corner[1] + sides[1], corner[1])
    rows = _resampling(before, after, limits[0], corner[0], pace[0])
    columns = _resampling(before, after, limits[1], start, jnp.where(flip, -1, 1) * pace[1])
    return rows, columns, size


def _resampling(before: int, after: int, limit: Array, start: Array, step: Array) -> Array:
    """(after, before) weights along one axis: PIL's bilinear, which ends at `limit`."""
    centres = start + (jnp.arange(after) + 0.5) * step - 0.5
    places = jnp.arange(before)
    away = jnp.abs(centres[:, None] - places) / jnp.maximum(jnp.abs(step), 1)
    weights = jnp.maximum(1 - away, 0) * (places < limit)
    return weights / jnp.maximum(weights.sum(1, keepdims=True), 1e-6)


def _colour(pixels: Array, inside: Array, key: Array, augment: Augment) -> Array:
    """Brightness, then contrast about the view's mean grey, then saturation."""
    by = 1 + augment.colour * jax.random.uniform(_key(key, 5), (3,), minval=-1.0)
    pixels = pixels * by[0]
    grey = (pixels * jnp.array(GREY)).sum(-1, keepdims=True)
    middle = (grey[..., 0] * inside).sum() / inside.sum()
    pixels = middle + by[1] * (pixels - middle)
    grey = middle + by[1] * (grey - middle)
    return jnp.clip(grey + by[2] * (pixels - grey), 0, 255)


def _mixed(pixels: Array, inside: Array, size: Array, keys: Array, augment: Augment) -> Array:
    """Parts of the next photographs of the batch on each one, where both have something to show."""
    draw = jax.vmap(lambda key, use: jax.random.uniform(_key(key, use), (5,)), (0, None))
    batch, side = pixels.shape[0], pixels.shape[1]
    if batch < 2:
        return pixels
    places = jnp.arange(side) + 0.5
    y, x = places[None, :, None], places[None, None, :]
    height, width = (size[:, i, None, None].astype(jnp.float32) for i in range(2))

    chance, cut_y, cut_x, *_ = draw(keys, 6).T[:, :, None, None]
    below = y > (0.25 + 0.5 * cut_y) * height
    right = x > (0.25 + 0.5 * cut_x) * width
    quarter = jnp.where(chance < augment.mosaic, 2 * below + right, 0)
    result = pixels
    for i in range(1, min(batch, 4)):
        here = (quarter == i) & jnp.roll(inside, i, axis=0)
        result = jnp.where(here[..., None], jnp.roll(pixels, i, axis=0), result)

    chance, middle_y, middle_x, tall, wide = draw(keys, 7).T[:, :, None, None]
    away_y = (y - middle_y * height) / ((0.1 + 0.25 * tall) * height)
    away_x = (x - middle_x * width) / ((0.1 + 0.25 * wide) * width)
    here = (chance < augment.paste) & (away_y**2 + away_x**2 < 1) & jnp.roll(inside, -1, axis=0)
    return jnp.where(here[..., None], jnp.roll(pixels, -1, axis=0), result)

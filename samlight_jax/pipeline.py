"""The pure functions: `encode` an image, `predict` its masks, `predict_batch` many at once.

What a user gives is checked here and nowhere deeper; the steps are preprocess, `Sam.encode`,
`Sam.decode`, postprocess. Host inputs (paths, PIL, NumPy) are resized by PIL and give NumPy; they
compile encoder and decoder once, whatever the photographs' sizes.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from samlight_jax import prompts as prompts_
from samlight_jax.build_sam import default_model
from samlight_jax.config import EMBEDDING
from samlight_jax.errors import InputError
from samlight_jax.flat import DECODER, ENCODER, Flat, flat
from samlight_jax.postprocess import MASK_THRESHOLD, photo_logits
from samlight_jax.preprocess import Frame, ImageLike, as_array, device_pixels, host_pixels
from samlight_jax.prompts import Prompts
from samlight_jax.sam import Sam

ModelLike = Sam | str | os.PathLike[str] | None
Masks = tuple[Any, Any, Any]
ABSENT_LOGIT = -32.0  # of a row without any prompt: background, about as sure as SAM gets


@functools.partial(jax.jit, static_argnames="features")
def _encode(model: Flat, pixels: Any, features: bool = False) -> Any:
    found = jax.tree.map(lambda x: x.astype(jnp.float32), model.model().encode(pixels))
    return found if features else found[0]


@jax.jit
def _decode(model: Flat, embeddings: Any, prompts: Prompts) -> tuple[jax.Array, jax.Array]:
    """(b, h, w, 256) and prompts (b, q, ...) to (b, q, 4, n, n) logits and (b, q, 4) IoU."""
    sam = model.model()
    # One image after the other, so that memory grows with the prompts of one.
    logits, iou = jax.lax.map(lambda one: sam.decode(*one), (embeddings, prompts))
    return logits.astype(jnp.float32), iou.astype(jnp.float32)


def embed(image: Any, model: Sam) -> tuple[jax.Array, Frame]:
    """An image of `as_array` to its (1, h, w, 256) embedding and its geometry."""
    frame = _frame(image, model)
    return _encode(flat(model, ENCODER), _pixels(image, frame)[None]), frame


def _pixels(image: Any, frame: Frame) -> Any:
    if isinstance(image, np.ndarray):
        return host_pixels(image, frame)
    return device_pixels(image, frame)


def _frame(image: Any, model: Sam) -> Frame:
    return Frame((image.shape[0], image.shape[1]), model.config.image_size)


def encode(
    image: ImageLike,
    *,
    model: ModelLike = None,
    image_format: str = "RGB",
    return_features: bool = False,
) -> Any:
    """The image embedding, to decode many prompts on.

    Args:
      image: see `predict`.
      model: see `predict`.
      image_format: "RGB" or "BGR".
      return_features: also return the outputs of the encoder's parts, by their names in the model:
        `patch_embed`, `blocks.0` ... (ViT), `layers.0.blocks.0`, `layers.0.downsample` ...
        (TinyViT), each (h, w, channels).

    Returns:
      (h, w, 256) float32, channels last, h = w = image_size / 16; with `return_features` a pair.
    """
    model = default_model(model)
    array = as_array(image, image_format)
    pixels = _pixels(array, _frame(array, model))
    return jax.tree.map(
        lambda x: x[0], _encode(flat(model, ENCODER), pixels[None], return_features)
    )


def predict(
    image: ImageLike,
    point_coords: Any = None,
    point_labels: Any = None,
    box: Any = None,
    mask_input: Any = None,
    multimask_output: bool = True,
    return_logits: bool = False,
    *,
    model: ModelLike = None,
    image_embedding: Any = None,
    image_format: str = "RGB",
) -> Masks:
    """Masks of one image for one prompt: points, a box, an earlier mask, or a mix of them.

    A pure function: `jax.jit`, `jax.vmap` (over images, over prompts) and `jax.grad` (to the
    image, the prompts and the embedding) apply. A path, PIL image or NumPy array is resized by PIL
    exactly as in SAM and the results are NumPy; with a `jax.Array` anywhere, or under a
    transformation, they are JAX arrays.

    Args:
      image: a path, a PIL image, or (height, width, 3) uint8; see `preprocess.as_array`.
      point_coords: (n, 2), x then y, photograph pixels.
      point_labels: (n,), 1 foreground, 0 background, -1 SAM's padding token.
      box: (4,), x1, y1, x2, y2, photograph pixels.
      mask_input: (1, 256, 256) low-resolution logits of an earlier call, or of `mask_to_input`.
      multimask_output: three masks for an ambiguous prompt; else the single one.
      return_logits: masks as float32 logits, not bool.
      model: a `Sam`, a name or path for `load`, or None for the default.
      image_embedding: from `encode`; the image then gives only its size.
      image_format: "RGB" or "BGR".

    Returns:
      masks: (c, height, width) bool, c = 3 or 1.
      iou_predictions: (c,) float32, as the model gives it: it may leave 0 to 1.
      low_res_masks: (c, 256, 256) float32 logits.

    Raises:
      InputError: a bad image or prompt, in one sentence.
    """
    model = default_model(model)
    array = as_array(image, image_format)
    expected = (model.config.grid, model.config.grid, EMBEDDING)
    if image_embedding is not None and np.shape(image_embedding) != expected:
        raise InputError(
            f"`image_embedding` has shape {np.shape(image_embedding)}; expected {expected}, as "
            "encode() gives it. From SAM's (1, 256, h, w): jnp.moveaxis(embedding[0], 0, -1)."
        )
    return predict_one(
        model,
        lambda: (
            embed(array, model)[0]
            if image_embedding is None
            else jnp.asarray(image_embedding)[None]
        ),
        _frame(array, model),
        (point_coords, point_labels, box, mask_input),
        multimask_output,
        return_logits,
        host=prompts_.is_host(array),
    )


def predict_one(
    model: Sam,
    embedding: Callable[[], Any],
    frame: Frame,
    prompt: Sequence[Any],
    multimask_output: bool,
    return_logits: bool,
    *,
    host: bool = True,
) -> Masks:
    """`predict` from the prompt on.

    Args:
      model: to decode with.
      embedding: called after the prompt's checks; (1, h, w, 256).
      frame: of the image.
      prompt: point_coords, point_labels, box, mask_input.
      multimask_output: as in `predict`.
      return_logits: as in `predict`.
      host: whether the image was one of the host.
    """
    coords, labels, box, mask = _arrays(_ONE, prompt)
    rows = [None if x is None else x[None] for x in (coords, labels, box)] + [mask]
    if mask is not None and mask.shape[0] != 1:
        raise InputError(f"`mask_input` has shape {mask.shape}; expected one mask, (1, h, w).")
    prompts_.check(frame, model.config, *rows, absent=False)
    prompts = prompts_.assemble(frame, model.config, 1, *rows, absent=False, roomy=True)
    one = jax.tree.map(lambda x: x[None], prompts)
    low_res, iou = _decode(flat(model, DECODER), embedding(), one)
    host = host and prompts_.is_host(*rows) and not isinstance(low_res, Tracer)
    return _finish(low_res[0, 0], iou[0, 0], frame, host, multimask_output, return_logits)


# The parts of a prompt: name, shape, rank, size of the last axis.
_ONE = (
    ("point_coords", "(n, 2), x then y", 2, 2),
    ("point_labels", "(n,)", 1, None),
    ("box", "(4,): x1, y1, x2, y2", 1, 4),
    ("mask_input", "(1, 256, 256)", 3, None),
)
_BATCH = (
    ("point_coords", "(b, q, n, 2), x then y", 4, 2),
    ("point_labels", "(b, q, n)", 3, None),
    ("boxes", "(b, q, 4): x1, y1, x2, y2", 3, 4),
    ("mask_inputs", "(b, q, 256, 256)", 4, None),
)


def _arrays(parts: Sequence[tuple], prompt: Sequence[Any]) -> list[Any]:
    """The four parts of a prompt as arrays of numbers, host or device."""
    arrays: list[Any] = []
    for value, (name, shape, rank, last) in zip(prompt, parts, strict=True):
        if value is not None and not isinstance(value, jax.Array):
            try:
                value = np.asarray(value, np.float64)
            except (TypeError, ValueError) as error:
                raise InputError(f"`{name}` is not an array of numbers ({error}).") from None
        if value is not None and (value.ndim != rank or last not in (None, value.shape[-1])):
            raise InputError(f"`{name}` has shape {value.shape}; expected {shape}.")
        arrays.append(value)
    return arrays


def _finish(low_res, iou, frame: Frame, host: bool, multimask: bool, logits: bool) -> Masks:
    """(..., 4, n, n) logits and (..., 4) IoU to SAM's triple, on the host or on the device."""
    chosen = slice(1, None) if multimask else slice(0, 1)
    low_res, iou = low_res[..., chosen, :, :], iou[..., chosen]
    if host:
        low_res, iou = np.asarray(low_res), np.asarray(iou)
    masks = photo_logits(low_res, frame)
    return (masks if logits else masks > MASK_THRESHOLD), iou, low_res


def predict_batch(
    images: Sequence[ImageLike] | np.ndarray | jax.Array,
    point_coords: Any = None,
    point_labels: Any = None,
    boxes: Any = None,
    mask_inputs: Any = None,
    multimask_output: bool = True,
    return_logits: bool = False,
    *,
    model: ModelLike = None,
    image_format: str = "RGB",
) -> Masks:
    """Masks of b images with q prompts each; ragged prompts are filled up with -1.

    Here a label of -1, a box of four -1 and a mask of only -1 mean *absent* and change nothing.
    (SAM gives a point of label -1 a meaning of its own; `predict` keeps that.)

    Args:
      images: an array (b, height, width, 3), or a sequence of images of any sizes.
      point_coords: (b, q, n, 2), x then y, photograph pixels.
      point_labels: (b, q, n), 1, 0, or -1 for no point.
      boxes: (b, q, 4), or four -1 for no box.
      mask_inputs: (b, q, 256, 256) low-resolution logits, or only -1 for no mask.
      multimask_output: three masks a prompt, or one.
      return_logits: masks as float32 logits, not bool.
      model: see `predict`.
      image_format: "RGB" or "BGR".

    Returns:
      masks: (b, q, c, height, width) bool; for a sequence, a list of b arrays.
      iou_predictions: (b, q, c) float32.
      low_res_masks: (b, q, c, 256, 256) float32 logits.
      A row without any prompt gets masks of False, IoU 0 and logits -32.

    Raises:
      InputError: a bad image or prompt, or counts that differ, in one sentence.
    """
    model = default_model(model)
    if isinstance(images, (str, os.PathLike)) or (
        isinstance(images, (np.ndarray, jax.Array))
        and images.ndim < 4
        and images.shape[-1] in (3, 4)
    ):
        raise InputError("`images` is a single image; expected several. For one, write [image].")
    arrays = [as_array(image, image_format) for image in images]
    if not arrays:
        raise InputError("`images` is empty; expected at least one image.")
    frames = [_frame(array, model) for array in arrays]
    host = prompts_.is_host(*arrays)

    def embeddings() -> jax.Array:
        pixels = [_pixels(array, frame) for array, frame in zip(arrays, frames, strict=True)]
        return _encode(flat(model, ENCODER), (np if host else jnp).stack(pixels))

    masks, iou, low_res = predict_many(
        model,
        embeddings,
        frames,
        (point_coords, point_labels, boxes, mask_inputs),
        multimask_output,
        return_logits,
        host=host,
    )
    if isinstance(images, (list, tuple)):
        return masks, iou, low_res
    return (np if isinstance(iou, np.ndarray) else jnp).stack(masks), iou, low_res


def predict_many(
    model: Sam,
    embeddings: Callable[[], Any],
    frames: Sequence[Frame],
    prompt: Sequence[Any],
    multimask_output: bool,
    return_logits: bool,
    *,
    host: bool = True,
) -> tuple[list[Any], Any, Any]:
    """`predict_batch` from the prompts on, with a list of masks; see `predict_one`."""
    given = _arrays(_BATCH, prompt)
    count = _count(len(frames), given)
    host = host and prompts_.is_host(*given)
    padded = 1 << (count - 1).bit_length() if host else count  # few compilations
    prompts = _batch_prompts(model, frames, given, count, padded)
    low_res, iou = _decode(flat(model, DECODER), embeddings(), prompts)
    host = host and not isinstance(low_res, Tracer)
    # A row without any prompt is padding: no mask, and no faith in it.
    xp = np if host else jnp
    present = prompts.valid.any(axis=-1)
    present = (present if prompts.masks is None else present | prompts.has_mask)[:, :count]
    low_res = xp.where(present[..., None, None, None], low_res[:, :count], ABSENT_LOGIT)
    iou = xp.where(present[..., None], iou[:, :count], 0)
    results = [
        _finish(low_res[i], iou[i], frame, host, multimask_output, return_logits)
        for i, frame in enumerate(frames)
    ]
    masks, ious, low = (list(each) for each in zip(*results, strict=True))
    return masks, xp.stack(ious), xp.stack(low)


def _count(images: int, given: Sequence[Any]) -> int:
    """The number of prompts an image, which every array must share."""
    shapes = {x.shape[:2] for x in given if x is not None}
    if len(shapes) != 1 or next(iter(shapes))[0] != images or not next(iter(shapes))[1]:
        raise InputError(
            f"The prompts' leading axes (b, q) are {sorted(shapes)} for {images} images; expected "
            "one (b, q) for all, with b the number of images and q at least 1."
        )
    return next(iter(shapes))[1]


def _batch_prompts(
    model: Sam, frames: Sequence[Frame], given: Sequence[Any], count: int, padded: int
) -> Prompts:
    """(b, padded, ...) prompts; the rows past `count` hold nothing."""
    each = []
    for i, frame in enumerate(frames):
        rows = [None if x is None else x[i] for x in given]
        prompts_.check(frame, model.config, *rows, absent=True)
        one = prompts_.assemble(frame, model.config, count, *rows, absent=True)
        each.append(_filled(one, padded - count) if padded > count else one)
    xp = np if prompts_.is_host(*given) else jnp
    return jax.tree.map(lambda *rows: xp.stack(rows), *each)


def _filled(prompts: Prompts, more: int) -> Prompts:
    return jax.tree.map(lambda x: np.pad(x, ((0, more), *((0, 0),) * (x.ndim - 1))), prompts)

"""`predict`, the pure function, and `SamPredictor`, SAM's stateful face over the same steps.

Source of names, order and units: segment-anything, `predictor.py`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from samlight_jax import prompts as prompts_
from samlight_jax import weights
from samlight_jax.build_sam import default_model
from samlight_jax.config import EMBEDDING
from samlight_jax.errors import InputError
from samlight_jax.postprocess import MASK_THRESHOLD, photo_logits
from samlight_jax.preprocess import Frame, ImageLike, as_array, device_pixels, host_pixels
from samlight_jax.prompts import Prompts
from samlight_jax.sam import Sam

ModelLike = Sam | str | os.PathLike[str] | None
Masks = tuple[Any, Any, Any]


@functools.partial(jax.jit, static_argnames="features")
def _encode(model: Sam, pixels: jax.Array, features: bool = False) -> Any:
    embedding, by_name = model.encode(pixels)
    return (embedding, by_name) if features else embedding


@jax.jit
def _decode(model: Sam, embedding: jax.Array, prompts: Prompts) -> tuple[jax.Array, jax.Array]:
    return model.decode(embedding, prompts)


@jax.jit
def _decode_images(model: Sam, embeddings: jax.Array, prompts: Prompts) -> Any:
    """One image after the other, so that memory grows with the prompts of one."""
    logits, iou = jax.lax.map(lambda one: model.decode(*one), (embeddings, prompts))
    # A row without any prompt is padding: no mask, and no faith in it.
    present = prompts.valid.any(axis=-1) | prompts.has_mask
    return (
        jnp.where(present[..., None, None, None], logits, -32.0),
        jnp.where(present[..., None], iou, 0.0),
    )


def _pixels(image: np.ndarray | jax.Array, frame: Frame) -> np.ndarray | jax.Array:
    to_pixels = host_pixels if isinstance(image, np.ndarray) else device_pixels
    return to_pixels(image, frame)


def _frame(image: np.ndarray | jax.Array, model: Sam) -> Frame:
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
      return_features: also return the encoder's outputs by name: `patch_embed` and `blocks.0` ...
        (ViT) or `layers.0` ... (TinyViT), each (h, w, channels).

    Returns:
      (h, w, 256) float32, channels last, h = w = image_size / 16; with `return_features` a pair.
    """
    model = default_model(model)
    pixels = as_array(image, image_format)
    pixels = _pixels(pixels, _frame(pixels, model))
    return jax.tree.map(lambda x: x[0], _encode(model, pixels[None], return_features))


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
    image = as_array(image, image_format)
    frame = _frame(image, model)
    if image_embedding is None:
        embedding = _encode(model, _pixels(image, frame)[None])[0]
    else:
        embedding = _checked_embedding(image_embedding, model)
    host = prompts_.is_host(image) and not isinstance(image_embedding, jax.core.Tracer)
    return _predict_one(
        model,
        frame,
        embedding,
        host,
        point_coords,
        point_labels,
        box,
        mask_input,
        multimask_output,
        return_logits,
    )


def _checked_embedding(embedding: Any, model: Sam) -> Any:
    expected = (model.config.grid, model.config.grid, EMBEDDING)
    if embedding.shape != expected:
        raise InputError(
            f"`image_embedding` has shape {embedding.shape}; expected {expected}, as encode() "
            "gives it. From SAM's (1, 256, h, w): jnp.moveaxis(embedding[0], 0, -1)."
        )
    return embedding


def _rows(name: str, value: Any, shape: str, ndim: int, last: int | None = None) -> Any:
    """A prompt as an array of numbers of the right rank, host or device."""
    if value is None:
        return None
    if not isinstance(value, jax.Array):
        try:
            value = np.asarray(value, np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"`{name}` is not an array of numbers ({error}).") from None
    if value.ndim != ndim or (last is not None and value.shape[-1] != last):
        raise InputError(f"`{name}` has shape {value.shape}; expected {shape}.")
    return value


def _predict_one(
    model, frame, embedding, host, point_coords, point_labels, box, mask_input, multimask, logits
) -> Masks:
    """`predict` from the embedding on: one prompt, without and again without the axis of prompts."""
    given = (
        _rows("point_coords", point_coords, "(n, 2), x then y", 2, 2),
        _rows("point_labels", point_labels, "(n,)", 1),
        _rows("box", box, "(4,): x1, y1, x2, y2", 1, 4),
        _rows("mask_input", mask_input, "(1, 256, 256)", 3),
    )
    if given[3] is not None and given[3].shape[0] != 1:
        raise InputError(f"`mask_input` has shape {given[3].shape}; expected one mask, (1, h, w).")
    coords, labels, box, mask = given
    rows = [None if x is None else x[None] for x in (coords, labels, box)] + [mask]
    prompts_.check(frame, model.config, *rows, absent=False)
    prompts = prompts_.assemble(frame, model.config, 1, *rows, absent=False)
    low_res, iou = _decode(model, embedding, prompts)
    host = host and prompts_.is_host(*given)
    return tuple(x[0] for x in _finish(low_res, iou, frame, host, multimask, logits))  # type: ignore


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
    as_images = [as_array(image, image_format) for image in images]
    if not as_images:
        raise InputError("`images` is empty; expected at least one image.")
    frames = [_frame(image, model) for image in as_images]
    given = (
        _rows("point_coords", point_coords, "(b, q, n, 2), x then y", 4, 2),
        _rows("point_labels", point_labels, "(b, q, n)", 3),
        _rows("boxes", boxes, "(b, q, 4): x1, y1, x2, y2", 3, 4),
        _rows("mask_inputs", mask_inputs, "(b, q, 256, 256)", 4),
    )
    host = prompts_.is_host(*as_images, *given)
    count = _count(len(as_images), given)
    padded = 1 << (count - 1).bit_length() if host else count  # few compilations
    prompts = _batch_prompts(model, frames, given, count, padded)
    pixels = [_pixels(image, frame) for image, frame in zip(as_images, frames, strict=True)]
    embeddings = _encode(model, (np if host else jnp).stack(pixels))
    low_res, iou = _decode_images(model, embeddings, prompts)
    low_res, iou = low_res[:, :count], iou[:, :count]

    results = [
        _finish(low_res[i], iou[i], frame, host, multimask_output, return_logits)
        for i, frame in enumerate(frames)
    ]
    masks, ious, low = (list(each) for each in zip(*results, strict=True))
    stack = np.stack if host else jnp.stack
    as_one = not isinstance(images, (list, tuple))
    return (stack(masks) if as_one else masks), stack(ious), stack(low)


def _count(images: int, given: Sequence[Any]) -> int:
    """The number of prompts an image, which every array must share."""
    shapes = {x.shape[:2] for x in given if x is not None}
    if len(shapes) != 1 or next(iter(shapes))[0] != images or not next(iter(shapes))[1]:
        raise InputError(
            f"The prompts' leading axes (b, q) are {sorted(shapes)} for {images} images; expected "
            "one (b, q) for all, with b the number of images and q at least 1."
        )
    return next(iter(shapes))[1]


def _batch_prompts(model: Sam, frames, given, count: int, padded: int) -> Prompts:
    """(b, padded, ...) prompts; the rows past `count` hold nothing."""
    each = []
    for i, frame in enumerate(frames):
        rows = [None if x is None else x[i] for x in given]
        prompts_.check(frame, model.config, *rows, absent=True)
        one = prompts_.assemble(frame, model.config, count, *rows, absent=True)
        if padded > count:
            fill = ((0, padded - count),)
            one = Prompts(*(np.pad(x, fill + ((0, 0),) * (x.ndim - 1)) for x in one))
        each.append(one)
    xp = np if prompts_.is_host(*given) else jnp
    return Prompts(*(xp.stack(column) for column in zip(*each, strict=True)))


class SamPredictor:
    """SAM's predictor: set an image once, then ask for masks.

    Args:
      model: a `Sam`, a name or path for `load`, or None for the default.
    """

    def __init__(self, model: ModelLike = None):
        self.model = default_model(model)
        self._held: tuple[jax.Array, Frame] | None = None  # replaced whole: no stale part

    def set_image(self, image: ImageLike, image_format: str = "RGB") -> None:
        """Computes the embedding of an image (see `predict`), for the calls that follow."""
        array = as_array(image, image_format)
        frame = _frame(array, self.model)
        self._held = _encode(self.model, _pixels(array, frame)[None])[0], frame

    def predict(
        self,
        point_coords: Any = None,
        point_labels: Any = None,
        box: Any = None,
        mask_input: Any = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> Masks:
        """As `samlight_jax.predict`, on the image that was set."""
        embedding, frame = self._image()
        return _predict_one(
            self.model,
            frame,
            embedding,
            True,
            point_coords,
            point_labels,
            box,
            mask_input,
            multimask_output,
            return_logits,
        )

    def predict_batch(
        self,
        point_coords: Any = None,
        point_labels: Any = None,
        boxes: Any = None,
        mask_inputs: Any = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> Masks:
        """q prompts at once on the image that was set, as SAM's `predict_torch`.

        Args:
          point_coords: (q, n, 2), x then y, photograph pixels (not the frame's).
          point_labels: (q, n), 1, 0, or -1 for no point.
          boxes: (q, 4), or four -1 for no box.
          mask_inputs: (q, 1, 256, 256) logits, or only -1 for no mask.
          multimask_output: three masks a prompt, or one.
          return_logits: masks as float32 logits, not bool.

        Returns:
          (q, c, height, width), (q, c), (q, c, 256, 256).
        """
        embedding, frame = self._image()
        if mask_inputs is not None:
            mask_inputs = mask_inputs[:, 0]
        given = (
            _rows("point_coords", point_coords, "(q, n, 2), x then y", 3, 2),
            _rows("point_labels", point_labels, "(q, n)", 2),
            _rows("boxes", boxes, "(q, 4): x1, y1, x2, y2", 2, 4),
            _rows("mask_inputs", mask_inputs, "(q, 1, 256, 256)", 3),
        )
        given = tuple(None if x is None else x[None] for x in given)
        host = prompts_.is_host(*given)
        count = _count(1, given)
        padded = 1 << (count - 1).bit_length() if host else count
        prompts = _batch_prompts(self.model, [frame], given, count, padded)
        low_res, iou = _decode_images(self.model, embedding[None], prompts)
        return _finish(
            low_res[0, :count], iou[0, :count], frame, host, multimask_output, return_logits
        )

    def get_image_embedding(self) -> jax.Array:
        """(1, 256, h, w), channels first as in SAM."""
        return jnp.moveaxis(self._image()[0], -1, 0)[None]

    def reset_image(self) -> None:
        """Forgets the image."""
        self._held = None

    @property
    def is_image_set(self) -> bool:
        """Whether there is an image to ask about."""
        return self._held is not None

    @property
    def original_size(self) -> tuple[int, int]:
        """(height, width) of the image that was set."""
        return self._image()[1].original

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the image within the model's frame."""
        return self._image()[1].input

    def _image(self) -> tuple[jax.Array, Frame]:
        if self._held is None:
            raise InputError("No image is set; call set_image(image) first.")
        return self._held

    @functools.cached_property
    def _fingerprint(self) -> str:
        return weights.fingerprint(self.model.config, weights.arrays_of(self.model))

    def save_embedding(self, path: str | os.PathLike[str]) -> None:
        """Writes the embedding, the geometry and the fingerprint of the model that made it."""
        embedding, frame = self._image()
        weights.write_safetensors(
            path,
            {"embedding": np.asarray(embedding)},
            {
                "fingerprint": self._fingerprint,
                "height": str(frame.original[0]),
                "width": str(frame.original[1]),
            },
        )

    def load_embedding(self, path: str | os.PathLike[str]) -> None:
        """Sets the image whose embedding `save_embedding` wrote.

        Raises:
          InputError: not such a file, or of another model.
        """
        arrays, header = weights.read_safetensors(path)
        if "embedding" not in arrays or "fingerprint" not in header:
            raise InputError(f"{path} is not an embedding that save_embedding() wrote.")
        if header["fingerprint"] != self._fingerprint:
            raise InputError(
                f"{path} was made by another model (fingerprint {header['fingerprint'][:12]}, this "
                f"model has {self._fingerprint[:12]}); set_image() computes it anew."
            )
        original = int(header["height"]), int(header["width"])
        frame = Frame(original, self.model.config.image_size)
        self._held = jnp.asarray(arrays["embedding"]), frame

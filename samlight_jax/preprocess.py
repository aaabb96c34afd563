"""Photograph -> normalised, padded pixels, and the `Frame` that remembers the geometry.

Two ways, the same rule: `host_pixels` (NumPy, resized by PIL as SAM does, bit for bit) and
`device_pixels` (jnp, traceable and differentiable). docs/preprocessing.md has their difference.

Source: segment-anything, `utils/transforms.py` and `modeling/sam.py`, `preprocess`.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from samlight_jax.errors import InputError

PIXEL_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
PIXEL_STD = np.array([58.395, 57.12, 57.375], np.float32)
MAX_PIXELS = 1 << 27  # 11585 x 11585

ImageLike = np.ndarray | jax.Array | Image.Image | str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Frame:
    """Where a photograph lies in the model's square frame: top left, zeros below and to the right.

    Attributes:
      original: (height, width) of the photograph.
      image_size: side of the frame.
    """

    original: tuple[int, int]
    image_size: int

    def __post_init__(self):
        height, width = self.original
        if not (height and width):
            raise InputError(f"The image is empty: its size is {width}x{height} pixels.")
        if height * width > MAX_PIXELS:
            raise InputError(
                f"The image has {width}x{height} pixels; at most {MAX_PIXELS} are accepted. "
                "Make it smaller first."
            )
        if not min(self.input):
            raise InputError(
                f"The image of {width}x{height} pixels is too narrow: with the long side at "
                f"{self.image_size} its short side would vanish. Crop it first."
            )

    @property
    def input(self) -> tuple[int, int]:
        """(height, width) of the resized photograph within the frame."""
        scale = self.image_size / max(self.original)
        height, width = (int(size * scale + 0.5) for size in self.original)
        return height, width

    @property
    def scale(self) -> tuple[float, float]:
        """Frame pixels for one photograph pixel, (x, y); they differ by rounding."""
        return self.input[1] / self.original[1], self.input[0] / self.original[0]


def as_array(image: ImageLike, image_format: str = "RGB") -> Any:
    """An image as (height, width, 3) RGB.

    Args:
      image: a path (EXIF orientation is applied), a PIL image, a NumPy array of uint8, or a JAX
        array of uint8 or of floats from 0 to 255; arrays are (height, width) or (height, width,
        1, 3 or 4). Grey becomes three equal channels, alpha is dropped.
      image_format: "RGB", or "BGR" for arrays in OpenCV's order.

    Returns:
      NumPy uint8, or the JAX array in its own dtype.

    Raises:
      InputError: not such an image, or the file cannot be read.
    """
    if image_format not in ("RGB", "BGR"):
        raise InputError(f"image_format={image_format!r}: expected 'RGB' or 'BGR'.")
    if isinstance(image, (str, os.PathLike)):
        return _read(Path(image))
    if isinstance(image, Image.Image):
        try:
            return _from_pil(image)
        except OSError as error:  # the pixels of a file are read at their first use
            raise InputError(f"The PIL image is damaged or unreadable ({error}).") from None
    if not isinstance(image, (np.ndarray, jax.Array)):
        raise InputError(
            f"`image` is a {type(image).__name__}; expected a path, a PIL image, a NumPy or a JAX "
            "array."
        )
    return _three_channels(image, image_format)


def _three_channels(image: Any, image_format: str) -> Any:
    floats = isinstance(image, jax.Array) and jnp.issubdtype(image.dtype, jnp.floating)
    if image.dtype != np.uint8 and not floats:
        raise InputError(
            f"`image` has dtype {image.dtype}; expected uint8 from 0 to 255 (a jax.Array may hold "
            "floats from 0 to 255). Convert it with (image * 255).astype('uint8') if it is 0 to 1."
        )
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4):
        raise InputError(
            f"`image` has shape {image.shape}; expected (height, width) or (height, width, 1, 3 or "
            "4), channels last. For several images use predict_batch or jax.vmap."
        )
    if image.shape[-1] == 1:
        return image.repeat(3, axis=-1)
    image = image[..., :3]
    return image[..., ::-1] if image_format == "BGR" else image


def _from_pil(image: Image.Image) -> np.ndarray:
    if image.mode[0] in "IF":  # Pillow would cut everything above 255 off
        raise InputError(
            f"The image has mode {image.mode!r}, more than 8 bits a channel; expected 8: scale its "
            "values to 0 to 255 first."
        )
    return np.asarray(image.convert("RGB"))


def _read(path: Path) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `Frame` has a limit
            image = Image.open(path)
        with image:
            Frame((image.height, image.width), 1 << 14)  # before the pixels are decoded
            return _from_pil(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise InputError(f"{path} is not an image that Pillow can read.") from None
    except FileNotFoundError:
        raise InputError(f"There is no image {path}.") from None
    except Image.DecompressionBombError:
        raise InputError(
            f"{path} has more pixels than the {MAX_PIXELS} accepted. Make it smaller first."
        ) from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # Pillow raises what it likes: AttributeError, struct.error ...
        raise InputError(f"{path} is damaged or unreadable ({error}).") from None


def host_pixels(image: np.ndarray, frame: Frame) -> np.ndarray:
    """(height, width, 3) uint8 to (image_size, image_size, 3) float32, resized by PIL as in SAM."""
    height, width = frame.input
    if image.shape[:2] != frame.input:
        image = np.asarray(
            Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        )
    pixels = np.zeros((frame.image_size, frame.image_size, 3), np.float32)
    pixels[:height, :width] = (image - PIXEL_MEAN) / PIXEL_STD
    return pixels


def device_pixels(image: jax.Array, frame: Frame) -> jax.Array:
    """The same in jnp. uint8 is rounded after each axis, as PIL does; floats never are."""
    height, width = frame.input
    finish = (lambda x: jnp.floor(x + 0.5)) if image.dtype == jnp.uint8 else lambda x: x
    pixels = image.astype(jnp.float32)
    for shape in ((image.shape[0], width, 3), (height, width, 3)):
        if pixels.shape != shape:
            # `antialias` widens the triangle when the image shrinks: PIL's bilinear.
            pixels = finish(jax.image.resize(pixels, shape, "linear", antialias=True))
    pixels = (pixels - PIXEL_MEAN) / PIXEL_STD
    pad = frame.image_size - height, frame.image_size - width
    return jnp.pad(pixels, ((0, pad[0]), (0, pad[1]), (0, 0)))

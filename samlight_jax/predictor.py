"""`SamPredictor`: SAM's stateful face over the functions of `pipeline`.

Source of names, order and units: segment-anything, `predictor.py`.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from samlight_jax import weights
from samlight_jax.build_sam import default_model
from samlight_jax.errors import InputError
from samlight_jax.pipeline import Masks, ModelLike, embed, predict_many, predict_one
from samlight_jax.preprocess import Frame, ImageLike, as_array


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
        self._held = embed(as_array(image, image_format), self.model)

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
        prompt = (point_coords, point_labels, box, mask_input)
        return predict_one(
            self.model, lambda: embedding, frame, prompt, multimask_output, return_logits
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
        """Q prompts at once on the image that was set, as SAM's `predict_torch`.

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
            if np.ndim(mask_inputs) != 4 or np.shape(mask_inputs)[1] != 1:
                raise InputError(
                    f"`mask_inputs` has shape {np.shape(mask_inputs)}; expected (q, 1, 256, 256)."
                )
            xp = jnp if isinstance(mask_inputs, jax.Array) else np
            mask_inputs = xp.asarray(mask_inputs)[:, 0]
        prompt = [
            None if part is None else part[None] if hasattr(part, "ndim") else [part]
            for part in (point_coords, point_labels, boxes, mask_inputs)
        ]
        masks, iou, low_res = predict_many(
            self.model, lambda: embedding, [frame], prompt, multimask_output, return_logits
        )
        return masks[0], iou[0], low_res[0]

    def get_image_embedding(self) -> jax.Array:
        """(1, 256, h, w), channels first as in SAM."""
        return jnp.moveaxis(self._image()[0], -1, 1)

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

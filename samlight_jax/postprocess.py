"""Low-resolution logits -> masks of the photograph's size.

SAM resizes twice: to the frame, crops the padding, then to the photograph, both bilinear without
antialiasing. Both are linear and separable, so they are one matrix for each axis, and a mask is two
small products; nothing of the frame's size is ever made.

Source: segment-anything, `modeling/sam.py`, `postprocess_masks`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from samlight_jax.preprocess import Frame

MASK_THRESHOLD = 0.0
LOW_RES = 4  # low-resolution mask pixels for one token


def _resize_rows(matrix: np.ndarray, rows: int) -> np.ndarray:
    """Bilinear along the first axis to `rows`, `align_corners=False`, no antialiasing."""
    places = np.clip((np.arange(rows) + 0.5) * len(matrix) / rows - 0.5, 0, None)
    low = np.minimum(places.astype(int), len(matrix) - 1)
    high = np.minimum(low + 1, len(matrix) - 1)
    part = (places - low)[:, None]
    return matrix[low] * (1 - part) + matrix[high] * part


def resize_weights(frame: Frame, low_res: int) -> tuple[np.ndarray, np.ndarray]:
    """((height, low_res), (width, low_res)) float32: the whole way from a low-res mask, by axis."""
    to_frame = _resize_rows(np.eye(low_res), frame.image_size)
    height, width = (
        _resize_rows(to_frame[:inside], original).astype(np.float32)
        for inside, original in zip(frame.input, frame.original, strict=True)
    )
    return height, width


def photo_logits(low_res_logits: Any, frame: Frame) -> Any:
    """(..., n, n) low-resolution logits to (..., height, width); NumPy in, NumPy out, else jnp."""
    by_row, by_column = resize_weights(frame, low_res_logits.shape[-1])
    if isinstance(low_res_logits, np.ndarray):
        return by_row @ low_res_logits @ by_column.T
    dot = jax.lax.Precision.HIGHEST  # tf32 would shift a mask's edge
    rows = jnp.matmul(by_row, low_res_logits.astype(jnp.float32), precision=dot)
    return jnp.matmul(rows, by_column.T, precision=dot)

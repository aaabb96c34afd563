"""What all subjects of `benchmarks.compare` share: what they are asked, and how they are held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

SIDE = 1024
TINY_SIDE = 256
IMAGE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
BOX = np.array([200.0, 150, 800, 700])
Call = Callable[[], Any]


def photograph(side: int) -> np.ndarray:
    """A photograph of scikit-image's, (side, side, 3) uint8."""
    from skimage import data  # type: ignore[reportMissingImports]

    return np.asarray(
        Image.fromarray(data.astronaut()).resize((side, side), Image.Resampling.BICUBIC)
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over tokens; channels last."""
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (a, b))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(f"{((a * b).sum(1) / norms).mean():.6g}")

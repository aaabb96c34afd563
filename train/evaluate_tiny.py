"""A random model and synthetic photographs for `--tiny`: seconds on any machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from PIL import Image, ImageDraw

from samlight_jax import weights
from samlight_jax.config import Pattern, SamConfig, ViTConfig
from samlight_jax.sam import Sam

TINY = SamConfig(
    name="tiny",
    encoder=ViTConfig(width=32, depth=1, heads=2, attention=(Pattern(segment=(2, 2)),)),
    image_size=64,
    decoder_mlp=64,
)


def tiny_model() -> Sam:
    """A model of random weights."""
    return weights.build(TINY, weights.arrays_of(Sam(TINY, rngs=nnx.Rngs(0))))


def tiny_data(folder: Path, photographs: int = 4) -> Path:
    """Writes photographs of two ellipses each, and their annotations in COCO's format.

    Returns:
      The JSON file; the photographs lie in `images` beside it.
    """
    rng = np.random.default_rng(0)
    images: list[Any] = []
    annotations: list[Any] = []
    (folder / "images").mkdir(parents=True)
    for i in range(photographs):
        width, height = (int(side) for side in rng.integers(40, 120, size=2))
        name = f"{i}.png"
        picture = Image.new("RGB", (width, height), tuple(rng.integers(0, 100, 3).tolist()))
        for x in (0, width // 2):
            box = (x + 2, 4, x + width // 2 - 3, height - 5)
            colour = tuple(rng.integers(150, 256, 3).tolist())
            ImageDraw.Draw(picture).ellipse(box, fill=colour)
            annotations.append(_annotation(len(annotations) + 1, i, (width, height), box))
        picture.save(folder / "images" / name)
        images.append({"id": i, "file_name": name, "width": width, "height": height})
    path = folder / "annotations.json"
    categories = [{"id": 1, "name": "ellipse"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return path


def _annotation(number: int, image: int, size: tuple[int, int], box: tuple) -> dict[str, Any]:
    mask = Image.new("1", size)
    ImageDraw.Draw(mask).ellipse(box, fill=1)
    flat = np.concatenate([[False], np.asarray(mask).T.ravel()])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], changes, [len(flat) - 1]])).tolist()
    x1, y1, x2, y2 = box
    return {
        "id": number,
        "image_id": image,
        "category_id": 1,
        "segmentation": {"size": size[::-1], "counts": counts},
        "bbox": [x1, y1, x2 - x1 + 1, y2 - y1 + 1],
        "area": int(flat.sum()),
        "iscrowd": 0,
    }

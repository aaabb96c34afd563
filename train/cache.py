"""A teacher's embeddings of fixed views, in array_record shards with a manifest.

A view follows from the cache's seed and the item's number alone, so pixels are never stored. The
manifest says of which teacher, photographs and preprocessing the embeddings are; others are
refused.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import grain
import jax
import ml_dtypes
import numpy as np

from samlight_jax.errors import InputError
from train.config import Augment

MANIFEST, FORMAT = "manifest.json", 1
SHARD = 512  # records in a file
DTYPE = ml_dtypes.bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a cache is of.

    Attributes:
      teacher: fingerprint of its file.
      photographs: sha256 of their names.
      count: of photographs.
      views: of each photograph.
      seed: of the views.
      augment: of the views; nothing of other photographs.
      image_size: side of the frame, pixels.
      canvas: side of the photographs' squares, pixels.
    """

    teacher: str
    photographs: str
    count: int
    views: int
    seed: int
    augment: Augment
    image_size: int
    canvas: int

    def to_json(self) -> dict[str, Any]:
        """As it is stored, and as JSON gives it back."""
        return json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}))


def keys_of(seed: int, items: jax.Array) -> jax.Array:
    """(n,) random keys of items' views."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), items)


def shard_name(index: int) -> str:
    """Of the file with the items from `index * SHARD` on."""
    return f"embeddings-{index:05d}.array_record"


class Cache:
    """The embeddings of a folder, by item: view v of photograph p is item v * count + p.

    Args:
      folder: that `train.cache_teacher` wrote.
      manifest: what the run needs; the views' seed, number and augmentation are the cache's own.

    Raises:
      InputError: no cache, not a whole one, or of something else.
    """

    def __init__(self, folder: str, **needed: Any):
        path = Path(folder) / MANIFEST
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{folder} holds no teacher's cache ({error}); python -m train.cache_teacher makes "
                "one."
            ) from None
        wrong = [
            f"{name} is {found.get(name)!r}, this run has {value!r}"
            for name, value in {"format": FORMAT, **needed}.items()
            if found.get(name) != value
        ]
        if wrong:
            raise InputError(f"The cache {folder} is of something else: {'; '.join(wrong)}.")
        self.views, self.seed, self.count = found["views"], found["seed"], found["count"]
        self.augment = Augment(**{**found["augment"], "scale": tuple(found["augment"]["scale"])})
        self.grid = found["image_size"] // 16
        total = self.views * self.count
        names = [Path(folder) / shard_name(i) for i in range(-(-total // SHARD))]
        missing = [name.name for name in names if not name.exists()]
        if missing:
            raise InputError(
                f"The cache {folder} lacks {len(missing)} of {len(names)} shards ({missing[0]} "
                "...); the same cache_teacher command goes on where it stopped."
            )
        self.source = grain.sources.ArrayRecordDataSource([str(name) for name in names])

    def __getitem__(self, item: int) -> np.ndarray:
        """(h, w, 256) bfloat16."""
        flat = np.frombuffer(self.source[item], DTYPE)
        return flat.reshape(self.grid, self.grid, -1)

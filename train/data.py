"""Photographs in an order that only the seed decides, to batches for the devices.

The photograph of row j of step i follows from the seed alone, so that a run continued at step i, on
any number of processes, sees what an uninterrupted one sees.
"""

from __future__ import annotations

import csv
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from samlight_jax.errors import InputError
from train import sharding
from train.photographs import Photographs, open_photographs

THREADS = 16  # that read and decode; Pillow lets others run meanwhile


class Photos:
    """The photographs of a run, decoded to canvases of one size; the unreadable are replaced.

    Args:
      roots: folders and tars, see `photographs.open_photographs`.
      exclude: files that name photographs to leave out.
      canvas: side in pixels; larger photographs are made smaller.
      max_bad: share that may be unreadable.

    Attributes:
      names: in a fixed order.
      bad: sentences about the unreadable ones that were met, by name.
    """

    def __init__(
        self, roots: Sequence[str], exclude: Sequence[str], canvas: int, max_bad: float = 0.01
    ):
        if not roots:
            raise InputError("No photographs were given: --data FOLDER_OR_TAR ...")
        self.source: Photographs = open_photographs(list(roots))
        unwanted = {name for path in exclude for name in _listed(path)}
        self.names = [
            n for n in self.source.names if n not in unwanted and _inner(n) not in unwanted
        ]
        if not self.names:
            raise InputError(f"No photograph is left of {', '.join(roots)}; give other --data.")
        self.canvas, self.max_bad = canvas, max_bad
        self.bad: dict[str, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`photos` (canvas, canvas, 3) uint8 and `sizes` (2,) int32, (height, width).

        In place of an unreadable photograph comes the next one that can be read.

        Raises:
          InputError: more than `max_bad` of the photographs are unreadable.
        """
        for step in range(len(self)):
            name = self.names[(index + step) % len(self)]
            try:
                return on_canvas(self.source.read(name, upright=True), self.canvas)
            except InputError as error:
                self._remember(name, str(error))
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


def _listed(path: str) -> Iterator[str]:
    """Names in the first column of a file; where there is a column `file`, in that."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--exclude {path} cannot be read ({error}).") from None
    column = rows[0].index("file") if rows and "file" in rows[0] else 0
    yield from (row[column] for row in rows if len(row) > column)


def _inner(name: str) -> str:
    """Without the folder or tar that `open_photographs` puts before ambiguous names."""
    return name.split("/", 1)[-1]


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


class Rows:
    """The photographs of one process's rows, step after step: a random access data source.

    Args:
      photos: what they come from.
      seed: of the order; every photograph comes once before any comes again.
      rows: this process's rows of the batch.
      batch: over all processes.
      steps: how many.
    """

    def __init__(self, photos: Any, seed: int, rows: slice, batch: int, steps: int):
        self.photos, self.rows, self.batch, self.steps = photos, rows, batch, steps
        self.order = grain.MapDataset.range(len(photos)).seed(seed).shuffle().repeat()

    def __len__(self) -> int:
        return self.steps * (self.rows.stop - self.rows.start)

    def index(self, step: int, row: int) -> int:
        """The photograph of a row of a step."""
        return int(self.order[step * self.batch + row])

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        step, row = divmod(i, self.rows.stop - self.rows.start)
        return self.photos[self.index(step, self.rows.start + row)]


def batches(rows: Rows, start: int, mesh: jax.sharding.Mesh) -> Iterator[dict[str, jax.Array]]:
    """Batches from step `start` on, as global arrays: `photos` and `sizes`."""
    each = rows.rows.stop - rows.rows.start
    dataset = grain.MapDataset.source(rows)[start * each :]
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=max(2 * each, THREADS))
    for some in dataset.to_iter_dataset(options).batch(each):
        yield sharding.from_rows(some, mesh)


class Resident:
    """All photographs decoded once into the devices' memory, each device holding its part.

    Args:
      photos: what to hold.
      mesh: of the devices.
    """

    def __init__(self, photos: Photos, mesh: jax.sharding.Mesh):
        self.mesh = mesh
        devices = mesh.shape["data"] * mesh.shape["fsdp"]
        self.length = -(-len(photos) // devices) * devices
        self.count = len(photos)
        where = sharding.batch_sharding(mesh)
        first = photos[0]
        shapes = {name: (self.length, *x.shape) for name, x in first.items()}
        # Each process decodes what its devices hold, and nothing twice.
        parts = where.addressable_devices_indices_map((self.length,))
        held: dict[str, list[jax.Array]] = {name: [] for name in first}
        for device, (rows,) in parts.items():
            some = self._decode(photos, range(*rows.indices(self.length)))
            for name, x in some.items():
                held[name].append(jax.device_put(x, device))
        self.arrays = {
            name: jax.make_array_from_single_device_arrays(shapes[name], where, arrays)
            for name, arrays in held.items()
        }

    def _decode(self, photos: Photos, rows: range) -> dict[str, np.ndarray]:
        indices = [i % self.count for i in rows]
        dataset = grain.MapDataset.source(_Some(photos, indices))
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=2 * THREADS)
        found: dict[str, np.ndarray] = {}
        for i, one in enumerate(dataset.to_iter_dataset(options)):
            for name, x in one.items():
                found.setdefault(name, np.empty((len(indices), *x.shape), x.dtype))[i] = x
        return found

    def take(self, arrays: dict[str, jax.Array], index: jax.Array) -> dict[str, jax.Array]:
        """Rows by their number, each on the device that will use it; inside `jit`.

        Every device gives what it holds of the batch; a sum over devices brings it together.
        """
        axes = ("data", "fsdp")
        spec = sharding.BATCH

        def local(parts: dict[str, jax.Array], index: jax.Array) -> dict[str, jax.Array]:
            held = parts["sizes"].shape[0]
            place = index - jax.lax.axis_index(axes) * held
            here = (place >= 0) & (place < held)

            def one(x: jax.Array) -> jax.Array:
                rows = x[jnp.where(here, place, 0)]
                rows = jnp.where(here.reshape(-1, *[1] * (x.ndim - 1)), rows, 0)
                return jax.lax.psum_scatter(rows, axes, tiled=True)

            return {name: one(x) for name, x in parts.items()}

        specs = jax.tree.map(lambda _: spec, arrays)
        run = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(specs, jax.sharding.PartitionSpec()),
            out_specs=specs,
            check_vma=False,
        )
        return run(arrays, index)


class _Some:
    """Some items of a source, by their own numbers."""

    def __init__(self, source: Any, indices: Sequence[int]):
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Any:
        return self.source[self.indices[i]]


def indices(rows: Rows, step: int) -> np.ndarray:
    """(batch,) int32: the photographs of all rows of a step."""
    return np.array([rows.index(step, row) for row in range(rows.batch)], np.int32)

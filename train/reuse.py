"""Views kept on the devices with the teacher's embeddings, so that each is learnt from again.

Round after round a pool is filled with new views; then they come in as many random orders as
`reuse` says. All follows from the seed and the step, so that a continued run sees the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from samlight_jax.sam import Sam
from train import augment, sharding
from train.step import EMBEDDING, Seen, Task, keys_of, teach

Arrays = dict[str, jax.Array]


class Pool:
    """Some batches of views; row j of a step takes one of those that row j of a filling made.

    Args:
      task: of the run.
      teacher: on the devices.
      see: (batch, keys) to `Seen`, of new views.
      fresh: batches for `see`, from the given one on.
      mesh: of the devices.

    Attributes:
      held: batches in the pool.
      filled: batches that are made for it in all the run.
      arrays: the pool: (held, batch, ...) each.
    """

    def __init__(
        self,
        task: Task,
        teacher: Sam,
        see: Callable[..., Seen],
        fresh: Callable[[int], Iterator[Any]],
        mesh: jax.sharding.Mesh,
    ):
        config = self.config = task.config
        self.teacher, self.fresh, self.mesh = teacher, fresh, mesh
        self.held = config.held
        self.filled = -(-config.steps // (self.held * config.reuse)) * self.held
        self.spec = PartitionSpec(None, *sharding.BATCH)
        self.round: int | None = None
        self.arrays: Arrays = {}
        self.coming: Iterator[Any] = iter(())

        def made(teacher: Sam, batch: Any, step: Any) -> Arrays:
            views = see(batch, keys_of(np.uint32(config.seed), step, config.batch)).views
            embedding, _ = teach(task, teacher, views)
            kept = {"pixels": views.pixels, EMBEDDING: embedding}
            return {"size": views.size, **{n: x.astype(config.dtype) for n, x in kept.items()}}

        def fill(pool: Arrays, teacher: Sam, batch: Any, step: Any) -> Arrays:
            place = step % self.held
            rows = made(teacher, batch, step)
            put = jax.lax.dynamic_update_index_in_dim  # in the pool's own memory
            return {n: put(x, rows[n], place, 0) for n, x in pool.items()}

        self.made, where = made, NamedSharding(mesh, self.spec)
        self.fill = jax.jit(fill, donate_argnums=0, out_shardings=where)

    def batches(self, start: int) -> Iterator[tuple[Arrays, Arrays]]:
        """What `look` takes, from step `start` on."""
        config, held = self.config, self.held
        rows = sharding.rows_of(jax.process_index(), jax.process_count(), config.batch)
        for turn in range(start // held, -(-config.steps // held)):
            self._fill(turn // config.reuse)
            places = self._places(turn)
            first, end = turn * held, min((turn + 1) * held, config.steps)
            for step in range(max(start, first), end):
                some = {"place": places[rows, step - first].astype(np.int32)}
                yield sharding.from_rows(some, self.mesh), self.arrays

    def _places(self, turn: int) -> np.ndarray:
        """(batch, held): for each row, the whole pool in an order of its own."""
        order = np.random.default_rng([self.config.seed, turn])
        return order.permuted(np.tile(np.arange(self.held), (self.config.batch, 1)), axis=1)

    def _fill(self, wanted: int) -> None:
        if self.round == wanted:
            return
        first = wanted * self.held
        if self.round is None or wanted != self.round + 1:
            self.coming = self.fresh(first)
        for i, batch in enumerate(itertools.islice(self.coming, self.held)):
            if not self.arrays:
                self.arrays = self._empty(batch)
            self.arrays = self.fill(self.arrays, self.teacher, batch, np.int32(first + i))
        self.round = wanted

    def _empty(self, batch: Any) -> Arrays:
        shapes = jax.eval_shape(self.made, self.teacher, batch, np.int32(0))
        where = NamedSharding(self.mesh, self.spec)

        def zeros() -> Arrays:
            return {n: jnp.zeros((self.held, *x.shape), x.dtype) for n, x in shapes.items()}

        return jax.jit(zeros, out_shardings=where)()

    def look(self, batch: tuple[Arrays, Arrays], keys: jax.Array) -> Seen:
        """The views of a step; inside `jit`."""
        del keys  # they made other views, when the pool was filled

        def local(pool: Arrays, place: jax.Array) -> Arrays:
            return {n: x[place, jnp.arange(len(place))] for n, x in pool.items()}

        some, pool = batch
        take = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=({n: self.spec for n in pool}, sharding.BATCH),
            out_specs=sharding.BATCH,
            check_vma=False,
        )
        rows = take(pool, some["place"])
        return Seen(augment.Views(rows["pixels"], rows["size"]), rows[EMBEDDING])

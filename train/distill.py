"""Program: distils a light SAM from a teacher, one stage at a time.

Run: `python -m train.distill --stage 1 --data FOLDER_OR_TAR --out runs/t`; the same command
continues a run that was stopped. `--config debug` (or another of `train.config.PRESETS`) sets other
defaults.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from samlight_jax import weights
from samlight_jax.build_sam import keep_compilations
from samlight_jax.errors import InputError, exit_on_error
from samlight_jax.postprocess import LOW_RES
from train import augment, cache, checkpoint, data, sharding, sheet
from train.config import PRESETS, Augment, TrainConfig
from train.log import Log
from train.losses import Moments
from train.reuse import Pool
from train.schedule import Pace
from train.start import prepare, prepared
from train.step import Seen, State, make_step

MODEL = "model.safetensors"
AHEAD = 2  # steps that the devices are sent before the first of them is read
SHOWN = 4  # photographs on a sheet


class Run:
    """One stage, from where its folder says it is to its end.

    Args:
      config: of the run.
      resident: the same photographs, if they lie on the devices already.

    Attributes:
      stopped: set it, and the run saves and ends after its current step.
    """

    def __init__(self, config: TrainConfig, resident: data.Resident | None = None):
        self.config, self.folder, self.stopped = config, Path(config.out), False
        self.begun: tuple[State, Any] | None = None
        self.advance: Any = None
        self.moments: dict[str, Moments] | None = None
        self.mesh = sharding.make_mesh(config.mesh)
        parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"] * config.accumulate
        if config.batch % parts:
            raise InputError(
                f"batch={config.batch} does not divide over {parts} (devices times accumulate); "
                f"take a multiple of {parts}."
            )
        self.writes = jax.process_index() == 0
        self.photos = data.Photos(
            config.data,
            config.exclude,
            config.canvas,
            config.max_bad,
            annotated=config.targets == "annotations",
        )
        self.start = prepare(config)
        self.task = self.start.task
        self.cache = self._cache()
        self.teacher = self.start.place_teacher(self.mesh)
        if resident is None and config.cache_photos == "device":
            resident = data.Resident(self.photos, self.mesh)
        self.resident = resident
        items = data.Items(None if resident else self.photos, self.cache, len(self.photos))
        rows = sharding.rows_of(jax.process_index(), jax.process_count(), config.batch)
        self.pool = None
        if config.reuse > 1:
            self.pool = Pool(self.task, self.teacher, self._see, self._fresh, self.mesh)
        steps = self.pool.filled if self.pool else config.steps
        self.rows = data.Rows(items, config.seed, rows, config.batch, steps)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints = checkpoint.Checkpoints(self.folder, self._identity(), config.keep)

    def _identity(self) -> dict[str, Any]:
        return checkpoint.identity(
            self.config,
            teacher=self.start.teacher_fingerprint,
            student=self.task.student.to_json(),
            photographs=self.photos.fingerprint,
        )

    def _cache(self) -> cache.Cache | None:
        if not self.config.teacher_cache:
            return None
        return cache.Cache(
            self.config.teacher_cache,
            teacher=self.start.teacher_fingerprint,
            photographs=self.photos.fingerprint,
            image_size=self.config.image_size,
            canvas=self.config.canvas,
        )

    def batches(self, start: int) -> Iterator[Any]:
        """What `look` takes, step after step."""
        return self._fresh(start) if self.pool is None else self.pool.batches(start)

    def look(self, batch: Any, keys: jax.Array) -> Seen:
        """A batch as the models see it; inside `jit`."""
        return (self._see if self.pool is None else self.pool.look)(batch, keys)

    def _fresh(self, start: int) -> Iterator[Any]:
        held = None if self.resident is None else self.resident.arrays
        for batch in data.batches(self.rows, start, self.mesh):
            yield batch, held

    def _see(self, batch: Any, keys: jax.Array) -> Seen:
        (some, held), varied = batch, self.config.augment
        photos = some if self.resident is None else self.resident.take(held, some["item"])
        if self.cache is not None:
            keys, varied = cache.keys_of(self.cache.seed, some["item"]), self.cache.augment
        if self.photos.annotated:
            varied = varied.alone()
        of, size = (photos["sizes"], keys, varied), self.config.image_size
        views, masks = augment.views(photos["photos"], *of, size), None
        if self.photos.annotated:
            masks = augment.masks(photos["masks"], *of, size, LOW_RES * self.task.student.grid)
        return Seen(views, some.get("embedding"), masks)

    def state(self) -> State:
        """The state to go on from."""
        abstract, where = self._abstract()
        if self.checkpoints.latest is not None:
            return self.checkpoints.restore(abstract, where)[0]
        embeds = self.config.embedding_weight and not self.photos.annotated
        if self.moments is None and (self.config.stage == 1 or embeds):
            self.moments = prepared(self.task, self.teacher, self.look, self.batches(0))
        return sharding.placed(self.start.state(self.moments), where)

    def _pace(self, step: int) -> Pace:
        return jax.tree.map(lambda x: x[step], self.start.paces)

    def _abstract(self) -> tuple[State, State]:
        """Shapes of the state, and where its arrays lie."""
        abstract = jax.eval_shape(self.start.state)
        return abstract, sharding.shardings(abstract, self.mesh)

    def begin(self, like: Run | None = None) -> tuple[State, Any]:
        """The first state and the compiled step: what `run` would do first, ahead of it.

        Args:
          like: a run of the same `TrainConfig.program` that has begun; what it compiled and found
            out about the teacher serves again.
        """
        if like is not None:
            self.advance, self.moments = like.advance, like.moments
        state = self.state()
        if self.advance is None:
            self.advance = make_step(self.task, self.look, self._abstract()[1])
            for batch in itertools.islice(self.batches(int(state.step)), 1):  # none at the end
                lowered = self.advance.lower(state, self.teacher, self._pace(0), batch)
                self.advance = lowered.compile()
        self.begun = state, self.advance
        return self.begun

    def run(self) -> None:
        """Trains until the end or until it is told to stop; then writes the model."""
        state, advance = self.begun or self.begin()
        self.begun = None  # the state's memory is given to the next one
        start = int(state.step)
        if start:
            self.say(f"continues at step {start} of {self.config.steps}")
        log = Log(
            self.config,
            start,
            rates=self.start.paces.rate,
            flops=self.start.flops(),
            writes=self.writes,
        )
        with log:
            state = self._steps(state, advance, start, log)
        self.pool = None  # its memory is given to the next run
        self._save(state)
        self.checkpoints.close()
        if int(state.step) < self.config.steps:
            self.say(f"stopped at step {int(state.step)}; the same command continues.")
        else:
            self._write(state)

    def _steps(self, state: State, advance: Any, start: int, log: Log) -> State:
        batches, pending = self.batches(start), collections.deque()

        def settle(few: int) -> None:
            while len(pending) > few:
                done, measures, waited = pending.popleft()
                log.take(done, measures, waited, self.checkpoints.latest)

        for done in range(start + 1, self.config.steps + 1):
            before = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - before
            if pending and not pending[-1][1]["loss"].is_ready():
                waited = 0.0  # the devices are still busy with the step before
            state, measures = advance(state, self.teacher, self._pace(done - 1), batch)
            pending.append((done - 1, measures, waited))
            settle(AHEAD)
            stops = self.stopped or self._preempted(done)
            last = stops or done == self.config.steps
            if last or done % self.config.save_every == 0:
                settle(0)  # nothing is saved that was not looked at
                self._save(state)
            if self.config.sheet_every and (last or done % self.config.sheet_every == 0):
                self._draw(state)
            if stops:
                break
        return state

    def _preempted(self, step: int) -> bool:
        """Whether any of several processes was told to stop; all of them agree on the step."""
        return jax.process_count() > 1 and self.checkpoints.manager.reached_preemption(step)

    def _save(self, state: State) -> None:
        step = int(state.step)
        self.checkpoints.save(step, state, {"step": step, "unreadable": self.photos.bad})

    def _draw(self, state: State) -> None:
        """A sheet of the first photographs, as they are."""
        some = [self.photos[i] for i in range(min(SHOWN, len(self.photos)))]
        models = {**state.frozen, **state.ema}, self.teacher
        models = sharding.everywhere(models, self.mesh)
        if not self.writes:
            return
        arrays, teacher = jax.tree.map(np.asarray, models)  # of this process alone from here on
        photos, sizes = (
            jnp.asarray(np.stack([one[name] for one in some])) for name in ("photos", "sizes")
        )
        size = self.config.image_size
        views = augment.views(photos, sizes, jnp.zeros(len(some)), None, size)
        picture = sheet.make(self.task.student, arrays, teacher, views, f"step {int(state.step)}")
        path = self.folder / f"sheet-{int(state.step):06d}.png"
        weights.write_whole(path, lambda scratch: picture.save(scratch, "PNG"))

    def _write(self, state: State) -> None:
        """The averaged weights as a model file."""
        arrays = sharding.everywhere({**state.frozen, **state.ema}, self.mesh)
        if self.writes:
            metadata = {
                "source": f"distilled from {self.config.teacher}, stage {self.config.stage}"
            }
            path = self.folder / MODEL
            host = {name: np.asarray(x) for name, x in arrays.items()}
            weights.save(path, host, self.task.student, metadata=metadata)
            self.say(f"wrote {path}")
        if bad := self.photos.bad:
            self.say(f"{len(bad)} unreadable photographs were replaced: {'; '.join(bad.values())}")

    def say(self, text: str) -> None:
        """Prints, in one process."""
        if self.writes:
            Console(stderr=True, soft_wrap=True).print(text, highlight=False, markup=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Views(Augment):
    def __post_init__(self):
        pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Flags(TrainConfig):
    """Not checked yet: tyro would make a picture of our sentence."""

    augment: _Views = dataclasses.field(default_factory=_Views)

    def __post_init__(self):
        pass


def _as(kind: type, config: Any, **changes: Any) -> Any:
    """The same fields in another class."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(kind)}
    return kind(**fields | changes)


def parse(arguments: list[str]) -> TrainConfig:
    """Flags over the defaults of `--config`."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config", choices=PRESETS, default="default")
    chosen, rest = first.parse_known_args(arguments)
    presets = "\n".join(f"  --config {name}: {text}" for name, (text, _) in PRESETS.items())
    default = PRESETS[chosen.config][1]
    flags = tyro.cli(
        _Flags,
        prog="python -m train.distill",
        default=_as(_Flags, default, augment=_as(_Views, default.augment)),
        args=rest,
        description=f"{(__doc__ or '').splitlines()[0]}\n\nPresets:\n{presets}",
    )
    return _as(TrainConfig, flags, augment=_as(Augment, flags.augment))


def join(config: TrainConfig) -> None:
    """Joins the other processes, where there are any."""
    cluster = config.cluster
    sizes = (os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    if cluster.coordinator or any(int(size) > 1 for size in sizes):
        jax.distributed.initialize(cluster.coordinator, cluster.processes, cluster.process)


def distil(config: TrainConfig) -> None:
    """Runs one stage; SIGTERM and Ctrl-C make it save and end."""
    keep_compilations()
    join(config)
    run = Run(config)

    def stop(*_: object) -> None:
        run.stopped = True

    if jax.process_count() == 1:  # several processes agree through Orbax
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, stop)
    run.run()


def main() -> None:
    """The command line; bad input ends it with one sentence and exit code 2."""
    exit_on_error(lambda: distil(parse(sys.argv[1:])))


if __name__ == "__main__":
    main()

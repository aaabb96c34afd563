"""Program: distils a light SAM from a teacher, one stage at a time.

Run: `python -m train.distill --stage 1 --data FOLDER_OR_TAR --out runs/t`; the same command
continues a run that was stopped. `--config debug` (or another of `train.config.PRESETS`) sets other
defaults.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
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
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from samlight_jax import weights
from samlight_jax.errors import InputError, exit_on_error
from train import augment, checkpoint, data, sharding, sheet
from train.config import PRESETS, TrainConfig
from train.start import Start, prepare, prepared
from train.step import State, Task, make_step

MODEL, METRICS = "model.safetensors", "metrics.jsonl"
AHEAD = 2  # steps that the devices are sent before the first of them is read
CHECKED = "loss"


class Run:
    """One stage, from where its folder says it is to its end.

    Args:
      config: of the run.
    """

    def __init__(self, config: TrainConfig):
        self.config, self.folder = config, Path(config.out)
        self.mesh = sharding.make_mesh(config.mesh)
        parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"] * config.accumulate
        if config.batch % parts:
            raise InputError(
                f"batch={config.batch} does not divide over {parts} (devices times accumulate); "
                f"take a multiple of {parts}."
            )
        self.main = jax.process_index() == 0
        self.photos = data.Photos(config.data, config.exclude, config.canvas, config.max_bad)
        rows = sharding.rows_of(jax.process_index(), jax.process_count(), config.batch)
        self.rows = data.Rows(self.photos, config.seed, rows, config.batch, config.steps)
        self.start: Start = prepare(config)
        self.teacher = self.start.place_teacher(self.mesh)
        self.task: Task = self.start.task
        names = hashlib.sha256("\n".join(self.photos.names).encode()).hexdigest()
        self.checkpoints = checkpoint.Checkpoints(
            self.folder,
            checkpoint.identity(
                config,
                teacher=self.start.teacher_fingerprint,
                student=self.task.student.to_json(),
                photographs=names,
            ),
            config.keep,
        )
        self.resident = data.Resident(self.photos, self.mesh) if self._on_device else None
        self.stopped = False

    @property
    def _on_device(self) -> bool:
        return self.config.cache_photos == "device"

    def state(self) -> State:
        """The state to go on from."""
        abstract = jax.eval_shape(lambda: self.start.state())
        where = sharding.shardings(abstract, self.mesh)
        if self.checkpoints.latest is not None:
            state, _ = self.checkpoints.restore(abstract, where)
            return state
        seen = (self.look(batch, self._keys(i)) for i, batch in enumerate(self.batches(0)))
        moments = prepared(self.task, self.teacher, seen, self.config.batch)
        return sharding.placed(self.start.state(moments), where)

    def _keys(self, step: int) -> jax.Array:
        from train.step import keys_of

        return keys_of(self.config.seed, jnp.int32(step), self.config.batch)

    def batches(self, start: int) -> Iterator[Any]:
        """What `look` takes, step after step."""
        if self.resident is None:
            yield from data.batches(self.rows, start, self.mesh)
            return
        where = sharding.replicated(self.mesh)
        for step in range(start, self.config.steps):
            index = sharding.placed(data.indices(self.rows, step), where)
            yield self.resident.arrays, index

    def look(self, batch: Any, keys: jax.Array) -> tuple[augment.Views, None]:
        """A batch as the models see it; inside `jit`."""
        if self.resident is not None:
            batch = self.resident.take(*batch)
        config = self.config
        return augment.views(
            **batch, keys=keys, augment=config.augment, image_size=config.image_size
        ), None

    def run(self) -> None:
        """Trains until the end or until it is told to stop; then writes the model."""
        state = self.state()
        start = int(state.step)
        if start:
            self._say(f"continues at step {start} of {self.config.steps}")
        with Log(self, start) as log:
            state = self._steps(state, start, log)
        if self.stopped and int(state.step) < self.config.steps:
            self._save(state)
            self.checkpoints.close()
            self._say(f"stopped at step {int(state.step)}; the same command continues.")
            return
        self._save(state)
        self.checkpoints.close()
        self.write(state)

    def _steps(self, state: State, start: int, log: Log) -> State:
        step_ = make_step(self.task, self.look)
        batches, pending = self.batches(start), collections.deque()
        for step in range(start, self.config.steps):
            before = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - before
            state, measures = step_(state, self.teacher, batch)
            pending.append((step, measures, waited))
            while len(pending) > AHEAD:
                log.take(*pending.popleft())
            done = step + 1
            last = done == self.config.steps
            if last or self.stopped or done % self.config.save_every == 0:
                while pending:  # nothing is saved that was not looked at
                    log.take(*pending.popleft())
                if not last and not self.stopped:
                    self._save(state)
            if self.config.sheet_every and (last or done % self.config.sheet_every == 0):
                self._draw(state, done)
            if self.stopped:
                break
        return state

    def _save(self, state: State) -> None:
        step = int(state.step)
        self.checkpoints.save(step, state, {"step": step, "bad": self.photos.bad})

    def _draw(self, state: State, step: int) -> None:
        """The sheet of the first photographs, as they are."""
        count = min(4, len(self.photos))
        some = [self.photos[i] for i in range(count)]
        batch = {name: jnp.stack([one[name] for one in some]) for name in some[0]}
        keys = jax.random.split(jax.random.key(0), count)
        seen = augment.views(**batch, keys=keys, augment=None, image_size=self.config.image_size)
        arrays = {**state.frozen, **state.ema}
        asked, masks = sheet.answers(
            self.task.student, arrays, self.start.plain_teacher(self.teacher), seen, keys[0]
        )
        if self.main:
            picture = sheet.draw(seen, asked, masks, f"step {step}: photograph, teacher, student")
            path = self.folder / f"sheet-{step:06d}.png"
            weights.write_whole(path, lambda scratch: picture.save(scratch, "PNG"))

    def write(self, state: State) -> None:
        """The averaged weights as a model file."""
        arrays = {**state.frozen, **state.ema}
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            arrays = multihost_utils.process_allgather(arrays, tiled=True)
        if self.main:
            source = f"distilled from {self.config.teacher} (stage {self.config.stage})"
            host = {name: np.asarray(x) for name, x in arrays.items()}
            path = self.folder / MODEL
            weights.save(path, host, self.task.student, metadata={"source": source})
            self._say(f"wrote {path}")
        if self.photos.bad:
            self._say(
                f"{len(self.photos.bad)} unreadable photographs were replaced: "
                + "; ".join(self.photos.bad.values())
            )

    def _say(self, text: str) -> None:
        if self.main:
            Console(stderr=True, soft_wrap=True).print(text, highlight=False)


class Log:
    """Progress bar, metrics.jsonl and, if asked for, TensorBoard.

    Args:
      run: whose measures come.
      start: the first step.
    """

    def __init__(self, run: Run, start: int):
        self.run, self.start = run, start
        config = run.config
        self.bar = Progress(
            TextColumn("stage {task.fields[stage]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[now]}"),
            console=Console(stderr=True),
            disable=not run.main,
        )
        self.row = self.bar.add_task(
            "", total=config.steps, completed=start, stage=config.stage, now=""
        )
        self.since, self.waited, self.count = time.perf_counter(), 0.0, 0
        self.board: Any = None

    def __enter__(self) -> Log:
        folder = self.run.folder
        if self.run.main:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = (folder / METRICS).open("a")
            _cut(folder / METRICS, self.start)
        if self.run.main and self.run.config.tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise InputError(
                    "--tensorboard needs tensorboardX: pip install tensorboardX."
                ) from None
            self.board = SummaryWriter(str(folder))
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        if self.run.main:
            self.file.close()
        if self.board is not None:
            self.board.close()

    def take(self, step: int, measures: Any, waited: float) -> None:
        """Reads the measures of a step; stops the run if they are not finite."""
        values = {name: float(x) for name, x in jax.device_get(measures).items()}
        wrong = [name for name, x in values.items() if not np.isfinite(x)]
        if wrong:
            last = self.run.checkpoints.latest
            good = (
                "there is no checkpoint yet"
                if last is None
                else f"the last good checkpoint is of step {last}"
            )
            raise InputError(
                f"Step {step}: {', '.join(wrong)} is not finite, so training stopped; {good}. Try a "
                "lower --lr or --dtype float32."
            )
        self.waited, self.count = self.waited + waited, self.count + 1
        if (step + 1) % self.run.config.log_every == 0 or step + 1 == self.run.config.steps:
            self._write(step, values)

    def _write(self, step: int, values: dict[str, float]) -> None:
        now = time.perf_counter()
        spent = now - self.since
        config = self.run.config
        speed = self.count * config.batch / spent
        rate = float(self.run.start.rate(step))
        row = {
            "step": step + 1,
            **values,
            "lr": rate,
            "images_per_s": speed,
            "waited": self.waited / spent,
        }
        self.since, self.waited, self.count = now, 0.0, 0
        if not self.run.main:
            return
        row = {"step": step + 1, **{name: _short(x) for name, x in row.items()}}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, x in row.items():
                self.board.add_scalar(name, x, step + 1)
        self.bar.update(
            self.row,
            completed=step + 1,
            now=f"{speed:.1f} images/s  loss {values['loss']:.4f}  lr {rate:.2g}",
        )


def _short(x: float) -> float:
    return float(f"{x:.6g}")


def _cut(path: Path, step: int) -> None:
    """Drops rows past a step: the run goes on from there."""
    rows = [
        row for row in path.read_text().splitlines() if row.startswith("{") and row.endswith("}")
    ]
    kept = [row for row in rows if json.loads(row)["step"] <= step]
    path.write_text("".join(f"{row}\n" for row in kept))


def parse(arguments: list[str]) -> TrainConfig:
    """Flags over the defaults of `--config`."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config", choices=PRESETS, default="default")
    chosen, rest = first.parse_known_args(arguments)
    presets = "\n".join(f"  --config {name}: {text}" for name, (text, _) in PRESETS.items())
    return tyro.cli(
        TrainConfig,
        prog="python -m train.distill",
        default=PRESETS[chosen.config][1],
        args=rest,
        description=f"{(__doc__ or '').splitlines()[0]}\n\nPresets:\n{presets}",
    )


def join(config: TrainConfig) -> None:
    """Joins the other processes, where there are any."""
    cluster = config.cluster
    sizes = (os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    if cluster.coordinator or any(int(size) > 1 for size in sizes):
        jax.distributed.initialize(cluster.coordinator, cluster.processes, cluster.process)


def main(arguments: list[str] | None = None) -> None:
    """Runs the program; bad input ends it with one sentence and exit code 2."""

    def distil() -> None:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        join(config)
        run = Run(config)

        def stop(*_: object) -> None:
            run.stopped = True

        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, stop)
        run.run()

    exit_on_error(distil)


if __name__ == "__main__":
    main()

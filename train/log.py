"""What a run tells: a progress bar, metrics.jsonl, TensorBoard where asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from samlight_jax.errors import InputError
from train.config import TrainConfig

METRICS = "metrics.jsonl"


class Log:
    """Takes the measures of every step; writes every `log_every`th.

    Args:
      config: of the run.
      start: its first step.
      rates: the encoder's learning rate, step by step.
      flops: of one photograph, forward and backward, or None.
      writes: whether this process does.
    """

    def __init__(
        self,
        config: TrainConfig,
        start: int,
        *,
        rates: Sequence[float] | np.ndarray,
        flops: float | None,
        writes: bool,
    ):
        self.config, self.rates, self.flops, self.writes = config, rates, flops, writes
        self.file, self.board = None, None
        if writes and config.tensorboard:
            self.board = _tensorboard(config.out)
        if writes:
            path = Path(config.out) / METRICS
            _cut(path, start)
            self.file = path.open("a")
        self.bar = Progress(
            TextColumn(f"stage {config.stage}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            disable=not writes,
        )
        self.row = self.bar.add_task("", total=config.steps, completed=start)
        self.since, self.waited, self.count = time.perf_counter(), 0.0, 0

    def __enter__(self) -> Log:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        for each in (self.file, self.board):
            if each is not None:
                each.close()

    def take(self, step: int, measures: Any, waited: float, checkpoint: int | None) -> None:
        """Reads the measures of a step.

        Args:
          step: from 0.
          measures: scalars on the device, by name.
          waited: seconds that the devices may have waited for data.
          checkpoint: the newest.

        Raises:
          InputError: one of them is not finite.
        """
        values = {name: float(x) for name, x in jax.device_get(measures).items()}
        if wrong := [name for name, x in values.items() if not np.isfinite(x)]:
            good = f"the last good checkpoint is of step {checkpoint}"
            raise InputError(
                f"Step {step + 1}: {', '.join(wrong)} is not finite, so training stopped; "
                f"{good if checkpoint is not None else 'there is no checkpoint yet'}. Try a lower "
                "--lr, or --dtype float32."
            )
        self.waited, self.count = self.waited + waited, self.count + 1
        if (step + 1) % self.config.log_every == 0 or step + 1 == self.config.steps:
            self._write(step + 1, values)

    def _write(self, step: int, values: dict[str, float]) -> None:
        now = time.perf_counter()
        spent, self.since = now - self.since, now
        speed = self.count * self.config.batch / spent
        rate = float(self.rates[step - 1])
        values |= {"lr": rate, "images_per_s": speed, "waited": self.waited / spent}
        text = f"{speed:.1f} images/s  loss {values['loss']:.4f}  lr {rate:.2g}"
        if (peak := peak_flops()) and self.flops:
            values["utilisation"] = self.flops * speed / peak
            text += f"  {100 * values['utilisation']:.0f} % of peak"
        self.waited, self.count = 0.0, 0
        if self.file is not None:
            short = {name: float(f"{x:.6g}") for name, x in values.items()}
            self.file.write(json.dumps({"step": step, **short}) + "\n")
            self.file.flush()
        if self.board is not None:
            for name, x in values.items():
                self.board.add_scalar(name, x, step)
        self.bar.update(self.row, completed=step, description=text)


PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bfloat16, of NVIDIA's data sheets


def peak_flops() -> float | None:
    """The most that all devices multiply in a second in bfloat16, where that is known."""
    kind = jax.devices()[0].device_kind
    each = next((flops for name, flops in PEAK.items() if name in kind), None)
    return each * jax.device_count() if each else None


def _cut(path: Path, step: int) -> None:
    """Drops rows past a step, and one that was cut off: the run goes on from there."""
    rows = path.read_text().splitlines() if path.exists() else []
    whole = [row for row in rows if row.endswith("}")]
    path.write_text("".join(f"{row}\n" for row in whole if json.loads(row)["step"] <= step))


def _tensorboard(folder: str) -> Any:
    try:
        from tensorboardX import SummaryWriter  # type: ignore[reportMissingImports]
    except ImportError:
        raise InputError("--tensorboard needs: pip install 'samlight-jax[tensorboard]'.") from None
    return SummaryWriter(folder)

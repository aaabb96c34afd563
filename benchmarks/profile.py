"""Program: which kernels a GPU spends a call's time in; writes profile_<device>.json.

Run: `python -m benchmarks.profile`. JAX's own profiler traces one call of `samlight_t` after a few
others; without CUDA graphs, whose kernels carry no names.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks.attention import RESULTS
from benchmarks.compare_subjects import Ours
from pallas_kernels import measure
from samlight_jax.errors import InputError, exit_on_error

CALLS: dict[str, Callable[[Ours], Callable[[], Any]]] = {
    "encoder of 1": lambda subject: subject.encoder(1, subject.side),
    "encoder of 16": lambda subject: subject.encoder(16, subject.side),
    "1 prompt": lambda subject: subject.prompts(1),
    "256 prompts": lambda subject: subject.prompts(256),
    "predict, 1 box": lambda subject: subject.predict(1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Traces calls of the default model in bfloat16.

    Attributes:
      calls: names of `CALLS`; all by default.
      output: the JSON; profile_<device>.json by default.
    """

    calls: tuple[str, ...] = ()
    output: Path | None = None


def main() -> None:
    """Runs the program; bad input ends it with one sentence and exit code 2."""
    # Before the first use of a device, or XLA does not see it.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
    exit_on_error(lambda: _main(tyro.cli(Options)))


def _main(options: Options) -> None:
    names = options.calls or tuple(CALLS)
    if unknown := [name for name in names if name not in CALLS]:
        raise InputError(f"--calls {unknown[0]!r}: expected some of {list(CALLS)}.")
    needs_gpu()
    subject = Ours("samlight_t", "bfloat16", tiny=False)
    report: dict[str, Any] = {**measure.machine(), "calls": {}}
    path = options.output or RESULTS / f"profile_{measure.slug(report['device'])}.json"
    for name in names:
        report["calls"][name] = row = traced(CALLS[name](subject), subject.wait)
        measure.write_json(path, report)
        print(f"{name}: {sum(us for _, us in row.values()):.0f} us in {len(row)} kinds of kernels")


def needs_gpu() -> None:
    """Says so where there is none."""
    if jax.default_backend() != "gpu":
        raise InputError(f"This machine's device is a {jax.default_backend()}; expected a GPU.")


def traced(call: Callable[[], Any], wait: Callable[[], None]) -> dict[str, list[float]]:
    """Of one call among others: each kernel's name, how often it ran, and its microseconds."""
    for _ in range(3):
        call()
    wait()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
            wait()
        (path,) = Path(folder).rglob("*.xplane.pb")
        return kernels(jax.profiler.ProfileData.from_file(str(path)).planes)


def kernels(planes: Iterable[Any]) -> dict[str, list[float]]:
    """Of a trace: for each kernel [how often, microseconds], the longest first."""
    found: dict[str, list[float]] = {}
    for plane in planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):  # the other lines say the same by operation
                continue
            for event in line.events:
                times, us = found.get(event.name, [0, 0.0])
                found[event.name] = [times + 1, us + event.duration_ns / 1e3]
    longest = sorted(found.items(), key=lambda item: -item[1][1])
    return {name: [times, measure.digits(us)] for name, (times, us) in longest}


if __name__ == "__main__":
    main()

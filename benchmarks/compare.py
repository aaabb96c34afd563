"""Program: every model beside its peers on one device in one run; writes compare_<device>.json.

Run: `python -m benchmarks.compare` with PyTorch, segment-anything and timm installed. Each subject
runs in a process of its own, so that neither memory nor a warm cache is shared; inputs lie on the
device. Latency is a call that is waited for; throughput are calls in a row. Before anything is
timed, an embedding is held against the same weights' in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks import attention, compare_automatic, compare_subjects
from benchmarks.attention import RESULTS
from pallas_kernels import measure
from samlight_jax.errors import InputError, exit_on_error

BATCHES = (1, 16, 64)
PREDICTED = (1, 16)  # boxes of a photograph
PROMPTS = (1, 16, 256)  # of an embedding
SIDES = (512, 1024, 2048)
SPEND = 0.4  # seconds on one figure
SUBJECTS = (*compare_subjects.SUBJECTS, *compare_automatic.SUBJECTS)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Times encoders and whole predictions of this package and of its peers.

    Attributes:
      subjects: names of `SUBJECTS`; all by default.
      output: the JSON; what it holds of other subjects stays if the device is the same.
      limit: seconds for one subject.
      only: times this one subject in this process and prints its row; for the program itself.
      tiny: small models and sides, to see the program work.
    """

    subjects: tuple[str, ...] = ()
    output: Path | None = None
    limit: int = 300
    only: str | None = None
    tiny: bool = False


def main() -> None:
    """Runs the program; bad input ends it with one sentence and exit code 2."""
    exit_on_error(lambda: _main(tyro.cli(Options)))


def _main(options: Options) -> None:
    if options.only is not None:
        print(json.dumps(_measured(options.only, tiny=options.tiny)))
        return
    names = options.subjects or SUBJECTS
    if unknown := sorted(set(names) - set(SUBJECTS)):
        known = ", ".join(SUBJECTS)
        raise InputError(f"--subjects {' '.join(unknown)}: expected some of {known}.")
    here = json.loads(_child("import json; from benchmarks import compare; "
                                f"print(json.dumps(compare.machine({options.tiny})))"))  # fmt: skip
    path = options.output or RESULTS / f"compare_{measure.slug(here['device'])}.json"
    report = {**here, "rows": {}}
    if path.exists() and (before := json.loads(path.read_text()))["device"] == here["device"]:
        report["rows"] = before["rows"]
    for name in names:
        report["rows"][name] = row = {"date": here["date"], **_row(name, options)}
        report["rows"] = {each: report["rows"][each] for each in SUBJECTS if each in report["rows"]}
        measure.write_json(path, report)
        print(f"{name}: {row.get('failed') or _line(row)}", flush=True)


def machine(tiny: bool) -> dict[str, Any]:
    """This machine, and the TFLOP/s of a large product on its device."""
    return measure.machine() | {"tflops": attention.ceilings(512 if tiny else 8192)["tflops"]}


def _measured(name: str, *, tiny: bool) -> Row:
    if name in compare_automatic.SUBJECTS:
        return compare_automatic.measured(compare_automatic.SUBJECTS[name](tiny=tiny), tiny=tiny)
    return measured(compare_subjects.SUBJECTS[name](tiny=tiny), tiny=tiny)


def _line(row: Row) -> str:
    if "automatic_ms" in row:
        return f"{row['masks']} masks, ms by points at once: {row['automatic_ms']}"
    batches = ", ".join(f"b{b} {ms}" for b, ms in row["encoder_ms_per_image"].items())
    return f"latency {row['encoder_latency_ms']} ms; ms an image: {batches}"


def _child(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()[-1]


def _row(name: str, options: Options) -> Row:
    """What a process of its own measured, or why it did not."""
    command = [sys.executable, "-m", "benchmarks.compare", "--only", name]
    command += ["--tiny"] if options.tiny else []
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=options.limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {options.limit} s."}
    if run.returncode:
        lines = run.stderr.strip().splitlines() or ["no message"]
        return {"failed": lines[-1]}
    return json.loads(run.stdout.splitlines()[-1])


def measured(subject: Any, *, tiny: bool = False) -> Row:
    """All figures of a subject; what it has no way to make is left out, what does not fit None."""
    timed, side = functools.partial(fitting, subject), subject.side
    row: Row = {**subject.described(), "parity": subject.parity()}
    row["mask_parity"] = subject.mask_parity()
    row["encoder_latency_ms"] = timed(latency, subject.encoder(1, side))
    row["memory_mib"] = subject.memory_mib()
    row["encoder_ms_per_image"] = {}
    for batch in BATCHES[:2] if tiny else BATCHES:
        if (call := subject.encoder(batch, side)) is not None:
            ms = timed(throughput, call)
            row["encoder_ms_per_image"][batch] = None if ms is None else measure.digits(ms / batch)
    asked = ("predict_ms", subject.predict, PREDICTED), ("prompts_ms", subject.prompts, PROMPTS)
    for key, make, counts in asked:
        calls = {n: call for n in (counts[:2] if tiny else counts) if (call := make(n))}
        row[key] = {n: timed(latency, call) for n, call in calls.items()}
    row["side_ms"] = {}
    sides = (side, 2 * side) if tiny else SIDES
    for other in sides if subject.grows else ():
        if other == side:
            row["side_ms"][other] = row["encoder_ms_per_image"][1]
        elif (call := subject.encoder(1, other)) is not None:
            row["side_ms"][other] = timed(throughput, call)
    return row


def fitting(subject: Any, by: Callable[..., float], call: Callable[[], Any]) -> float | None:
    """Milliseconds of a subject's call by `latency` or `throughput`; None if it does not fit."""
    try:
        return by(call, subject.wait)
    except subject.exhausted:
        return None


def latency(call: Callable[[], Any], wait: Callable[[], None]) -> float:
    """Median milliseconds of a call that is waited for."""
    return _median(call, 1, wait)


def throughput(call: Callable[[], Any], wait: Callable[[], None]) -> float:
    """Median milliseconds of a call among others in a row."""
    return _median(call, 10, wait)


def _median(call: Callable[[], Any], row: int, wait: Callable[[], None]) -> float:
    def spent(row: int) -> float:
        start = time.perf_counter()
        for _ in range(row):
            call()
        wait()
        return (time.perf_counter() - start) / row

    spent(2)  # compiles, warms
    once = spent(1)
    row = max(1, min(row, int(SPEND / once)))
    samples = int(min(max(SPEND / (row * once), 3), 50))
    return measure.digits(1e3 * float(np.median([spent(row) for _ in range(samples)])))


if __name__ == "__main__":
    main()

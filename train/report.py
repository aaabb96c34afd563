"""report.json and report.md: what was found, under which protocol, and what was left out.

Two runs of one command give identical reports; what differs from run to run is in run.json.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import samlight_jax
from samlight_jax.errors import InputError
from samlight_jax.weights import write_whole
from train.annotations import Dataset, Photo
from train.detections import Detections
from train.evaluator_batch import Record
from train.metrics import area_class, average_precision, mean_interval
from train.protocol import Protocol

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pillow", "pycocotools")
AREAS = ("small", "medium", "large")
LISTED = 30  # problems in report.md; report.json has all
NAMES = {
    "miou": "mIoU",
    "boundary": "boundary IoU",
    "agreement": "agreement with the teacher, mIoU",
    "agreement_point": "agreement from the point, mIoU",
    "agreement_token": "agreement from the point by the teacher's choice of mask, mIoU",
    "embedding_mse": "embedding: mean squared error",
    "embedding_cosine": "embedding: mean cosine",
}
# Of an instance's record, what is averaged under which name.
AVERAGED = {
    "iou": "miou",
    "boundary": "boundary",
    "agreement": "agreement",
    "agreement_point": "agreement_point",
    "agreement_token": "agreement_token",
}


def versions() -> dict[str, str]:
    """Of the packages that decide numbers, and the kind of device."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    # Of the code that runs: a clone may not be installed.
    found = {"samlight-jax": samlight_jax.__version__, **found}
    return {**found, "device": jax.devices()[0].device_kind}


def build(
    header: Mapping[str, Any],
    dataset: Dataset,
    photos: Sequence[Photo],
    records: Mapping[str, Record],
    detections: Detections | None,
    protocol: Protocol,
) -> dict[str, Any]:
    """The report as JSON has it.

    Args:
      header: what decided the numbers.
      dataset: where the photographs come from.
      photos: those that were chosen.
      records: of each of them.
      detections: of the protocol, or None.
      protocol: of the header.

    Raises:
      InputError: nothing could be evaluated.
    """
    ordered = [records[photo.id] for photo in photos]
    problems = [{"what": p.what, "why": p.why} for p in dataset.problems]
    problems += [
        {"what": p.what, "why": p.why} for p in (detections.problems if detections else ())
    ]
    problems += [problem for record in ordered for problem in record["problems"]]
    instances = [
        {"photo": record["photo"], **_without_mask(instance)}
        for record in ordered
        for instance in record["instances"]
    ]
    if not instances:
        why = (
            f"; the first problem: {problems[0]['what']}: {problems[0]['why']}" if problems else ""
        )
        raise InputError(f"Nothing of {dataset.name} could be evaluated{why or '.'}")
    results = _results(instances, ordered, protocol)
    if "ap" in protocol.metric:
        results["ap"] = _average_precision(photos, ordered, protocol)
    return {
        "protocol": {**header["protocol"], "sentence": protocol.sentence()},
        **{key: header[key] for key in ("model", "teacher", "data", "detections", "limit")},
        "versions": header["versions"],
        "counts": {
            "photographs in the data": len(dataset.photos),
            "photographs chosen": len(photos),
            "photographs that failed": sum(bool(record["problems"]) for record in ordered),
            "instances": len(instances),
            "problems": len(problems),
        },
        "results": results,
        "photos": [_photo(record) for record in ordered],
        "instances": instances,
        "problems": problems,
    }


def _without_mask(instance: Record) -> Record:
    return {key: value for key, value in instance.items() if key != "rle"}


def _photo(record: Record) -> dict[str, Any]:
    photo: dict[str, Any] = {"id": record["photo"], "name": record["name"]}
    photo["instances"] = len(record["instances"])
    values = [i["iou"] for i in record["instances"] if "iou" in i]
    if values:
        photo["miou"] = round(sum(values) / len(values), 6)
    if "embedding" in record:
        photo["embedding"] = record["embedding"]
    return photo


def _results(
    instances: Sequence[Record], records: Sequence[Record], protocol: Protocol
) -> dict[str, Any]:
    """Means with their intervals, over instances and by area class; over photographs."""
    results: dict[str, Any] = {}
    for key, name in AVERAGED.items():
        if name in ("miou", "boundary") and name not in protocol.metric:
            continue
        values = [(instance[key], instance) for instance in instances if key in instance]
        if not values:
            continue
        results[name] = _mean([value for value, _ in values])
        if all("area" in instance for _, instance in values):
            results[name]["by_area"] = {
                area: _mean([value for value, i in values if area_class(i["area"]) == area])
                for area in AREAS
            }
    if protocol.refine and "miou" in results:
        rounds = [instance["rounds"] for instance in instances]
        results["miou"]["after_clicks"] = [_mean(each) for each in zip(*rounds, strict=True)]
    for key in ("mse", "cosine"):
        if values := [r["embedding"][key] for r in records if "embedding" in r]:
            results[f"embedding_{key}"] = _mean(values)
    return results


def _mean(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return {"value": None, "low": None, "high": None, "n": 0}
    found = mean_interval(values)._asdict()
    # Significant digits: an embedding's error may be tiny.
    return {key: value if key == "n" else float(f"{value:.6g}") for key, value in found.items()}


def _average_precision(
    photos: Sequence[Photo],
    records: Sequence[Record],
    protocol: Protocol,
) -> dict[str, float | None]:
    """COCO's twelve numbers on the photographs that could be read."""
    found = [
        {
            "image_id": record["photo"],
            "category_id": instance["category"],
            "segmentation": instance["rle"],
            "score": instance.get("score", instance["predicted_iou"]),
        }
        for record in records
        for instance in record["instances"]
    ]
    truth = []
    for photo, record in zip(photos, records, strict=True):
        if record["problems"]:
            continue
        kept = tuple(i for i in photo.instances if i.crowd or i.area >= protocol.min_area)
        truth.append(Photo(photo.id, photo.name, photo.size, kept))
    scores = average_precision(truth, found)
    return {name: None if value is None else round(value, 6) for name, value in scores.items()}


def write(folder: Path, report: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Writes report.json and report.md, and run.json of a run that evaluated anything."""
    texts = {"report.json": json.dumps(report, indent=1) + "\n", "report.md": markdown(report)}
    if run["photographs"]:
        texts["run.json"] = json.dumps(run, indent=1) + "\n"
    for name, text in texts.items():
        write_whole(folder / name, lambda scratch, text=text: scratch.write_text(text))


def markdown(report: Mapping[str, Any]) -> str:
    """The report for a reader."""
    lines = [
        f"# {report['model']['name']} on {report['data']['name']}",
        "",
        report["protocol"]["sentence"],
        "",
        "; ".join(f"{name}: {count}" for name, count in report["counts"].items()) + ".",
        "",
        *_table(report["results"]),
    ]
    if ap := report["results"].get("ap"):
        lines += ["", "| " + " | ".join(ap) + " |", "|" + "---|" * len(ap)]
        lines.append("| " + " | ".join(_number(value) for value in ap.values()) + " |")
    if problems := report["problems"]:
        lines += ["", f"## Problems: {len(problems)}", ""]
        lines += [f"- {each['what']}: {each['why']}" for each in problems[:LISTED]]
        if len(problems) > LISTED:
            lines.append(f"- and {len(problems) - LISTED} more, in report.json")
    used = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    prints = (
        f"model {report['model']['fingerprint'][:12]}, data {report['data']['fingerprint'][:12]}"
    )
    return "\n".join([*lines, "", f"{used}; {prints}.", ""])


def _table(results: Mapping[str, Any]) -> list[str]:
    lines = ["| | value | 95 % interval | n |", "|---|---|---|---|"]
    for name, result in results.items():
        if name == "ap":
            continue
        lines.append(_row(NAMES[name], result))
        lines += [_row(f"- {area}", part) for area, part in result.get("by_area", {}).items()]
        clicks = enumerate(result.get("after_clicks", ()))
        lines += [_row(f"- after {n} corrective clicks", part) for n, part in clicks]
    return lines if len(lines) > 2 else []


def _row(name: str, result: Mapping[str, Any]) -> str:
    interval = f"{_number(result['low'])} to {_number(result['high'])}" if result["n"] else "-"
    return f"| {name} | {_number(result['value'])} | {interval} | {result['n']} |"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if 0 < abs(value) < 0.001:  # an embedding's error, whose scale is the embedding's
        return f"{value:.3g}"
    return f"{value:.4f}" if value < 100 else f"{value:.1f}"

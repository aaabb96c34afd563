"""Two reports beside each other: differences over the instances that both have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samlight_jax.errors import InputError
from train.metrics import area_class, paired_difference
from train.report import AREAS, AVERAGED, NAMES


def table(first: Path, second: Path) -> str:
    """A Markdown table of second minus first, with paired bootstrap intervals.

    Raises:
      InputError: not two reports, or of different data, or without a common instance.
    """
    a, b = read(first), read(second)
    if a["data"]["fingerprint"] != b["data"]["fingerprint"]:
        raise InputError(
            f"{first} is of {a['data']['name']} ({a['data']['fingerprint'][:12]}), {second} of "
            f"{b['data']['name']} ({b['data']['fingerprint'][:12]}); only reports of the same data "
            "compare."
        )
    common = pairs(a, b)
    if not common:
        raise InputError(f"{first} and {second} have no instance in common; nothing compares.")
    lines = [
        f"A: {a['model']['name']} ({a['model']['fingerprint'][:12]}), {first}",
        f"B: {b['model']['name']} ({b['model']['fingerprint'][:12]}), {second}",
        f"{len(common)} common instances of {len(a['instances'])} and {len(b['instances'])} of "
        f"{a['data']['name']}",
        *_protocols(a["protocol"], b["protocol"]),
        "",
        "| | A | B | B - A | 95 % interval | n |",
        "|---|---|---|---|---|---|",
    ]
    rows = []
    for key, name in AVERAGED.items():
        both = [(x, y) for x, y in common if key in x and key in y]
        rows += _rows(NAMES[name], key, both)
    ap = [report["results"].get("ap", {}) for report in (a, b)]
    for name, x in ap[0].items():
        if x is not None and (y := ap[1].get(name)) is not None:
            rows.append(f"| {name} | {x:.4f} | {y:.4f} | {y - x:+.4f} | - | - |")
    if not rows:
        raise InputError(f"{first} and {second} have no metric in common; nothing compares.")
    return "\n".join([*lines, *rows])


def pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """The instances that both reports have, in the order of the first."""
    theirs = {(each["photo"], each["id"]): each for each in b["instances"]}
    keys = [(each["photo"], each["id"]) for each in a["instances"]]
    return [
        (each, theirs[key]) for key, each in zip(keys, a["instances"], strict=True) if key in theirs
    ]


def read(path: Path) -> dict[str, Any]:
    """A report.json of train.evaluate.

    Raises:
      InputError: it cannot be read, or is none.
    """
    try:
        report = json.loads(path.read_text())
        for key in ("protocol", "model", "data", "results", "instances"):
            report[key]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is not a report.json that train.evaluate wrote.") from None
    return report


def _protocols(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    different = [
        f"{key}: {a.get(key)} and {b.get(key)}"
        for key in a
        if key != "sentence" and a.get(key) != b.get(key)
    ]
    return [f"The protocols differ: {'; '.join(different)}."] if different else []


def _rows(name: str, key: str, both: list[tuple[Any, Any]]) -> list[str]:
    rows = []
    for area in (None, *AREAS):
        pairs = [
            (x[key], y[key])
            for x, y in both
            if area is None or ("area" in x and area_class(x["area"]) == area)
        ]
        if pairs:
            x, y = zip(*pairs, strict=True)
            change = paired_difference(y, x)
            means = f"{sum(x) / len(x):.4f} | {sum(y) / len(y):.4f}"
            interval = f"{change.low:+.4f} to {change.high:+.4f} | {change.n}"
            rows.append(
                f"| {f'- {area}' if area else name} | {means} | {change.value:+.4f} | {interval} |"
            )
    return rows

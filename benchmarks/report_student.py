"""The model card's tables, from results/release.json: the released student beside its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.cells import AGREEMENT, Rows, change, mask, mean, titled, where


def beside(values: dict[str, Any]) -> Rows:
    """The released student's mIoU beside its teacher's, by set, and the paired difference."""
    names, titles, head = _columns(values, "mIoU")
    rows: list[Sequence[str]] = [(head, "mask", *titles)]
    for protocol, cells in _by_protocol(values):
        for who in ("teacher", "student", "difference"):
            shown = change if who == "difference" else mean
            first = f"`{protocol}`, {names.get(who, 'paired difference')}"
            which = mask(values["protocols"][protocol])
            rows.append((first, which, *(shown(cell[who]) for cell in cells)))
    return rows


def scores(values: dict[str, Any]) -> Rows:
    """How well teacher and student rank their own masks, by set."""
    names, titles, head = _columns(values, "Spearman's correlation of predicted with true IoU")
    rows: list[Sequence[str]] = [(head, *titles)]
    for protocol, cells in _by_protocol(values):
        for who, name in names.items():
            found = [cell["spearman"][who] for cell in cells]
            numbers = ("-" if each is None else f"{each:.2f}" for each in found)
            rows.append((f"`{protocol}`, {name}", *numbers))
    return rows


def agreement(values: dict[str, Any]) -> Rows:
    """The student's agreement with its teacher on photographs held out and on those it learnt."""
    head = f"agreement with {values['teacher']['name']}, {where(values)}"
    titles = {"heldout": "held out of training", "train": "of the training"}
    return [
        (head, "photographs", "prompts", *AGREEMENT.values()),
        *(
            (
                *(titles[name], str(found["photographs"]), str(found["n"])),
                *(mean(found[key]) for key in AGREEMENT),
            )
            for name, found in values["agreement"].items()
        ),
    ]


def variants(values: dict[str, Any]) -> Rows:
    """How far the student's mIoU moves in another dtype."""
    head = f"minus the released file computed in float32, {where(values)}"
    what = {"bfloat16": "computed in bfloat16", "float32": "the file before it became bfloat16"}
    rows: list[Sequence[str]] = [
        (head, "instances", "mean difference of mIoU", "largest of a set", "instances beyond 0.01")
    ]
    names = dict.fromkeys((row["variant"], row["protocol"]) for row in values["variants"])
    for variant, protocol in names:
        key = (variant, protocol)
        of = [row for row in values["variants"] if (row["variant"], row["protocol"]) == key]
        moves = [row["difference"]["value"] for row in of]
        n, beyond = (str(sum(row[each] for row in of)) for each in ("n", "beyond"))
        middle, largest = sum(moves) / len(moves), max(moves, key=abs)
        first = f"`{protocol}`, {what[variant]}"
        rows.append((first, n, f"{middle:+.4f}", f"{largest:+.4f}", beyond))
    return rows


def _columns(values: dict[str, Any], what: str) -> tuple[dict[str, str], list[str], str]:
    """The two models' names, the titles of the sets' columns, and that of the first."""
    names = {who: values[who]["name"] for who in ("teacher", "student")}
    counts = {row["set"]: row["n"] for row in values["rows"]}
    titles = [titled(name, n) for name, n in counts.items()]
    return names, [*titles, f"mean of {len(titles)} sets"], f"{what}, {where(values)}"


def _by_protocol(values: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Of each protocol its sets' rows, and last their mean."""
    found = {last["protocol"]: last for last in values["means"]}
    return [
        (name, [*(row for row in values["rows"] if row["protocol"] == name), last])
        for name, last in found.items()
    ]

"""Program: the picture of benchmarks/results/compare_<device>.json, docs/images/compare.png.

Run: `python -m benchmarks.plot_compare`.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import tyro

from benchmarks import report_compare
from benchmarks.attention import RESULTS
from benchmarks.plot import PICTURE, rule, save
from samlight_jax.errors import exit_on_error

COMPARED = PICTURE.with_name("compare.png")
OURS, THEIRS = "#D55E00", "#0072B2"  # of Okabe and Ito
MARKERS = {"1": "o", "16": "s", "64": "D"}  # by photographs at once


def plot(
    results: Path = RESULTS / "compare_h200.json",
    output: Path = COMPARED,
) -> None:
    """Draws milliseconds of each encoder for a photograph, by how many it takes at once.

    Args:
      results: what `python -m benchmarks.compare` wrote.
      output: the PNG to write.
    """
    report = json.loads(results.read_text())
    rows = [
        (report_compare.named(name, row, report).replace("`", ""), row)
        for name, row in report["rows"].items()
        if "encoder_ms_per_image" in row
    ]
    rows.sort(key=lambda of: of[1]["encoder_ms_per_image"]["1"])
    figure, panel = plt.subplots(figsize=(9, 1.6 + 0.3 * len(rows)), layout="constrained")
    for count, marker in MARKERS.items():
        found = [
            (ms, place, OURS if row["framework"].startswith("jax") else THEIRS)
            for place, (_, row) in enumerate(rows)
            if (ms := row["encoder_ms_per_image"].get(count))
        ]
        x, y, colours = zip(*found, strict=True) if found else ((), (), ())
        panel.scatter(x, y, c=colours, marker=marker, s=38, linewidths=0, zorder=3)
        panel.scatter([], [], c="0.35", marker=marker, s=38, label=f"{count} at once")
    for label, colour in (("this package", OURS), ("PyTorch", THEIRS)):
        panel.scatter([], [], c=colour, marker="o", s=38, label=label)
    panel.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xscale("log")
    panel.set_xlabel("ms of an encoder for a photograph of 1024x1024, calls in a row")
    panel.xaxis.set_major_formatter("{x:g}")
    rule(panel)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle(f"Image encoders, {report['device']}, {report['date']}", fontsize=11)
    save(figure, output)


if __name__ == "__main__":
    exit_on_error(lambda: tyro.cli(plot))

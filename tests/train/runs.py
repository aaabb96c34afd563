"""Runs of the distillation program on a tiny teacher and tiny photographs, in processes apart."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from samlight_jax import weights
from tests.models import TINY, random_arrays

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {
    **{"stage": 1, "student": "samlight_t", "width": 32, "depth": 2, "heads": 2},
    **{"image-size": 64, "canvas": 64, "steps": 12, "batch": 8, "prompts": 4, "dtype": "float32"},
    **{"schedule": "ramp", "lr": 1e-3, "warmup": 2, "ema": 0.5},
    **{"log-every": 1, "sheet-every": 0, "save-every": 4},
}


def teacher(folder):
    """A teacher's file."""
    path = folder / "teacher.safetensors"
    weights.save(path, random_arrays(TINY), TINY)
    return path


def photographs(folder, count=10, size=(48, 64)):
    """A folder of photographs of smooth noise."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        coarse = np.random.default_rng(i).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC).save(
            folder / f"{i:02d}.png"
        )
    return folder


def command(folder, **changes):
    """The program's command line; `changes` over `FLAGS`."""
    given = FLAGS | {"out": folder / "out"} | changes
    given.setdefault("teacher", folder / "teacher.safetensors")
    given.setdefault("data", folder / "photographs")
    flags = []
    for name, value in given.items():
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return [sys.executable, "-m", "train.distill", *flags]


def environment(folder, devices=1):
    """Of a process with so many CPU devices; what one run compiled, the next ones find."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }


def start(folder, *, devices=1, **flags):
    """The program, started."""
    return subprocess.Popen(
        command(folder, **flags),
        cwd=ROOT,
        env=environment(folder, devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(folder, *, devices=1, **flags):
    """The program's (exit code, what it said)."""
    process = start(folder, devices=devices, **flags)
    said, _ = process.communicate(timeout=600)
    return process.returncode, said


def model(out):
    """The arrays that a run wrote."""
    return weights.read(out / "model.safetensors")[0]


def metrics(out):
    """The rows of metrics.jsonl, without times."""
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["images_per_s"], row["waited"]
    return rows


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

"""Kernels keep every dtype and rank in hand: nothing is promoted in silence."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pallas_kernels.device import Device, assume

ROOT = Path(__file__).parents[2]
PRECISION = {4: "highest", 2: "default"}  # by bytes: of float32 not TF32, a GPU's own choice
INTERPRETED = Device("gpu", "NVIDIA H200", (9, 0), interpret=True)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(params=["interpreted", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernel(request):
    """Runs the kernels, not the plain forms."""
    with assume(INTERPRETED) if request.param == "interpreted" else contextlib.nullcontext():
        yield


def on_four_devices(program):
    """Runs a program in a process of its own: this one has begun with the devices that it has."""
    four = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | four,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]

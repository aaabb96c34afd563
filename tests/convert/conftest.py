"""What the tests of the programs share."""

from __future__ import annotations

import sys

import pytest

from convert import apply
from samlight_jax.config import PRESETS
from samlight_jax.errors import exit_on_error
from tests.models import random_arrays


@pytest.fixture(scope="session")
def mobile_sam():
    """Random weights of MobileSAM's architecture: (Flax arrays, state dict), both numpy."""
    arrays = random_arrays(PRESETS["mobile_sam"])
    return arrays, apply.to_torch(arrays, PRESETS["mobile_sam"])


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a program's `main` with arguments; (exit code, stdout, stderr)."""

    def run(main, *args):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, args)])
        code = 0
        try:
            exit_on_error(main)
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return code, out, err

    return run

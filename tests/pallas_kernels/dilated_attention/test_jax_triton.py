"""The back end by jax-triton: refusals and lowering on any machine, its numbers on a real GPU."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pallas_kernels import device
from pallas_kernels.dilated_attention import groups, jax_triton, transforms
from tests.pallas_kernels.dilated_attention.cases import REAL, SMALL, Case
from tests.pallas_kernels.dilated_attention.suite import Suite

ROOT = Path(__file__).resolve().parents[3]
H200 = device.Device("gpu", "NVIDIA H200", (9, 0))
CASE = Case(size=(8, 8), segment=(8, 8))
TAKEN = tuple(name for name, case in SMALL.items() if case.dtype != "float64")
LOWERED = ["window_batch", "dense_rel", "ragged_rel", "own_ragged_rel", "window14_rel_half"]


def refusal(case, on):
    qkv, rel = jax.eval_shape(case.draw)
    with device.assume(on):
        return jax_triton.unsupported(qkv, rel, **case.static)


@pytest.mark.parametrize(
    ("change", "on", "words"),
    [
        ({}, device.Device("cpu", "cpu"), "needs an NVIDIA GPU"),
        ({}, dataclasses.replace(H200, interpret=True), "no interpreter"),
        ({}, device.Device("gpu", "Tesla V100", (7, 0)), "compute capability 8.0"),
        ({"dtype": "float8_e5m2"}, H200, "takes float16"),
        ({"head_dim": 8}, H200, "head_dim=8"),
        ({"head_dim": 136}, H200, "head_dim=136"),
        ({"size": (1, 160), "segment": (1, 160), "rel": "float32"}, H200, "128 key columns"),
    ],
)
def test_refuses_in_one_sentence(change, on, words):
    reason = refusal(dataclasses.replace(CASE, **change), on)
    assert reason is not None
    assert words in reason, reason
    assert reason.endswith("."), reason


def test_refuses_images_whose_offsets_pass_32_bits():
    """By shapes alone: the arrays would fill gigabytes."""

    def reason(*shape):
        x = jax.ShapeDtypeStruct(shape, "bfloat16")
        grid = groups.fit(shape[1:3], (16, 16), (1, 1))
        qkv = (x,) if len(shape) == 6 else (x, x, x)
        with device.assume(H200):
            return jax_triton.unsupported(qkv, (), grid=grid, offsets="all", scale=0.1)

    taken = reason(1, 16, 16, 1, 64)  # None, or that jax-triton is not here
    assert reason(1, 4096, 4096, 1, 127) == taken
    sentence = "takes less than 2**31 numbers an image, but one of qkv and rel holds {}."
    assert reason(1, 4096, 4096, 1, 128) == sentence.format(2**31)
    # A packed array holds three at once; a batch is no image.
    assert reason(1, 4096, 4096, 3, 1, 64) == sentence.format(3 * 2**30)
    assert reason(64, 4096, 4096, 1, 64) == taken


def test_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)  # as where there is none
    jax_triton._missing.cache_clear()
    try:
        assert "pip install 'samlight-jax[triton]'" in (refusal(CASE, H200) or "")
    finally:
        jax_triton._missing.cache_clear()


def lower(name):
    """Compiles the kernels of a call for an H200, forward and backward."""
    case = SMALL[name]
    call = transforms.Call(case.grid, case.offsets, case.static["scale"], H200)
    qkv, rel = jax.eval_shape(case.draw)

    def both(qkv, rel, dout, dlse):
        out, lse = jax_triton.forward(call, qkv, rel)
        return jax_triton.backward(call, qkv, rel, out, lse, dout, dlse)

    given = jax.eval_shape(lambda *x: jax_triton.forward(call, *x), qkv, rel)
    lowered = jax.jit(both).trace(qkv, rel, *given).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("triton_kernel_call") == 3


def test_compiles_for_a_gpu_that_is_not_here():
    """In a process of its own: the interpreter's tests change Triton for all of theirs."""
    if importlib.util.find_spec("jax_triton") is None:
        pytest.skip("needs jax-triton (pip install 'samlight-jax[triton]').")
    program = f"from {__name__} import LOWERED, lower; [lower(name) for name in LOWERED]"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
class TestJaxTritonOnGpu(Suite):
    name = "jax_triton"
    cases = SMALL | REAL
    must_take = (*TAKEN, *REAL)

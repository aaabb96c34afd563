"""Mosaic GPU: every branch is lowered for CUDA on any machine, and run on a Hopper GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.device import Device, assume
from pallas_kernels.dilated_attention import mosaic_gpu
from tests.pallas_kernels.dilated_attention.cases import REAL, SMALL, Case
from tests.pallas_kernels.dilated_attention.suite import Suite

HOPPER = Device("gpu", "NVIDIA H200", (9, 0))
WINDOW = Case(size=(32, 16), segment=(16, 16), dtype="bfloat16", head_dim=64)
TAKEN = {  # resident up to 256 keys, streamed beyond
    "resident": WINDOW,
    "resident_half": dataclasses.replace(WINDOW, segment=(8, 16), dtype="float16", head_dim=128),
    "resident_many": dataclasses.replace(
        WINDOW, size=(64, 64), dilation=(1, 2), segment=(16, 32), packed=True, heads=5, batch=2
    ),
    "resident_row": Case(
        size=(1, 1024), segment=(1, 512), dilation=(1, 2), dtype="bfloat16", head_dim=128
    ),
    "streamed": dataclasses.replace(WINDOW, segment=(32, 16), packed=True, head_dim=128),
    "streamed_narrow": dataclasses.replace(WINDOW, size=(96, 16), segment=(48, 8)),
    "streamed_grid": dataclasses.replace(
        WINDOW, size=(64, 128), segment=(64, 128), dilation=(4, 2), dtype="float16", packed=True
    ),
    "streamed_row": Case(
        size=(1, 1536),
        segment=(1, 768),
        dilation=(1, 2),
        dtype="bfloat16",
        packed=True,
        head_dim=64,
    ),
}
MODELS = {name: case for name, case in REAL.items() if case.rel is None}


def lower(case):
    """The program of forward and backward, as StableHLO."""

    def step(qkv):
        (out, lse), pull_back = jax.vjp(lambda x: mosaic_gpu.run(x, (), **case.static), qkv)
        return out, lse, pull_back((out, lse))

    tail = case.heads, case.head_dim
    shape = (case.batch, *case.size, *((3, *tail) if case.packed else tail))
    qkv = (jax.ShapeDtypeStruct(shape, case.dtype),) * (1 if case.packed else 3)
    with assume(HOPPER):
        assert mosaic_gpu.unsupported(qkv, (), **case.static) is None
        return jax.export.export(jax.jit(step), platforms=["cuda"])(qkv).mlir_module()


@pytest.mark.parametrize("case", (TAKEN | MODELS).values(), ids=(TAKEN | MODELS).keys())
def test_lowers_to_three_kernels(case):
    """One forward, two backward: shared memory, layouts and products all fit."""
    assert lower(case).count("stablehlo.custom_call @mosaic_gpu") == 3


@pytest.mark.parametrize(
    ("change", "device", "sentence"),
    [
        ({}, Device("cpu", "cpu"), "needs an NVIDIA GPU, but the device is 'cpu' (cpu)."),
        (
            {},
            Device("gpu", "NVIDIA B200", (10, 0)),
            "needs compute capability 9.0 (Hopper), but 'NVIDIA B200' has (10, 0).",
        ),
        (
            {},
            dataclasses.replace(HOPPER, interpret=True),
            "is compiled alone, since Mosaic GPU's interpreter lacks what the kernels use.",
        ),
        (
            {"dtype": "float32"},
            HOPPER,
            "takes float16 and bfloat16, but qkv[0].dtype=dtype('float32').",
        ),
        ({"head_dim": 80}, HOPPER, "takes a head_dim of 64 or 128, but head_dim=80."),
        (
            {"rel": "float32"},
            HOPPER,
            "takes no relative positions, but rel_h and rel_w are given.",
        ),
        ({"offsets": "per_head"}, HOPPER, "takes offsets='all', but offsets='per_head'."),
        (
            {"size": (40, 16)},
            HOPPER,
            "takes whole segments, but grid.segment=(16, 16) does not divide grid.size=(40, 16).",
        ),
    ],
)
def test_refuses(change, device, sentence):
    case = dataclasses.replace(WINDOW, **change)
    with assume(device):
        assert mosaic_gpu.unsupported(*case.draw(), **case.static) == sentence


@pytest.mark.parametrize(
    ("segment", "size"), [((28, 28), (56, 56)), ((16, 24), (32, 48)), ((8, 8), (16, 16))]
)
def test_refuses_groups_that_its_tiles_do_not_fill(segment, size):
    case = dataclasses.replace(WINDOW, segment=segment, size=size)
    with assume(HOPPER):
        reason = mosaic_gpu.unsupported(*case.draw(), **case.static)
    assert reason is not None and f"grid.group={segment}" in reason


def test_refuses_a_scale_that_reverses_the_order():
    with assume(HOPPER):
        reason = mosaic_gpu.unsupported(*WINDOW.draw(), **WINDOW.static | {"scale": -1.0})
    assert reason == "takes a positive scale, but scale=-1.0."


@pytest.mark.gpu
class TestMosaicGpu(Suite):
    name = "mosaic_gpu"
    cases = SMALL | TAKEN | MODELS
    must_take = (*TAKEN, *MODELS)

    def test_gradients_come_out_the_same_every_time(self):
        case = TAKEN["streamed"]
        _, *arrays = self.take(case)
        first = self.results(case, *arrays)
        for x, y in zip(first, self.results(case, *arrays), strict=True):
            assert (jnp.asarray(x) == jnp.asarray(y)).all()

"""cuDNN: its refusals and, with JAX's own attention in its place, the rest; on a GPU the real."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import device
from pallas_kernels.dilated_attention import cudnn
from tests.pallas_kernels.dilated_attention.cases import REAL, SMALL, Case
from tests.pallas_kernels.dilated_attention.suite import Suite

H200 = device.Device("gpu", "NVIDIA H200", (9, 0))
FINE = Case(size=(8, 8), segment=(8, 8), dtype="bfloat16")


def takes(case):
    halves = case.dtype in ("bfloat16", "float16")
    return halves and not case.rel and case.offsets == "all" and case.grid.size == case.grid.padded


TAKEN = tuple(name for name, case in (SMALL | REAL).items() if takes(case))
# The stand-in's float16 product is one that CPUs lack.
STAND_IN = {name: case for name, case in SMALL.items() if case.dtype != "float16"}


class TestCudnn(Suite):
    name = "cudnn"
    device = H200
    cases = STAND_IN
    must_take = TAKEN

    @pytest.fixture(autouse=True)
    def stand_in(self, monkeypatch):
        plain = jax.nn.dot_product_attention

        def attend(q, k, v, *, scale, implementation):
            assert implementation == "cudnn"
            return plain(q, k, v, scale=scale, implementation="xla")

        monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
        with jax.numpy_dtype_promotion("standard"):  # the stand-in's gradient mixes dtypes
            yield

    @pytest.mark.skip(reason="a process of its own has no stand-in.")
    def test_batch_and_heads_divide_among_devices_without_messages(self):
        pass

    def test_unused_log_sum_exp_costs_nothing(self):
        case = Case(size=(16, 16), segment=(16, 16), dilation=(2, 2), dtype="bfloat16")
        run, qkv, _ = self.take(case)

        def products(function):
            return jax.jit(function).lower(qkv).compile().as_text().count(" dot(")

        def loss(qkv, results):
            return sum(x.astype(jnp.float32).sum() for x in run(qkv, ())[:results])

        assert products(lambda qkv: run(qkv, ())[0]) == 2 < products(lambda qkv: run(qkv, ()))
        alone, both = (
            products(jax.grad(functools.partial(loss, results=results))) for results in (1, 2)
        )
        assert alone <= 2 + 4 < both


@pytest.mark.gpu
class TestCudnnOnGpu(Suite):
    name = "cudnn"
    cases = SMALL | REAL
    must_take = TAKEN


@pytest.mark.parametrize(
    ("here", "change", "sentence"),
    [
        (device.Device("cpu", "cpu"), {}, "needs an NVIDIA GPU, but the device is 'cpu'"),
        (dataclasses.replace(H200, interpret=True), {}, "no interpreter runs"),
        (device.Device("gpu", "MI300"), {}, "needs an NVIDIA GPU"),
        (device.Device("gpu", "T4", (7, 5)), {}, r"capability 8.0, but 'T4' has \(7, 5\)"),
        (H200, {"dtype": "float32"}, "float16 and bfloat16, but dtype=dtype\\('float32'\\)"),
        (H200, {"head_dim": 12}, "in steps of 8, but head_dim=12"),
        (H200, {"head_dim": 136}, "8 to 128 in steps of 8, but head_dim=136"),
        (H200, {"rel": "float32"}, "relative positions"),
        (H200, {"offsets": "per_head"}, "within every group, but offsets='per_head'"),
        (H200, {"size": (8, 9)}, r"segments of \(8, 8\) do not divide \(8, 9\)"),
    ],
)
def test_refusals(here, change, sentence):
    case = dataclasses.replace(FINE, **change)
    with device.assume(here), pytest.raises(AssertionError, match=sentence):
        reason = cudnn.unsupported(*case.draw(), **case.static)
        assert reason is None, reason

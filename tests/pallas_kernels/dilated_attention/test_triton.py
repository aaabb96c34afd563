"""Pallas-Triton, in Pallas's interpreter on any machine and on a real GPU."""

import pytest

from pallas_kernels.device import Device
from tests.pallas_kernels.dilated_attention.cases import REAL, SMALL
from tests.pallas_kernels.dilated_attention.suite import Suite

TAKEN = tuple(name for name, case in SMALL.items() if case.dtype != "float64")


class TestTriton(Suite):
    name = "triton"
    device = Device("gpu", "NVIDIA H200", (9, 0), interpret=True)
    must_take = TAKEN


@pytest.mark.gpu
class TestTritonOnGpu(Suite):
    name = "triton"
    cases = SMALL | REAL
    must_take = (*TAKEN, *REAL)

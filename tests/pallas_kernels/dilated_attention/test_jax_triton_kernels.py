"""The Triton kernels in Triton's interpreter: their numbers, on a machine without a GPU."""

import importlib
import sys
import types
import warnings

import jax
import numpy as np
import pytest

from pallas_kernels.device import Device
from tests.pallas_kernels.dilated_attention.cases import SMALL
from tests.pallas_kernels.dilated_attention.suite import Suite

if jax.default_backend() == "gpu":
    pytest.skip("would leave Triton's interpreter on for the GPU's tests", allow_module_level=True)
torch = pytest.importorskip("torch", reason="Triton's interpreter reads PyTorch's tensors")
with pytest.MonkeyPatch.context() as patch:  # Triton looks at this wherever it defines a kernel
    patch.setenv("TRITON_INTERPRET", "1")
    triton = pytest.importorskip("triton", reason="pip install 'samlight-jax[triton]'")

KERNELS = "pallas_kernels.dilated_attention.jax_triton_kernels"


def widened(x):
    """In a dtype that the interpreter multiplies: not bfloat16."""
    return np.array(x, np.float32 if x.dtype.name == "bfloat16" else x.dtype)


def triton_call(
    *inputs,
    kernel,
    out_shape,
    grid,
    num_warps,
    num_stages,
    compute_capability,
    input_output_aliases=None,
    **constants,
):
    """As jax-triton's, in Triton's interpreter; what a kernel leaves out is NaN."""

    def host(*arrays):
        arrays = [widened(x) for x in arrays]
        results = [widened(np.full(x.shape, np.nan, x.dtype)) for x in out_shape]
        for i, j in (input_output_aliases or {}).items():
            results[j] = arrays[i]
        with np.errstate(invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # NaN is what some tests put in
            kernel[grid](*map(torch.from_numpy, (*arrays, *results)), **constants)
        return tuple(x.astype(y.dtype) for x, y in zip(results, out_shape, strict=True))

    return jax.pure_callback(host, out_shape, *inputs)


class TestInterpreted(Suite):
    name = "jax_triton"
    device = Device("gpu", "Triton's interpreter", (9, 0))
    must_take = tuple(name for name, case in SMALL.items() if case.dtype != "float64")

    def test_batch_and_heads_divide_among_devices_without_messages(self):
        pytest.skip("needs a process of its own, which would not have this one's `triton_call`.")

    @pytest.fixture(autouse=True)
    def interpreted(self, monkeypatch):
        module = types.ModuleType("jax_triton")
        module.triton_call = triton_call
        monkeypatch.setitem(sys.modules, "jax_triton", module)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.delitem(sys.modules, KERNELS, raising=False)
        interpreted = importlib.import_module(KERNELS)
        package, name = KERNELS.rsplit(".", 1)
        monkeypatch.setattr(sys.modules[package], name, interpreted)
        self.backend._missing.cache_clear()
        yield
        self.backend._missing.cache_clear()

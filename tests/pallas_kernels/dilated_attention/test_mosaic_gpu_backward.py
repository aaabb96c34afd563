"""The backward kernels alone; test_mosaic_gpu.py holds their numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.device import Device
from pallas_kernels.dilated_attention import mosaic_gpu_backward
from pallas_kernels.dilated_attention.transforms import Call
from tests.pallas_kernels.dilated_attention.cases import Case

CASE = Case(size=(32, 32), segment=(32, 32), dtype="float16", head_dim=128)


@pytest.mark.parametrize("packed", [False, True])
def test_two_kernels_give_gradients_shaped_as_the_inputs(packed):
    case = dataclasses.replace(CASE, packed=packed)
    call = Call(case.grid, "all", 1.0, Device("gpu", "NVIDIA H200", (9, 0)))
    qkv, _ = case.draw()
    out = case.draw_cotangents()[0]
    lse = jnp.zeros((1, 1, 1, case.heads, 1024), jnp.float32)

    def gradients(qkv):
        return mosaic_gpu_backward.backward(call, qkv, (), out, lse, out, lse)[0]

    exported = jax.export.export(jax.jit(gradients), platforms=["cuda"])(qkv)
    assert [(x.shape, x.dtype) for x in exported.out_avals] == [(x.shape, x.dtype) for x in qkv]
    module = exported.mlir_module()
    assert module.count("stablehlo.custom_call @mosaic_gpu") == 2
    # A packed gradient is put together where it lies.
    assert "stablehlo.concatenate" not in module

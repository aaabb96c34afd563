"""GELU, in the form that each type of number deserves."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.device import Device
from pallas_kernels.dilated_attention.triton_kernels import plt

PAIRS = """{
.reg .b32 c, d, e, bend, half;
mov.b32 c, 0x3D123D12;
mov.b32 d, 0x3F4C3F4C;
mov.b32 e, 0x3F003F00;
mul.rn.bf16x2 bend, $1, $1;
fma.rn.bf16x2 bend, bend, c, d;
mul.rn.bf16x2 bend, bend, $1;
tanh.approx.bf16x2 bend, bend;
mul.rn.bf16x2 half, $1, e;
fma.rn.bf16x2 $0, half, bend, half;
}"""  # PTX; the constants are 0.0356, 0.797 and 0.5, each twice


def gelu(x: jax.Array) -> jax.Array:
    """GELU as in PyTorch; in bfloat16, whose rounding is far coarser, its form by tanh.

    That one (off by 5e-4) cuBLAS computes within the product before it. The exact one is by erf:
    `jax.nn.gelu` takes erfc, which costs a CPU more.
    """
    if x.dtype == jnp.bfloat16:
        return _gelu_tanh(x)
    wide = x if x.dtype.itemsize >= 4 else x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


@jax.custom_jvp
def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


@_gelu_tanh.defjvp
def _gelu_tanh_jvp(primals, tangents):
    # Its derivative in float32.
    (x,), (dx,) = primals, tangents
    wide = x.astype(jnp.float32)
    _, out = jax.jvp(lambda y: jax.nn.gelu(y, approximate=True), (wide,), (dx.astype(wide.dtype),))
    return _gelu_tanh(x), out.astype(x.dtype)


def gelu_in_triton(x: jax.Array, interpret: bool) -> jax.Array:
    """By tanh, which is one instruction, off by up to 5e-4."""
    tanh = jnp.tanh if interpret else plt.approx_tanh
    return 0.5 * x * (1 + tanh(x * (0.79788456 + 0.035677408 * x * x)))


def gelu_of_pairs(x: jax.Array, here: Device) -> jax.Array:
    """The same of bfloat16 and in it: two numbers by each instruction where a device has them."""
    if here.interpret or (here.capability or (0, 0)) < (9, 0):
        return gelu_in_triton(x.astype(jnp.float32), here.interpret).astype(x.dtype)
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return plt.elementwise_inline_asm(
        PAIRS, args=[x], constraints="=r,r", pack=2, result_shape_dtypes=[result]
    )[0]

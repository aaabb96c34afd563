"""A convolution whose stride is its size, and the GELU of it: the stem's first step.

As the product that it is, its patches must first be put side by side in memory, which takes as long
as the product. One Triton kernel (through Pallas; sm80 and later, bfloat16) multiplies row by row
of the patches, where they lie. Elsewhere, and where gradients are asked for, the product does it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import device
from pallas_kernels.dilated_attention import triton
from pallas_kernels.dilated_attention.triton_kernels import div_rem, dot, plt
from pallas_kernels.gelu import gelu, gelu_of_pairs
from pallas_kernels.opaque import opaque
from pallas_kernels.two_way import differentiable

BLOCK = 64  # patches of a program
DEPTH = 16  # numbers of a patch's row, filled up


def patch_conv_gelu(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """GELU of the convolution.

    Args:
      x: (b, y, x, c), sides in steps of s.
      kernel: (s, s, c, d).
      bias: (d,).

    Returns:
      (b, y / s, x / s, d), x's dtype; differentiable in reverse.
    """
    if unsupported(x, kernel) is not None:
        return plain(x, kernel, bias)
    return differentiable(functools.partial(_run, device.current()), plain)(x, kernel, bias)


def unsupported(x: jax.Array, kernel: jax.Array) -> str | None:
    """One sentence that says why the kernel would not do, or None."""
    if (reason := triton.missing(x.dtype)) is not None:
        return reason
    if x.dtype != jnp.bfloat16 or kernel.dtype != x.dtype:
        return f"takes bfloat16, but {x.dtype=} and {kernel.dtype=}."
    size, _, channels, out = kernel.shape
    if size * channels > DEPTH or out & (out - 1) or not 16 <= out <= 128:
        return (
            f"takes patches of up to {DEPTH} numbers a row to 16 to 128 channels, a power of two, "
            f"but {kernel.shape=}."
        )
    if x.shape[2] % (size * BLOCK):
        return f"takes rows in steps of {BLOCK} patches, but {x.shape=}."
    return None


def plain(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """The operation as a product; arguments as in `patch_conv_gelu`."""
    return gelu(product(x, kernel) + bias.reshape(1, 1, 1, -1))


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(b, y, x, c) and (s, s, c, d) to (b, y / s, x / s, d): each patch times the kernel."""
    (b, height, width, channels), (size, _, _, out) = x.shape, kernel.shape
    rows, columns = height // size, width // size
    x = x.reshape(b, rows, size, columns, size * channels).swapaxes(2, 3)
    return x.reshape(b, rows, columns, -1) @ kernel.reshape(-1, out)


def _run(here: device.Device, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    size, _, _, out = kernel.shape
    kernel = kernel.reshape(size, -1, out)
    kernel = jnp.pad(kernel, ((0, 0), (0, DEPTH - kernel.shape[1]), (0, 0)))
    run = functools.partial(_rows, here)
    return opaque(run, 1, "b y x c, s k d, o d -> b h w d", "b")(x, kernel, bias[None])


def _body(x: Any, kernel: Any, bias: Any, out: Any, *, depth: int, here: device.Device) -> None:
    """Patches side by side; refs of (s, patches * depth), (s, DEPTH, d), (1, d), (BLOCK, d)."""
    first = pl.program_id(0) % (x.shape[1] // (depth * BLOCK)) * BLOCK
    patch, place = (lax.broadcasted_iota(jnp.int32, (BLOCK, DEPTH), axis) for axis in (0, 1))
    sums = bias[...].astype(jnp.float32)
    for row in range(x.shape[0]):
        at = jnp.full_like(place, row), (first + patch) * depth + place
        sums += dot(plt.load(x.at[at], mask=place < depth, other=0.0), kernel[row], here.interpret)
    out[...] = gelu_of_pairs(sums.astype(out.dtype), here)


def _rows(here: device.Device, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    (b, height, width, channels), (size, _, d) = x.shape, kernel.shape
    rows, columns, depth = height // size, width // size, size * channels
    parts = columns // BLOCK

    def of_output(program: Any) -> tuple[Any, Any, int]:
        return *div_rem(program, parts), 0

    out = pl.pallas_call(
        functools.partial(_body, depth=depth, here=here),
        grid=(b * rows * parts,),
        in_specs=[
            pl.BlockSpec((None, size, width * channels), lambda program: (program // parts, 0, 0)),
            *(pl.BlockSpec(each.shape) for each in (kernel, bias)),
        ],
        out_specs=pl.BlockSpec((None, BLOCK, d), of_output),
        out_shape=jax.ShapeDtypeStruct((b * rows, columns, d), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        name="patch_conv_gelu",
        interpret=here.interpret,
    )(x.reshape(b * rows, size, width * channels), kernel, bias)
    return out.reshape(b, rows, columns, d)

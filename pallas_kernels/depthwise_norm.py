"""A 3x3 convolution of every channel by itself, its residual and the layer norm after it.

One Triton kernel (through Pallas, sm80 and later) reads the map once and a half and writes both
results, where a convolution and then a norm read and write it twice more. Elsewhere, and where
gradients are asked for, `depthwise_conv` and a plain norm do it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import device
from pallas_kernels.depthwise_conv import TAPS, depthwise_conv, fma
from pallas_kernels.dilated_attention import triton
from pallas_kernels.dilated_attention.triton_kernels import div_rem, plt
from pallas_kernels.opaque import opaque
from pallas_kernels.two_way import differentiable, normed

ROWS = 4  # of a program's strip
PART = 128  # channels held in one register array
WARPS = 4
BUSY = 512  # programs that fill a device


def depthwise_conv_norm(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    *,
    epsilon: float,
) -> tuple[jax.Array, jax.Array]:
    """`x` plus its depthwise convolution, and the layer norm of that over channels.

    Args:
      x: (b, H, W, c).
      kernel: (3, 3, c), as in `depthwise_conv`.
      bias: (c,), added to the convolution.
      scale: (c,), of the norm.
      shift: (c,), the same.
      epsilon: of the norm.

    Returns:
      (sum, norm), each (b, H, W, c) of x's dtype, computed in float32; differentiable in reverse.
    """
    by_parts = functools.partial(plain, epsilon=epsilon)
    if unsupported(x, kernel) is not None:
        return by_parts(x, kernel, bias, scale, shift)
    run = functools.partial(_run, epsilon, device.current())
    return differentiable(run, by_parts)(x, kernel, bias, scale, shift)


def unsupported(x: jax.Array, kernel: jax.Array) -> str | None:
    """One sentence that says why the kernel would not do, or None."""
    if (reason := triton.missing(x.dtype)) is not None:
        return reason
    if kernel.dtype != x.dtype:
        return f"takes arrays of one dtype, but {x.dtype=} and {kernel.dtype=}."
    if x.shape[-1] % PART or x.shape[1] % ROWS:
        return f"takes channels in steps of {PART} and rows in steps of {ROWS}, but {x.shape=}."
    return None


def plain(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, scale: jax.Array, shift: jax.Array, *,
    epsilon: float,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    y = depthwise_conv(x, kernel, bias, residual=True)
    return y, normed(y, scale, shift, epsilon)


def _run(
    epsilon: float, here: device.Device, x: jax.Array, kernel: jax.Array, *numbers: jax.Array
) -> tuple[jax.Array, jax.Array]:
    run = functools.partial(_strips, epsilon, here)
    rule = "b y x c, t c, c, c, c -> b y x c, b y x c"
    return opaque(run, 1, rule, "b")(x, kernel.reshape(TAPS, -1), *numbers)


def _body(
    x: Any, kernel: Any, bias: Any, scale: Any, shift: Any, out: Any, norm: Any, *,
    size: tuple[int, int], columns: int, epsilon: float, interpret: bool,
) -> None:  # fmt: skip
    """One strip of rows, column after column; refs of (tokens, c), (9, c), (c,)s, (tokens, c)s.

    Each column is read once, and its share of the three columns around it is added to their sums.
    """
    (height, width), channels = size, x.shape[1]
    parts = range(channels // PART)
    strip, segment = div_rem(pl.program_id(0) % (height // ROWS * (width // columns)),
                             width // columns)  # fmt: skip
    row, first = strip * ROWS, segment * columns
    place = [part * PART + lax.broadcasted_iota(jnp.int32, (PART,), 0) for part in parts]

    def wide(ref: Any, *index: int) -> list[jax.Array]:
        return [
            plt.load(ref.at[*(jnp.full_like(of, i) for i in index), of]).astype(jnp.float32)
            for of in place
        ]

    taps = [wide(kernel, t) for t in range(TAPS)]
    bias, scale, shift = wide(bias), wide(scale), wide(shift)
    taps[4] = [tap + 1.0 for tap in taps[4]]  # the residual

    def at(row: Any, column: Any) -> tuple[Any, Any]:
        real = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        # Beyond the map: nowhere, since Pallas's interpreter writes masked places back.
        return jnp.where(real, row * width + column, height * width), real

    def load(row: Any, column: Any) -> list[jax.Array]:
        token, real = at(row, column)
        mask = jnp.broadcast_to(real, (PART,))
        loaded = (
            plt.load(x.at[jnp.broadcast_to(token, (PART,)), of], mask=mask, other=0.0)
            for of in place
        )
        return [each.astype(jnp.float32) for each in loaded]

    def add(near: Any, dx: int, sums: Any) -> Any:
        """A column's share of the sums of the one that sees it as its column `dx`."""
        sums = list(sums)
        for dy in range(3):
            for i, value in enumerate(near[dy]):
                sums[i] = fma(value, taps[3 * dy + dx][i], sums[i], interpret)
        return sums

    def advance(column: Any, before: Any, own: Any) -> tuple[Any, Any, Any]:
        near = [load(row + r, column) for r in range(-1, ROWS + 1)]
        see = [near[r : r + 3] for r in range(ROWS)]
        done = [add(see[r], 2, before[r]) for r in range(ROWS)]
        return done, [add(see[r], 1, own[r]) for r in range(ROWS)], [
            add(see[r], 0, bias) for r in range(ROWS)
        ]  # fmt: skip

    def step(i: Any, state: Any) -> Any:
        done, *state = advance(first + i + 1, *state)
        for r in range(ROWS):
            token, _ = at(row + r, first + i)
            mean = sum(done[r][1:], done[r][0]).sum() / channels
            centred = [part - mean for part in done[r]]
            squares = [part * part for part in centred]
            factor = lax.rsqrt(sum(squares[1:], squares[0]).sum() / channels + epsilon)
            for i_, of in enumerate(place):
                where = jnp.broadcast_to(token, (PART,)), of
                plt.store(out.at[where], done[r][i_].astype(out.dtype))
                result = fma(centred[i_] * factor, scale[i_], shift[i_], interpret)
                plt.store(norm.at[where], result.astype(norm.dtype))
        return state

    start = [bias] * ROWS
    _, *state = advance(first - 1, start, start)
    _, *state = advance(first, *state)
    lax.fori_loop(0, columns, step, state)


def _strips(epsilon: float, here: device.Device, x: jax.Array, *shared: jax.Array) -> Any:
    b, height, width, c = x.shape
    columns = width
    while b * (height // ROWS) * (width // columns) < BUSY and columns % 2 == 0 and columns > 4:
        columns //= 2
    programs = height // ROWS * (width // columns)
    spec = pl.BlockSpec((None, height * width, c), lambda program: (program // programs, 0, 0))
    shape = jax.ShapeDtypeStruct((b, height * width, c), x.dtype)
    out, norm = pl.pallas_call(
        functools.partial(_body, size=(height, width), columns=columns, epsilon=epsilon,
                          interpret=here.interpret),
        grid=(b * programs,),
        in_specs=[spec, *(pl.BlockSpec(each.shape) for each in shared)],
        out_specs=(spec, spec),
        out_shape=(shape, shape),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=here.interpret,
    )(x.reshape(shape.shape), *shared)  # fmt: skip
    return out.reshape(x.shape), norm.reshape(x.shape)

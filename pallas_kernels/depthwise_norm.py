"""A 3x3 convolution of every channel by itself, its residual and the layer norm after it.

One Triton kernel (through Pallas, sm80 and later) reads the map once and a half and writes both
results, where a convolution and then a norm read and write it twice more. Elsewhere, and where
gradients are asked for, `depthwise_conv` and a plain norm do it.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

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

ROWS = 4  # of a program's strip, a warp each
PART = 128  # channels of a register array
UNROLL = 2  # columns at once
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
    """The operation as two; arguments as in `depthwise_conv_norm`."""
    y = depthwise_conv(x, kernel, bias, residual=True)
    return y, normed(y, scale, shift, epsilon)


def _run(
    epsilon: float, here: device.Device, x: jax.Array, kernel: jax.Array, *numbers: jax.Array
) -> tuple[jax.Array, jax.Array]:
    run = functools.partial(_strips, epsilon, here)
    rule = "b y x c, t c, c, c, c -> b y x c, b y x c"
    return opaque(run, 1, rule, "b")(x, kernel.reshape(TAPS, -1), *numbers)


class _Strip(NamedTuple):
    """What a program's arrays hold, (ROWS, PART) each.

    Attributes:
      size: (H, W) of the map.
      row: of the map.
      place: channels, of each part.
    """

    size: tuple[int, int]
    row: jax.Array
    place: list[jax.Array]

    @classmethod
    def of(cls, strip: Any, size: tuple[int, int], channels: int) -> _Strip:
        """The strip of a number."""
        rows, lanes = (lax.broadcasted_iota(jnp.int32, (ROWS, PART), axis) for axis in (0, 1))
        return cls(size, strip * ROWS + rows, [lanes + c for c in range(0, channels, PART)])

    def number(self, ref: Any, part: int, *index: int) -> jax.Array:
        """Of each channel, in float32."""
        of = self.place[part]
        at = *(jnp.full_like(of, i) for i in index), of
        return plt.load(ref.at[at]).astype(jnp.float32)

    def near(self, x: Any, column: Any) -> list[list[jax.Array]]:
        """A column's values: of the rows above, here and below, each part."""
        (height, width), found = self.size, []
        for dy in (-1, 0, 1):
            y = self.row + dy
            real = (y >= 0) & (y < height) & (column >= 0) & (column < width)
            # Beyond the map: nowhere, since Pallas's interpreter writes masked places back.
            token = jnp.where(real, y * width + column, height * width)
            found.append([plt.load(x.at[token, of], mask=real, other=0.0) for of in self.place])
        return found


def _body(
    x: Any, kernel: Any, bias: Any, scale: Any, shift: Any, out: Any, norm: Any, *,
    size: tuple[int, int], columns: int, unroll: int, epsilon: float, interpret: bool,
) -> None:  # fmt: skip
    """One strip of rows, `unroll` columns at once; refs as in the call, maps as (tokens, c).

    A warp has a token's channels, so that its norm crosses no warps; each column is read once, and
    its share of the three columns around it is added to their sums. The weights come from the
    nearest cache again and again: registers would hold nothing else.
    """
    segments = size[1] // columns
    strip, segment = div_rem(pl.program_id(0) % (size[0] // ROWS * segments), segments)
    cut, first = _Strip.of(strip, size, x.shape[1]), segment * columns
    parts = range(len(cut.place))

    def advance(column: Any, count: int, state: Any) -> tuple[Any, Any]:
        """Adds `count` columns: what is done, and the sums of the next two, part by part."""
        done, after = [], []
        near = [cut.near(x, column + u) for u in range(count)]
        for part, known in zip(parts, state, strict=True):
            sums = [*known, *[cut.number(bias, part)] * count]
            for dy, dx in itertools.product(range(3), repeat=2):
                tap = cut.number(kernel, part, 3 * dy + dx)
                tap = tap + 1.0 if dy == dx == 1 else tap  # the residual
                for u in range(count):
                    value = near[u][dy][part].astype(jnp.float32)
                    sums[u + 2 - dx] = fma(value, tap, sums[u + 2 - dx], interpret)
            done.append(sums[:count])
            after.append(tuple(sums[count:]))
        return done, tuple(after)

    def step(i: Any, state: Any) -> Any:
        column = first + i * unroll
        done, state = advance(column + 1, unroll, state)
        for u in range(unroll):
            sums = [part[u] for part in done]
            mean = _mean(sums)[:, None]
            centred = [part - mean for part in sums]
            factor = lax.rsqrt(_mean([part * part for part in centred]) + epsilon)[:, None]
            for part, of in enumerate(cut.place):
                at = cut.row * size[1] + column + u, of
                plt.store(out.at[at], sums[part].astype(out.dtype))
                numbers = cut.number(scale, part), cut.number(shift, part)
                result = fma(centred[part] * factor, *numbers, interpret)
                plt.store(norm.at[at], result.astype(norm.dtype))
        return state

    start = tuple((cut.number(bias, part),) * 2 for part in parts)
    _, state = advance(first - 1, 1, start)
    _, state = advance(first, 1, state)
    lax.fori_loop(0, columns // unroll, step, state)


def _mean(parts: list[jax.Array]) -> jax.Array:
    """Of each token's channels, in parts."""
    return functools.reduce(jnp.add, parts).sum(1) / (len(parts) * PART)


def _strips(epsilon: float, here: device.Device, x: jax.Array, *shared: jax.Array) -> Any:
    b, height, width, c = x.shape
    columns = width
    while b * (height // ROWS) * (width // columns) < BUSY and columns % (2 * UNROLL) == 0:
        columns //= 2
    unroll = math.gcd(columns, UNROLL)
    programs = height // ROWS * (width // columns)
    spec = pl.BlockSpec((None, height * width, c), lambda program: (program // programs, 0, 0))
    shape = jax.ShapeDtypeStruct((b, height * width, c), x.dtype)
    out, norm = pl.pallas_call(
        functools.partial(_body, size=(height, width), columns=columns, unroll=unroll,
                          epsilon=epsilon, interpret=here.interpret),
        grid=(b * programs,),
        in_specs=[spec, *(pl.BlockSpec(each.shape) for each in shared)],
        out_specs=(spec, spec),
        out_shape=(shape, shape),
        compiler_params=plt.CompilerParams(num_warps=ROWS, num_stages=1),
        name="depthwise_conv_norm",
        interpret=here.interpret,
    )(x.reshape(shape.shape), *shared)  # fmt: skip
    return out.reshape(x.shape), norm.reshape(x.shape)

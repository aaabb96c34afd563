"""A 3x3 convolution of every channel by itself, in one pass over the map.

A Triton kernel (through Pallas, sm80 and later) reads every value three times, from nearby caches,
where nine shifted reads in XLA cost five times the memory's time; its gradients are the same kernel
and a sum. Elsewhere the plain form does it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import device
from pallas_kernels.dilated_attention import triton
from pallas_kernels.dilated_attention.triton_kernels import div_rem, plt
from pallas_kernels.gelu import gelu_in_triton
from pallas_kernels.opaque import opaque

ROWS, COLUMNS = 8, 16  # of a program's tile
SUMMED = 32  # rows of a program's tile, of the kernel's gradient
CHANNELS = 64  # at most, of a program
TAPS = 9


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: int = 1,
    residual: bool = False,
    gelu_tanh: bool = False,
) -> jax.Array:
    """Each channel of a map, zero-padded, convolved with its own 3x3 kernel.

    Args:
      x: (b, H, W, c).
      kernel: (3, 3, c), not flipped: [0, 0] is for the neighbour above to the left.
      bias: (c,), added.
      stride: of the result, in both directions.
      residual: adds `x` too; needs stride 1.
      gelu_tanh: GELU of it all, by tanh.

    Returns:
      (b, ceil(H / stride), ceil(W / stride), c), x's dtype, summed in float32 by the kernel;
      differentiable in all arrays, in reverse.

    Raises:
      ValueError: shapes that do not fit each other.
    """
    c = x.shape[-1]
    if x.ndim != 4 or kernel.shape != (3, 3, c) or (bias is not None and bias.shape != (c,)):
        raise ValueError(
            f"{x.shape=}, {kernel.shape=} and bias.shape={getattr(bias, 'shape', None)} must be "
            "(b, H, W, c), (3, 3, c) and (c,)."
        )
    if residual and stride != 1:
        raise ValueError(f"residual=True needs stride=1, but {stride=}.")
    if unsupported(x, kernel, stride) is not None:
        out = plain(x, kernel, bias, stride=stride, residual=residual)
        return jax.nn.gelu(out, approximate=True) if gelu_tanh else out
    bias = jnp.zeros(c, kernel.dtype) if bias is None else bias
    run = _differentiable(residual, gelu_tanh, device.current())
    return run(x, kernel.reshape(TAPS, c), bias)


def unsupported(x: jax.Array, kernel: jax.Array, stride: int) -> str | None:
    """One sentence that says why the kernel would not do, or None."""
    if (reason := triton.missing(x.dtype)) is not None:
        return reason
    if kernel.dtype != x.dtype:
        return f"takes arrays of one dtype, but {x.dtype=} and {kernel.dtype=}."
    if stride != 1:
        return f"takes stride 1, but {stride=}."
    if x.shape[-1] % 16:
        return f"takes channels in steps of 16, but {x.shape=}."
    return None


def plain(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, *, stride: int, residual: bool
) -> jax.Array:
    """Nine shifted multiply-adds: a grouped convolution has no fast path in XLA on a CPU."""
    _, height, width, _ = x.shape
    # What is read nine times is computed once, on a CPU with its padding.
    once, as_it_is = lax.optimization_barrier, lambda x: x
    own = x = lax.platform_dependent(x, cpu=as_it_is, default=once)
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = lax.platform_dependent(x, cpu=once, default=as_it_is)
    taps = kernel[:, :, None, None, None]
    out = 0 if bias is None else bias[None, None, None]
    for dy in range(3):
        for dx in range(3):
            view = x[:, dy : dy + height : stride, dx : dx + width : stride]
            out = out + view * taps[dy, dx]
    return own + out if residual else jnp.asarray(out)


@functools.cache
def _differentiable(residual: bool, gelu_tanh: bool, here: device.Device) -> Any:
    """(x, (9, c) kernel, bias) to the result."""

    def convolved(gelu_tanh: bool) -> Any:
        run = functools.partial(_convolved, residual, gelu_tanh, here)
        return opaque(run, 1, "b y x c, t c, c -> b y x c", "b c")

    convolve = convolved(False)
    sums = opaque(functools.partial(_sums, here), 2, "b y x c, b v u c -> b n t c", "b c")
    forward = convolved(True) if gelu_tanh else convolve
    function = jax.custom_vjp(forward)

    def save(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> Any:
        return forward(x, kernel, bias), (x, kernel, bias)

    def pull_back(saved: Any, dout: jax.Array) -> Any:
        x, kernel, bias = saved
        if gelu_tanh:
            before = convolve(x, kernel, bias)
            (dout,) = jax.vjp(functools.partial(jax.nn.gelu, approximate=True), before)[1](dout)
        found = sums(x, dout).sum((0, 1))
        dx = convolve(dout, kernel[::-1], jnp.zeros_like(bias))
        return dx, found[:TAPS].astype(kernel.dtype), found[TAPS].astype(bias.dtype)

    function.defvjp(save, pull_back)
    return function


@dataclasses.dataclass(frozen=True)
class _Cut:
    """Which program does what: a tile of rows, columns and channels of one image.

    Attributes:
      size: (H, W) of the map.
      channels: c.
      rows: of a tile.
    """

    size: tuple[int, int]
    channels: int
    rows: int

    @classmethod
    def of(cls, x: jax.Array, rows: int) -> _Cut:
        """Of (b, H, W, c)."""
        return cls((x.shape[1], x.shape[2]), x.shape[3], rows)

    @property
    def block(self) -> int:
        """Channels of a tile."""
        return math.gcd(self.channels, CHANNELS)

    @property
    def tiles(self) -> tuple[int, int]:
        return pl.cdiv(self.size[0], self.rows), pl.cdiv(self.size[1], COLUMNS)

    @property
    def programs(self) -> int:
        """Of one image."""
        return math.prod(self.tiles) * (self.channels // self.block)

    def place(self, program: Any) -> tuple[Any, ...]:
        """(batch, tile, first row, column and channel) of a program."""
        rest, channel = div_rem(program, self.channels // self.block)
        batch, tile = div_rem(rest, math.prod(self.tiles))
        row, column = div_rem(tile, self.tiles[1])
        return batch, tile, row * self.rows, column * COLUMNS, channel * self.block

    def at(self, row: Any, column: Any, channel: Any) -> tuple[Any, Any, Any]:
        """(flat position, channel, whether it is on the map) of a row of a tile."""
        shape = COLUMNS, self.block
        x = column + lax.broadcasted_iota(jnp.int32, shape, 0)
        real = (row >= 0) & (row < self.size[0]) & (x >= 0) & (x < self.size[1])
        # Beyond the map: nowhere, since Pallas's interpreter writes masked places back.
        where = jnp.where(real, row * self.size[1] + x, math.prod(self.size))
        return where, channel + lax.broadcasted_iota(jnp.int32, shape, 1), real

    def load(self, x: Any, row: Any, column: Any, channel: Any) -> jax.Array:
        """A row of a tile in float32, zero beyond the map."""
        at, of, real = self.at(row, column, channel)
        return plt.load(x.at[at, of], mask=real, other=0.0).astype(jnp.float32)

    def spread(self, numbers: Any, channel: Any, *row: int) -> jax.Array:
        """(c,) numbers, or a row of several, in float32, for all of a tile."""
        of = channel + lax.broadcasted_iota(jnp.int32, (COLUMNS, self.block), 1)
        at = *(jnp.full_like(of, r) for r in row), of
        return plt.load(numbers.at[at]).astype(jnp.float32)


def fma(x: jax.Array, y: jax.Array, z: jax.Array, interpret: bool) -> jax.Array:
    """`x * y + z` in one instruction, which XLA does not let Triton's compiler make of two."""
    if interpret:
        return x * y + z
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    text, types = "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f"
    args = x, y, z
    return plt.elementwise_inline_asm(
        text, args=args, constraints=types, pack=1, result_shape_dtypes=[shape]
    )[0]


def _convolved_body(
    x: Any, taps: Any, bias: Any, out: Any, *, cut: _Cut, residual: bool, gelu_tanh: bool,
    interpret: bool,
) -> None:  # fmt: skip
    """One program; refs of (tokens, c), (9, c), (c,), (tokens, c). Rows are read once each."""
    _, _, row, column, channel = cut.place(pl.program_id(0))
    kernel = [cut.spread(taps, channel, t) for t in range(TAPS)]
    first = cut.spread(bias, channel)
    if residual:
        kernel[4] += 1.0
    sums: dict[int, jax.Array] = {}
    for r in range(-1, cut.rows + 1):
        near = [cut.load(x, row + r, column + dx, channel) for dx in (-1, 0, 1)]
        for dy in range(3):
            o = r + 1 - dy  # the row that sees this one as its row `dy`
            if 0 <= o < cut.rows:
                for dx in range(3):
                    sums[o] = fma(near[dx], kernel[3 * dy + dx], sums.get(o, first), interpret)
        if r >= 1:
            at, of, real = cut.at(row + r - 1, column, channel)
            found = sums.pop(r - 1)
            found = gelu_in_triton(found, interpret) if gelu_tanh else found
            plt.store(out.at[at, of], found.astype(out.dtype), mask=real)


def _convolved(
    residual: bool,
    gelu_tanh: bool,
    here: device.Device,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
) -> jax.Array:
    cut = _Cut.of(x, ROWS)
    body = functools.partial(_convolved_body, residual=residual, gelu_tanh=gelu_tanh)
    shape = jax.ShapeDtypeStruct((len(x), math.prod(cut.size), cut.channels), x.dtype)
    return _call(body, cut, here, shape, (x,), (kernel, bias)).reshape(x.shape)


def _sums_body(x: Any, dout: Any, out: Any, *, cut: _Cut, interpret: bool) -> None:
    """One program; refs of (tokens, c) twice and (tiles, 10, c)."""
    _, tile, row, column, channel = cut.place(pl.program_id(0))

    def add(r: Any, sums: Any) -> Any:
        g = cut.load(dout, row + r, column, channel)
        near = (
            cut.load(x, row + r + dy, column + dx, channel)
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
        )
        kernel = [fma(g, n, s, interpret) for s, n in zip(sums, near, strict=False)]
        return *kernel, sums[TAPS] + g

    zero = jnp.zeros((COLUMNS, cut.block), jnp.float32)
    sums = lax.fori_loop(0, cut.rows, add, (zero,) * (TAPS + 1))
    for t, found in enumerate(sums):
        plt.store(out.at[tile, jnp.int32(t), pl.ds(channel, cut.block)], found.sum(0))


def _sums(here: device.Device, x: jax.Array, dout: jax.Array) -> jax.Array:
    """(b, tiles, 10, c) float32: of each tile, the gradients of nine taps and the bias."""
    cut = _Cut.of(x, SUMMED)
    shape = jax.ShapeDtypeStruct((len(x), math.prod(cut.tiles), TAPS + 1, x.shape[3]), jnp.float32)
    return _call(_sums_body, cut, here, shape, (x, dout))


def _call(body: Any, cut: _Cut, here: device.Device, shape: Any, maps: Any, taps: Any = ()) -> Any:
    """Runs a body on each image's maps, flat."""

    def image(shape: tuple[int, ...]) -> pl.BlockSpec:
        zeros = (0,) * (len(shape) - 1)
        return pl.BlockSpec((None, *shape[1:]), lambda program: (cut.place(program)[0], *zeros))

    maps = [x.reshape(len(x), -1, cut.channels) for x in maps]
    return pl.pallas_call(
        functools.partial(body, cut=cut, interpret=here.interpret),
        grid=(shape.shape[0] * cut.programs,),
        in_specs=[*(image(x.shape) for x in maps), *(pl.BlockSpec(x.shape) for x in taps)],
        out_specs=image(shape.shape),
        out_shape=shape,
        compiler_params=plt.CompilerParams(num_warps=COLUMNS * cut.block // 256, num_stages=1),
        name="depthwise_conv" if taps else "depthwise_conv_sums",
        interpret=here.interpret,
    )(*maps, *taps)

"""Attention within the windows of a map, with a bias for every pair of tokens: TinyViT's.

One Triton kernel (through Pallas, sm80 and later) reads each window's tokens where they lie on the
map and keeps a window's scores in registers; elsewhere, and backwards, the plain form does it.
Source of the operation: TinyViT, arXiv 2207.10666.
"""

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
from pallas_kernels.dilated_attention.triton_kernels import LOG2E, div_rem, dot, plt
from pallas_kernels.opaque import opaque

BLOCK = 64  # queries of a program
KEYS = 256  # of a window, at most


def window_attention(qkv: jax.Array, bias: jax.Array, *, window: int) -> jax.Array:
    """Each token attends to those of its own window of `window` x `window` tokens.

    Args:
      qkv: (b, H, W, heads, 3, d), H and W multiples of `window`: each head's query, key and value
        side by side, as TinyViT packs them.
      bias: (heads, window**2, window**2), added to the products of query and key, which are
        divided by the square root of d.
      window: tokens on a side.

    Returns:
      (b, H, W, heads, d), qkv's dtype; differentiable in both, in reverse.

    Raises:
      ValueError: shapes that do not fit each other.
    """
    _, height, width, heads, three, _ = qkv.shape
    if three != 3 or height % window or width % window:
        raise ValueError(
            f"qkv.shape={qkv.shape} must be (b, H, W, heads, 3, d) with H and W multiples of "
            f"{window=}; pad the map."
        )
    if bias.shape != (heads, window**2, window**2):
        raise ValueError(
            f"bias.shape={bias.shape} must be {(heads, window**2, window**2)}, "
            "(heads, window**2, window**2)."
        )
    if unsupported(qkv, window) is not None:
        return plain(qkv, bias, window)
    return _kernel(window, device.current())(qkv, bias)


def unsupported(qkv: jax.Array, window: int) -> str | None:
    """One sentence that says why the kernel would not do, or None."""
    d = qkv.shape[-1]
    if (reason := triton.missing(qkv.dtype)) is not None:
        return reason
    if d not in (16, 32, 64):
        return f"takes a head_dim of 16, 32 or 64, but head_dim={d}."
    if window**2 > KEYS:
        return f"takes windows of up to {KEYS} tokens, but {window=}."
    return None


def plain(qkv: jax.Array, bias: jax.Array, window: int) -> jax.Array:
    """The operation in a few lines of JAX."""
    b, height, width, heads, _, d = qkv.shape
    rows, columns, n = height // window, width // window, window**2
    cut = qkv.reshape(b, rows, window, columns, window, heads, 3, d)
    cut = cut.transpose(6, 0, 1, 3, 5, 2, 4, 7).reshape(3, -1, heads, n, d)
    q, k, v = cut
    product = functools.partial(jnp.einsum, precision="highest")  # float32's own, on a GPU too
    scores = product("bhqd,bhkd->bhqk", q * d**-0.5, k)
    scores = (scores + bias[None].astype(scores.dtype)).astype(jnp.float32)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = product("bhqk,bhkd->bhqd", weights, v)
    out = out.reshape(b, rows, columns, heads, window, window, d)
    return out.transpose(0, 1, 4, 2, 5, 3, 6).reshape(b, height, width, heads, d)


@functools.cache
def _kernel(window: int, here: device.Device) -> Any:
    """The kernel as a function of arrays, with gradients."""
    forward = functools.partial(_forward, window, here)
    run = opaque(forward, 1, "b y x n t d, n i j -> b y x n d", "b n")
    attend = jax.custom_vjp(run)
    attend.defvjp(
        lambda qkv, bias: (run(qkv, bias), (qkv, bias)),
        lambda saved, dout: jax.vjp(functools.partial(plain, window=window), *saved)[1](dout),
    )
    return attend


@dataclasses.dataclass(frozen=True)
class _Cut:
    """Which program does what: a tile of one window's queries, of one head.

    Attributes:
      window: tokens on a side.
      size: (H, W) of the map.
      heads: of an image.
    """

    window: int
    size: tuple[int, int]
    heads: int

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.window**2, BLOCK)

    @property
    def windows(self) -> tuple[int, int]:
        return self.size[0] // self.window, self.size[1] // self.window

    def place(self, program: Any) -> tuple[Any, ...]:
        """(batch, row and column of the window, head, tile) of a program."""
        rest, tile = div_rem(program, self.tiles)
        rest, head = div_rem(rest, self.heads)
        rest, column = div_rem(rest, self.windows[1])
        return *div_rem(rest, self.windows[0]), column, head, tile

    def places(self, row: Any, column: Any, start: Any, shape: tuple[int, int]) -> Any:
        """(flat position on the map, place in the head, whether there is one), each of `shape`."""
        index = start + lax.iota(jnp.int32, shape[0])
        y, x = div_rem(index, self.window)
        at = (row * self.window + y) * self.size[1] + column * self.window + x
        # Beyond the window: nowhere, since Pallas's interpreter writes masked places back.
        tokens = math.prod(self.size)
        at = lax.broadcast_in_dim(jnp.where(index < self.window**2, at, tokens), shape, (0,))
        return at, lax.broadcasted_iota(jnp.int32, shape, 1), at < tokens


def _body(qkv: Any, bias: Any, out: Any, *, cut: _Cut, keys: int, interpret: bool) -> None:
    """One program; refs of (tokens, 3, d), (queries, keys) and (tokens, d)."""
    d = out.shape[-1]
    _, row, column, _, tile = cut.place(pl.program_id(0))

    def load(start: Any, block: int, slot: int) -> jax.Array:
        at, of_head, real = cut.places(row, column, start, (block, d))
        return plt.load(qkv.at[at, slot, of_head], mask=real, other=0.0)

    first = tile * BLOCK
    q, k, v = load(first, BLOCK, 0), load(0, keys, 1), load(0, keys, 2)
    scores = dot(q, k.T, interpret) * (d**-0.5 * LOG2E)
    scores += plt.load(bias.at[pl.ds(first, BLOCK)]).astype(jnp.float32) * LOG2E
    weights = jnp.exp2(scores - scores.max(1, keepdims=True))
    result = dot(weights.astype(v.dtype), v, interpret) / weights.sum(1, keepdims=True)
    at, of_head, real = cut.places(row, column, first, (BLOCK, d))
    plt.store(out.at[at, of_head], result.astype(out.dtype), mask=real)


def _forward(window: int, here: device.Device, qkv: jax.Array, bias: jax.Array) -> jax.Array:
    b, height, width, heads, _, d = qkv.shape
    cut = _Cut(window, (height, width), heads)
    n, tokens = window**2, height * width
    rows, keys = cut.tiles * BLOCK, pl.next_power_of_2(n)
    bias = jnp.pad(bias, ((0, 0), (0, rows - n), (0, 0)))
    bias = jnp.pad(bias, ((0, 0), (0, 0), (0, keys - n)), constant_values=-jnp.inf)

    def head_of(*inner: int) -> pl.BlockSpec:
        def index(program: Any) -> tuple[Any, ...]:
            batch, *_, head, _ = cut.place(program)
            return batch, 0, head, *(0,) * len(inner)

        return pl.BlockSpec((None, tokens, None, *inner), index)

    of_bias = pl.BlockSpec((None, rows, keys), lambda program: (cut.place(program)[3], 0, 0))
    out = pl.pallas_call(
        functools.partial(_body, cut=cut, keys=keys, interpret=here.interpret),
        grid=(b * math.prod(cut.windows) * heads * cut.tiles,),
        in_specs=[head_of(3, d), of_bias],
        out_specs=head_of(d),
        out_shape=jax.ShapeDtypeStruct((b, tokens, heads, d), qkv.dtype),
        compiler_params=plt.CompilerParams(num_warps=4 if keys <= BLOCK else 8, num_stages=1),
        name="window_attention",
        interpret=here.interpret,
    )(qkv.reshape(b, tokens, heads, 3, d), bias)
    return out.reshape(b, height, width, heads, d)

"""Dilated attention through Pallas's Triton back end, forward and backward (sm80 and later)."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import device, tiles
from pallas_kernels.dilated_attention import groups, transforms
from pallas_kernels.dilated_attention import triton_kernels as kernels
from pallas_kernels.dilated_attention.transforms import Arrays, Call
from pallas_kernels.dilated_attention.triton_kernels import Cut
from pallas_kernels.tiles import Tiles

NAME = "triton"
DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32)


def missing(dtype: Any) -> str | None:
    """One sentence that says why no kernel of arrays of `dtype` runs here, or None."""
    if kernels.plt is None:
        return f"needs Pallas's Triton back end, which JAX {jax.__version__} no longer has."
    here = device.current()
    if here.platform != "gpu" or here.capability is None:
        return f"needs an NVIDIA GPU, but the device is {here.kind!r} ({here.platform})."
    if here.capability < (8, 0):
        return f"needs compute capability 8.0, but {here.kind!r} has {here.capability}."
    if dtype not in DTYPES:
        return f"takes float16, bfloat16 and float32, but {dtype=}."
    return None


def unsupported(
    qkv: Arrays, rel: Arrays, *, grid: groups.Grid, offsets: str, scale: float
) -> str | None:
    """One sentence that says why `run` would not do, or None."""
    if (reason := missing(qkv[0].dtype)) is not None:
        return reason
    if qkv[0].shape[-1] % 16 or qkv[0].shape[-1] > 128:
        return f"takes a head_dim of 16 to 128 in steps of 16, but head_dim={qkv[0].shape[-1]}."
    return None


def _call(kernel: Any, cut: Cut, block: int, inputs: Any, outputs: Any, **options: Any) -> Any:
    """Runs a kernel: whole maps of one head go in, each program finds its tokens.

    Args:
      kernel: the body.
      cut: as the body sees the call.
      block: tokens of a program's own tile.
      inputs: pairs (array, kind); kinds are those of `_view`.
      outputs: likewise, with shapes for arrays.
      **options: of `pl.pallas_call`.
    """
    views = [_view(x, kind) for x, kind in inputs]
    shapes = [_view(x, kind) for x, kind in outputs]

    def spec(x: Any, kind: str) -> pl.BlockSpec:
        def index(program: Any) -> Any:
            batch, segment, residue, head, _ = cut.place(program, block)
            if kind == "sums":
                inner = (segment, jnp.zeros_like(residue) if cut.call.own else residue)
            else:
                inner = (jnp.zeros_like(head),) * (x.ndim - 3)
            return batch, *inner, head, jnp.zeros_like(head)

        inner = {"tokens": x.shape[1:3], "relative": x.shape[1:2], "sums": (None, None)}[kind]
        return pl.BlockSpec((None, *inner, None, x.shape[-1]), index)

    batch = inputs[0][0].shape[0]
    results = pl.pallas_call(
        kernel,
        grid=(cut.programs(batch, block),),
        in_specs=[spec(x, kind) for x, (_, kind) in zip(views, inputs, strict=True)],
        out_specs=[spec(x, kind) for x, (_, kind) in zip(shapes, outputs, strict=True)],
        out_shape=shapes,
        compiler_params=kernels.plt.CompilerParams(
            num_warps=cut.tiles.num_warps, num_stages=cut.tiles.num_stages
        ),
        interpret=cut.call.device.interpret,
        **options,
    )(*views)
    return [x.reshape(y.shape) for x, (y, _) in zip(results, outputs, strict=True)]


def _view(x: Any, kind: str) -> Any:
    """As the kernels see it, a bitcast.

    Args:
      x: an array, or its shape and dtype.
      kind: "tokens" (b, H, W, [3,] n, d) -> (b, H W, 3 or 1, n, d); "relative" (b, H, W, n, m) ->
        (b, H W, n, m); "sums", the grouped log-sum-exp, as it is.
    """
    if kind == "sums":
        return x
    b, h, w, *rest = x.shape
    shape = (b, h * w, *([1] if kind == "tokens" and len(rest) == 2 else []), *rest)
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, x.dtype)
    return x.reshape(shape)


def _slots(qkv: Arrays) -> tuple[Arrays, tuple[int, int, int]]:
    return (qkv, (0, 0, 0)) if len(qkv) == 3 else (qkv * 3, (0, 1, 2))


def _like(x: Any, shape: Any = None, dtype: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape if shape is None else shape, dtype or x.dtype)


def _cut(kernel: str, call: Call, qkv: Arrays, rel: Arrays) -> Cut:
    heads, head_dim = qkv[0].shape[-2:]
    cut = Cut(call, heads, head_dim, qkv[0].dtype, bool(rel), Tiles(0, 0, 0, 0))
    return dataclasses.replace(cut, tiles=tiles.choose(NAME, kernel, cut, candidates))


def candidates(kernel: str, cut: Cut) -> list[Tiles]:
    """Tiles worth trying, the heuristic's choice first.

    Args:
      kernel: "forward", "dq" or "dkv".
      cut: of the call; its tiles are ignored.
    """
    whole = max(16, pl.next_power_of_2(cut.call.grid.keys))
    columns = cut.call.grid.group[1]
    by_row = cut.rel and columns in (32, 64, 128)  # then a tile of keys is a row
    itemsize = jnp.dtype(cut.dtype).itemsize
    found = []
    for mine, other, warps, stages in itertools.product(
        (128, 64, 32, 16), (64, 32, 128, 16), (4, 8), (3, 2)
    ):
        q, k = (other, mine) if kernel == "dkv" else (mine, other)
        if max(mine, other) > whole:
            continue
        # What a thread holds in registers: sums of its own tile, and scores at several steps.
        own, sums, scores = {"forward": (1, 1, 1.5), "dq": (2, 1, 2.5), "dkv": (2, 2, 2.5)}[kernel]
        held = (sums * mine * cut.head_dim + scores * q * k) / (32 * warps)
        # Its own tile, and two tiles a stage; float32 is held once more, split for TF32.
        shared = (own * mine + 2 * stages * other) * cut.head_dim * itemsize * itemsize / 2
        if held <= 200 and shared <= _shared_memory(cut.call.device):
            found.append(
                ((by_row and k != columns, warps, abs(held - 120)), Tiles(q, k, warps, stages))
            )
    found.sort(key=lambda pair: pair[0])
    return [tile for _, tile in found]


def _shared_memory(here: device.Device) -> int:
    """Bytes that one program can have; CUDA C++ Programming Guide, compute capabilities."""
    sizes = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227}
    return sizes.get(here.capability or (9, 0), 99) * 1024


def forward(call: Call, qkv: Arrays, rel: Arrays) -> tuple[jax.Array, jax.Array]:
    """The output and the grouped log-sum-exp; see `transforms.run_of`."""
    cut = _cut("forward", call, qkv, rel)
    views, slots = _slots(qkv)
    b, h, w = qkv[0].shape[:3]
    out = _like(qkv[0], (b, h, w, cut.heads, cut.head_dim))
    segments, residues = math.prod(call.grid.segments), 1 if call.own else call.grid.residues
    lse = _like(out, (b, segments, residues, cut.heads, call.grid.keys), jnp.float32)
    out, lse = _call(
        functools.partial(kernels.forward_kernel, cut=cut, slots=slots),
        cut,
        cut.tiles.block_q,
        [*((x, "tokens") for x in views), *((x, "relative") for x in rel)],
        [(out, "tokens"), (lse, "sums")],
    )
    return out, lse


def dq(
    call: Call,
    qkv: Arrays,
    rel: Arrays,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
) -> tuple[jax.Array, jax.Array, Arrays]:
    """The gradients of the queries and of `rel`.

    Returns:
      q's gradient, or a packed one whose q alone is filled; the sums that `dkv` needs, grouped;
      the relative terms' gradients.
    """
    cut = _cut("dq", call, qkv, rel)
    views, slots = _slots(qkv)
    inputs = [*((x, "tokens") for x in views), *((x, "relative") for x in rel)]
    gradient, delta, *drel = _call(
        functools.partial(kernels.dq_kernel, cut=cut, slots=slots, rels=len(rel)),
        cut,
        cut.tiles.block_q,
        [*inputs, (out, "tokens"), (lse, "sums"), (dout, "tokens"), (dlse, "sums")],
        [(_like(qkv[0]), "tokens"), (_like(lse), "sums"), *((_like(x), "relative") for x in rel)],
    )
    return gradient, delta, tuple(drel)


def dkv(
    call: Call,
    qkv: Arrays,
    rel: Arrays,
    lse: jax.Array,
    dout: jax.Array,
    delta: jax.Array,
    gradient: jax.Array,
) -> Arrays:
    """The gradients of keys and values; a packed `gradient` of `dq` is filled where it lies."""
    cut = _cut("dkv", call, qkv, rel)
    views, slots = _slots(qkv)
    inputs = [*((x, "tokens") for x in views), *((x, "relative") for x in rel)]
    inputs += [(lse, "sums"), (dout, "tokens"), (delta, "sums")]
    packed = len(qkv) == 1
    return tuple(
        _call(
            functools.partial(kernels.dkv_kernel, cut=cut, slots=slots, rels=len(rel)),
            cut,
            cut.tiles.block_k,
            [*inputs, (gradient, "tokens")] if packed else inputs,
            [(_like(x), "tokens") for x in qkv[-2:]],
            input_output_aliases={len(inputs): 0} if packed else {},
        )
    )


def backward(
    call: Call,
    qkv: Arrays,
    rel: Arrays,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
) -> tuple[Arrays, Arrays]:
    """The gradients of `qkv` and `rel`; see `transforms.run_of`."""
    gradient, delta, drel = dq(call, qkv, rel, out, lse, dout, dlse)
    rest = dkv(call, qkv, rel, lse, dout, delta, gradient)
    return rest if len(qkv) == 1 else (gradient, *rest), drel


run = transforms.run_of(forward, backward)

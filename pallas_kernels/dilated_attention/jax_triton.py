"""Dilated attention as Triton kernels of our own, called through jax-triton (optional, sm80+).

Pallas's way to Triton ends with some JAX release; jax-triton is the other way. A program owns a
tile of queries of one group and head (of keys, for their gradients) and reads every token where it
lies. The backward pass recomputes the scores from the log-sum-exp (FlashAttention-2, arXiv
2307.08691) in two kernels without atomics: the same bits every run.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import device, tiles
from pallas_kernels.dilated_attention import groups, transforms
from pallas_kernels.dilated_attention.transforms import Arrays, Call
from pallas_kernels.tiles import Tiles

NAME = "jax_triton"
DTYPES = ("float16", "bfloat16", "float32")


def unsupported(
    qkv: Arrays, rel: Arrays, *, grid: groups.Grid, offsets: str, scale: float
) -> str | None:
    """One sentence that says why `run` would not do, or None."""
    here, (*_, head_dim) = device.current(), qkv[0].shape
    if here.platform != "gpu" or here.capability is None:
        return f"needs an NVIDIA GPU, but the device is {here.kind!r} ({here.platform})."
    if here.interpret:
        return "has no interpreter; run it on a GPU."
    if here.capability < (8, 0):
        return f"needs compute capability 8.0, but {here.kind!r} has {here.capability}."
    if qkv[0].dtype.name not in DTYPES:
        return f"takes {', '.join(DTYPES)}, but {qkv[0].dtype=}."
    if not 16 <= head_dim <= 128:
        return f"takes a head_dim of 16 to 128, but {head_dim=}."
    if rel and grid.group[1] > 128:
        return f"takes relative terms of at most 128 key columns, but a group is {grid.group=}."
    if (image := max(math.prod(x.shape[1:]) for x in (*qkv, *rel))) >= 1 << 31:
        return f"takes less than 2**31 numbers an image, but one of qkv and rel holds {image}."
    return _missing()


@functools.cache
def _missing() -> str | None:
    """Why jax-triton cannot be imported here, or None."""
    try:
        import jax_triton  # noqa: F401
        import triton  # noqa: F401
    except ImportError as error:
        return f"needs jax-triton (pip install 'samlight-jax[triton]'): {error}."
    return None


@dataclasses.dataclass(frozen=True)
class Cut:
    """One kernel's view of a call: all that it knows when it is compiled.

    Attributes:
      call: the static arguments.
      heads: n.
      head_dim: d.
      dtype: of q, k and v.
      packed: q, k and v come in one array.
      rel: with relative terms.
      tiles: the sizes.
    """

    call: Call
    heads: int
    head_dim: int
    dtype: Any
    packed: bool
    rel: bool
    tiles: Tiles

    def constants(self) -> dict[str, Any]:
        """What the kernels read."""
        grid, vector = self.call.grid, self.heads * self.head_dim
        (rows, columns), whole = grid.group, 1 << (self.head_dim.bit_length() - 1)
        # A row of keys begins with a tile, or a tile with a row: terms of a row are added as one.
        pitch = _power_of_2(columns) if self.rel else columns
        block_q, block_k, slots_k = self.tiles.block_q, self.tiles.block_k, rows * pitch
        ragged = grid.size != grid.padded
        return {
            "heads": self.heads,
            "head_dim": self.head_dim,
            "width0": whole,
            "width1": _power_of_2(max(16, self.head_dim - whole)) if self.head_dim > whole else 0,
            "parts": 2 if self.head_dim > whole else 1,
            # Of float32 alone: its own products, the exact choice, which no tensor core makes.
            # `triton`, asked before this back end, takes three of TF32 on tensor cores instead.
            "precision": "ieee",
            "scale": self.call.scale,
            "rel": self.rel,
            "own": self.call.own,
            "height": grid.size[0],
            "width": grid.size[1],
            "segment_h": grid.segment[0],
            "segment_w": grid.segment[1],
            "dilation_h": grid.dilation[0],
            "dilation_w": grid.dilation[1],
            "segments": math.prod(grid.segments),
            "segments_across": grid.segments[1],
            "residues": grid.residues,
            "rows": rows,
            "columns": columns,
            "tokens": grid.keys,
            "pitch": pitch,
            "slots_k": slots_k,
            "stride": 3 * vector if self.packed else vector,
            "stride_out": vector,
            "slot": vector if self.packed else 0,
            "ragged": ragged,
            "masked_q": ragged or grid.keys % block_q != 0,
            "masked_k": ragged or slots_k % block_k != 0 or pitch != columns,
            "block_q": block_q,
            "block_k": block_k,
            "tiles_q": -(-grid.keys // block_q),
            "tiles_k": -(-slots_k // block_k),
        }


def _power_of_2(x: int) -> int:
    """The least that is not below x."""
    return 1 << (x - 1).bit_length()


def candidates(kernel: str, cut: Cut) -> list[Tiles]:
    """Tiles worth trying, the heuristic's choice first.

    Args:
      kernel: "forward", "dq" or "dkv".
      cut: of the call; its tiles are ignored.
    """
    sizes = [(128, 64), (64, 64), (128, 128), (64, 128), (64, 32), (128, 32)]
    if cut.dtype == jnp.float32:
        sizes = [(32, 32), (64, 32), (32, 64), (64, 64)]
    if kernel == "dkv":
        sizes = [(k, q) for q, k in sizes]
    whole = max(16, _power_of_2(cut.call.grid.keys))
    pitch = _power_of_2(cut.call.grid.group[1]) if cut.rel else 16
    sizes = [(min(q, whole), max(min(k, whole), pitch)) for q, k in sizes]
    return [
        Tiles(q, k, warps, stages)
        for q, k in dict.fromkeys(sizes)
        for warps in (4, 8)
        for stages in (2, 3)
        if q * k // warps <= 4096
    ]


def _cut(kernel: str, call: Call, qkv: Arrays, rel: Arrays) -> Cut:
    heads, head_dim = qkv[0].shape[-2:]
    cut = Cut(call, heads, head_dim, qkv[0].dtype, len(qkv) == 1, bool(rel), Tiles(0, 0, 0, 0))
    return dataclasses.replace(cut, tiles=tiles.choose(NAME, kernel, cut, candidates))


def _launch(
    kernel: str, cut: Cut, inputs: Any, outputs: Any, *, tiles_each: str, **options: Any
) -> list[jax.Array]:
    """Runs a kernel of `jax_triton_kernels`.

    Args:
      kernel: its name.
      cut: of the call.
      inputs: arrays.
      outputs: shapes and dtypes.
      tiles_each: the constant that says how many programs a group has.
      **options: of `triton_call`.
    """
    from jax_triton import triton_call  # pyright: ignore[reportAttributeAccessIssue]

    from pallas_kernels.dilated_attention import jax_triton_kernels as kernels

    constants, call = cut.constants(), cut.call
    groups_ = inputs[0].shape[0] * math.prod(call.grid.segments) * call.grid.residues
    major, minor = call.device.capability or (8, 0)
    return triton_call(
        *inputs,
        kernel=getattr(kernels, kernel),
        out_shape=outputs,
        grid=(groups_ * cut.heads * constants[tiles_each],),
        num_warps=cut.tiles.num_warps,
        num_stages=cut.tiles.num_stages,
        compute_capability=10 * major + minor,
        cut=kernels.Constants(**constants),
        **options,
    )


def _inputs(qkv: Arrays, rel: Arrays) -> tuple[jax.Array, ...]:
    """q, k, v, rel_h, rel_w as the kernels take them; what is not there is never read."""
    return (*(qkv if len(qkv) == 3 else qkv * 3), *(rel or (qkv[0], qkv[0])))


def _like(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def forward(call: Call, qkv: Arrays, rel: Arrays) -> tuple[jax.Array, jax.Array]:
    """The output and the grouped log-sum-exp; see `transforms.run_of`."""
    cut = _cut("forward", call, qkv, rel)
    b, h, w = qkv[0].shape[:3]
    segments, residues = math.prod(call.grid.segments), 1 if call.own else call.grid.residues
    out = jax.ShapeDtypeStruct((b, h, w, cut.heads, cut.head_dim), cut.dtype)
    lse = jax.ShapeDtypeStruct((b, segments, residues, cut.heads, call.grid.keys), jnp.float32)
    out, lse = _launch("forward", cut, _inputs(qkv, rel), (out, lse), tiles_each="tiles_q")
    return out, lse


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
    packed = len(qkv) == 1
    dq, delta, *drel = _launch(
        "backward_q",
        _cut("dq", call, qkv, rel),
        (*_inputs(qkv, rel), out, lse, dout, dlse),
        (_like(qkv[0]), _like(lse), *map(_like, rel)),
        tiles_each="tiles_q",
        **({} if rel else {"drel_h_ptr": None, "drel_w_ptr": None}),
    )
    # The gradient of a packed array goes on being written where it lies.
    inputs = (*_inputs(qkv, rel), lse, dout, delta, dq)
    dkv = _launch(
        "backward_kv",
        _cut("dkv", call, qkv, rel),
        inputs,
        tuple(map(_like, qkv[-2:])),
        tiles_each="tiles_k",
        **({"dv_ptr": None, "input_output_aliases": {len(inputs) - 1: 0}} if packed else {}),
    )
    return tuple(dkv) if packed else (dq, *dkv), tuple(drel)


run = transforms.run_of(forward, backward)

"""What a call to dilated attention must satisfy; each error names value, expectation, way out."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels.dilated_attention.groups import Grid

DTYPES = ("float16", "bfloat16", "float32", "float64")


def pattern(segment: object, dilation: object) -> tuple[bool, tuple[int, int], tuple[int, int]]:
    """Reads a pattern as (is it 2-D, segment pair, dilation pair); the 1-D form gets one row."""
    cut, step = _whole_numbers("segment", segment), _whole_numbers("dilation", dilation)
    if len(step) > len(cut):
        raise ValueError(
            f"dilation={dilation!r} is a pair, so segment={segment!r} must be one too; pass "
            "segment=(rows, columns), or one number as the dilation."
        )
    planar = len(cut) == 2
    segment_hw = (cut[0], cut[1]) if planar else (1, cut[0])
    dilation_hw = (step[0], step[-1]) if planar else (1, step[0])
    if any(s % r for s, r in zip(segment_hw, dilation_hw, strict=True)):
        raise ValueError(
            f"dilation={dilation!r} must divide segment={segment!r} on each axis; pass a segment "
            "that is a multiple of the dilation."
        )
    return planar, segment_hw, dilation_hw


def patterns(pairs: Any) -> None:
    """Checks a mixture's (segment, dilation) pairs: there are some, all 1-D or all 2-D."""
    well_formed = isinstance(pairs, Sequence) and all(
        isinstance(i, tuple | list) and len(i) == 2 for i in pairs
    )
    if not well_formed or not pairs:
        raise ValueError(
            f"patterns={pairs!r} must be one or more (segment, dilation) pairs; for a single "
            "pattern pass [(segment, dilation)]."
        )
    if len({pattern(*i)[0] for i in pairs}) == 2:
        raise ValueError(
            f"patterns={pairs!r} must be all 1-D or all 2-D; write every segment as one number, "
            "or every segment as a pair (rows, columns)."
        )


def _whole_numbers(name: str, got: Any) -> list[int]:
    pair: list[Any] = list(got) if isinstance(got, tuple | list) and len(got) == 2 else [got]
    if any(not isinstance(i, int | np.integer) or isinstance(i, bool) or i < 1 for i in pair):
        raise ValueError(
            f"{name}={got!r} must be a whole number >= 1, or for the 2-D form a pair "
            "(rows, columns) of them."
        )
    return [int(i) for i in pair]


def qkv(q: jax.Array, k: jax.Array, v: jax.Array, *, planar: bool) -> None:
    """Checks rank, shape and dtype."""
    axes = "(..., H, W, heads, d)" if planar else "(..., L, heads, d)"
    form = "a pair" if planar else "one number"
    if q.ndim < (4 if planar else 3):
        raise ValueError(
            f"q.shape={q.shape} must be {axes} where segment is {form}; add the missing axes, or "
            f"pass {'one number' if planar else 'a pair'} as the segment for the other form."
        )
    if not q.shape == k.shape == v.shape:
        raise ValueError(
            f"q.shape={q.shape}, k.shape={k.shape} and v.shape={v.shape} must be equal, "
            f"{axes}; repeat the heads of k and v where they are fewer than q's."
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in DTYPES:
        raise ValueError(
            f"q.dtype={q.dtype}, k.dtype={k.dtype} and v.dtype={v.dtype} must be one of "
            f"{', '.join(DTYPES)}, the same for all; cast them to one."
        )
    _not_empty("q", q)


def packed(qkv: jax.Array, *, planar: bool) -> tuple[int, ...]:
    """Checks a packed array and returns the shape of the q it holds."""
    axes = "(..., H, W, 3, heads, d)" if planar else "(..., L, 3, heads, d)"
    if qkv.ndim < (5 if planar else 4) or qkv.shape[-3] != 3:
        raise ValueError(
            f"qkv.shape={qkv.shape} must be {axes} where segment is "
            f"{'a pair' if planar else 'one number'}; reshape the projection's output to that, or "
            "pass q, k and v to dilated_attention."
        )
    if qkv.dtype.name not in DTYPES:
        raise ValueError(
            f"qkv.dtype={qkv.dtype} must be one of {', '.join(DTYPES)}; cast it to one."
        )
    _not_empty("qkv", qkv)
    return (*qkv.shape[:-3], *qkv.shape[-2:])


def _not_empty(name: str, x: jax.Array) -> None:
    if 0 in x.shape:
        raise ValueError(
            f"{name}.shape={x.shape} has an empty axis where at least 1 is needed; leave the call "
            "out."
        )


def padding(grid: Grid, *, planar: bool) -> None:
    """Refuses axes that whole segments do not fill."""
    names = ("H", "W") if planar else ("", "L")
    for name, size, s, padded in zip(names, grid.size, grid.segment, grid.padded, strict=True):
        if size != padded:
            raise ValueError(
                f"axis {name} holds {size} tokens, which segments of {s} do not divide; pass "
                "pad=True, or a segment that divides the axis."
            )


def relative(
    rel_h: jax.Array | None,
    rel_w: jax.Array | None,
    shape: tuple[int, ...],
    dtype: np.dtype,
    grid: Grid,
    *,
    planar: bool,
) -> tuple[jax.Array, ...]:
    """Checks both relative-position terms against q's shape and dtype; returns those given."""
    if rel_h is None and rel_w is None:
        return ()
    if rel_h is None or rel_w is None:
        given, missing = ("rel_w", "rel_h") if rel_h is None else ("rel_h", "rel_w")
        raise ValueError(
            f"{given} came with {missing}=None but both are needed; pass zeros for the other."
        )
    if not planar:
        raise ValueError(
            f"rel_h.shape={rel_h.shape} needs the 2-D form, but segment is one number; pass "
            "segment=(rows, columns), or leave rel_h and rel_w out."
        )
    for name, x, m in zip(("rel_h", "rel_w"), (rel_h, rel_w), grid.group, strict=True):
        want = (*shape[:-1], m)
        if x.shape != want:
            raise ValueError(
                f"{name}.shape={x.shape} must be {want}, (..., H, W, heads, keys of a group); "
                f"compute it for groups of {grid.group[0]} x {grid.group[1]} tokens."
            )
        if x.dtype not in (dtype, np.float32):
            raise ValueError(
                f"{name}.dtype={x.dtype} must be float32 or q's {dtype}; cast it to one of them."
            )
    return rel_h, rel_w


def choices(offsets: object, scale: object) -> None:
    """Checks the static arguments that have a range."""
    if offsets not in ("all", "per_head"):
        raise ValueError(f"offsets={offsets!r} is unknown; pass 'all' or 'per_head'.")
    known = isinstance(scale, numbers.Real) and 0 < float(scale) < math.inf  # NaN is neither
    if scale is not None and not known:
        raise ValueError(
            f"scale={scale!r} must be a positive, finite Python number; pass None for d**-0.5, or "
            "multiply q by a factor that is an array."
        )

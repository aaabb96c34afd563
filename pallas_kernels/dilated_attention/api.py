"""The one door to dilated attention: checks the call, brings it to one form, asks the chain."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels import chain
from pallas_kernels.dilated_attention import checks, groups

Offsets = Literal["all", "per_head"]


def dilated_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    offsets: Offsets = "all",
    scale: float | None = None,
    rel_h: jax.Array | None = None,
    rel_w: jax.Array | None = None,
    pad: bool = True,
    implementation: str | None = None,
    return_residuals: bool = False,
) -> Any:  # one array or two; a union would make every caller narrow it
    """Attends among the tokens that share a segment and a residue modulo the dilation.

    A token at position `p` of an axis lies in segment `p // segment` and has residue
    `p % segment % dilation`; tokens equal in both (on both axes) form a group, and attention stays
    within it. `dilation=1` is windowed attention; a segment as long as its axis is dense.

    Args:
      q: (..., L, heads, d), or (..., H, W, heads, d) where `segment` is a pair; float16, bfloat16,
        float32 or float64.
      k: as q.
      v: as q.
      segment: tokens, or (rows, columns) for the 2-D form; one longer than its axis is clamped to
        the axis rounded up to a multiple of the dilation.
      dilation: divides the segment; in the 2-D form also a pair (rows, columns).
      offsets: "all": every head attends within every group. "per_head": head `h` attends only
        residue `h % dilation` (2-D, dilation (rh, rw): `divmod(h % (rh * rw), rw)`); elsewhere
        its output is 0 and its log-sum-exp -inf.
      scale: factor of the products; None means d**-0.5.
      rel_h: (..., H, W, heads, rows of a group), added to the scaled products by query and key
        row; q's dtype or float32. 2-D form only, and together with `rel_w`.
      rel_w: (..., H, W, heads, columns of a group), likewise by query and key column.
      pad: pads axes that whole segments do not fill; padding is never attended and is cropped from
        the output. False makes such an axis an error.
      implementation: the back end that must run; None means the first that takes the call.
      return_residuals: also returns the log-sum-exp.

    Returns:
      The output, in q's shape and dtype; with `return_residuals`, also the natural log-sum-exp
      (..., L or H, W, heads), float32 (float64 where q is). Both are differentiable, once and in
      reverse; forward mode and second derivatives take `implementation="reference"`.

    Raises:
      ValueError: an argument does not fit the others.
      Unsupported: the named implementation does not take this call.
    """
    return _attend(
        tuple(jnp.asarray(x) for x in (q, k, v)),
        rel_h,
        rel_w,
        segment=segment,
        dilation=dilation,
        offsets=offsets,
        scale=scale,
        pad=pad,
        implementation=implementation,
        return_residuals=return_residuals,
    )


def dilated_attention_qkvpacked(
    qkv: jax.Array,
    *,
    segment: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    offsets: Offsets = "all",
    scale: float | None = None,
    rel_h: jax.Array | None = None,
    rel_w: jax.Array | None = None,
    pad: bool = True,
    implementation: str | None = None,
    return_residuals: bool = False,
) -> Any:
    """`dilated_attention` of one array that holds q, k and v, as one projection makes them.

    Args:
      qkv: (..., L, 3, heads, d), or (..., H, W, 3, heads, d) where `segment` is a pair;
        all else as in `dilated_attention`.

    Returns:
      As `dilated_attention`.

    Raises:
      ValueError: `qkv` does not hold three, or as there.
      Unsupported: as there.
    """
    qkv = jnp.asarray(qkv)
    return _attend(
        (qkv,),
        rel_h,
        rel_w,
        segment=segment,
        dilation=dilation,
        offsets=offsets,
        scale=scale,
        pad=pad,
        implementation=implementation,
        return_residuals=return_residuals,
    )


def _attend(
    qkv: tuple[jax.Array, ...],
    rel_h: jax.Array | None,
    rel_w: jax.Array | None,
    *,
    segment: int | Sequence[int],
    dilation: int | Sequence[int],
    offsets: Offsets,
    scale: float | None,
    pad: bool,
    implementation: str | None,
    return_residuals: bool,
) -> Any:
    """Both doors behind the point where they differ: `qkv` is three arrays or the packed one."""
    rel_h, rel_w = (None if x is None else jnp.asarray(x) for x in (rel_h, rel_w))
    planar, segment_hw, dilation_hw = checks.pattern(segment, dilation)
    if len(qkv) == 3:
        checks.qkv(*qkv, planar=planar)
        shape = qkv[0].shape
    else:
        shape = checks.packed(qkv[0], planar=planar)
    (h, w), (n, d) = (shape[-4:-2] if planar else (1, shape[-3])), shape[-2:]
    grid = groups.fit((h, w), segment_hw, dilation_hw)
    if not pad:
        checks.padding(grid, planar=planar)
    rel = checks.relative(rel_h, rel_w, shape, qkv[0].dtype, grid, planar=planar)
    checks.choices(offsets, scale)
    lead = math.prod(shape[: -4 if planar else -3])
    # Back ends know one form: (b, H, W, ...); the 1-D form is one row.
    out, lse = chain.run(
        implementation,
        tuple(x.reshape(lead, h, w, *x.shape[x.ndim - (2 if len(qkv) == 3 else 3) :]) for x in qkv),
        tuple(x.reshape(lead, h, w, n, -1) for x in rel),
        grid=grid,
        offsets=offsets,
        scale=d**-0.5 if scale is None else float(scale),
    )
    out = out.reshape(shape)
    return (out, lse.reshape(shape[:-1])) if return_residuals else out

"""The one door to dilated attention: checks the call, brings it to one form, asks the chain."""

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
      (..., L or H, W, heads), float32 (float64 where q is), differentiable.

    Raises:
      ValueError: an argument does not fit the others.
      Unsupported: the named implementation does not take this call.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    rel_h, rel_w = (None if x is None else jnp.asarray(x) for x in (rel_h, rel_w))
    planar, segment_hw, dilation_hw = checks.pattern(segment, dilation)
    checks.qkv(q, k, v, planar=planar)
    (h, w), (n, d) = (q.shape[-4:-2] if planar else (1, q.shape[-3])), q.shape[-2:]
    grid = groups.fit((h, w), segment_hw, dilation_hw)
    if not pad:
        checks.padding(grid, planar=planar)
    checks.relative(rel_h, rel_w, q, grid, planar=planar)
    checks.choices(offsets, scale)

    def enter(x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        x = x.reshape(-1, h, w, n, x.shape[-1])
        below, right = grid.padded[0] - h, grid.padded[1] - w
        pads = ((0, 0), (0, below), (0, right), (0, 0), (0, 0))
        return jnp.pad(x, pads) if below or right else x

    # Back ends know one form: (b, H, W, n, ...), padded; the 1-D form is one row.
    out, lse = chain.run(
        implementation,
        *(enter(x) for x in (q, k, v, rel_h, rel_w)),
        grid=grid,
        offsets=offsets,
        scale=d**-0.5 if scale is None else float(scale),
    )
    out = out[:, :h, :w].reshape(q.shape)
    return (out, lse[:, :h, :w].reshape(q.shape[:-1])) if return_residuals else out


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
    if qkv.ndim < 3 or qkv.shape[-3] != 3:
        raise ValueError(
            f"qkv.shape={qkv.shape} must be (..., 3, heads, d); reshape the projection's output "
            "to that, or pass q, k and v to dilated_attention."
        )
    return dilated_attention(
        *(qkv[..., i, :, :] for i in range(3)),
        segment=segment,
        dilation=dilation,
        offsets=offsets,
        scale=scale,
        rel_h=rel_h,
        rel_w=rel_w,
        pad=pad,
        implementation=implementation,
        return_residuals=return_residuals,
    )

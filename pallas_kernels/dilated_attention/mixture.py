"""Several patterns of dilated attention as one: LongNet's mixture (arXiv 2307.02486)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dilated_attention import checks
from pallas_kernels.dilated_attention.api import Offsets, dilated_attention


def dilated_attention_mixture(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    patterns: Sequence[tuple[int | Sequence[int], int | Sequence[int]]],
    offsets: Offsets = "all",
    scale: float | None = None,
    pad: bool = True,
    implementation: str | None = None,
    return_residuals: bool = False,
) -> Any:  # one array or two; a union would make every caller narrow it
    """Averages the patterns' outputs, weighted by their softmax denominators.

    It equals one softmax over the keys of all patterns, where a key counts once for each pattern
    that has it. Gradients flow through the weights too.

    Args:
      q: as in `dilated_attention`.
      k: as q.
      v: as q.
      patterns: (segment, dilation) pairs, as there; all 1-D or all 2-D.
      offsets: as there, for all patterns; with "per_head" a token that no pattern covers for a
        head gets output 0, log-sum-exp -inf and gradient 0 there.
      scale: as there.
      pad: as there.
      implementation: as there, for all patterns.
      return_residuals: also returns the log-sum-exp of the mixture.

    Returns:
      As `dilated_attention`.

    Raises:
      ValueError: `patterns` is empty, holds what is no pair, or mixes the two forms; or as there.
      Unsupported: as there.
    """
    checks.patterns(patterns)
    parts = [
        dilated_attention(
            q,
            k,
            v,
            segment=segment,
            dilation=dilation,
            offsets=offsets,
            scale=scale,
            pad=pad,
            implementation=implementation,
            return_residuals=True,
        )
        for segment, dilation in patterns
    ]
    out, lse = _mix([out for out, _ in parts], jnp.stack([lse for _, lse in parts]))
    return (out, lse) if return_residuals else out


def _mix(outs: list[jax.Array], lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp (...) of `outs` (..., d), with `lses` (patterns, ...)."""
    top = jax.lax.stop_gradient(lses.max(0, keepdims=True))
    top = jnp.where(top == -jnp.inf, 0.0, top)  # -inf less -inf would be NaN
    weights = jnp.exp(lses - top)
    total = weights.sum(0, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)  # before division and log: their gradients stay finite
    shares = (weights / total)[..., None]
    mixed = jnp.zeros(outs[0].shape, lses.dtype)
    for share, out in zip(shares, outs, strict=True):
        mixed += share * out.astype(lses.dtype)
    return mixed.astype(outs[0].dtype), jnp.where(empty, -jnp.inf, top + jnp.log(total))[0]

"""The truth that every other back end is held against: plain jnp, float32, never optimised."""

import jax
import jax.numpy as jnp

from pallas_kernels.dilated_attention import groups

NAME = "reference"


def unsupported(*_args: object, **_kwargs: object) -> None:
    """Refuses nothing."""


def run(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rel_h: jax.Array | None,
    rel_w: jax.Array | None,
    *,
    grid: groups.Grid,
    offsets: str,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attends within each group.

    Args:
      q: (b, H, W, n, d), with H, W = `grid.padded`.
      k: as q.
      v: as q.
      rel_h: (b, H, W, n, mh), added to the scaled products by query and key row; or None.
      rel_w: (b, H, W, n, mw), likewise by key column; None where `rel_h` is.
      grid: how the tokens are cut, and which of them are real.
      offsets: "all" or "per_head".
      scale: factor of the products.

    Returns:
      Output, as q; log-sum-exp (b, H, W, n), float32, or float64 where q is.
    """
    dtype = q.dtype if q.dtype == jnp.float64 else jnp.float32
    own = offsets == "per_head"

    def cut(x: groups.Array) -> groups.Array:
        x = groups.group(x, grid)
        return groups.take_own(x) if own else x

    def join(x: jax.Array, elsewhere: float) -> jax.Array:
        return groups.ungroup(groups.put_own(x, grid, elsewhere) if own else x, grid)

    scores = _product(cut(q.astype(dtype) * scale), cut(k.astype(dtype)).mT)
    if rel_h is not None and rel_w is not None:
        rows, columns = cut(rel_h.astype(dtype)), cut(rel_w.astype(dtype))
        scores += (rows[..., :, None] + columns[..., None, :]).reshape(scores.shape)
    real = groups.real_tokens(grid, q.shape[3])
    if real is not None:
        scores = jnp.where(cut(real).swapaxes(-1, -2), scores, -jnp.inf)
    out, lse = _attend(scores, cut(v.astype(dtype)))
    return join(out, 0.0).astype(q.dtype), join(lse, -jnp.inf)[..., 0]


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    # One batch axis, since XLA's CPU back end is a third slower on several; HIGHEST, since a
    # GPU's default is TF32.
    flat = jnp.matmul(*(a.reshape(-1, *a.shape[-2:]) for a in (x, y)), precision="highest")
    return flat.reshape(*x.shape[:-1], -1)


def _attend(scores: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Softmax of (..., q, k) scores over (..., k, d) values; a row of -inf gives 0 and -inf."""
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    top = jnp.where(top == -jnp.inf, 0.0, top)  # -inf less -inf would be NaN
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    return _product(weights, v) / total, lse

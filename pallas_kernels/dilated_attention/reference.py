"""The truth that every other back end is held against: plain jnp, float32, never optimised."""

import jax
import jax.numpy as jnp

from pallas_kernels.dilated_attention import groups

NAME = "reference"


def unsupported(*_args: object, **_kwargs: object) -> None:
    """Refuses nothing."""


def run(
    qkv: tuple[jax.Array, ...],
    rel: tuple[jax.Array, ...],
    *,
    grid: groups.Grid,
    offsets: str,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attends within each group; every back end's `run` and `unsupported` take these arguments.

    Args:
      qkv: q, k and v, each (b, H, W, n, d) with H, W = `grid.size`; or the one packed array
        (b, H, W, 3, n, d).
      rel: (), or rel_h (b, H, W, n, mh) and rel_w (b, H, W, n, mw), added to the scaled products
        by query and key row, by query and key column.
      grid: how the tokens are cut.
      offsets: "all" or "per_head".
      scale: factor of the products.

    Returns:
      Output (b, H, W, n, d), q's dtype; natural log-sum-exp (b, H, W, n), float32, or float64
      where q is.
    """
    q, k, v = groups.unpack(qkv)
    dtype = q.dtype if q.dtype == jnp.float64 else jnp.float32
    own = offsets == "per_head"

    def cut(x: groups.Array) -> groups.Array:
        x = groups.group(x, grid)
        return groups.take_own(x) if own else x

    def join(x: jax.Array, elsewhere: float) -> jax.Array:
        return groups.ungroup(groups.put_own(x, grid, elsewhere) if own else x, grid)

    scores = _product(cut(q.astype(dtype) * scale), cut(k.astype(dtype)).mT)
    if rel:
        rows, columns = (cut(x.astype(dtype)) for x in rel)
        scores += (rows[..., :, None] + columns[..., None, :]).reshape(scores.shape)
    real = groups.real_tokens(grid, q.shape[3])
    if real is not None:
        real = groups.take_own(real) if own else real
        scores = jnp.where(real.swapaxes(-1, -2), scores, -jnp.inf)
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

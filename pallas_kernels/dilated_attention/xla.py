"""Plain jnp in bounded memory, for every call on every device; the default on CPU and TPU.

Groups follow one another in blocks, and queries too where a group is long: the scores of one step
are all that is held. A query sees all its keys in one step, so no sum is ever corrected; the
backward pass computes the weights again, from the log-sum-exp.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dilated_attention import groups, transforms
from pallas_kernels.dilated_attention.transforms import Arrays, Call

NAME = "xla"
# The scores of one step: 64 MiB of float32. On a CPU as much of a group as its cache holds, 2 MiB,
# but of whole groups together 32 MiB, which are those of a student's block for one image.
PART_ON_CPU, STEP_ON_CPU, STEP = 2**19, 2**23, 2**24


def unsupported(*_args: object, **_kwargs: object) -> None:
    """Refuses nothing."""


def _forward(call: Call, qkv: Arrays, rel: Arrays) -> tuple[jax.Array, jax.Array]:
    q, k, v = groups.unpack(qkv)
    queries = [_cut(x, call) for x in (q, *rel)]
    function = functools.partial(_attend, call.scale)
    (out, lse), _ = _in_steps(call, function, queries, _keys(k, v, call))
    return _join(out, q, call), _grouped(lse[..., 0], q, call)


def _backward(
    call: Call,
    qkv: Arrays,
    rel: Arrays,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
) -> tuple[Arrays, Arrays]:
    q, k, v = groups.unpack(qkv)
    shift = jnp.where(lse == -jnp.inf, 0.0, lse)  # -inf less -inf would be NaN
    rows = [x.reshape(-1, x.shape[-1], 1) for x in (shift, dlse)]
    queries = [_cut(x, call) for x in (out, dout)] + rows + [_cut(x, call) for x in (q, *rel)]
    function = functools.partial(_pull_back, call.scale)
    (dq, *drel), (dk, dv) = _in_steps(call, function, queries, _keys(k, v, call))
    dqkv = [_join(dx, x, call) for dx, x in zip((dq, dk, dv), (q, k, v), strict=True)]
    return (
        (jnp.stack(dqkv, axis=3),) if len(qkv) == 1 else tuple(dqkv),
        tuple(_join(dx, x, call) for dx, x in zip(drel, rel, strict=True)),
    )


run = transforms.run_of(_forward, _backward)


def _cut(x: groups.Array, call: Call) -> groups.Array:
    """(b, H, W, n, c) -> (groups of all heads, tokens, c): XLA's CPU is slower on more axes."""
    x = groups.group(x, call.grid)
    return (groups.take_own(x) if call.own else x).reshape(-1, x.shape[-2], x.shape[-1])


def _grouped(x: jax.Array, like: jax.Array, call: Call) -> jax.Array:
    residues = 1 if call.own else call.grid.residues
    return x.reshape(like.shape[0], -1, residues, like.shape[-2], *x.shape[1:])


def _join(x: jax.Array, like: jax.Array, call: Call) -> jax.Array:
    """Undoes `_cut`, in the shape and dtype of `like`."""
    x = _grouped(x.astype(like.dtype), like, call)
    return groups.ungroup(groups.put_own(x, call.grid, 0.0) if call.own else x, call.grid)


def _keys(k: jax.Array, v: jax.Array, call: Call) -> Arrays:
    """Keys, values and, where there is padding, which of them are real."""
    real = groups.real_tokens(call.grid, k.shape[-2])
    if real is None:
        return _cut(k, call), _cut(v, call)
    real = groups.take_own(real) if call.own else real
    every = jnp.broadcast_to(real, (k.shape[0], *real.shape[1:]))
    return _cut(k, call), _cut(v, call), every.reshape(-1, real.shape[-2])


def _in_steps(
    call: Call, function: Callable[..., Any], queries: list[jax.Array], keys: Arrays
) -> Any:
    """Applies `function` to every group, to as many at once as a step may hold.

    `function` takes the queries and the keys of one group; it returns what belongs to each query,
    and what is to be summed over the queries.
    """
    on_cpu = call.device.platform == "cpu"
    part, most = (PART_ON_CPU, STEP_ON_CPU) if on_cpu else (STEP, STEP)
    tokens = keys[0].shape[1]
    parts = -(-(tokens**2) // part)

    def group(operands: Any) -> Any:
        return function(*operands) if parts == 1 else _in_parts(parts, function, *operands)

    return jax.lax.map(group, (queries, keys), batch_size=max(1, most // tokens**2))


def _in_parts(
    parts: int, function: Callable[..., Any], queries: list[jax.Array], keys: Arrays
) -> Any:
    """Applies `function` to one part of a group's queries after the other."""
    tokens = len(keys[0])
    length = -(-tokens // parts)
    # Padding adds nothing to the sums: its cotangents are zero.
    pads = ((0, parts * length - tokens), (0, 0))
    queries = [jnp.pad(x, pads).reshape(parts, length, -1) for x in queries]

    def step(sums: Any, part: Any) -> Any:
        results, more = function(part, keys)
        return jax.tree.map(jnp.add, sums, more), results

    _, more = jax.eval_shape(function, [x[0] for x in queries], keys)
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), more)
    sums, results = jax.lax.scan(step, sums, queries)
    return jax.tree.map(lambda x: x.reshape(parts * length, -1)[:tokens], results), sums


def _attend(scale: float, queries: list[jax.Array], keys: Arrays) -> Any:
    """Output (queries, d) and log-sum-exp (queries, 1) of one group."""
    q, *rel = queries
    scores = _scores(scale, q, rel, keys)
    top = scores.max(-1, keepdims=True)
    # A query may see no key at all; where none can, XLA fuses all of it on a CPU: half the time.
    guarded = bool(rel) or len(keys) == 3
    top = jnp.where(top == -jnp.inf, 0.0, top) if guarded else top
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1.0, total) if guarded else total
    out = _product("qk,kd->qd", weights.astype(q.dtype), keys[1]) / total
    lse = top + jnp.log(total)
    return (out, jnp.where(empty, -jnp.inf, lse) if guarded else lse), ()


def _pull_back(scale: float, queries: list[jax.Array], keys: Arrays) -> Any:
    """Gradients of the queries and of their relative positions; of the keys and the values."""
    out, dout, lse, dlse, q, *rel = queries
    k, v = keys[:2]
    weights = jnp.exp(_scores(scale, q, rel, keys) - lse)
    delta = (out.astype(lse.dtype) * dout.astype(lse.dtype)).sum(-1, keepdims=True) - dlse
    dscores = weights * (_product("qd,kd->qk", dout, v) - delta)
    dv = _product("qk,qd->kd", weights.astype(q.dtype), dout)
    drel = []
    if rel:
        plane = dscores.reshape(len(q), rel[0].shape[-1], rel[1].shape[-1])
        drel = [plane.sum(2), plane.sum(1)]
    dscores = dscores.astype(q.dtype)
    dq = _product("qk,kd->qd", dscores, k) * scale
    dk = _product("qk,qd->kd", dscores, q) * scale
    return (dq, *drel), (dk, dv)


def _scores(scale: float, q: jax.Array, rel: list[jax.Array], keys: Arrays) -> jax.Array:
    scores = _product("qd,kd->qk", q, keys[0]) * scale
    if rel:
        rows, columns = (x.astype(scores.dtype) for x in rel)
        scores += (rows[:, :, None] + columns[:, None, :]).reshape(scores.shape)
    return jnp.where(keys[2][None], scores, -jnp.inf) if len(keys) == 3 else scores


def _product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Sums in float32 or float64; HIGHEST, since a GPU's default for float32 is TF32."""
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    return jnp.einsum(subscripts, x, y, precision="highest", preferred_element_type=dtype)

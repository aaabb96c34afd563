"""How exact a back end must be: held to plain attention's errors against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dilated_attention import groups, reference

# Half of the time on a CPU would go into making each program fast.
QUICK = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


@functools.partial(
    jax.jit,
    static_argnames=("run", "grid", "offsets", "scale", "device"),
    compiler_options=QUICK,
)
def results(run, qkv, rel, cotangents, device=None, **static):
    """Output, log-sum-exp, and the gradient of every input; compiled anew for each `device`."""
    (out, lse), pull_back = jax.vjp(functools.partial(run, **static), qkv, rel)
    dqkv, drel = pull_back((cotangents[0].astype(out.dtype), cotangents[1].astype(lse.dtype)))
    return out, lse, *dqkv, *drel


def plain(qkv, rel, *, grid, offsets, scale):
    """Attention in q's own dtype throughout: its errors are the yardstick."""
    own = offsets == "per_head"

    def cut(x):
        x = groups.group(x, grid)
        return groups.take_own(x) if own else x

    def join(x, elsewhere):
        return groups.ungroup(groups.put_own(x, grid, elsewhere) if own else x, grid)

    product = functools.partial(jnp.einsum, precision="highest")
    q, k, v = map(cut, groups.unpack(qkv))
    scores = product("...qd,...kd->...qk", q, k) * scale
    if rel:
        rows, columns = (cut(x.astype(q.dtype)) for x in rel)
        scores += (rows[..., :, None] + columns[..., None, :]).reshape(scores.shape)
    real = groups.real_tokens(grid, qkv[0].shape[-2])
    if real is not None:
        real = groups.take_own(real) if own else real
        scores = jnp.where(real.swapaxes(-1, -2), scores, jnp.finfo(q.dtype).min)
    out = product("...qk,...kd->...qd", jax.nn.softmax(scores), v)
    lse = jax.nn.logsumexp(scores.astype(sums(q.dtype)), -1, keepdims=True)
    return join(out, 0.0), join(lse, -jnp.inf)[..., 0]


def sums(dtype):
    """What products of `dtype` are summed in."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


@functools.cache
def known(case):
    """Results of plain attention, and the true ones in float64."""
    with jax.enable_x64(case.dtype == "float64"):
        arrays = (*case.draw(), case.draw_cotangents())
        yardstick = results(plain, *arrays, **case.static)
    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda x: x.astype(jnp.float64), arrays)
        truth = results(reference.run, *arrays, **case.static)
    return yardstick, tuple(map(np.asarray, truth))


def assert_as_exact(got, case):
    """Errs at most twice as much as plain attention, and by rounding where that errs by nothing."""
    yardstick, truth = known(case)
    names = ("out", "lse", *(f"gradient {i}" for i in range(len(truth) - 2)))
    for name, x, y, want in zip(names, got, yardstick, truth, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), name
        rounding = float(jnp.finfo(x.dtype).eps) * np.abs(want).max(
            where=np.isfinite(want), initial=0
        )
        rounding += float(jnp.finfo(sums(x.dtype)).eps) * case.head_dim  # of inner products
        x, y = double(x), double(y)
        nowhere = np.isneginf(want)  # log-sum-exp where a head does not attend
        np.testing.assert_array_equal(np.isneginf(x), nowhere, err_msg=name)
        x, y, want = (np.where(nowhere, 0.0, a) for a in (x, y, want))
        error, due = np.abs(x - want).max(), 2 * np.abs(y - want).max() + rounding
        assert error <= due, f"{name}: off by {error:.2g}, {due:.2g} is due"


def double(x):
    return np.asarray(x).astype(np.float64)

"""cuDNN's attention between two transposes, through `jax.nn`: the yardstick of the kernels."""

import jax
import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.dilated_attention import groups, xla
from pallas_kernels.dilated_attention.transforms import Arrays

NAME = "cudnn"
DTYPES = (jnp.float16, jnp.bfloat16)


def unsupported(
    qkv: Arrays, rel: Arrays, *, grid: groups.Grid, offsets: str, scale: float
) -> str | None:
    """One sentence that says why `run` would not do, or None."""
    here, dtype, d = device.current(), qkv[0].dtype, qkv[0].shape[-1]
    if here.platform != "gpu" or here.capability is None:
        return f"needs an NVIDIA GPU, but the device is {here.kind!r} ({here.platform})."
    if here.interpret:
        return "is a library of the GPU's, which no interpreter runs."
    if here.capability < (8, 0):
        return f"needs compute capability 8.0, but {here.kind!r} has {here.capability}."
    if dtype not in DTYPES:
        return f"takes float16 and bfloat16, but {dtype=}."
    if d % 8 or d > 128:
        return f"takes a head_dim of 8 to 128 in steps of 8, but head_dim={d}."
    if rel:
        return "would need the relative positions of all queries and keys written out."
    if offsets != "all":
        return f"attends with all heads within every group, but {offsets=}."
    if grid.size != grid.padded:
        return f"takes whole segments, but segments of {grid.segment} do not divide {grid.size}."
    return None


def run(
    qkv: Arrays, rel: Arrays, *, grid: groups.Grid, offsets: str, scale: float
) -> tuple[jax.Array, jax.Array]:
    """See `reference.run`.

    The log-sum-exp is `xla`'s, with its gradient, since `jax.nn` rounds cuDNN's to q's dtype and
    gives it none; under `jit` nothing is computed for one that is not used.
    """
    q, k, v = groups.unpack(qkv)
    out = jax.nn.dot_product_attention(
        *(_cut(x, grid) for x in (q, k, v)), scale=scale, implementation="cudnn"
    )
    _, lse = xla.run(qkv, rel, grid=grid, offsets=offsets, scale=scale)
    return _join(out, q, grid), lse


def _cut(x: jax.Array, grid: groups.Grid) -> jax.Array:
    """(b, H, W, n, d) -> (groups, tokens, n, d), the order that cuDNN reads, in one transpose."""
    b, h, w, n, d = x.shape
    (rh, rw), (mh, mw) = grid.dilation, grid.group
    x = x.reshape(b, h // (mh * rh), mh, rh, w // (mw * rw), mw, rw, n, d)
    return x.transpose(0, 1, 4, 3, 6, 2, 5, 7, 8).reshape(-1, mh * mw, n, d)


def _join(x: jax.Array, like: jax.Array, grid: groups.Grid) -> jax.Array:
    """Undoes `_cut`, in the shape of `like`."""
    b, h, w, n, d = like.shape
    (rh, rw), (mh, mw) = grid.dilation, grid.group
    x = x.reshape(b, h // (mh * rh), w // (mw * rw), rh, rw, mh, mw, n, d)
    return x.transpose(0, 1, 5, 3, 2, 6, 4, 7, 8).reshape(like.shape)

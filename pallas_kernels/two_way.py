"""Attention between a map and the few tokens of each prompt, both ways, with their projections.

What SAM's decoder spends its time on: as products, softmax and norm one after the other, every
prompt needs several maps of its own in memory. Two Triton kernels (through Pallas; sm80 and later,
16-bit types) keep a tile of the map in registers from one end to the other; elsewhere, and where
gradients are asked for, the plain form does it.
Source of the operation: segment-anything, `modeling/transformer.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import device
from pallas_kernels.dilated_attention import triton
from pallas_kernels.dilated_attention.triton_kernels import LOG2E, LOWEST, div_rem, dot, plt
from pallas_kernels.opaque import opaque

BLOCK = 64  # tokens of the map that a program of `image_to_tokens` holds
STEP = 64  # that one of `tokens_to_image` goes on by
ROWS = 128  # heads times a prompt's tokens, at most
BUSY = 256  # programs that fill a device


class ToTokens(NamedTuple):
    """Weights of `image_to_tokens`: q (c, d), q_bias (d,), out (d, c); the others (c,).

    `scale` and `shift` are of the norm after the residual.
    """

    q: jax.Array
    q_bias: jax.Array
    out: jax.Array
    out_bias: jax.Array
    scale: jax.Array
    shift: jax.Array


class ToImage(NamedTuple):
    """Weights of `tokens_to_image`: k and v (c, d), v_bias (d,).

    A bias of keys would move all scores of a query alike, and nothing else.
    """

    k: jax.Array
    v: jax.Array
    v_bias: jax.Array


def image_to_tokens(
    image: jax.Array,
    positions: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    valid: jax.Array,
    weights: ToTokens,
    *,
    heads: int,
    epsilon: float = 1e-5,
) -> jax.Array:
    """Every token of a map attends to the tokens of a prompt; then residual and layer norm.

    Args:
      image: (b, m, c).
      positions: (m, c), added to the image for its queries.
      keys: (b, q, n, d), projected, of q prompts for each image.
      values: (b, q, n, d), the same.
      valid: (b, q, n) bool, the tokens that count.
      weights: of queries, result and norm.
      heads: that d is divided into.
      epsilon: of the norm.

    Returns:
      (b, q, m, c), the image's dtype; differentiable in reverse.
    """
    b, q, n, d = keys.shape
    keys = _by_head(keys, heads) * (d // heads) ** -0.5
    # A query meets a key as the image meets the key taken back through the query's projection: few
    # rows of c numbers for each prompt, and no map of queries. So with values and the result.
    rows = jnp.einsum("bqnhe,che->bqnhc", keys, weights.q.reshape(-1, heads, d // heads))
    extra = jnp.einsum("bqnhe,he->bqnh", keys, weights.q_bias.reshape(heads, -1))
    extra = jnp.where(valid[..., None], extra.astype(jnp.float32), LOWEST)
    out = weights.out.reshape(heads, d // heads, -1)
    answers = jnp.einsum("bqnhe,hec->bqnhc", _by_head(values, heads), out)
    given = (
        *(image, positions, rows.reshape(b, q, n * heads, -1), extra.reshape(b, q, n * heads)),
        *(answers.reshape(b, q, n * heads, -1), weights.out_bias, weights.scale, weights.shift),
    )
    plain = functools.partial(plain_to_tokens, heads=heads, epsilon=epsilon)
    if unsupported(image, n, heads) is not None:
        return plain(*given)
    run = functools.partial(_to_tokens, heads, epsilon, device.current())
    return differentiable(run, plain)(*given)


def tokens_to_image(
    image: jax.Array,
    positions: jax.Array,
    queries: jax.Array,
    weights: ToImage,
    *,
    heads: int,
) -> jax.Array:
    """The tokens of each prompt attend to a map.

    Args:
      image: (b, m, c).
      positions: (m, c), added to the image for its keys.
      queries: (b, q, n, d), projected, of q prompts for each image.
      weights: of keys and values.
      heads: that d is divided into.

    Returns:
      (b, q, n, d), the image's dtype; differentiable in reverse.
    """
    b, q, n, d = queries.shape
    k, v = (x.reshape(-1, heads, d // heads) for x in (weights.k, weights.v))
    asked = _by_head(queries, heads) * (d // heads) ** -0.5
    rows = jnp.einsum("bqnhe,che->bqnhc", asked, k).reshape(b, q, n * heads, -1)
    # All rows of all prompts with one map are two large products, which are faster.
    if b == 1 or unsupported(image, n, heads) is not None:
        seen = plain_to_image(image, positions, rows)
    else:
        run = functools.partial(_to_image, device.current())
        seen = differentiable(run, plain_to_image)(image, positions, rows)
    seen = seen.reshape(b, q, n, heads, -1)
    seen = jnp.einsum("bqnhc,che->bqnhe", seen, v).reshape(queries.shape)
    return seen + last(weights.v_bias, 4)


def _by_head(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], heads, -1)


def unsupported(image: jax.Array, tokens: int, heads: int) -> str | None:
    """One sentence that says why the kernels would not do, or None.

    Args:
      image: (b, m, c).
      tokens: of a prompt.
      heads: of each.
    """
    if (reason := triton.missing(image.dtype)) is not None:
        return reason
    if image.dtype.itemsize != 2:
        return f"takes 16-bit types, but {image.dtype=}."
    _, m, c = image.shape
    if m % BLOCK or c & (c - 1) or not 64 <= c <= 256:
        return f"takes maps in steps of {BLOCK} of 64 to 256 channels, but {image.shape=}."
    if heads & (heads - 1) or heads * _padded(tokens) > ROWS:
        return f"takes up to {ROWS} tokens times heads, padded, but {tokens=}, {heads=}."
    return None


def differentiable(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Any:
    """The kernel; under differentiation the plain form, forward as well."""
    function = jax.custom_vjp(kernel)
    function.defvjp(lambda *args: jax.vjp(plain, *args), lambda pull_back, out: pull_back(out))
    return function


def plain_to_tokens(
    image: jax.Array,
    positions: jax.Array,
    rows: jax.Array,
    extra: jax.Array,
    answers: jax.Array,
    bias: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    *,
    heads: int,
    epsilon: float,
) -> jax.Array:
    """`image_to_tokens` once its projections are absorbed.

    Args:
      image: (b, m, c).
      positions: (m, c).
      rows: (b, q, r, c), what the image is held against: each token's heads, side by side.
      extra: (b, q, r) float32, added to the scores.
      answers: (b, q, r, c), what the image learns from each.
      bias: (c,), added.
      scale: (c,), of the norm.
      shift: (c,), the same.
      heads: of a token.
      epsilon: of the norm.
    """
    (b, q, r, c), m = rows.shape, image.shape[1]
    scores = _scores(image, positions, rows.reshape(b, -1, c), "bmc,brc->bmr")
    scores = scores.reshape(b, m, q, r).swapaxes(1, 2) + extra[:, :, None]
    found = jax.nn.softmax(scores.reshape(b, q, m, -1, heads), axis=3).astype(image.dtype)
    out = jnp.einsum("bqmr,bqrc->bqmc", found.reshape(b, q, m, r), answers)
    return normed(image[:, None] + out + last(bias, 4), scale, shift, epsilon)


def plain_to_image(image: jax.Array, positions: jax.Array, rows: jax.Array) -> jax.Array:
    """(b, q, r, c) rows attend to a map (b, m, c), plus (m, c) for its keys: all of it or part."""
    b, _, _, c = rows.shape
    scores = _scores(image, positions, rows.reshape(b, -1, c), "bmc,brc->brm")
    found = jax.nn.softmax(scores, axis=2).astype(image.dtype)
    return jnp.einsum("brm,bmc->brc", found, image).reshape(rows.shape)


def _scores(image: jax.Array, positions: jax.Array, rows: jax.Array, axes: str) -> jax.Array:
    """Of the map and its positions with all rows of a batch, float32."""
    if image.shape[0] == 1:
        return jnp.einsum(axes, image + positions[None], rows).astype(jnp.float32)
    # A sum of each image and the positions would be a map for each.
    of_place = jnp.einsum(axes.replace("bmc", "mc"), positions, rows)
    return (jnp.einsum(axes, image, rows) + of_place).astype(jnp.float32)


def last(x: jax.Array, ndim: int) -> jax.Array:
    """(c,) as the last of so many axes."""
    return x.reshape(*(1,) * (ndim - 1), -1)


def normed(x: jax.Array, scale: jax.Array, shift: jax.Array, epsilon: float) -> jax.Array:
    """Layer norm over the last axis, in float32 or more."""
    dtype = x.dtype if x.dtype.itemsize >= 4 else jnp.float32
    wide = x.astype(dtype)
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * lax.rsqrt((wide * wide).mean(-1, keepdims=True) + epsilon)
    scale, shift = (last(each, x.ndim).astype(dtype) for each in (scale, shift))
    return (wide * scale + shift).astype(x.dtype)


def _padded(tokens: int) -> int:
    """Tokens of a prompt in a kernel."""
    return max(pl.next_power_of_2(tokens), 8)


def _filled(x: jax.Array, rows: int, value: float = 0.0) -> jax.Array:
    """(b, q, r, ...) with so many rows."""
    more = ((0, 0), (0, 0), (0, rows - x.shape[2]), *((0, 0),) * (x.ndim - 3))
    return jnp.pad(x, more, constant_values=value)


def _to_tokens_body(
    image: Any, rows: Any, answers: Any, extra: Any, positions: Any, numbers: Any, out: Any, *,
    heads: int, epsilon: float, interpret: bool,
) -> None:  # fmt: skip
    """One tile of the map for one prompt; refs of (m, c), (r, c) twice, (r,), (m, c), (3, c)."""
    tile = pl.ds(pl.program_id(0) % (image.shape[0] // BLOCK) * BLOCK, BLOCK)
    x = plt.load(image.at[tile])
    scores = dot(x + plt.load(positions.at[tile]), rows[...].T, interpret) + extra[...][None]
    scores = scores.reshape(BLOCK, -1, heads)
    found = jnp.exp2(scores - scores.max(1)[:, None])
    found = (found / found.sum(1)[:, None]).reshape(BLOCK, -1)
    bias, scale, shift = (plt.load(numbers.at[pl.ds(i, 1)]).astype(jnp.float32) for i in range(3))
    y = dot(found.astype(x.dtype), answers[...], interpret) + bias + x.astype(jnp.float32)
    plt.store(out.at[tile], normed(y, scale, shift, epsilon).astype(out.dtype))


def _to_tokens(
    heads: int, epsilon: float, here: device.Device, image: jax.Array, positions: jax.Array,
    rows: jax.Array, extra: jax.Array, answers: jax.Array, *norm: jax.Array,
) -> jax.Array:  # fmt: skip
    full = heads * _padded(rows.shape[2] // heads)
    run = functools.partial(_tiles_of_map, heads, epsilon, here)
    rule = "b m c, b q r c, b q r c, b q r, m c, i c -> b q m c"
    return opaque(run, 4, rule, "b q")(
        image,
        _filled(_in_twos(rows), full),
        _filled(answers, full),
        _filled(extra * LOG2E, full, LOWEST),
        positions,
        jnp.stack(norm),
    )


def _in_twos(rows: jax.Array) -> jax.Array:
    """Rows for scores whose powers are of two."""
    return (rows.astype(jnp.float32) * LOG2E).astype(rows.dtype)


def _of_image(programs: int, *shape: int) -> pl.BlockSpec:
    """An image's array in each of its programs."""
    return pl.BlockSpec((None, *shape), lambda program: (program // programs, *(0,) * len(shape)))


def _of_prompt(programs: int, prompts: int, *shape: int) -> pl.BlockSpec:
    """A prompt's array in each of its programs; an image has so many prompts."""

    def index(program: Any) -> tuple[Any, ...]:
        return *div_rem(program // programs, prompts), *(0,) * len(shape)

    return pl.BlockSpec((None, None, *shape), index)


def _params(rows: int) -> Any:
    """A warp holds 16 rows of sums."""
    return plt.CompilerParams(num_warps=max(rows // 16, 4), num_stages=1)


def _tiles_of_map(
    heads: int, epsilon: float, here: device.Device, image: jax.Array, rows: jax.Array, *more: Any
) -> jax.Array:
    (b, m, c), (_, q, r, _) = image.shape, rows.shape
    tiles = m // BLOCK

    return pl.pallas_call(
        functools.partial(_to_tokens_body, heads=heads, epsilon=epsilon, interpret=here.interpret),
        grid=(b * q * tiles,),
        in_specs=[
            _of_image(tiles * q, m, c),
            _of_prompt(tiles, q, r, c),
            _of_prompt(tiles, q, r, c),
            _of_prompt(tiles, q, r),
            *(pl.BlockSpec(x.shape) for x in more[2:]),
        ],
        out_specs=_of_prompt(tiles, q, m, c),
        out_shape=jax.ShapeDtypeStruct((b, q, m, c), image.dtype),
        compiler_params=_params(r),
        name="image_to_tokens",
        interpret=here.interpret,
    )(image, rows, *more)


def _to_image_body(
    image: Any, rows: Any, positions: Any, out: Any, weight: Any, *, tiles: int, interpret: bool
) -> None:
    """Several tiles of the map for one prompt; refs of (m, c), (r, c), (m, c), (r, c), (r,).

    The last is the logarithm of the sum of weights.
    """
    first = pl.program_id(0) % (image.shape[0] // (tiles * STEP)) * tiles
    asked = rows[...]

    def step(i: Any, state: Any) -> Any:
        top, total, sums = state
        tile = pl.ds((first + i) * STEP, STEP)
        x = plt.load(image.at[tile])
        # Not of their sum: with a tile and a sum of it in two products, Triton lets warps overwrite
        # what others have yet to read.
        scores = dot(asked, x.T, interpret)
        scores += dot(asked, plt.load(positions.at[tile]).T, interpret)
        new = jnp.maximum(top, scores.max(1))
        found, less = jnp.exp2(scores - new[:, None]), jnp.exp2(top - new)
        sums = sums * less[:, None] + dot(found.astype(x.dtype), x, interpret)
        return new, total * less + found.sum(1), sums

    r = len(asked)
    start = jnp.full(r, LOWEST), jnp.zeros(r), jnp.zeros(asked.shape)
    top, total, sums = lax.fori_loop(0, tiles, step, start)
    out[...] = sums / total[:, None]
    weight[...] = top + jnp.log2(total)


def _to_image(
    here: device.Device, image: jax.Array, positions: jax.Array, rows: jax.Array
) -> jax.Array:
    (b, q, r, _), tiles = rows.shape, image.shape[1] // STEP
    full, parts = pl.next_power_of_2(max(r, BLOCK)), 1
    while b * q * parts < BUSY and tiles % (2 * parts) == 0:
        parts *= 2
    rule = "b m c, b q r c, m c -> b q s r c, b q s r"
    run = opaque(functools.partial(_parts_of_map, parts, here), 2, rule, "b q")
    found, weight = run(image, _filled(_in_twos(rows), full), positions)
    share = jnp.exp2(weight - weight.max(2, keepdims=True))
    share /= share.sum(2, keepdims=True)
    return (found * share[..., None]).sum(2)[:, :, :r].astype(image.dtype)


def _parts_of_map(
    parts: int, here: device.Device, image: jax.Array, rows: jax.Array, positions: jax.Array
) -> Any:
    (b, m, c), (_, q, r, _) = image.shape, rows.shape

    def of_part(*shape: int) -> pl.BlockSpec:
        def index(program: Any) -> tuple[Any, ...]:
            return *div_rem(program // parts, q), program % parts, *(0,) * len(shape)

        return pl.BlockSpec((None, None, None, *shape), index)

    shapes = (b, q, parts, r, c), (b, q, parts, r)
    return pl.pallas_call(
        functools.partial(_to_image_body, tiles=m // STEP // parts, interpret=here.interpret),
        grid=(b * q * parts,),
        in_specs=[
            _of_image(parts * q, m, c),
            _of_prompt(parts, q, r, c),
            pl.BlockSpec(positions.shape),
        ],
        out_specs=tuple(of_part(*shape[3:]) for shape in shapes),
        out_shape=tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
        compiler_params=_params(r),
        name="tokens_to_image",
        interpret=here.interpret,
    )(image, rows, positions)

"""From a map's tokens to masks of four times its resolution, without the pixels in between.

Two transposed 2x2 convolutions and a product with a few numbers for each mask: a Triton kernel
(through Pallas; sm80 and later, bfloat16) keeps the 16 pixels of its tokens, 32 channels each, in
registers. Elsewhere, and where gradients are asked for, the plain form does it.
Source of the operation: segment-anything, `modeling/mask_decoder.py`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import device
from pallas_kernels.dilated_attention import triton
from pallas_kernels.dilated_attention.triton_kernels import div_rem, dot, plt
from pallas_kernels.gelu import gelu, gelu_of_pairs
from pallas_kernels.opaque import opaque
from pallas_kernels.two_way import differentiable, last, normed

BLOCK = 64  # tokens of a program
MASKS = 4  # of a token's quarter: with four quarters a product's 16 columns


class Upscaling(NamedTuple):
    """Weights: first (c, 2, 2, e), second (e, 2, 2, f), their biases, and the norm's between."""

    first: jax.Array
    first_bias: jax.Array
    scale: jax.Array
    shift: jax.Array
    second: jax.Array
    second_bias: jax.Array


def upscaled_masks(
    image: jax.Array,
    masks: jax.Array,
    weights: Upscaling,
    *,
    size: tuple[int, int],
    epsilon: float = 1e-6,
) -> jax.Array:
    """Logits of masks: every token becomes 2x2, norm, GELU, 2x2 again, GELU, and a product.

    Args:
      image: (b, m, c), m tokens row by row.
      masks: (b, k, f), what the channels of a pixel are multiplied with for each mask.
      weights: of the two convolutions.
      size: (height, width) in tokens, m together.
      epsilon: of the norm.

    Returns:
      (b, k, 4 height, 4 width), the image's dtype; differentiable in reverse.
    """
    plain = functools.partial(plain_masks, size=size, epsilon=epsilon)
    if unsupported(image, masks) is not None:
        return plain(image, masks, weights)
    run = functools.partial(_masks, size, epsilon, device.current())
    return differentiable(run, plain)(image, masks, weights)


def unsupported(image: jax.Array, masks: jax.Array) -> str | None:
    """One sentence that says why the kernel would not do, or None."""
    if (reason := triton.missing(image.dtype)) is not None:
        return reason
    if image.dtype != jnp.bfloat16:
        return f"takes bfloat16, but {image.dtype=}."
    (_, m, c), (_, k, f) = image.shape, masks.shape
    if m % BLOCK or c & (c - 1) or f & (f - 1) or min(c, f) < 16 or k > MASKS:
        return (
            f"takes maps in steps of {BLOCK} tokens, channels in powers of two and up to {MASKS} "
            f"masks, but {image.shape=}, {masks.shape=}."
        )
    return None


def plain_masks(
    image: jax.Array,
    masks: jax.Array,
    weights: Upscaling,
    *,
    size: tuple[int, int],
    epsilon: float,
) -> jax.Array:
    """The operation in plain JAX: each token's pixels stay side by side until they are a mask.

    To put them in rows then moves an eighth of the numbers.
    """
    (b, m, _), (_, k, f) = image.shape, masks.shape
    x = jnp.tensordot(image, weights.first, 1) + last(weights.first_bias, 5)
    x = gelu(normed(x, weights.scale, weights.shift, epsilon))
    x = gelu(jnp.tensordot(x, weights.second, 1) + last(weights.second_bias, 7))
    logits = jnp.einsum("bkf,bpf->bkp", masks, x.reshape(b, 16 * m, f))
    logits = logits.reshape(b, k, *size, 2, 2, 2, 2)  # halves by rows and columns, and theirs
    logits = jnp.einsum("bkhwyxvu->bkhyvwxu", logits)
    return logits.reshape(b, k, 4 * size[0], 4 * size[1])


def _body(
    image: Any, masks: Any, first: Any, between: Any, second: Any, bias: Any, out: Any, *,
    width: int, count: int, epsilon: float, here: device.Device,
) -> None:  # fmt: skip
    """One tile; refs of (m, c), (4 f, 16), (4, c, e), (3, e), (e, 4 f), (1, 4 f), (k, pixels)."""
    start = pl.program_id(0) % (image.shape[0] // BLOCK) * BLOCK
    x = plt.load(image.at[pl.ds(start, BLOCK)])
    shape = BLOCK, 2 * MASKS, 2  # pairs of neighbours, which are written together
    token, pair, across = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3))
    row, column = div_rem(start + token, width)
    which, down = div_rem(pair, 2)
    bias_1, scale, shift = (plt.load(between.at[pl.ds(i, 1)]).astype(jnp.float32) for i in range(3))
    bias_2 = bias[...].astype(jnp.float32)
    product = functools.partial(dot, interpret=here.interpret)
    for half in range(4):
        y = normed(product(x, first[half]) + bias_1, scale, shift, epsilon)
        y = gelu_of_pairs(y.astype(x.dtype), here)
        z = gelu_of_pairs((product(y, second[...]) + bias_2).astype(x.dtype), here)
        logits = product(z, masks[...])
        at = (4 * row + 2 * (half // 2) + down) * (4 * width) + 4 * column + 2 * (half % 2) + across
        plt.store(out.at[which, at], logits.astype(out.dtype).reshape(shape), mask=which < count)


def _masks(
    size: tuple[int, int], epsilon: float, here: device.Device, image: jax.Array, masks: jax.Array,
    weights: Upscaling,
) -> jax.Array:  # fmt: skip
    (b, _, c), k = image.shape, masks.shape[1]
    e, *_, f = weights.second.shape
    # A quarter's channels meet the columns of its own masks alone.
    padded = jnp.pad(masks, ((0, 0), (0, MASKS - k), (0, 0)))
    apart = jnp.einsum("bkf,uv->bufkv", padded, jnp.eye(4, dtype=masks.dtype))
    run = functools.partial(_tiles, size, k, epsilon, here)
    out = opaque(run, 2, "b m c, b f j, i c e, n e, e f, o f -> b k p", "b")(
        image,
        apart.reshape(b, 4 * f, 4 * MASKS),
        weights.first.reshape(c, 4, e).swapaxes(0, 1),
        jnp.stack([weights.first_bias, weights.scale, weights.shift]),
        weights.second.reshape(e, 4 * f),
        jnp.tile(weights.second_bias, 4)[None],
    )
    return out.reshape(b, k, 4 * size[0], 4 * size[1])


def _tiles(
    size: tuple[int, int], count: int, epsilon: float, here: device.Device, image: jax.Array,
    masks: jax.Array, *shared: jax.Array,
) -> jax.Array:  # fmt: skip
    b, m, _ = image.shape
    tiles = m // BLOCK

    def of_image(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda program: (program // tiles, 0, 0))

    return pl.pallas_call(
        functools.partial(_body, width=size[1], count=count, epsilon=epsilon, here=here),
        grid=(b * tiles,),
        in_specs=[
            *(of_image(*x.shape[1:]) for x in (image, masks)),
            *(pl.BlockSpec(x.shape) for x in shared),
        ],
        out_specs=of_image(count, 16 * m),
        out_shape=jax.ShapeDtypeStruct((b, count, 16 * m), image.dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        name="upscaled_masks",
        interpret=here.interpret,
    )(image, masks, *shared)

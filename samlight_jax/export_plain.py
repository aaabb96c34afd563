"""A program as a jaxpr of plain operations, each of which other formats have a word for.

Kernels, loops and shifted sums are how a device runs a model fast. Here attention is two products
and a softmax over all keys at once (the back end `reference`), and a depthwise convolution is a
grouped convolution. The memory is that of the plain products.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax

from samlight_jax import attention, layers
from samlight_jax.export import Program, specs
from samlight_jax.sam import Sam


def plain_jaxpr(program: Program, model: Sam) -> Any:
    """The program's closed jaxpr; its constants are the model's arrays themselves."""
    with _plain():
        function = jax.jit(lambda *inputs: program.run(model, *inputs))
        return function.trace(*specs(program.inputs)).jaxpr


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    kernels, shifted = attention.dilated_attention_qkvpacked, layers.depthwise_conv
    plain = functools.partial(kernels, implementation="reference")
    attention.dilated_attention_qkvpacked = plain  # type: ignore[assignment]
    layers.depthwise_conv = _grouped  # type: ignore[assignment]
    try:
        yield
    finally:
        attention.dilated_attention_qkvpacked = kernels
        layers.depthwise_conv = shifted


def _grouped(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    *,
    stride: int,
    residual: bool,
    gelu_tanh: bool,  # float32 has the exact one, apart
) -> jax.Array:
    assert not gelu_tanh
    y = jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (stride, stride),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=kernel.shape[-1],
    )
    y = y if bias is None else y + bias
    return x + y if residual else y

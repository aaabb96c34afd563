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

from samlight_jax import attention
from samlight_jax.export import Program, specs
from samlight_jax.layers import DepthwiseConv
from samlight_jax.sam import Sam


def plain_jaxpr(program: Program, model: Sam) -> Any:
    """The program's closed jaxpr; its constants are the model's arrays themselves."""
    with _plain():
        function = jax.jit(lambda *inputs: program.run(model, *inputs))
        return function.trace(*specs(program.inputs)).jaxpr


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    kernels, shifted = attention.dilated_attention_qkvpacked, DepthwiseConv.__call__
    plain = functools.partial(kernels, implementation="reference")
    attention.dilated_attention_qkvpacked = plain  # type: ignore[assignment]
    DepthwiseConv.__call__ = _grouped
    try:
        yield
    finally:
        attention.dilated_attention_qkvpacked = kernels
        DepthwiseConv.__call__ = shifted


def _grouped(self: DepthwiseConv, x: jax.Array) -> jax.Array:
    kernel = self.kernel[...]
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        (self.stride, self.stride),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=kernel.shape[-1],
    )
    return y if self.bias is None else y + self.bias[...]

"""Kernels for attention, convolutions and masks on plain arrays; depends on jax and numpy alone."""

from pallas_kernels.chain import Unsupported
from pallas_kernels.depthwise_conv import depthwise_conv
from pallas_kernels.dilated_attention.api import dilated_attention, dilated_attention_qkvpacked
from pallas_kernels.dilated_attention.mixture import dilated_attention_mixture
from pallas_kernels.window_attention import window_attention

__all__ = [
    "Unsupported",
    "depthwise_conv",
    "dilated_attention",
    "dilated_attention_mixture",
    "dilated_attention_qkvpacked",
    "window_attention",
]

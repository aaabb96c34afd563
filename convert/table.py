"""The names and layouts of a model in PyTorch and in Flax, as data; nothing here runs them.

A template's placeholders stand for the alternatives in `PLACEHOLDERS` and have the same value on
both sides, so that every rule reads both ways. PyTorch's names are Meta's (segment-anything) and
MobileSAM's; those of Hugging Face's `SamModel` become Meta's by `HUGGING_FACE`.

Sources: the `state_dict` keys of segment-anything 1.0, MobileSAM and transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
    """One array: its template in PyTorch, its template in Flax, a key of `TRANSFORMS`."""

    torch: str
    flax: str
    transform: str = "same"


PLACEHOLDERS = {
    "i": r"0|[1-9]\d*",
    "j": r"0|[1-9]\d*",
    "conv": "conv1|conv2|conv3",
    "norm": "norm1|norm2|norm3|norm4",
    "lin": "lin1|lin2",
    "fc": "fc1|fc2",
    "linear": "qkv|proj",
    "axis": "rel_pos_h|rel_pos_w",
    "token": "iou_token|mask_tokens",
    "embed": "not_a_point_embed|no_mask_embed",
    "attn": "self_attn|cross_attn_token_to_image|cross_attn_image_to_token",
    "proj": "q_proj|k_proj|v_proj|out_proj",
    "p": "weight|bias",
}

Transform = Callable[[np.ndarray], np.ndarray]
TRANSFORMS: dict[str, tuple[Transform, Transform]] = {  # to Flax, back to PyTorch
    "same": (lambda w: w, lambda w: w),
    "linear": (lambda w: w.transpose(1, 0), lambda w: w.transpose(1, 0)),
    "conv": (lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1)),
    "conv_transpose": (lambda w: w.transpose(0, 2, 3, 1), lambda w: w.transpose(0, 3, 1, 2)),
}

KINDS = {  # the arrays of a module: suffix in PyTorch, suffix in Flax, transform
    "array": (("", "", "same"),),
    "embedding": ((".weight", ".embedding", "same"),),
    "norm": ((".weight", ".scale", "same"), (".bias", ".bias", "same")),
    "linear": ((".weight", ".kernel", "linear"), (".bias", ".bias", "same")),
    "conv": ((".weight", ".kernel", "conv"), (".bias", ".bias", "same")),
    "conv_without_bias": ((".weight", ".kernel", "conv"),),
    "conv_transpose": ((".weight", ".kernel", "conv_transpose"), (".bias", ".bias", "same")),
    "conv_bn": (
        (".c.weight", ".conv.kernel", "conv"),
        (".bn.weight", ".bn.scale", "same"),
        (".bn.bias", ".bn.bias", "same"),
        (".bn.running_mean", ".bn.mean", "same"),
        (".bn.running_var", ".bn.var", "same"),
    ),
}
BUFFERS = (".bn.mean", ".bn.var", "_gaussian_matrix")  # ends of Flax names that are not trained

_SAME = None  # the module has the same name on both sides
_MODULES = (  # name in PyTorch, name in Flax, kind
    # ImageEncoderViT
    ("image_encoder.pos_embed", _SAME, "array"),
    ("image_encoder.patch_embed.proj", _SAME, "conv"),
    ("image_encoder.blocks.{i}.{norm}", _SAME, "norm"),
    ("image_encoder.blocks.{i}.attn.{linear}", _SAME, "linear"),
    ("image_encoder.blocks.{i}.attn.{axis}", _SAME, "array"),
    ("image_encoder.blocks.{i}.mlp.{lin}", _SAME, "linear"),
    # TinyViT
    ("image_encoder.patch_embed.seq.0", "image_encoder.patch_embed.conv1", "conv_bn"),
    ("image_encoder.patch_embed.seq.2", "image_encoder.patch_embed.conv2", "conv_bn"),
    ("image_encoder.layers.{i}.blocks.{j}.{conv}", _SAME, "conv_bn"),
    ("image_encoder.layers.{i}.downsample.{conv}", _SAME, "conv_bn"),
    ("image_encoder.layers.{i}.blocks.{j}.attn.norm", _SAME, "norm"),
    ("image_encoder.layers.{i}.blocks.{j}.attn.{linear}", _SAME, "linear"),
    ("image_encoder.layers.{i}.blocks.{j}.attn.attention_biases", _SAME, "array"),
    ("image_encoder.layers.{i}.blocks.{j}.local_conv", _SAME, "conv_bn"),
    ("image_encoder.layers.{i}.blocks.{j}.mlp.norm", _SAME, "norm"),
    ("image_encoder.layers.{i}.blocks.{j}.mlp.{fc}", _SAME, "linear"),
    # the neck of both
    ("image_encoder.neck.0", "image_encoder.neck.conv1", "conv_without_bias"),
    ("image_encoder.neck.1", "image_encoder.neck.norm1", "norm"),
    ("image_encoder.neck.2", "image_encoder.neck.conv2", "conv_without_bias"),
    ("image_encoder.neck.3", "image_encoder.neck.norm2", "norm"),
    # PromptEncoder
    ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", _SAME, "array"),
    ("prompt_encoder.point_embeddings.{i}", _SAME, "embedding"),
    ("prompt_encoder.{embed}", _SAME, "embedding"),
    ("prompt_encoder.mask_downscaling.0", "prompt_encoder.mask_downscaling.conv1", "conv"),
    ("prompt_encoder.mask_downscaling.1", "prompt_encoder.mask_downscaling.norm1", "norm"),
    ("prompt_encoder.mask_downscaling.3", "prompt_encoder.mask_downscaling.conv2", "conv"),
    ("prompt_encoder.mask_downscaling.4", "prompt_encoder.mask_downscaling.norm2", "norm"),
    ("prompt_encoder.mask_downscaling.6", "prompt_encoder.mask_downscaling.conv3", "conv"),
    # MaskDecoder
    ("mask_decoder.{token}", _SAME, "embedding"),
    ("mask_decoder.transformer.layers.{i}.{attn}.{proj}", _SAME, "linear"),
    ("mask_decoder.transformer.layers.{i}.{norm}", _SAME, "norm"),
    ("mask_decoder.transformer.layers.{i}.mlp.{lin}", _SAME, "linear"),
    ("mask_decoder.transformer.final_attn_token_to_image.{proj}", _SAME, "linear"),
    ("mask_decoder.transformer.norm_final_attn", _SAME, "norm"),
    ("mask_decoder.output_upscaling.0", "mask_decoder.output_upscaling.conv1", "conv_transpose"),
    ("mask_decoder.output_upscaling.1", "mask_decoder.output_upscaling.norm1", "norm"),
    ("mask_decoder.output_upscaling.3", "mask_decoder.output_upscaling.conv2", "conv_transpose"),
    ("mask_decoder.output_hypernetworks_mlps.{i}.layers.{j}", _SAME, "linear"),
    ("mask_decoder.iou_prediction_head.layers.{i}", _SAME, "linear"),
)

RULES = tuple(
    Rule(torch + end, (torch if flax is _SAME else flax) + flax_end, transform)
    for torch, flax, kind in _MODULES
    for end, flax_end, transform in KINDS[kind]
)

# Keys that a model does not need, and why.
IGNORED = {
    "pixel_mean": "a constant of samlight_jax.preprocess",
    "pixel_std": "a constant of samlight_jax.preprocess",
    "image_encoder.norm_head.{p}": "TinyViT's ImageNet classifier, which SAM never calls",
    "image_encoder.head.{p}": "TinyViT's ImageNet classifier, which SAM never calls",
    "image_encoder.layers.{i}.blocks.{j}.attn.attention_bias_idxs": "follows from the window",
    "prompt_encoder.shared_embedding.positional_embedding": "shared_image_embedding's, tied to it",
    **{
        torch + ".bn.num_batches_tracked": "a counter of training"
        for torch, _, kind in _MODULES
        if kind == "conv_bn"
    },
}

_GAUSSIAN = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
HUGGING_FACE = (  # Hugging Face's name, Meta's name; all names not matched here are the same
    Rule("shared_image_embedding.positional_embedding", _GAUSSIAN),
    Rule("vision_encoder.pos_embed", "image_encoder.pos_embed"),
    Rule("vision_encoder.patch_embed.projection.{p}", "image_encoder.patch_embed.proj.{p}"),
    Rule("vision_encoder.layers.{i}.layer_{norm}.{p}", "image_encoder.blocks.{i}.{norm}.{p}"),
    Rule(
        "vision_encoder.layers.{i}.attn.{linear}.{p}", "image_encoder.blocks.{i}.attn.{linear}.{p}"
    ),
    Rule("vision_encoder.layers.{i}.attn.{axis}", "image_encoder.blocks.{i}.attn.{axis}"),
    Rule("vision_encoder.layers.{i}.mlp.{lin}.{p}", "image_encoder.blocks.{i}.mlp.{lin}.{p}"),
    Rule("vision_encoder.neck.conv1.weight", "image_encoder.neck.0.weight"),
    Rule("vision_encoder.neck.layer_norm1.{p}", "image_encoder.neck.1.{p}"),
    Rule("vision_encoder.neck.conv2.weight", "image_encoder.neck.2.weight"),
    Rule("vision_encoder.neck.layer_norm2.{p}", "image_encoder.neck.3.{p}"),
    Rule("prompt_encoder.point_embed.{i}.weight", "prompt_encoder.point_embeddings.{i}.weight"),
    Rule("prompt_encoder.mask_embed.conv1.{p}", "prompt_encoder.mask_downscaling.0.{p}"),
    Rule("prompt_encoder.mask_embed.layer_norm1.{p}", "prompt_encoder.mask_downscaling.1.{p}"),
    Rule("prompt_encoder.mask_embed.conv2.{p}", "prompt_encoder.mask_downscaling.3.{p}"),
    Rule("prompt_encoder.mask_embed.layer_norm2.{p}", "prompt_encoder.mask_downscaling.4.{p}"),
    Rule("prompt_encoder.mask_embed.conv3.{p}", "prompt_encoder.mask_downscaling.6.{p}"),
    Rule(
        "mask_decoder.transformer.layers.{i}.layer_{norm}.{p}",
        "mask_decoder.transformer.layers.{i}.{norm}.{p}",
    ),
    Rule(
        "mask_decoder.transformer.layer_norm_final_attn.{p}",
        "mask_decoder.transformer.norm_final_attn.{p}",
    ),
    Rule("mask_decoder.upscale_conv1.{p}", "mask_decoder.output_upscaling.0.{p}"),
    Rule("mask_decoder.upscale_layer_norm.{p}", "mask_decoder.output_upscaling.1.{p}"),
    Rule("mask_decoder.upscale_conv2.{p}", "mask_decoder.output_upscaling.3.{p}"),
    *(
        Rule(f"mask_decoder.{mlp}.{theirs}.{{p}}", f"mask_decoder.{mlp}.layers.{ours}.{{p}}")
        for mlp in ("output_hypernetworks_mlps.{i}", "iou_prediction_head")
        for theirs, ours in (("proj_in", 0), ("layers.0", 1), ("proj_out", 2))
    ),
)

FOREIGN = {  # starts of keys that only another family's checkpoint has
    "mask_decoder.hf_token.": "SAM-HQ",
    "mask_decoder.hq_token.": "SAM-HQ",
    "image_encoder.trunk.": "SAM 2",
    "vision_encoder.backbone.": "SAM 2 or 3",
    "mask_decoder.iou_token.embedding": "a file of this project, in no need of conversion",
}

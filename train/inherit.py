"""A student's encoder from slices of a wider or deeper teacher's: the nearest start there is.

Blocks are taken evenly spaced. Of the teacher's channels those are kept whose weights are largest:
one choice for the residual stream (all blocks must agree on it), and one in each block for the
hidden units of its MLP. Heads are taken evenly spaced, whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from samlight_jax.config import SamConfig, ViTConfig
from samlight_jax.errors import InputError

Arrays = dict[str, Any]


def inherited(
    student: SamConfig, teacher: Mapping[str, Any], teacher_config: SamConfig, fresh: Arrays
) -> Arrays:
    """The student's encoder arrays that could be taken from the teacher.

    Args:
      student: its config.
      teacher: arrays by name.
      teacher_config: its config.
      fresh: the student's own arrays; what has no counterpart of its shape stays as it is.

    Raises:
      InputError: the teacher is no ViT, or smaller than the student.
    """
    small, large = student.encoder, teacher_config.encoder
    assert isinstance(small, ViTConfig)
    if not isinstance(large, ViTConfig):
        raise InputError(
            f"inherit needs a ViT as teacher; {teacher_config.name!r} is a TinyViT. Leave it out."
        )
    if small.width > large.width or small.depth > large.depth:
        raise InputError(
            f"inherit cuts a student out of its teacher, but width={small.width}, "
            f"depth={small.depth} is more than the teacher's {large.width}, {large.depth}."
        )
    found = _Slices(small, large, teacher).all()
    return {n: x for n, x in found.items() if n in fresh and fresh[n].shape == x.shape}


class _Slices:
    def __init__(self, small: ViTConfig, large: ViTConfig, teacher: Mapping[str, Any]):
        self.small, self.large, self.teacher = small, large, teacher
        self.blocks = _spread(small.depth, large.depth)
        self.width = self._stream()
        self.heads = _spread(small.heads, large.heads)

    def _stream(self) -> np.ndarray:
        """The channels of the residual stream with the largest products, in order."""
        scores = np.zeros(self.large.width)
        for i in range(self.large.depth):
            block = f"image_encoder.blocks.{i}."
            for name in ("attn.qkv.kernel", "mlp.lin1.kernel"):
                scores += np.linalg.norm(self.teacher[block + name], axis=1)
            for name in ("attn.proj.kernel", "mlp.lin2.kernel"):
                scores += np.linalg.norm(self.teacher[block + name], axis=0)
        return _largest(scores, self.small.width)

    def all(self) -> Arrays:
        """All arrays that have a counterpart, cut."""
        root, w, t = "image_encoder.", self.width, self.teacher
        found = {f"{root}pos_embed": t[f"{root}pos_embed"][..., w]}
        if self.small.stem == self.large.stem:
            stem = {name: x for name, x in t.items() if name.startswith(f"{root}patch_embed.")}
            found |= {name: x[..., w] if ".proj." in name else x for name, x in stem.items()}
        for i, j in enumerate(self.blocks):
            cut = self._block(f"{root}blocks.{j}.")
            found |= {f"{root}blocks.{i}.{name}": x for name, x in cut.items()}
        found |= {name: x for name, x in t.items() if name.startswith(f"{root}neck.")}
        found[f"{root}neck.conv1.kernel"] = t[f"{root}neck.conv1.kernel"][:, :, w]
        return found

    def _block(self, prefix: str) -> Arrays:
        t, w = (
            {n.removeprefix(prefix): x for n, x in self.teacher.items() if n.startswith(prefix)},
            self.width,
        )
        large_dim = self.large.width // self.large.heads
        small_dim = self.small.width // self.small.heads
        hidden = int(self.small.width * self.small.mlp_ratio)
        strength = np.linalg.norm(t["mlp.lin1.kernel"], axis=0) * np.linalg.norm(
            t["mlp.lin2.kernel"], axis=1
        )
        units = _largest(strength, hidden)
        cut = {
            "mlp.lin1.kernel": t["mlp.lin1.kernel"][w][:, units],
            "mlp.lin1.bias": t["mlp.lin1.bias"][units],
            "mlp.lin2.kernel": t["mlp.lin2.kernel"][units][:, w],
            "mlp.lin2.bias": t["mlp.lin2.bias"][w],
        }
        for norm in ("norm1", "norm2"):
            cut |= {f"{norm}.{part}": t[f"{norm}.{part}"][w] for part in ("scale", "bias")}
        if small_dim == large_dim:  # whole heads, so that queries still meet their keys
            places = (self.heads[:, None] * large_dim + np.arange(large_dim)).ravel()
            packed = np.concatenate([part * self.large.width + places for part in range(3)])
            cut["attn.qkv.kernel"] = t["attn.qkv.kernel"][w][:, packed]
            cut["attn.qkv.bias"] = t["attn.qkv.bias"][packed]
            cut["attn.proj.kernel"] = t["attn.proj.kernel"][places][:, w]
            cut["attn.proj.bias"] = t["attn.proj.bias"][w]
            cut |= {name: x for name, x in t.items() if ".rel_pos_" in name}
        cut |= {name: x[..., w] for name, x in t.items() if name.startswith("local_conv.")}
        return cut


def _spread(few: int, many: int) -> np.ndarray:
    """`few` of `many`, evenly spaced, the last among them."""
    return np.round(np.arange(1, few + 1) * many / few).astype(int) - 1


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    return np.sort(np.argsort(-scores, kind="stable")[:count])

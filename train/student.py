"""The student: its config, where its arrays start, and which teacher feature each block learns.

A model is a flat dict of arrays by name (as in its file), so that rules about parts of it are
rules about names.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from samlight_jax import weights
from samlight_jax.config import PRESETS, SamConfig, ViTConfig
from samlight_jax.errors import InputError
from train.config import TrainConfig
from train.losses import Moments

Arrays = dict[str, Any]
ENCODER, DECODER, PROJECTOR = "image_encoder.", "mask_decoder.", "projectors."
STATISTIC = re.compile(r"\.bn\.(mean|var)$")
BUFFER = re.compile(r"gaussian_matrix$")
LAST_NORM = "image_encoder.neck.norm2."


def student_config(config: TrainConfig, teacher: SamConfig) -> SamConfig:
    """The preset with the run's own width, depth, heads and image size, and the teacher's decoder.

    Raises:
      InputError: an unknown preset, a file that holds no config, or one that is not a ViT's.
    """
    preset = _preset(config.student)
    if not isinstance(preset.encoder, ViTConfig):
        raise InputError(f"{config.student!r} is no ViT; students are: samlight_t, sam_vit_b, ...")
    changes = {n: v for n in ("width", "depth", "heads") if (v := getattr(config, n)) is not None}
    try:
        encoder = dataclasses.replace(preset.encoder, **changes)
        return dataclasses.replace(
            preset,
            encoder=encoder,
            image_size=config.image_size,
            decoder_mlp=teacher.decoder_mlp,
        )
    except ValueError as error:
        raise InputError(f"This student cannot be: {error}") from None


def _preset(name: str) -> SamConfig:
    """A preset by its name, or a config from its JSON file."""
    if name in PRESETS:
        return PRESETS[name]
    if not name.endswith(".json"):
        raise InputError(
            f"There is no preset {name!r}; expected one of {list(PRESETS)}, or a .json file that "
            "holds what SamConfig.to_json gives."
        )
    try:
        return SamConfig.from_json(Path(name).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be read as a student: {error}") from None


def fresh(config: SamConfig, seed: int, scale: float = 1.0) -> Arrays:
    """Random arrays of an encoder: products keep the variance (LeCun), norms do nothing yet.

    Those of the blocks are `scale` times that.

    By NumPy: to compile the modules' own draws takes longer than the first steps of a run.
    """
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith(".kernel"):
            inputs = math.prod(shape[:-1])
            own = scale if ".blocks." in name else 1.0
            return rng.normal(0, own * inputs**-0.5, shape).astype(np.float32)
        return np.full(shape, name.endswith((".scale", ".var")), np.float32)

    wanted = {n: x.shape for n, x in weights.expected(config).items() if n.startswith(ENCODER)}
    return {name: draw(name, wanted[name]) for name in sorted(wanted)}


def with_decoder_of(student: Arrays, teacher: Mapping[str, Any]) -> Arrays:
    """The student with its teacher's prompt encoder and mask decoder."""
    own = {name: x for name, x in student.items() if name.startswith(ENCODER)}
    return {**own, **{name: x for name, x in teacher.items() if not name.startswith(ENCODER)}}


def blocks_of(features: Mapping[str, Any]) -> list[str]:
    """Names of the blocks' outputs among an encoder's features, in order."""
    return [name for name in features if re.search(r"blocks\.\d+$", name)]


def matched(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> dict[str, str]:
    """The teacher feature that each student block learns: evenly spaced over the teacher's blocks.

    Of a ViT these are its transformer blocks, of a TinyViT those of all four stages.
    """
    own, theirs = blocks_of(student), blocks_of(teacher)
    last = [max(1, round((i + 1) * len(theirs) / len(own))) for i in range(len(own))]
    return {name: theirs[i - 1] for name, i in zip(own, last, strict=True)}


def pooled(feature: Array, side: int) -> Array:
    """(b, h, w, c) to (b, side, side, c): the mean of the cells that a token covers."""
    b, height, width, c = feature.shape
    step = height // side
    if step * side != height or height != width:
        raise ValueError(f"A map of {height}x{width} does not divide into {side}x{side} tokens.")
    return feature.reshape(b, side, step, side, step, c).mean((2, 4))


class Encoded(NamedTuple):
    """What an encoder made of a batch.

    Attributes:
      embedding: (b, h, w, 256).
      features: by name.
      statistics: batch norms' running means and variances after it, by name.
    """

    embedding: Array
    features: dict[str, Array]
    statistics: Arrays


def cast(arrays: Arrays, dtype: Any) -> Arrays:
    """In the products' dtype; float32 stay the statistics, frequencies and the last norm.

    The last norm makes the embedding: its channels are small and uneven.
    """
    return {name: cast_one(name, x, dtype) for name, x in arrays.items()}


def cast_one(name: str, x: Any, dtype: Any) -> Any:
    """One array of `cast`."""
    wide = STATISTIC.search(name) or BUFFER.search(name) or name.startswith(LAST_NORM)
    return x if wide else x.astype(dtype)


def encode(config: SamConfig, arrays: Arrays, pixels: Array, *, dtype: Any, remat: bool) -> Encoded:
    """The student's encoder in training: batch norms use the batch and remember it."""

    def run(arrays: Arrays, pixels: Array) -> Encoded:
        model = weights.build(config, cast(arrays, dtype), folded=False)
        model.train()
        # Else their float32 statistics would make float32 of all that follows.
        model.set_attributes(nnx.BatchNorm, dtype=jnp.dtype(dtype), raise_if_not_found=False)
        embedding, features = model.encode(pixels.astype(dtype))
        found = weights.values(model)
        return Encoded(embedding, features, {n: x for n, x in found.items() if STATISTIC.search(n)})

    if remat:
        policy = jax.checkpoint_policies.save_only_these_names("block")
        run = jax.checkpoint(run, policy=policy)
    return run(arrays, pixels)


def projectors(pairs: Mapping[str, str], student: Mapping, teacher: Mapping, seed: int) -> Arrays:
    """Linear maps from the student's features to the teacher's, by name; thrown away at the end."""
    rng = np.random.default_rng(seed)
    arrays: Arrays = {}
    for own, theirs in pairs.items():
        before, after = student[own].shape[-1], teacher[theirs].shape[-1]
        kernel = rng.normal(0, before**-0.5, (before, after)).astype(np.float32)
        arrays[f"{PROJECTOR}{own}.kernel"] = kernel
        arrays[f"{PROJECTOR}{own}.bias"] = np.zeros(after, np.float32)
    return arrays


def project(arrays: Arrays, name: str, feature: Array) -> Array:
    """A student's feature in its teacher's channels."""
    kernel, bias = (arrays[f"{PROJECTOR}{name}.{part}"] for part in ("kernel", "bias"))
    return feature @ kernel.astype(feature.dtype) + bias.astype(feature.dtype)


def moments(feature: Array, inside: Array) -> tuple[Array, Array, Array]:
    """Sums over tokens that count: (how many, (c,) sum, (c,) sum of squares)."""
    feature = feature.astype(jnp.float32)
    counts = inside[..., None].astype(jnp.float32)
    axes = (0, 1, 2)
    return counts.sum(), (feature * counts).sum(axes), (feature**2 * counts).sum(axes)


def combined(sums: list[tuple[Any, Any, Any]]) -> Moments:
    """Mean and deviation from the sums of several batches."""
    count, first, second = (
        np.sum([np.asarray(x, np.float64) for x in part], axis=0)
        for part in zip(*sums, strict=True)
    )
    mean = first / count
    deviation = np.sqrt(np.maximum(second / count - mean**2, 1e-12))
    return Moments(mean.astype(np.float32), deviation.astype(np.float32))

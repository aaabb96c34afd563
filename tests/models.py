"""Small models with weights that make masks of both signs, built in a second."""

import functools

import numpy as np

from samlight_jax import weights
from samlight_jax.config import Pattern, SamConfig, ViTConfig
from samlight_jax.sam import Sam

TINY = SamConfig(
    name="tiny",
    encoder=ViTConfig(
        width=32, depth=2, heads=2, attention=(Pattern(segment=(2, 2)), Pattern()), rel_pos=True
    ),
    image_size=64,
    decoder_mlp=64,
)


def random_arrays(config: SamConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays by name: products that keep the variance, norms about 1, everything else about 0."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith(".kernel"):
            scale = np.prod(shape) / shape[-1]  # the inputs of one output
            return rng.normal(0, scale**-0.5, shape)
        if name.endswith((".scale", ".var")):
            return rng.uniform(0.5, 1.5, shape)
        return rng.normal(0, 1 if "prompt_encoder" in name else 0.1, shape)

    expected = weights.expected(config)
    return {name: draw(name, leaf.shape).astype(np.float32) for name, leaf in expected.items()}


@functools.cache
def random_model(config: SamConfig = TINY, seed: int = 0) -> Sam:
    """A model of `random_arrays`, folded for inference."""
    return weights.build(config, random_arrays(config, seed))

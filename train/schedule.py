"""What changes by the step: rates, averaging, and which layers a student learns when.

The layers' weights move from early to late, then to the output. SAM-Lightening's own schedule is
not public (arXiv 2403.09195 gives the idea alone): these are ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from train.config import Schedule, TrainConfig


class Pace(NamedTuple):
    """What one step takes from its place in the run; numbers, so that all runs share a program.

    Attributes:
      rate: () float32, of the encoder.
      decoder_rate: () float32.
      decay: () float32, of the averaged weights.
      layers: (matched layers + 1,) float32, what they and, last, the embedding weigh.
      seed: () uint32, of the run.
    """

    rate: Any
    decoder_rate: Any
    decay: Any
    layers: Any
    seed: Any


def paces(config: TrainConfig, layers: int) -> Pace:
    """Those of all steps, on the host: the first axis is the step."""
    steps = np.arange(config.steps)

    def of_each(one: Any) -> np.ndarray:
        return np.asarray(jax.jit(jax.vmap(one))(steps), np.float32)

    def weights(step: Array) -> Array:
        if config.stage > 1:
            return jnp.full(1, config.embedding_weight)
        return layer_weights(config.schedule, step, config.steps, layers, config.layers_share)

    return Pace(
        of_each(rate(config, config.peak)),
        of_each(rate(config, config.decoder_lr)),
        # Short at first, so that the random start is soon forgotten.
        np.minimum(config.ema, (1 + steps) / (10 + steps)).astype(np.float32),
        of_each(weights),
        np.full(config.steps, config.seed, np.uint32),
    )


def layer_weights(
    kind: Schedule, step: Array | int, steps: int, layers: int, share: float
) -> Array:
    """Weights of `layers` matched layers and, last, the output; they sum to 1.

    Args:
      kind: "ramp" passes weight on from each layer to the next without a break; "one_hot" gives
        one all of it at a time; "output_only" gives all to the output at once.
      step: from 0.
      steps: of the whole run.
      layers: how many are matched.
      share: of the run until the output has all the weight.

    Returns:
      (layers + 1,) float32.
    """
    last = jnp.arange(layers + 1) == layers
    if kind == "output_only" or not layers or not share:
        return last.astype(jnp.float32)
    turn = max(1, round(share * steps))  # the first step of the output alone
    done = jnp.minimum(step, turn) * layers
    place = done // turn  # in integers: a rounded quotient would be late by a step
    if kind == "ramp":
        place = place + done % turn / turn
    return jnp.maximum(0.0, 1 - jnp.abs(jnp.arange(layers + 1) - place)).astype(jnp.float32)


def rate(config: TrainConfig, peak: float) -> optax.Schedule:
    """The learning rate by step: a linear rise, then a cosine down to its end."""
    warmup, end = min(config.warmup, config.steps // 2), peak * config.lr_end
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, config.steps, end)

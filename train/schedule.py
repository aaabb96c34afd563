"""Which layers a student learns when: weights that move from early to late, then to the output.

SAM-Lightening's own schedule is not public (arXiv 2403.09195 gives the idea alone): these are ours.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax import Array

from train.config import Schedule, TrainConfig


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
    """The learning rate by step: a linear rise, then a cosine down to zero."""
    warmup = min(config.warmup, config.steps // 2)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, config.steps)

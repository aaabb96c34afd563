"""Which errors of an embedding matter: how the teacher's masks change with each direction of it.

The Gram matrix of the masks' gradients by the embedding, over random points of real views, is the
Gauss-Newton matrix of a squared error of the masks' probabilities. A few dozen of its 256
directions hold nearly all of it. Its square root weighs errors: what a large error costs in IoU
grows with its length, not with its square. This is ours; no paper has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from train import objects

PROMPTS, DRAWS = 8, 2  # points a view; random directions of its masks
LEAST = 1e-3  # of the mean eigenvalue, which the smallest are raised to


def gram(decode: Callable[..., Any], embedding: Array, size: Array, key: Array) -> Array:
    """(c, c) float32: the sum over tokens of the outer products of the masks' gradients.

    Args:
      decode: the teacher's: (embedding, prompts) to logits (q, 4, m, m) and IoUs (q, 4).
      embedding: (h, w, c), the teacher's own.
      size: (height, width) of the view.
      key: random.
    """
    place, draw = jax.random.split(key)
    coords = jax.random.uniform(place, (PROMPTS, 2)) * jnp.flip(size).astype(jnp.float32)

    def masks(embedding: Array) -> Array:
        logits, iou = decode(embedding, objects.points(coords))
        seen = objects.inside(size, logits.shape[-1])
        sure = jax.lax.stop_gradient(jnp.clip(iou.astype(jnp.float32), 0, 1))
        return jax.nn.sigmoid(logits.astype(jnp.float32)) * seen * sure[..., None, None]

    shares, pull = jax.vjp(masks, embedding.astype(jnp.float32))
    # Signs are uncorrelated, so that the mean over draws is the sum over all pixels.
    signs = jax.random.rademacher(draw, (DRAWS, *shares.shape), jnp.float32)
    slopes = jax.lax.map(lambda sign: pull(sign)[0], signs).reshape(-1, embedding.shape[-1])
    return jnp.dot(slopes.T, slopes, precision=jax.lax.Precision.HIGHEST) / DRAWS


def root(gram: np.ndarray | np.float64, covariance: np.ndarray) -> np.ndarray:
    """(c, c) float32 that errors are multiplied by: the Gram matrix's fourth root.

    Its square, and so the squared error's weight, is the Gram matrix's square root.

    Args:
      gram: the sum of `gram` over views.
      covariance: (c, c) of the embedding; a guess of its mean has a mean squared error of 1.
    """
    values, vectors = np.linalg.eigh(np.asarray(gram, np.float64))
    values = np.maximum(values, LEAST * values.mean()) ** 0.25
    found = (vectors * values) @ vectors.T
    typical = np.trace(found @ np.asarray(covariance, np.float64) @ found) / len(found)
    return (found / np.sqrt(typical)).astype(np.float32)

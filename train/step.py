"""One step of each stage: teacher, student, losses, gradients, update; one jitted program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from samlight_jax import weights
from samlight_jax.config import SamConfig
from samlight_jax.postprocess import LOW_RES
from samlight_jax.prompts import Prompts
from samlight_jax.sam import Sam
from train import augment, losses, objects
from train.config import Channels, TrainConfig
from train.losses import Moments
from train.schedule import Pace
from train.student import DECODER, PROJECTOR, Arrays, cast, encode, pooled, project

EMBEDDING = "embedding"


class State(NamedTuple):
    """All that changes in a run, and all that a checkpoint holds.

    Attributes:
      step: () int32, of the next update.
      params: trained arrays by name, projectors among them.
      frozen: the student's other arrays.
      statistics: running means and variances of batch norms.
      ema: averages of `params` (projectors aside) and `statistics`.
      optimizer: optax's state.
      moments: of the teacher's features, by name.
    """

    step: Array
    params: Arrays
    frozen: Arrays
    statistics: Arrays
    ema: Arrays
    optimizer: Any
    moments: dict[str, Moments]


class Seen(NamedTuple):
    """A batch as the models see it.

    Attributes:
      views: of the photographs.
      taught: the teacher's embeddings, of a cache or a pool.
      masks: (b, k, m, m) bool, the data's own, low-resolution.
    """

    views: augment.Views
    taught: Any = None
    masks: Any = None


@dataclasses.dataclass(frozen=True)
class Task:
    """What a step needs to know beside its arrays.

    Attributes:
      config: of the run.
      student: its model's config.
      pairs: the teacher feature that each student block learns.
      optimizer: of `make_optimizer`.
    """

    config: TrainConfig
    student: SamConfig
    pairs: tuple[tuple[str, str], ...]
    optimizer: optax.GradientTransformation


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Muon or AdamW for the encoder, AdamW for the decoder, both for rates of 1: see `rated`."""
    adamw = optax.adamw(
        1.0,
        weight_decay=config.weight_decay,
        mask=lambda tree: jax.tree.map(lambda x: jnp.ndim(x) > 1, tree),
    )
    groups: Any = {
        # The step is scaled to AdamW's size, so that one rate serves both (arXiv 2502.16982).
        "matrices": optax.contrib.muon(1.0, weight_decay=config.weight_decay, consistent_rms=0.2),
        "others": adamw,
    }

    def label(name: str, x: Any) -> str:
        matrix = ".blocks." in name and name.endswith(".kernel") and jnp.ndim(x) == 2
        others = config.optimizer == "adamw" or name.startswith((DECODER, PROJECTOR))
        return "matrices" if matrix and not others else "others"

    def labels(params: Arrays) -> dict[str, str]:
        return {name: label(name, x) for name, x in params.items()}

    return optax.chain(optax.clip_by_global_norm(config.clip), optax.partition(groups, labels))


def rated(updates: Any, pace: Pace) -> Arrays:
    """Updates at the encoder's and the decoder's own rates."""
    return {
        name: x * (pace.decoder_rate if name.startswith(DECODER) else pace.rate)
        for name, x in updates.items()
    }


def keys_of(seed: Any, step: Array, batch: int) -> Array:
    """(batch,) random keys of a step, one a row."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


def teach(task: Task, teacher: Sam, views: augment.Views) -> tuple[Array, dict[str, Array]]:
    """The teacher's embedding and the features that are learnt, without gradients."""
    pixels = views.pixels.astype(task.config.dtype)
    embedding, features = teacher.encode(pixels)
    wanted = {name: features[name] for _, name in task.pairs}
    return jax.lax.stop_gradient((embedding, wanted))


def feature_terms(
    task: Task, state: State, params: Arrays, found: Any, taught: Any, inside: Array
) -> dict[str, Array]:
    """Losses of stage 1: of each matched block, in deviations, and of the embedding."""
    config, grid = task.config, task.student.grid
    embedding, features = taught

    def loss(guess: Array, target: Array, moments: Moments, channels: Channels) -> Array:
        # Every photograph counts alike, so that parts of a batch add up to the whole.
        each = jax.vmap(losses.features, (0, 0, 0, None, None, None))
        return each(guess, target, inside, moments, config.loss, channels).mean()

    terms = {}
    for own, theirs in task.pairs:
        mean, deviation = state.moments[theirs]
        target = (pooled(features[theirs].astype(jnp.float32), grid) - mean) / deviation
        unit = Moments(jnp.zeros_like(mean), jnp.ones_like(deviation))
        terms[own] = loss(project(params, own, found.features[own]), target, unit, "plain")
    moments = state.moments[EMBEDDING]
    terms[EMBEDDING] = loss(found.embedding, embedding, moments, config.channels)
    return terms


Measures = dict[str, Array]


def stage_1(
    task: Task, state: State, params: Arrays, teacher: Sam, pace: Pace, seen: Seen, keys: Array
) -> tuple[Array, Measures, Arrays]:
    """Features: (loss, measures, statistics)."""
    config, views = task.config, seen.views
    taught = teach(task, teacher, views) if seen.taught is None else (seen.taught, {})
    arrays = {**params, **state.frozen, **state.statistics}
    arrays = {name: x for name, x in arrays.items() if not name.startswith(PROJECTOR)}
    found = encode(task.student, arrays, views.pixels, dtype=config.dtype, remat=config.remat)
    terms = feature_terms(task, state, params, found, taught, views.inside(task.student.grid))
    total = jnp.dot(pace.layers, jnp.stack(list(terms.values())))
    return total, {"loss": total, **terms}, found.statistics


def stages_2_3(
    task: Task, state: State, params: Arrays, teacher: Sam, pace: Pace, seen: Seen, keys: Array
) -> tuple[Array, Measures, Arrays]:
    """Masks: (loss, measures, statistics)."""
    config, low_res = task.config, LOW_RES * task.student.grid
    views, given = seen.views, seen.masks
    if given is None:  # the teacher is asked for objects, with its own embedding
        given = teach(task, teacher, views)[0] if seen.taught is None else seen.taught
    arrays = {**params, **state.frozen, **state.statistics}
    found = encode(task.student, arrays, views.pixels, dtype=config.dtype, remat=config.remat)
    model = weights.build(task.student, cast(arrays, config.dtype), folded=False)

    def terms(logits: Array, iou: Array, wanted: Any, inside: Array) -> losses.MaskTerms:
        asked = wanted.single, wanted.counts, inside, config.mask_loss
        if config.match == "token" and wanted.logits is not None:
            return losses.tokens(logits, iou, wanted.logits, wanted.iou, *asked)
        return losses.masks(logits, iou, wanted.target, *asked)

    def objects_of(given: Array, size: Array, key: Array) -> objects.Objects:
        if seen.masks is not None:
            return objects.of_annotations(given, size, key, config.prompts)

        def decode(prompts: Prompts) -> tuple[Array, Array]:
            return teacher.decode(given.astype(config.dtype), prompts)

        return objects.of_teacher(decode, size, key, config.prompts, low_res)

    def one(embedding: Array, given: Array, size: Array, key: Array) -> Any:
        ask, click = jax.random.split(jax.random.fold_in(key, 8))
        wanted = jax.lax.stop_gradient(objects_of(given, size, ask))
        inside = objects.inside(size, low_res)
        logits, iou = model.decode(embedding.astype(config.dtype), wanted.prompts)
        rounds = [terms(logits, iou, wanted, inside)]
        if config.stage == 3:
            three = 1 + jnp.argmax(iou[:, 1:], axis=1)
            choice = jnp.where(wanted.single, 0, three)
            wanted = objects.corrected(wanted, jax.lax.stop_gradient(logits), choice, inside, click)
            logits, iou = model.decode(embedding.astype(config.dtype), wanted.prompts)
            rounds.append(terms(logits, iou, wanted, inside))
        return rounds, wanted.counts.any()

    total, measures = _of_rounds(config, *jax.vmap(one)(found.embedding, given, views.size, keys))
    if seen.masks is None and config.embedding_weight:
        inside = views.inside(task.student.grid)
        measures |= feature_terms(task, state, params, found, (given, {}), inside)
        total += pace.layers[-1] * measures[EMBEDDING]
    return total, {"loss": total, **measures}, found.statistics


def _of_rounds(
    config: TrainConfig, rounds: list[losses.MaskTerms], asked: Array
) -> tuple[Array, Measures]:
    """The loss and the means of its terms, over the photographs on which something was asked."""
    _, weight = losses.PIXELS[config.mask_loss]
    measures: Measures = {}
    total = jnp.zeros(())
    for i, each in enumerate(rounds):
        of = "" if len(rounds) == 1 else f"_{i + 1}"
        means = {f"{name}{of}": losses.mean(x, asked) for name, x in each._asdict().items()}
        pixels, dice, iou, _ = means.values()
        total += (weight * pixels + dice + iou) / len(rounds)
        measures |= means
    return total, measures


def update(
    task: Task, state: State, teacher: Sam, pace: Pace, seen: Seen, keys: Array
) -> tuple[State, Measures]:
    """One update: the new state and what was measured."""
    config = task.config
    stage = stage_1 if config.stage == 1 else stages_2_3

    def lossy(params: Arrays, statistics: Arrays, part: Any) -> tuple[Array, Any]:
        now = state._replace(statistics=statistics)
        total, measures, statistics = stage(task, now, params, teacher, pace, *part)
        return total, (measures, statistics)

    differentiate = jax.value_and_grad(lossy, has_aux=True)

    def add(carry: Any, part: Any) -> tuple[Any, Measures]:
        gradients, statistics = carry
        (_, (measures, statistics)), more = differentiate(state.params, statistics, part)
        return (jax.tree.map(jnp.add, gradients, more), statistics), measures

    parts = config.accumulate
    if parts == 1:
        (_, (measures, statistics)), gradients = differentiate(
            state.params, state.statistics, (seen, keys)
        )
    else:
        # Every part takes rows of every device.
        rows = (seen, keys)
        cut = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), rows)
        start = jax.tree.map(jnp.zeros_like, state.params), state.statistics
        (gradients, statistics), measures = jax.lax.scan(add, start, cut)
        gradients, measures = (
            jax.tree.map(lambda x: x / parts, gradients),
            jax.tree.map(jnp.mean, measures),
        )
    updates, optimizer = task.optimizer.update(gradients, state.optimizer, state.params)
    params: Any = optax.apply_updates(state.params, rated(updates, pace))
    measures["gradient"] = optax.tree.norm(gradients)
    now, decay = {**params, **statistics}, pace.decay
    ema = {name: decay * x + (1 - decay) * now[name] for name, x in state.ema.items()}
    changed = {"params": params, "statistics": statistics, "ema": ema, "optimizer": optimizer}
    return state._replace(step=state.step + 1, **changed), measures


def make_step(task: Task, look: Callable[..., Any], where: State) -> Any:
    """The jitted step: (state, teacher, pace, batch) to (state, measures).

    Args:
      task: what to do.
      look: (batch, keys) to `Seen`.
      where: the state's shardings; a new state lies where the old one did, in its memory.
    """

    def step(state: State, teacher: Sam, pace: Pace, batch: Any) -> tuple[State, Measures]:
        keys = keys_of(pace.seed, state.step, task.config.batch)
        return update(task, state, teacher, pace, look(batch, keys), keys)

    # On a GPU, cuBLAS: unlike Triton's products, its own take bias and GELU with them.
    options = {"xla_gpu_enable_triton_gemm": False}
    outs = where, None
    return jax.jit(step, donate_argnums=(0,), out_shardings=outs, compiler_options=options)

"""What a run starts from: teacher, student, what is matched, and the first state."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import device
from samlight_jax import weights
from samlight_jax.build_sam import find
from samlight_jax.config import SamConfig
from samlight_jax.errors import InputError
from samlight_jax.sam import Sam
from train import schedule, sharding
from train.config import TrainConfig
from train.inherit import inherited
from train.losses import Moments
from train.step import EMBEDDING, State, Task, keys_of, make_optimizer, teach
from train.student import (
    BUFFER,
    DECODER,
    ENCODER,
    LAST_NORM,
    STATISTIC,
    Arrays,
    cast_one,
    combined,
    fresh,
    matched,
    moments,
    pooled,
    projectors,
    student_config,
    with_decoder_of,
)

SAMPLE = 64  # photographs that the teacher's moments are taken over, at least


@dataclasses.dataclass(frozen=True)
class Start:
    """A run before its first step.

    Attributes:
      task: of its steps.
      teacher: its arrays by name, batch norms folded, on the host.
      teacher_config: of the teacher.
      teacher_fingerprint: of its file.
      arrays: the student's, by name.
      projectors: the same.
      widths: channels of each taught feature.
    """

    task: Task
    teacher: Sam
    teacher_fingerprint: str
    arrays: Arrays
    projectors: Arrays
    widths: dict[str, int]

    @functools.cached_property
    def paces(self) -> schedule.Pace:
        """What each step takes from its place in the run."""
        return schedule.paces(self.task.config, len(self.task.pairs))

    def place_teacher(self, mesh: jax.sharding.Mesh) -> Sam:
        """The teacher on the devices, in the products' dtype."""
        dtype = self.task.config.dtype

        def one(name: str, x: Any) -> jax.Array:
            x = np.asarray(cast_one(name, x, dtype))
            spec = sharding.spec_of(name, x.shape, mesh)
            return sharding.placed(x, jax.sharding.NamedSharding(mesh, spec))

        return weights.replaced(self.teacher, one)

    def flops(self) -> float | None:
        """Of one photograph: the teacher's encoder once, the student's forward and backward."""
        config = self.task.config
        teacher = 0.0 if config.teacher_cache else flops_of(self.teacher)
        student = flops_of(weights.build(self.task.student, self.arrays, folded=False))
        return teacher + 3 * student if student else None

    def state(self, found: dict[str, Moments] | None = None) -> State:
        """The first state.

        Args:
          found: the teacher's moments; None for a state whose shapes alone matter.
        """
        config = self.task.config
        if found is None:
            found = {n: Moments(jnp.zeros(c), jnp.ones(c)) for n, c in self.widths.items()}
        arrays = dict(self.arrays)
        if config.stage == 1 and not config.init_from:
            arrays[f"{LAST_NORM}scale"], arrays[f"{LAST_NORM}bias"] = reversed(found[EMBEDDING])
        trained = (ENCODER,) if config.stage == 1 else (ENCODER, DECODER)
        statistics = {n: x for n, x in arrays.items() if STATISTIC.search(n)}
        params = {
            n: x
            for n, x in arrays.items()
            if n.startswith(trained) and n not in statistics and not BUFFER.search(n)
        }
        frozen = {n: x for n, x in arrays.items() if n not in params and n not in statistics}
        ema = {**params, **statistics}
        params = {**params, **self.projectors}
        optimizer = self.task.optimizer.init(jax.tree.map(jnp.asarray, params))
        step = jnp.zeros((), jnp.int32)
        return State(step, params, frozen, statistics, ema, optimizer, found)


def prepare(config: TrainConfig) -> Start:
    """Reads the teacher, makes the student, decides what is matched.

    Raises:
      InputError: a missing or wrong teacher, student or start.
    """
    arrays, teacher_config, _ = weights.read(find(config.teacher))
    fingerprint = weights.fingerprint(teacher_config, arrays)
    teacher_config, arrays = weights.resize(teacher_config, arrays, config.image_size)
    teacher = weights.build(teacher_config, arrays)
    student = student_config(config, teacher_config)
    own = _student_arrays(config, student, arrays, teacher_config)

    taught = _shapes(teacher)
    learnt = _shapes(weights.build(student, own, folded=False))
    wanted = config.stage == 1 and config.schedule != "output_only"
    pairs = matched(learnt[1], taught[1]) if wanted else {}
    if taught[0].shape != learnt[0].shape:
        raise InputError(
            f"The teacher's embedding is {taught[0].shape[1:]}, the student's "
            f"{learnt[0].shape[1:]}; both must have one image_size."
        )
    task = Task(config, student, tuple(pairs.items()), make_optimizer(config))
    widths = {theirs: taught[1][theirs].shape[-1] for theirs in pairs.values()}
    widths[EMBEDDING] = taught[0].shape[-1]
    return Start(
        task,
        teacher,
        fingerprint,
        own,
        projectors(pairs, learnt[1], taught[1], config.seed),
        widths,
    )


def _shapes(model: Sam) -> Any:
    side = model.config.image_size
    pixels = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return nnx.eval_shape(lambda model, x: model.encode(x), model, pixels)


def flops_of(model: Sam) -> float:
    """Of the encoder for one image, as XLA counts them where no kernel hides some."""
    side = model.config.image_size
    pixels = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    with device.assume(device.Device("cpu", "cpu")):
        traced = jax.jit(lambda model, x: model.encode(x)[0]).trace(model, pixels)
        found = traced.lower(lowering_platforms=("cpu",)).cost_analysis()
    return float((found or {}).get("flops", 0.0))


def _student_arrays(
    config: TrainConfig, student: SamConfig, teacher: Arrays, teacher_config: SamConfig
) -> Arrays:
    if config.init_from:
        path = find(config.init_from)
        if path.is_dir() and (path / "model.safetensors").exists():
            path = path / "model.safetensors"
        arrays, found, _ = weights.read(path)
        found, arrays = weights.resize(found, arrays, student.image_size)
        if found.encoder != student.encoder:
            raise InputError(
                f"--init-from {path} is a {found.encoder}; this run's student is a "
                f"{student.encoder}: give the same --student, --width, --depth and --heads."
            )
        return arrays
    arrays = fresh(student, config.seed, config.init_scale)
    if config.inherit:
        arrays |= inherited(student, teacher, teacher_config, arrays)
    return with_decoder_of(arrays, teacher)


def prepared(
    task: Task, teacher: Sam, look: Callable[..., Any], batches: Iterable[Any]
) -> dict[str, Moments]:
    """The teacher's moments over the first views of the run.

    Args:
      task: of the run.
      teacher: placed.
      look: as for `step.make_step`.
      batches: the run's, from its first step on.
    """
    config, side = task.config, task.student.grid

    @jax.jit
    def sums(teacher: Sam, batch: Any, seed: Any, step: Any) -> dict[str, Any]:
        seen = look(batch, keys_of(seed, step, config.batch))
        embedding, features = seen.taught, {}
        if embedding is None:
            embedding, features = teach(task, teacher, seen.views)
        inside = seen.views.inside(side)
        maps = {**{n: pooled(x, side) for n, x in features.items()}, EMBEDDING: embedding}
        return {name: moments(x, inside) for name, x in maps.items()}

    first = itertools.islice(batches, -(-SAMPLE // config.batch))
    found = [
        jax.device_get(sums(teacher, batch, np.uint32(config.seed), i))
        for i, batch in enumerate(first)
    ]
    return {name: combined([one[name] for one in found]) for name in found[0]}

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samlight_jax import weights
from samlight_jax.errors import InputError
from tests.models import TINY, random_arrays
from train import augment, sharding
from train.config import Mesh, TrainConfig
from train.reuse import Pool
from train.step import Seen, Task

BATCH, SIDE = 4, TINY.image_size


@pytest.fixture(scope="module")
def pool_of():
    """A pool of views whose pixels are all (number of the batch) + row / 10."""
    teacher = weights.build(TINY, random_arrays(TINY))

    def see(batch, keys):
        value = batch + jnp.arange(BATCH) / 10
        pixels = jnp.broadcast_to(value[:, None, None, None], (BATCH, SIDE, SIDE, 3))
        return Seen(augment.Views(pixels, jnp.full((BATCH, 2), SIDE)))

    def make(**changes):
        fields = {"steps": 15, "reuse": 3, "pool": 2, "batch": BATCH, "dtype": "float32"}
        config = TrainConfig(**fields | changes)
        task = Task(config, TINY, (), None)

        def fresh(start):
            return map(jnp.int32, range(start, pool.filled))

        pool = Pool(task, teacher, see, fresh, sharding.make_mesh(Mesh()))
        return pool

    return make, teacher


def steps_of(pool, start=0):
    look = jax.jit(pool.look)
    return [jax.device_get(look(batch, None)) for batch in pool.batches(start)]


def test_every_view_comes_as_often_as_it_is_reused_before_new_ones(pool_of):
    make, _ = pool_of
    pool = make()
    assert (pool.held, pool.filled) == (2, 6)
    seen = np.stack([each.views.pixels[:, 0, 0, 0] for each in steps_of(pool)])
    numbers = np.round(seen - np.arange(BATCH) / 10).astype(int)
    assert np.allclose(seen, numbers + np.arange(BATCH) / 10)  # row j of a step is row j of a batch
    for row in numbers.T:
        assert collections.Counter(row[:6]) == {0: 3, 1: 3}
        assert collections.Counter(row[6:12]) == {2: 3, 3: 3}
        assert set(row[12:]) == {4, 5}
        for i in range(0, 12, 2):  # each of them once before any comes again
            assert len(set(row[i : i + 2])) == 2
    assert len({tuple(row) for row in numbers.T}) > 1  # rows have orders of their own


def test_embeddings_are_the_teachers(pool_of):
    make, teacher = pool_of
    for each in steps_of(make(steps=4, reuse=2)):
        want, _ = teacher.encode(jnp.asarray(each.views.pixels))
        assert np.abs(each.taught - want).max() < 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("start", [1, 6, 9])
def test_a_continued_run_sees_the_same(pool_of, start):
    make, _ = pool_of
    whole, rest = steps_of(make()), steps_of(make(), start)
    assert len(rest) == 15 - start
    for one, other in zip(whole[start:], rest, strict=True):
        assert np.array_equal(one.views.pixels, other.views.pixels)
        assert np.array_equal(one.taught, other.taught)


def test_a_pool_is_no_longer_than_the_run_needs():
    assert TrainConfig(steps=10, reuse=4, pool=200).held == 3
    one, other = (TrainConfig(steps=n, reuse=4, pool=5).program() for n in (100, 200))
    assert one == other != TrainConfig(steps=10, reuse=4, pool=5).program()


@pytest.mark.parametrize(
    "flags",
    [
        {"schedule": "ramp"},
        {"teacher_cache": "somewhere"},
        {"stage": 2, "init_from": "x", "targets": "annotations"},
    ],
    ids=str,
)
def test_refuses_what_needs_more_than_embeddings(flags):
    with pytest.raises(InputError, match="reuse=2 keeps the teacher's embeddings alone"):
        TrainConfig(reuse=2, **flags)

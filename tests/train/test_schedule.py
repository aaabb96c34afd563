import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from train import schedule
from train.config import TrainConfig

KINDS = ["ramp", "one_hot"]


@functools.cache
def rows(kind, steps, layers, share):
    """The weights of every step of a run, one a row, as in a jitted step."""

    def one(step):
        return schedule.layer_weights(kind, step, steps, layers, share)

    return np.asarray(jax.jit(jax.vmap(one))(np.arange(steps)))


RUNS = st.tuples(st.integers(2, 300), st.integers(1, 32), st.floats(0, 1)).map(
    # The output's turn comes at a whole step.
    lambda run: (run[0], run[1], max(1, math.floor(run[2] * run[0])) / (run[0] + 1))
)


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=12)
@hypothesis.given(run=RUNS)
def test_weights_pass_from_the_first_layer_to_the_output(kind, run):
    steps, layers, share = run[0] + 1, run[1], run[2]
    turn = round(share * steps)
    found = rows(kind, steps, layers, share)
    assert found.shape == (steps, layers + 1)
    assert found.dtype == np.float32
    assert found.min() >= 0
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(found[0], np.eye(layers + 1)[0])
    np.testing.assert_array_equal(found[turn:], np.eye(layers + 1)[[layers] * (steps - turn)])
    assert (found[:turn, layers] < 1).all()
    centre = found @ np.arange(layers + 1)
    assert (np.diff(centre) >= -1e-5).all()


@pytest.mark.parametrize("layers", [1, 2, 3, 6, 7, 12, 24, 32])
def test_one_hot_gives_each_layer_an_equal_time(layers):
    for turn in (1, 7, 30, 49, 97, 300):
        steps = 2 * turn
        found = rows("one_hot", steps, layers, turn / steps)
        want = [min(step * layers // turn, layers) for step in range(steps)]
        np.testing.assert_array_equal(found, np.eye(layers + 1)[want])


def test_ramp_by_hand():
    found = rows("ramp", 10, 2, 0.8)  # a layer takes four steps
    want = [[1, 0, 0], [0.75, 0.25, 0], [0.5, 0.5, 0], [0.25, 0.75, 0], [0, 1, 0], [0, 0.75, 0.25]]
    np.testing.assert_allclose(found[:6], want, atol=1e-6)


@pytest.mark.parametrize(
    "kind, layers, share", [("output_only", 3, 0.3), ("ramp", 0, 0.3), ("one_hot", 3, 0)]
)
def test_the_output_alone(kind, layers, share):
    found = rows(kind, 5, layers, share)
    np.testing.assert_array_equal(found, np.eye(layers + 1)[[layers] * 5])


@pytest.mark.parametrize("steps, warmup, peak_at", [(1000, 100, 100), (10, 100, 5), (8, 0, 0)])
def test_rate_rises_then_falls_to_zero(steps, warmup, peak_at):
    rate = schedule.rate(TrainConfig(steps=steps, warmup=warmup), 0.5)
    found = np.array([rate(step) for step in range(steps + 1)])
    assert found.argmax() == peak_at
    np.testing.assert_allclose(found[peak_at], 0.5, rtol=1e-6)
    assert (np.diff(found[: peak_at + 1]) > 0).all()
    assert (np.diff(found[peak_at:]) < 0).all()
    np.testing.assert_allclose(found[-1], 0, atol=1e-7)
    middle = (peak_at + steps) / 2  # of a cosine
    if middle.is_integer():
        np.testing.assert_allclose(found[int(middle)], 0.25, rtol=1e-5)


def test_a_run_of_one_step_learns():
    assert schedule.rate(TrainConfig(steps=1), 0.5)(0) == 0.5


def test_a_pace_for_every_step():
    config = TrainConfig(
        schedule="ramp", steps=40, lr=0.5, decoder_lr=0.1, lr_end=0.2, warmup=4, ema=0.6, seed=9
    )
    found = schedule.paces(config, 2)
    assert [x.shape for x in found] == [(40,), (40,), (40,), (40, 3), (40,)]
    np.testing.assert_allclose(found.decoder_rate, found.rate / 5, rtol=1e-6)
    assert found.rate.argmax() == 4
    np.testing.assert_allclose([found.rate[4], found.rate[-1]], [0.5, 0.1], atol=2e-3)
    np.testing.assert_allclose(found.decay[:3], [1 / 10, 2 / 11, 3 / 12], rtol=1e-6)
    assert (found.decay[20:] == np.float32(0.6)).all()
    np.testing.assert_array_equal(found.layers, rows("ramp", 40, 2, config.layers_share))
    assert (found.seed == 9).all()
    later = TrainConfig(stage=2, init_from="a", steps=3, embedding_weight=4.0)
    np.testing.assert_array_equal(schedule.paces(later, 0).layers, [[4.0]] * 3)

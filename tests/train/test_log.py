import json

import jax.numpy as jnp
import numpy as np
import pytest

from samlight_jax.errors import InputError
from train import log
from train.config import TrainConfig


def opened(folder, start=0, **changes):
    config = TrainConfig(out=str(folder), steps=10, log_every=2, batch=4, **changes)
    return log.Log(config, start, rates=np.arange(10) * 0.5, flops=None, writes=True)


def rows(folder):
    return [json.loads(row) for row in (folder / log.METRICS).read_text().splitlines()]


def test_writes_every_so_many_steps_and_the_last(tmp_path):
    with opened(tmp_path) as taken:
        for step in range(10):
            taken.take(step, {"loss": jnp.float32(step)}, 0.0, None)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [2, 4, 6, 8, 10]
    assert [row["loss"] for row in found] == [1, 3, 5, 7, 9]
    assert [row["lr"] for row in found] == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert all(row["images_per_s"] > 0 and row["waited"] == 0 for row in found)


def test_a_run_that_goes_on_drops_what_comes_again(tmp_path):
    with opened(tmp_path) as taken:
        for step in range(8):
            taken.take(step, {"loss": jnp.float32(0)}, 0.0, None)
    with (tmp_path / log.METRICS).open("a") as file:
        file.write('{"step": 9, "lo')  # the process was killed here
    with opened(tmp_path, start=4) as taken:
        for step in range(4, 10):
            taken.take(step, {"loss": jnp.float32(1)}, 0.0, None)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [
        *((2, 0), (4, 0)),
        *((6, 1), (8, 1), (10, 1)),
    ]


@pytest.mark.parametrize("wrong", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize(("newest", "words"), [(None, "no checkpoint yet"), (5, "of step 5")])
def test_stops_at_what_is_not_finite(tmp_path, wrong, newest, words):
    with opened(tmp_path) as taken:
        with pytest.raises(InputError, match=rf"Step 8: dice is not finite.*{words}"):
            taken.take(7, {"loss": jnp.float32(1), "dice": jnp.float32(wrong)}, 0.0, newest)


def test_tensorboard_without_its_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(InputError, match="pip install 'samlight-jax\\[tensorboard\\]'"):
        opened(tmp_path, tensorboard=True)


def test_utilisation_needs_a_known_device(tmp_path):
    assert log.peak_flops() is None  # a CPU

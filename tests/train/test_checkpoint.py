import dataclasses

import jax
import numpy as np
import pytest

from samlight_jax.errors import InputError
from train import checkpoint, sharding
from train.config import Mesh, TrainConfig

STATE = {"a.kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3), "step": np.int32(4)}


@pytest.fixture
def where():
    return sharding.shardings(STATE, sharding.make_mesh(Mesh()))


def opened(folder, config=None, keep=2):
    config = config or TrainConfig()
    return checkpoint.Checkpoints(folder, checkpoint.identity(config, teacher="t"), keep)


def saved(folder, where, steps=(4,), **kwargs):
    checkpoints = opened(folder, **kwargs)
    for step in steps:
        state = sharding.placed(STATE | {"step": np.int32(step)}, where)
        checkpoints.save(step, state, {"step": step})
    checkpoints.close()


def test_gives_back_what_was_saved(tmp_path, where):
    saved(tmp_path, where)
    state, data = opened(tmp_path).restore(jax.eval_shape(lambda: STATE), where)
    assert data == {"step": 4}
    assert state["step"] == 4 and np.array_equal(state["a.kernel"], STATE["a.kernel"])
    assert state["a.kernel"].sharding == where["a.kernel"]


def test_keeps_the_newest(tmp_path, where):
    saved(tmp_path, where, steps=(2, 4, 6))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
    assert opened(tmp_path).latest == 6


def test_a_step_is_saved_once(tmp_path, where):
    checkpoints = opened(tmp_path)
    state = sharding.placed(STATE, where)
    checkpoints.save(4, state, {})
    checkpoints.manager.wait_until_finished()
    checkpoints.save(4, state, {})
    checkpoints.close()


def test_another_run_is_refused_by_what_differs(tmp_path, where):
    saved(tmp_path, where)
    other = dataclasses.replace(TrainConfig(), clip=0.5)
    with pytest.raises(InputError, match=r"clip was 1.0 and is 0.5\. Continue with the same"):
        opened(tmp_path, other).restore(jax.eval_shape(lambda: STATE), where)


def test_where_and_how_often_may_differ(tmp_path, where):
    saved(tmp_path, where)
    other = dataclasses.replace(TrainConfig(), out="elsewhere", log_every=3, mesh=Mesh(fsdp=8))
    opened(tmp_path, other).restore(jax.eval_shape(lambda: STATE), where)


def test_a_write_that_was_cut_off_is_no_checkpoint(tmp_path, where):
    saved(tmp_path, where)
    (tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir()
    assert opened(tmp_path).latest == 4


def test_no_checkpoint_is_none(tmp_path):
    assert opened(tmp_path).latest is None

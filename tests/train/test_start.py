import jax
import numpy as np
import pytest

from pallas_kernels import device
from samlight_jax import weights
from samlight_jax.errors import InputError
from tests.train import runs
from train import augment, start
from train.config import TrainConfig
from train.step import EMBEDDING, Seen, teach

SMALL = {
    **{"width": 32, "depth": 2, "heads": 2, "image_size": 64, "canvas": 64, "batch": 2},
    **{"dtype": "float32", "data": ("unused",), "schedule": "ramp"},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(runs.teacher(tmp_path_factory.mktemp("start")))


def begun(teacher, **changes):
    return start.prepare(TrainConfig(**SMALL | {"teacher": teacher} | changes))


def test_stage_1_trains_the_encoder_and_projectors(teacher):
    state = begun(teacher).state()
    assert all(name.startswith(("image_encoder.", "projectors.")) for name in state.params)
    assert {n for n in state.params if n.startswith("projectors.")} == {
        f"projectors.blocks.{i}.{part}" for i in range(2) for part in ("kernel", "bias")
    }
    assert not any(name.startswith("projectors.") for name in state.ema)
    assert all(name.startswith(("mask_decoder.", "prompt_encoder.")) for name in state.frozen)
    assert all(name.endswith((".bn.mean", ".bn.var")) for name in state.statistics)
    assert state.statistics and state.frozen


def test_a_run_goes_on_from_a_file_in_bfloat16_in_float32(teacher, tmp_path):
    begins = begun(teacher)
    low = {name: np.asarray(x, jax.numpy.bfloat16) for name, x in begins.arrays.items()}
    weights.save(tmp_path / "low.safetensors", low, begins.task.student)
    state = begun(teacher, init_from=str(tmp_path / "low.safetensors")).state()
    for part in (state.params, state.frozen, state.statistics, state.ema):
        assert {x.dtype for x in part.values()} == {np.dtype(np.float32)}
    name = "image_encoder.blocks.0.attn.qkv.kernel"
    assert (state.params[name] == low[name].astype(np.float32)).all()


def test_state_holds_a_whole_model(teacher):
    begins = begun(teacher)
    state = begins.state()
    arrays = {**state.frozen, **state.ema}
    assert arrays.keys() == weights.expected(begins.task.student).keys()


def test_the_decoder_is_the_teachers(teacher):
    state, arrays = begun(teacher).state(), weights.read(teacher)[0]
    assert all(np.array_equal(x, arrays[name]) for name, x in state.frozen.items())


def test_nothing_is_matched_for_the_output_alone(teacher):
    begins = begun(teacher, schedule="output_only")
    assert begins.task.pairs == () and not begins.projectors
    assert begins.widths == {EMBEDDING: 256}


def test_moments_are_those_of_the_teachers_embedding(teacher):
    begins = begun(teacher)
    rng = np.random.default_rng(0)
    photos = [rng.integers(0, 255, (2, 64, 64, 3), np.uint8) for _ in range(40)]
    sizes = np.array([[64, 64], [30, 64]], np.int32)

    def look(batch, keys):
        return Seen(augment.views(batch, sizes, keys, None, 64))

    model = begins.teacher
    found = start.prepared(begins.task, model, look, iter(photos))
    assert found.keys() == {EMBEDDING, "blocks.0", "blocks.1"}
    tokens = []
    for some in photos[: start.SAMPLE // 2]:
        views = look(some, jax.random.split(jax.random.key(0), 2)).views
        embedding, _ = teach(begins.task, model, views)
        tokens.append(np.asarray(embedding, np.float64)[np.asarray(views.inside(4))])
    tokens = np.concatenate(tokens)
    assert np.allclose(found[EMBEDDING].mean, tokens.mean(0), atol=1e-5)
    assert np.allclose(found[EMBEDDING].deviation, tokens.std(0), rtol=1e-4)

    state = begins.state(found)
    norm = "image_encoder.neck.norm2."
    assert np.array_equal(state.params[f"{norm}bias"], found[EMBEDDING].mean)
    assert np.array_equal(state.params[f"{norm}scale"], found[EMBEDDING].deviation)


def test_a_start_of_another_shape_is_refused(tmp_path, teacher):
    begins = begun(teacher)
    state = begins.state()
    path = tmp_path / "model.safetensors"
    arrays = {n: np.asarray(x) for n, x in {**state.frozen, **state.ema}.items()}
    weights.save(path, arrays, begins.task.student)
    again = begun(teacher, stage=2, init_from=str(tmp_path)).state()
    assert all(np.array_equal(arrays[n], x) for n, x in again.frozen.items())
    assert any(name.startswith("mask_decoder.") for name in again.params)
    with pytest.raises(InputError, match="give the same --student, --width"):
        begun(teacher, stage=2, init_from=str(path), depth=3)


def test_floating_point_operations_grow_with_the_student(teacher):
    one, deeper = begun(teacher).flops(), begun(teacher, depth=4).flops()
    assert one and deeper and 0 < one < deeper
    with device.assume(device.Device("gpu", "NVIDIA H200", (9, 0))):
        assert begun(teacher).flops() == one  # whose kernels XLA cannot look into

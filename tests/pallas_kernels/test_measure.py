import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import chain, dilated_attention_qkvpacked, measure
from pallas_kernels.shapes import SHAPES, Shape


def test_sets_of_inputs_together_exceed_the_cache_and_differ():
    arrays = [jax.ShapeDtypeStruct((1 << 22,), jnp.float32)]
    sets = measure.inputs(arrays, measure.sets_beyond_cache(arrays))
    assert len(sets) * (16 << 20) >= measure.BEYOND_CACHE
    assert not jnp.array_equal(sets[0][0], sets[1][0])
    assert abs(float(jnp.std(sets[-1][0])) - 1) < 0.01
    assert measure.sets_beyond_cache([jax.ShapeDtypeStruct((2,), jnp.float32)]) == 32
    assert measure.sets_beyond_cache([jax.ShapeDtypeStruct((1 << 30,), jnp.float32)]) == 4


def test_a_chain_calls_on_every_set_and_one_after_another():
    sets = measure.inputs([jax.ShapeDtypeStruct((128, 128), jnp.float32)] * 2, 3)

    def function(x, y):
        return [x @ y, x + y]

    program = measure.chained(function)
    for (product, total), (x, y) in zip(program(sets), sets, strict=True):
        assert jnp.allclose(product, x @ y, atol=1e-4) and jnp.array_equal(total, x + y)
    lowered = program.lower(sets)
    assert lowered.as_text().count("optimization_barrier") == 2
    # Three products are left: no call was merged with another, none was dropped.
    assert lowered.compile().cost_analysis()["flops"] >= 3 * 2 * 128**3


def test_times_are_of_one_call():
    def program(sets):
        time.sleep(0.002 * len(sets))
        return jnp.zeros(())

    found = measure.times(program, [[None] * 2] * 2, seconds=0.05)
    assert 2000 <= found.p10_us <= found.median_us <= found.p90_us
    assert found.median_us < 4000
    assert found.samples >= 3 and found.calls % 4 == 0
    assert measure.times(program, [[None] * 4], seconds=0).samples == 3


def test_digits():
    assert measure.digits(np.float64(123456)) == 123500 and measure.digits(0.00123456) == 0.001235


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "x.json"
    measure.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        measure.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_machine_names_the_device_and_the_versions():
    machine = measure.machine()
    assert machine["jax"] == jax.__version__ and machine["device"] == jax.devices()[0].device_kind
    assert machine["date"][:2] == "20" and machine.keys() >= {"platform", "driver"}


@pytest.mark.parametrize("name", ["window16_b1_6x64", "raster1024_r2_b16_6x64", "sam_vit_h_global"])
def test_the_arrays_of_a_shape_are_a_valid_call(name):
    shape = SHAPES[name]
    qkv, *rel = measure.arrays_of(shape)

    def call(qkv, *rel):
        return dilated_attention_qkvpacked(
            qkv,
            segment=shape.segment,
            dilation=shape.grid.dilation,
            implementation="reference",
            **dict(zip(("rel_h", "rel_w"), rel, strict=False)),
        )

    out = jax.eval_shape(call, qkv, *rel)
    assert out.shape == (shape.batch, *shape.size, shape.heads, shape.head_dim)
    assert out.dtype == jnp.bfloat16 and len(rel) == 2 * shape.rel


def test_refusals_are_the_chain_s():
    shape = Shape(batch=1, size=(4, 4), segment=(4, 4), heads=1, head_dim=8)
    found = measure.refusals(shape)
    assert list(found) == list(chain.CHAIN) and found["reference"] is None


@pytest.mark.parametrize(
    ("kind", "slug"), [("NVIDIA H200", "h200"), ("TPU v5 lite", "tpu_v5_lite")]
)
def test_the_file_is_named_after_the_device(kind, slug):
    assert measure.slug(kind) == slug

import pytest

from pallas_kernels.shapes import SHAPES, Shape
from samlight_jax import PRESETS


@pytest.mark.parametrize("name", ["window16_b1_6x64", "grid_r4_b1_6x64"])
def test_are_those_of_samlight_t(name):
    encoder, shape = PRESETS["samlight_t"].encoder, SHAPES[name]
    assert encoder.heads * shape.head_dim == encoder.width
    assert encoder.heads == shape.heads
    patterns = {(pattern.segment, pattern.dilation) for pattern in encoder.attention}
    assert (shape.segment, shape.dilation) in patterns


@pytest.mark.parametrize("size", "bh")
def test_are_those_of_the_teachers(size):
    encoder = PRESETS[f"sam_vit_{size}"].encoder
    for block in ("window14", "global"):
        shape = SHAPES[f"sam_vit_{size}_{block}"]
        assert (shape.heads, shape.heads * shape.head_dim) == (encoder.heads, encoder.width)


def test_work_is_counted_by_hand():
    shape = Shape(batch=2, size=(4, 4), segment=(2, 2), heads=3, head_dim=16, rel=True)
    assert shape.keys == 4
    assert shape.flops == 2 * 16 * 3 * (4 * 16 * 2) * 2  # two products, 2 a multiply-add
    # q, k, v, out; rel_h and rel_w of 2 numbers; the log-sum-exp.
    assert shape.bytes_moved() == 2 * 16 * 3 * (4 * 16 * 2 + (2 + 2) * 2 + 4)


def test_raster_is_one_row():
    grid = SHAPES["raster4096_r4_b16_6x64"].grid
    assert (grid.dilation, grid.group) == ((1, 4), (1, 1024))

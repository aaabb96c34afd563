"""Crops and grids: segment-anything's own functions are the oracle."""

import importlib

import numpy as np
import pytest

from samlight_jax.automatic_mask_generator_crops import boxes, crops_of, grids_of
from tests import oracles


@pytest.fixture(scope="module")
def amg():
    return importlib.import_module(f"{oracles.segment_anything().__name__}.utils.amg")


@pytest.mark.parametrize("size", [(480, 640), (37, 1000), (333, 334)])
@pytest.mark.parametrize(("layers", "ratio"), [(0, 0.3), (3, 512 / 1500), (2, 0.0)])
def test_crops_are_sams(amg, size, layers, ratio):
    want_boxes, want_layers = amg.generate_crop_boxes(size, layers, ratio)
    got = boxes(size, layers, ratio)
    assert [list(box) for _, box in got] == want_boxes
    assert [layer for layer, _ in got] == want_layers


def test_grids_are_sams(amg):
    want = amg.build_all_layer_point_grids(7, 2, 2)
    got = grids_of(7, 2, 2, None)
    assert [len(grid) for grid in got] == [49, 9, 1]
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, theirs)


def test_a_crop_is_the_part_of_the_photograph_at_its_box():
    image = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)
    whole, *four = crops_of(7, image, 1, 0.3, 128)
    assert whole.box == (0, 0, 100, 60) and whole.pixels.shape == (77, 128, 3)
    assert len(four) == 4 and {crop.photo for crop in four} == {7}
    for crop in four:
        x1, y1, x2, y2 = crop.box
        assert crop.frame.original == (y2 - y1, x2 - x1) and crop.size == (60, 100)
    # At the frame's own size nothing is resized.
    (same,) = crops_of(0, image[:, :64], 0, 0.3, 64)
    np.testing.assert_array_equal(same.pixels, image[:, :64])

"""Run lengths: pycocotools and the masks themselves are the oracles."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from samlight_jax import automatic_mask_generator_runs as runs


@hypothesis.given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    seed=st.integers(0, 99),
    ink=st.sampled_from([0, 0.02, 0.5, 1]),
)
@hypothesis.settings(max_examples=60)
def test_runs_are_cocos(height, width, seed, ink):
    """Of masks in stripes of 16 columns with padded bits, and of a mask at once."""
    mask_utils = pytest.importorskip("pycocotools.mask")
    masks = np.random.default_rng(seed).random((3, height, width)) < ink
    tall, wide = -(-height // 16) * 16, -(-width // 16) * 16
    canvas = np.pad(masks, ((0, 0), (0, tall - height), (0, 0)), mode="edge")
    canvas = np.pad(canvas, ((0, 0), (0, 0), (0, wide - width)))
    bits = np.packbits(canvas.transpose(0, 2, 1), axis=2)
    collected = runs.Runs(3, (height, width))
    for first in range(0, wide, 16):
        collected.add(bits[:, first : first + 16], first)
    for mask, counts in zip(masks, collected.counts(), strict=True):
        assert counts.tolist() == runs.runs_of(mask).tolist()
        rle = {"size": [height, width], "counts": counts.tolist()}
        rle = mask_utils.frPyObjects(rle, height, width)
        np.testing.assert_array_equal(mask_utils.decode(rle), mask)
        np.testing.assert_array_equal(runs.mask_of(counts, (height, width)), mask)
        assert runs.area_of(counts) == mask.sum()
        x, y, w, h = mask_utils.toBbox(rle)
        box = (x, y, x + w - 1, y + h - 1) if mask.any() else (0, 0, 0, 0)
        assert runs.box_of(counts, height) == box
        text = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        assert runs.compressed(counts, (height, width))["counts"] == text


def picture_of(text):
    return np.array([[c == "#" for c in line] for line in text.split()])


SPOTS = picture_of("""
    ####....#
    #.##.....
    ####..##.
    .......#.
""")


@pytest.mark.parametrize(
    ("area", "want"),
    [
        (1, SPOTS),
        (2, picture_of("####..... ####..... ####..##. .......#.")),
        (5, picture_of("####..... ####..... ####..... .........")),
        (99, picture_of("######### ######### ######### #########")),
    ],
)
def test_small_regions_go(area, want):
    """One hole of 1 pixel; islands of 12 with it filled, 3 and 1 pixels; a background of 20."""
    pytest.importorskip("cv2")
    got, changed = runs.without_small_regions(SPOTS, area)
    np.testing.assert_array_equal(got, want)
    assert changed == (area > 1)


def test_the_largest_island_stays_though_it_is_small():
    pytest.importorskip("cv2")
    wide = np.zeros((40, 40), bool)
    wide[:4, :9] = SPOTS
    got, changed = runs.without_small_regions(wide, 99)
    assert changed and got.sum() == 12 and got[:3, :4].all()
    nothing = np.zeros((20, 20), bool)
    got, changed = runs.without_small_regions(nothing, 9)
    assert not changed and not got.any()

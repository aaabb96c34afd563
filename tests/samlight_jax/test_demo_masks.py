"""Many masks together: whose pixel is whose, by hand on a few pixels."""

import numpy as np
import pytest

from samlight_jax.demo_masks import annotation, coloured, label_map

SIZE = (2, 3)
ALL, MIDDLE, NONE = [0, 6], [2, 2, 2], [6]  # run lengths, column by column


@pytest.mark.parametrize(
    ("counts", "row"),
    [([ALL, MIDDLE], [1, 2, 1]), ([MIDDLE, ALL], [2, 1, 2]), ([NONE, MIDDLE], [0, 2, 0])],
)
def test_the_smallest_mask_has_the_pixel(counts, row):
    labels = label_map(counts, SIZE)
    assert labels.dtype == np.uint16
    np.testing.assert_array_equal(labels, [row, row])


def test_no_masks_are_no_labels():
    assert not label_map([], SIZE).any()


def test_each_mask_has_its_colour_and_a_line_around():
    labels = np.zeros((8, 12), np.uint16)
    labels[:, 4:8], labels[:, 8:] = 1, 2
    image = np.full((4, 6, 3), 100, np.uint8)  # half the size
    shown = np.asarray(coloured(image, labels))
    assert shown.shape == image.shape
    assert (shown[:, :2] == 100).all()
    assert (shown[:, [2, 4]] == 255).all()
    first, second = shown[0, 3], shown[0, 5]
    assert (shown[:, 3] == first).all() and (shown[:, 5] == second).all()
    assert len({(100, 100, 100), tuple(first), tuple(second)}) == 3


@pytest.mark.parametrize(
    ("counts", "area", "bbox"),
    [(MIDDLE, 2, [1, 0, 1, 2]), (ALL, 6, [0, 0, 3, 2]), (NONE, 0, [0, 0, 0, 0])],
)
def test_an_annotation_counts_pixels_as_coco_does(counts, area, bbox):
    assert annotation(counts, SIZE) == {
        "segmentation": {"size": [2, 3], "counts": counts},
        "area": area,
        "bbox": bbox,
    }

"""Overlays show the mask, its outline and the prompt, and leave the rest as it was."""

import numpy as np

from samlight_jax.draw import BACKGROUND, FOREGROUND, MASK, OUTLINE, overlay

GREY = np.full((80, 100, 3), 100, np.uint8)


def test_only_the_mask_its_edge_and_the_prompt_change():
    mask = np.zeros((80, 100), bool)
    mask[20:60, 30:100] = True
    shown = np.asarray(overlay(GREY, mask))
    np.testing.assert_array_equal(shown[40, 60], 50 + MASK // 2)
    for edge in ((20, 60), (59, 60), (40, 30)):
        np.testing.assert_array_equal(shown[edge], OUTLINE)
    np.testing.assert_array_equal(shown[40, 99], 50 + MASK // 2)  # the border is no edge
    np.testing.assert_array_equal(shown[~mask], GREY[~mask])


def test_points_and_box_have_their_colours():
    points = [(20, 30, 1), (70, 50, 0)]
    shown = np.asarray(overlay(GREY, np.zeros((80, 100), bool), points=points, box=(5, 5, 95, 75)))
    np.testing.assert_array_equal(shown[30, 20], FOREGROUND)
    np.testing.assert_array_equal(shown[50, 70], BACKGROUND)
    np.testing.assert_array_equal(shown[5, 50], FOREGROUND)

"""The documentation's pictures: what is drawn is what is computed, and the files are small."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import samlight_jax
from tests.models import random_model

pytest.importorskip("skimage")
DOCS = Path(__file__).resolve().parents[1] / "docs"
SPEC = importlib.util.spec_from_file_location("docs_figures", DOCS / "figures.py")
assert SPEC and SPEC.loader
figures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(figures)
PICTURES = ("prompts.jpg", "three_masks.jpg", "everything.jpg", "failures.jpg", "patterns.png")


def same_group(segment, dilation):
    """Which tokens of the map share segment and residue with the query, one axis at a time."""
    place = np.arange(figures.SIDE)
    seen = [
        (place // s == q // s) & (place % s % dilation == q % s % dilation)
        for s, q in zip(segment, figures.QUERY, strict=True)
    ]
    return seen[0][:, None] & seen[1]


@pytest.mark.parametrize("segment, dilation", [((4, 4), 1), ((8, 8), 2), ((16, 16), 4)], ids=str)
def test_the_keys_that_are_drawn_are_those_of_the_group(segment, dilation):
    reach = figures.keys_of(segment=segment, dilation=dilation)[..., 0]
    want = same_group(segment, dilation)
    np.testing.assert_allclose(reach, want / want.sum() * 8, atol=1e-6)  # 8: the head's width


def test_a_raster_pattern_is_drawn_row_by_row():
    reach = figures.keys_of(segment=64, dilation=4)[..., 0]
    place, query = np.arange(256), 16 * figures.QUERY[0] + figures.QUERY[1]
    want = (place // 64 == query // 64) & (place % 4 == query % 4)
    np.testing.assert_array_equal(reach.ravel() > 0, want)


def test_in_a_mixture_a_key_counts_once_for_each_pattern():
    reach = figures.keys_of(patterns=[((4, 4), 1), ((16, 16), 4)])[..., 0]
    count = same_group((4, 4), 1).astype(int) + same_group((16, 16), 4)
    np.testing.assert_allclose(reach, count / count.sum() * 8, atol=1e-6)
    assert count.max() == 2 == count[figures.QUERY]


def test_every_head_covers_its_own_residue():
    cells = figures.covered(segment=(8, 8), dilation=2)[4::12, 4::12, :3]
    for row, column in ((0, 0), (0, 1), (1, 0), (5, 6)):
        head = 2 * (row % 2) + column % 2
        np.testing.assert_allclose(cells[row, column], figures.HEADS[head])


def test_all_pictures_are_made(tmp_path, monkeypatch):
    predictor = samlight_jax.SamPredictor
    monkeypatch.setattr(samlight_jax, "SamPredictor", lambda *_: predictor(random_model()))
    figures.main(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_the_pictures_are_there_and_small(name):
    assert 0 < (DOCS / "images" / name).stat().st_size < 100_000

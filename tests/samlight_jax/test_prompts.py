"""Prompts become slots: which tokens are there, where they lie, and what a mask becomes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samlight_jax import InputError, mask_to_input
from samlight_jax.preprocess import Frame
from samlight_jax.prompts import BUCKETS, assemble
from tests.models import TINY

FRAME = Frame((40, 60), TINY.image_size)
MASK = np.zeros((1, 16, 16))


def tokens(point_coords=None, point_labels=None, boxes=None, *, absent=False):
    """The (label, x, y) of every valid slot of a single prompt, in photograph pixels."""
    rows = [None if x is None else np.asarray(x)[None] for x in (point_coords, point_labels, boxes)]
    prompts = assemble(FRAME, TINY, 1, *rows, absent=absent, roomy=True)
    assert prompts.coords.shape[1] in BUCKETS
    valid = prompts.valid[0]
    places = prompts.coords[0][valid] / FRAME.scale
    labels = prompts.labels[0][valid]
    return [(int(k), *np.round(p, 3)) for k, p in zip(labels, places, strict=True)]


def test_points_get_sams_pad_point_and_boxes_do_not():
    assert tokens([[3, 4], [5, 6]], [1, 0]) == [(1, 3, 4), (0, 5, 6), (-1, 0, 0)]
    assert tokens(boxes=[1, 2, 30, 40]) == [(2, 1, 2), (3, 30, 40)]
    assert tokens([[3, 4]], [1], [1, 2, 30, 40]) == [(1, 3, 4), (2, 1, 2), (3, 30, 40)]
    assert tokens() == []


def test_minus_one_is_a_token_for_predict_and_nothing_for_a_batch():
    given_ = ([[3, 4], [5, 6]], [1, -1])
    assert tokens(*given_) == [(1, 3, 4), (-1, 5, 6), (-1, 0, 0)]
    assert tokens(*given_, absent=True) == [(1, 3, 4), (-1, 0, 0)]
    assert tokens(*given_, [-1] * 4, absent=True) == [(1, 3, 4), (-1, 0, 0)]
    assert tokens([[3, np.nan]], [-1], [1, 2, 3, 4], absent=True) == [(2, 1, 2), (3, 3, 4)]
    assert tokens([[3, 4]], [-1], [-1] * 4, absent=True) == []


@settings(max_examples=50)
@given(st.integers(0, 600))
def test_any_number_of_points_fits_its_bucket(count):
    coords, labels = np.ones((1, count, 2)), np.ones((1, count))
    prompts = assemble(FRAME, TINY, 1, coords, labels, absent=False, roomy=True)
    slots = prompts.coords.shape[1]
    assert slots in BUCKETS or slots % BUCKETS[-1] == 0
    assert prompts.valid.sum() == (count + 1 if count else 0)
    assert slots < 4 * max(count + 3, BUCKETS[0])


def test_a_point_or_a_box_takes_three_slots_unless_there_is_room():
    point, box = np.ones((4, 1, 2)), np.array([[1.0, 1, 9, 9]] * 4)
    for parts in ((point, point[..., 0], None), (None, None, box), (point, point[..., 0], box)):
        assert assemble(FRAME, TINY, 4, *parts, absent=False).valid.shape == (4, 3)
        assert assemble(FRAME, TINY, 4, *parts, absent=False, roomy=True).valid.shape == (4, 8)
    two = np.ones((4, 2, 2))
    assert assemble(FRAME, TINY, 4, two, two[..., 0], box, absent=False).valid.shape == (4, 8)


def test_masks_are_absent_where_a_batch_says_minus_one():
    masks = np.stack([MASK[0], MASK[0] - 1])
    prompts = assemble(FRAME, TINY, 2, masks=masks, absent=True)
    assert prompts.has_mask.tolist() == [True, False]
    assert assemble(FRAME, TINY, 2, masks=masks, absent=False).has_mask.all()
    assert assemble(FRAME, TINY, 2, absent=False)[-2:] == (None, None)


@pytest.mark.parametrize("size", [(400, 600), (300, 50), (1024, 1024)])
def test_a_full_size_mask_becomes_logits_in_its_place(size):
    height, width = size
    mask = np.zeros(size, bool)
    mask[height // 4 : height // 2, width // 2 :] = True
    logits = mask_to_input(mask)
    assert logits.shape == (1, 256, 256) and logits.dtype == np.float32
    in_rows, in_columns = (side / 4 for side in Frame(size, 1024).input)
    rows, columns = np.mgrid[:256, :256] + 0.5
    inside = (rows > in_rows / 4) & (rows < in_rows / 2)
    inside &= (columns > in_columns / 2) & (columns < in_columns)
    # But for the cells that the edge crosses.
    wrong = (logits[0] > 0) != inside
    assert wrong.sum() <= 2 * (in_rows / 4 + in_columns / 2)
    np.testing.assert_allclose([logits.min(), logits.max()], [-6.9, 6.9], atol=0.01)


def test_masks_that_are_none_are_refused():
    with pytest.raises(InputError, match=r"`mask` has shape \(1, 4, 4\); expected"):
        mask_to_input(np.zeros((1, 4, 4)))
    with pytest.raises(InputError, match="holds values from 0 to 255"):
        mask_to_input(np.array([[0, 255]]))
    with pytest.raises(InputError, match="is empty"):
        mask_to_input(np.zeros((0, 4)))

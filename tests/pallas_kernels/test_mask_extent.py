"""Masks measured without being made: Pallas's interpreter on any machine, and a real GPU."""

import jax
import numpy as np
import pytest

from pallas_kernels import mask_extent as module
from pallas_kernels.device import Device, assume
from pallas_kernels.mask_extent import Resize, mask_extent
from tests.pallas_kernels.conftest import INTERPRETED

LEVELS = np.array([1, 0, -1], np.float32)
SIZES = [(50, 70), (24, 17), (1, 40), (600, 90)]  # of photographs


def linear(n, length):
    """(length, n): each pixel between the two nearest of n, as PyTorch's bilinear places them."""
    at = np.clip((np.arange(length) + 0.5) * n / length - 0.5, 0, n - 1)
    return np.maximum(1 - np.abs(at[:, None] - np.arange(n)), 0)


def draw(size):
    """Logits of masks that are everywhere, rare, and nowhere; resized by way of 64 pixels."""
    low = np.random.default_rng(0).normal(size=(3, 16, 16)).astype(np.float32)
    low -= np.array([0, 1.5, 9], np.float32)[:, None, None]
    matrices = [linear(64, length) @ linear(16, 64) for length in size]
    rows, columns = (Resize.of(matrix.astype(np.float32), 1024) for matrix in matrices)
    return low, rows, columns, matrices[0] @ low @ matrices[1].T


@pytest.mark.parametrize("size", SIZES)
def test_counts_and_borders_are_the_photographs(kernel, size):
    low, rows, columns, full = draw(size)
    counts, box = jax.jit(mask_extent)(low, np.ones(3, bool), rows, columns, LEVELS)
    want = [[(mask > level).sum() for level in LEVELS] for mask in full]
    assert np.abs(np.array(counts) - want).max() <= 1  # a pixel whose logit is the level
    for found, mask in zip(np.array(box), full, strict=True):
        y, x = np.nonzero(mask > 0)
        assert found.tolist() == ([x.min(), y.min(), x.max(), y.max()] if len(x) else [0] * 4)


def test_what_is_not_wanted_is_left_out(kernel):
    low, rows, columns, _ = draw((50, 70))
    every = mask_extent(low, np.ones(3, bool), rows, columns, LEVELS)
    some = mask_extent(low, np.array([False, True, False]), rows, columns, LEVELS)
    for x, y in zip(every, some, strict=True):
        assert np.array(x[0]).any()
        np.testing.assert_array_equal(y[0], 0)
        np.testing.assert_array_equal(y[1], x[1])


def test_more_columns_than_a_program_has(kernel):
    low, rows, columns, full = draw((200, 1000))
    counts, box = mask_extent(low, np.ones(3, bool), rows, columns, LEVELS)
    assert int(counts[0, 1]) == (full[0] > 0).sum()
    assert int(box[0, 2]) == np.nonzero(full[0] > 0)[1].max() > module.COLUMNS


def test_a_resizing_that_it_does_not_take_is_none():
    wide = np.full((2, 8), 1 / 8)
    assert Resize.of(wide, 512) is None
    assert Resize.of(np.eye(4), 500) is None
    assert Resize.of(np.eye(4)[::-1], 512) is None
    small = Resize.of(np.ones((5, 1)), 512)
    np.testing.assert_array_equal(small.weights.sum(0), np.arange(512) < 5)


def test_without_a_gpu_it_says_so():
    low, *given = draw((24, 17))[:3]
    with assume(Device("cpu", "cpu", None)), pytest.raises(ValueError, match="NVIDIA GPU"):
        mask_extent(low, np.ones(3, bool), *given, LEVELS)
    with assume(INTERPRETED):
        assert module.unsupported(low.dtype) is None

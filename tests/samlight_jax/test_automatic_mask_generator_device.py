"""The device part: tiles, suppression, memory; the plain computation is the oracle."""

import jax
import numpy as np
import pytest

from pallas_kernels.device import assume
from samlight_jax import automatic_mask_generator_device as on
from samlight_jax.flat import flat
from samlight_jax.postprocess import photo_logits
from samlight_jax.preprocess import Frame
from tests.models import TINY, random_model
from tests.pallas_kernels.conftest import INTERPRETED

SIDE = TINY.image_size


@pytest.mark.parametrize(
    ("size", "side"),
    [
        *(((1, 40), 64), ((24, 17), 64), ((200, 130), 64), ((1024, 700), 64), ((100, 3000), 64)),
        *(((480, 640), 1024), ((1024, 700), 1024), ((1600, 2100), 1024)),
    ],
)
def test_the_tiles_make_the_photographs_logits(size, side):
    frame = Frame(size, side)
    low = np.random.default_rng(0).normal(size=(2, side // 4, side // 4)).astype(np.float32)
    want = photo_logits(low, frame)
    height, width = size
    rows, columns = on.axes(frame, (0, 0, width, height), size)
    tile = jax.jit(on._tile)
    down, across = -(-height // on.TILE), -(-width // on.TILE)
    got = np.block(
        [[np.array(tile(low, rows, columns, y, x)) for x in range(across)] for y in range(down)]
    )
    band = rows.weights.shape[2]  # all of a small frame; a part where the photograph is large
    assert band == columns.weights.shape[2] == (132 if max(size) >= side == 1024 else side // 4)
    assert got.shape == (2, down * on.TILE, across * on.TILE)
    np.testing.assert_allclose(got[:, :height, :width], want, atol=1e-5)
    # Behind the lower end the last row goes on, so that packed bits never change there.
    assert (got[:, height:] == got[:, height - 1 : height]).all()
    bits = np.asarray(on.tile_bits(low, rows, columns, 0, 0))
    np.testing.assert_array_equal(
        np.unpackbits(bits, axis=2), got[:, : on.TILE, : on.TILE].transpose(0, 2, 1) > 0
    )


def test_a_crops_tiles_lie_in_the_photograph():
    size, box = (700, 600), (200, 30, 450, 700)
    frame = Frame((670, 250), SIDE)
    low = np.random.default_rng(0).normal(size=(1, SIDE // 4, SIDE // 4)).astype(np.float32)
    want = np.zeros(size, np.float32)
    want[30:700, 200:450] = photo_logits(low, frame)[0]
    rows, columns = on.axes(frame, box, size)
    tile = jax.jit(on._tile)
    got = np.block([[np.array(tile(low, rows, columns, y, x)) for x in (0, 1)] for y in (0, 1)])
    np.testing.assert_allclose(got[0, :700, :600], want, atol=1e-5)
    assert (got[0, 700:] == got[0, 699]).all()


def test_the_kernel_measures_as_the_tiles_do():
    size = (50, 90)
    frame = Frame(size, SIDE)
    whole = (0, 0, *size[::-1])
    levels = np.float32(0), np.float32(0), np.float32(0.1)
    limits = on.Limits(*levels, *[np.array(whole, np.int32)] * 2)
    embedding = np.random.default_rng(0).normal(size=(SIDE // 16, SIDE // 16, 256))
    points = np.array([[5, 6], [40, 20], [60, 30]], np.float32)
    start = flat(random_model()), embedding.astype(np.float32), points
    tiles = on.measure(*start, *on.measures(frame), limits)
    with assume(INTERPRETED):
        resizes = on.measures(frame)
        assert all(isinstance(each, on.Resize) for each in resizes)
        kernel = on.measure(*start, *resizes, limits)
    assert len(set(np.array(tiles.stability).tolist())) > 3 and np.array(tiles.box).any()
    np.testing.assert_allclose(kernel.stability, tiles.stability, atol=1e-3)
    np.testing.assert_array_equal(kernel.box, tiles.box)
    np.testing.assert_array_equal(kernel.keep, tiles.keep)


def greedy(boxes, threshold):
    """Boxes that no better kept box overlaps too much; best first."""

    def area(box):
        return np.prod(np.maximum(box[2:] - box[:2], 0))

    kept = []
    for i, box in enumerate(boxes):
        for k in kept:
            both = area(np.r_[np.maximum(box[:2], boxes[k][:2]), np.minimum(box[2:], boxes[k][2:])])
            if both > threshold * (area(box) + area(boxes[k]) - both):
                break
        else:
            kept.append(i)
    return kept


@pytest.mark.parametrize("seed", range(5))
def test_suppression_is_the_greedy_one(seed):
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 30, (60, 2))
    boxes = np.concatenate([corner, corner + rng.integers(0, 25, (60, 2))], axis=1)
    padded = np.zeros((64, 4), np.float32)
    padded[:60] = boxes
    for threshold in (0.1, 0.33, 0.72):
        keep = np.asarray(on.suppress(padded, np.int32(60), np.float32(threshold)))
        assert np.flatnonzero(keep).tolist() == greedy(boxes, threshold)
        assert 3 < keep.sum() < (60 if threshold < 0.5 else 61)


def test_a_long_chain_of_suppressions_is_greedy_too():
    """Each box beats the next: every other one stays, decided one after the other."""
    start = np.arange(64) * 4.0
    boxes = np.stack([start, start * 0, start + 10, start * 0 + 10], axis=1).astype(np.float32)
    keep = on.suppress(boxes, np.int32(64), np.float32(0.4))
    assert np.flatnonzero(keep).tolist() == list(range(0, 64, 2))


@pytest.mark.parametrize("size", [(500, 1500), (16000, 8000)])
def test_memory_does_not_grow_with_the_photograph(size):
    """The buffers of one batch of 64 points; 16 tiles or 512, whose masks would take 98 GB."""
    model = flat(random_model())
    rows, columns = on.axes(Frame(size, SIDE), (0, 0, *size[::-1]), size)
    limits = on.Limits(*np.zeros(3, np.float32), *np.zeros((2, 4), np.int32))
    embedding = np.zeros((SIDE // 16, SIDE // 16, 256), np.float32)
    points = np.zeros((64, 2), np.float32)

    lowered = jax.jit(on.measure).lower(model, embedding, points, rows, columns, limits)
    need = lowered.compile().memory_analysis()
    assert 0 < need.temp_size_in_bytes + need.argument_size_in_bytes < 1 << 27

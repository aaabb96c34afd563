import dataclasses
import functools
import types

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from samlight_jax.preprocess import PIXEL_MEAN, PIXEL_STD, Frame, device_pixels, host_pixels
from train import augment
from train.config import Augment

STILL = Augment(scale=(1, 1), aspect=1, whole=1, flip=0, colour=0, mosaic=0, paste=0)
SIDE, CANVAS = 64, 96
MANY = 32  # draws
GREY = np.array([0.299, 0.587, 0.114])


def changed(**fields):
    """Nothing varies but what is named."""
    return dataclasses.replace(STILL, **fields)


@functools.partial(
    jax.jit,
    static_argnames="side",
    compiler_options={"xla_backend_optimization_level": 0},  # compiles in a third of the time
)
def program(photos, sizes, keys, fields, side):
    varied = None if fields is None else types.SimpleNamespace(**fields)
    return augment.views(photos, sizes, keys, varied, side)


def views(photos, sizes, keys, varied, side=SIDE):
    """`augment.views` by one program for all values of `varied`."""
    fields = None if varied is None else dataclasses.asdict(varied)
    return jax.device_get(program(photos, sizes, keys, fields, side))


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def on_canvas(photos, canvas=CANVAS, beyond=0):
    """(b, canvas, canvas, 3), and the sizes."""
    found = np.full((len(photos), canvas, canvas, 3), beyond, np.uint8)
    for row, photo in zip(found, photos, strict=True):
        row[: photo.shape[0], : photo.shape[1]] = photo
    return found, np.array([photo.shape[:2] for photo in photos], np.int32)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def levels(seen):
    """The views' pixels from 0 to 255."""
    return np.asarray(seen.pixels) * PIXEL_STD + PIXEL_MEAN


def shown(seen, row):
    """One view, without what is beyond it."""
    height, width = seen.size[row]
    return levels(seen)[row, :height, :width]


# As they are.

DEVICE_PIXELS = jax.jit(device_pixels, static_argnames="frame")
SMALL, EQUAL = [(20, 30), (30, 20), (17, 17), (5, 63)], [(64, 64), (64, 40), (40, 64)]
LARGE = [(96, 70), (70, 96), (96, 96), (5, 90), (90, 5)]
SIZES = SMALL + EQUAL + LARGE  # than the frame of 64


def test_photographs_as_they_are_equal_the_predictors():
    """The predictor rounds to whole levels after each axis, twice at most; the views never do.

    So they differ by up to 1/2 + 1/2 level; from the predictor's own floats only by float32's
    error of two sums.
    """
    photos = [noise(*size, seed=i) for i, size in enumerate(SIZES)]
    seen = views(*on_canvas(photos), keys(len(photos)), None)
    for row, photo in enumerate(photos):
        frame = Frame(photo.shape[:2], SIDE)
        assert tuple(seen.size[row]) == frame.input
        rounded = host_pixels(photo, frame)
        assert (np.abs(seen.pixels[row] - rounded) * PIXEL_STD).max() <= 1.01
        exact = DEVICE_PIXELS(photo.astype(np.float32), frame)
        assert (np.abs(seen.pixels[row] - exact) * PIXEL_STD).max() <= 1e-3


@hypothesis.settings(max_examples=50)
@hypothesis.given(st.lists(st.tuples(st.integers(1, CANVAS), st.integers(1, CANVAS)), min_size=1))
def test_sizes_are_the_frames(sizes):
    sizes = [(h, w) for h, w in sizes if min(h, w) * SIDE >= max(h, w)][:12]
    sizes += [(1, 1)] * (12 - len(sizes))
    photos = np.zeros((12, CANVAS, CANVAS, 3), np.uint8)
    found = views(photos, np.array(sizes, np.int32), keys(12), None).size
    assert [tuple(size) for size in found] == [Frame(size, SIDE).input for size in sizes]


def test_a_thread_of_a_photograph_has_a_pixel():
    seen = views(*on_canvas([noise(96, 1)], canvas=CANVAS), keys(1), None, side=16)
    assert tuple(seen.size[0]) == (16, 1)
    assert np.any(seen.pixels[0, :, 0])


# What is shown, by photographs that know their places: red is x, green is y.


def map_of(height, width):
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, 0 * x], -1).astype(np.uint8)


def region(view):
    """(top, left, height, width, mirrored) of what a view of a `map_of` shows.

    In its middle levels rise by one a photograph's pixel: the view is larger, so that nothing is
    averaged.
    """
    height, width = view.shape[:2]
    rows, columns = view[height // 2, :, 0], view[:, width // 2, 1]
    np.testing.assert_allclose(view[..., 0], np.broadcast_to(rows, (height, width)), atol=1e-2)
    found = []
    for line in (columns, rows):
        quarter = len(line) // 4
        step = (line[-1 - quarter] - line[quarter]) / (len(line) - 1 - 2 * quarter)
        start = line[quarter] + 0.5 - (quarter + 0.5) * step
        found.append((start, start + step * len(line)))
    (top, bottom), (left, right) = found
    return top, min(left, right), bottom - top, abs(right - left), right < left


@pytest.mark.parametrize("height, width", [(60, 90), (90, 60)])
def test_area_and_aspect_stay_within_their_bounds(height, width):
    count = MANY
    for scale, aspect in (((0.2, 1.0), 1.5), ((0.8, 0.9), 3.0), ((0.3, 0.3), 1.0)):
        photos, sizes = on_canvas([map_of(height, width)] * count)
        varied = changed(scale=scale, aspect=aspect, whole=0, flip=0.5)
        seen = views(photos, sizes, keys(count), varied, CANVAS)
        found = np.array([region(shown(seen, row)) for row in range(count)])
        top, left, tall, wide, mirrored = found.T
        assert min(top.min(), left.min()) >= -0.02
        assert max((top + tall - height).max(), (left + wide - width).max()) <= 0.02
        area, turn = tall * wide / (height * width), (wide / tall) / (width / height)
        assert scale[0] - 0.01 <= area.min() and area.max() <= scale[1] + 0.01
        assert 1 / aspect - 0.02 <= turn.min() and turn.max() <= aspect + 0.02
        assert 0.25 <= mirrored.mean() <= 0.75
        if scale[0] < scale[1]:
            assert np.ptp(area) > 0.7 * np.ptp(scale)
            assert max(np.ptp(top / height), np.ptp(left / width)) > 0.1
            assert turn.min() < 0.9 and turn.max() > 1.1
        # The view has the shape of what it shows, but for the rounding to whole pixels.
        size = np.asarray(seen.size)
        np.testing.assert_array_equal(size.max(1), CANVAS)
        short = np.where(tall < wide, tall / wide, wide / tall) * CANVAS
        np.testing.assert_allclose(size.min(1), short, atol=0.6)


def test_a_flip_mirrors_what_is_shown():
    photos = on_canvas([noise(40, 90), noise(90, 40)] * 6)
    varied = changed(scale=(0.3, 1), whole=0.3)
    straight, mirrored = (
        views(*photos, keys(12), dataclasses.replace(varied, flip=share)) for share in (0, 1)
    )
    np.testing.assert_array_equal(straight.size, mirrored.size)
    for row in range(12):
        np.testing.assert_allclose(shown(straight, row), shown(mirrored, row)[:, ::-1], atol=1e-2)


def test_whole_views_show_all():
    photos = on_canvas([map_of(60, 90)] * MANY)
    seen = views(*photos, keys(MANY), changed(scale=(0.3, 0.5), whole=0.5), CANVAS)
    area = np.array([np.prod(region(shown(seen, row))[2:4]) for row in range(MANY)]) / (60 * 90)
    assert 0.25 <= (area > 0.99).mean() <= 0.75
    assert area[area < 0.99].max() < 0.51


# What is never shown.


def test_beyond_the_view_all_is_zero():
    photos = [noise(40, 90), noise(90, 40), noise(64, 64)] * 4
    for varied in (None, Augment()):
        seen = views(*on_canvas(photos, beyond=255), keys(12), varied)
        rows, columns = np.mgrid[:SIDE, :SIDE]
        for row, (height, width) in enumerate(np.asarray(seen.size)):
            beyond = (rows >= height) | (columns >= width)
            assert not np.any(seen.pixels[row][beyond])
            assert np.all(np.any(seen.pixels[row][~beyond], axis=-1))


@pytest.mark.parametrize(
    "varied, side",
    [(None, 64), (None, 128), (Augment(), 64), (Augment(mosaic=1, paste=1, whole=0), 64)],
)
def test_nothing_depends_on_the_rest_of_the_canvas(varied, side):
    photos = [noise(40, 90), noise(90, 40), noise(70, 70), noise(5, 9)] * 3
    clean, poisoned = (
        views(*on_canvas(photos, beyond=beyond), keys(12), varied, side) for beyond in (0, 255)
    )
    np.testing.assert_array_equal(clean.pixels, poisoned.pixels)


def test_inside_are_the_cells_whose_centres_are_in_the_view():
    seen = augment.Views(np.zeros((2, 64, 64, 3)), np.array([[64, 24], [7, 41]]))
    for side in (64, 16, 4):
        centres = (np.arange(side) + 0.5) * 64 / side
        want = [(centres < h)[:, None] & (centres < w) for h, w in seen.size]
        np.testing.assert_array_equal(seen.inside(side), want)


# Colour.


def test_colours_of_plain_photographs():
    """Without contrasts, brightness alone changes; grey stays grey."""
    varied = changed(colour=0.3)
    photos = on_canvas([np.full((40, 90, 3), 100, np.uint8)] * MANY)
    seen = views(*photos, keys(MANY), varied, CANVAS)
    factors = np.array([shown(seen, row) for row in range(MANY)]) / 100
    assert np.ptp(factors.reshape(MANY, -1), axis=1).max() < 1e-3
    bright = factors.reshape(MANY, -1)[:, 0]
    assert 0.7 <= bright.min() < 0.8 and 1.2 < bright.max() <= 1.3


def test_contrast_is_about_the_mean_of_what_is_shown():
    photo = np.full((40, 90, 3), 80, np.uint8)
    photo[:, 45:] = 120
    seen = views(*on_canvas([photo] * MANY), keys(MANY), changed(colour=0.3), CANVAS)
    dark, light = (np.array([shown(seen, row)[0, x, 0] for row in range(MANY)]) for x in (0, -1))
    bright = (dark + light) / 200
    assert 0.7 <= bright.min() < 0.8 and 1.2 < bright.max() <= 1.3
    contrast = (light - dark) / 40 / bright
    assert 0.699 <= contrast.min() < 0.8 and 1.2 < contrast.max() <= 1.301
    assert abs(np.corrcoef(bright, contrast)[0, 1]) < 0.4  # drawn apart


def test_saturation_keeps_the_grey():
    colour = np.array([140, 90, 100])
    photo = np.full((40, 90, 3), colour, np.uint8)
    seen = views(*on_canvas([photo] * MANY), keys(MANY), changed(colour=0.3), CANVAS)
    found = np.array([shown(seen, row)[0, 0] for row in range(MANY)])
    bright = found @ GREY / (colour @ GREY)
    assert 0.699 <= bright.min() < 0.8 and 1.2 < bright.max() <= 1.301
    chroma = (found - (found @ GREY)[:, None]) / (colour - colour @ GREY)
    np.testing.assert_allclose(chroma, np.broadcast_to(chroma[:, :1], chroma.shape), atol=1e-3)
    by = chroma[:, 0] / bright  # contrast and saturation, each from 0.7 to 1.3
    assert 0.49 <= by.min() < 0.75 and 1.25 < by.max() <= 1.69


def test_colours_stay_in_their_range():
    photos = on_canvas([noise(90, 90, seed=i) for i in range(12)])
    seen = views(*photos, keys(12), Augment(colour=1))
    found = levels(seen)[np.asarray(seen.inside(SIDE))]
    assert -1e-3 <= found.min() < 1 and 254 < found.max() <= 255.001


# Keys decide, and the neighbours.


def test_a_view_depends_on_its_key_and_photograph_alone():
    photos, sizes = on_canvas([noise(40 + 5 * i, 90 - 6 * i, seed=i) for i in range(12)])
    order, drawn = np.random.default_rng(0).permutation(12), keys(12)
    varied = Augment(mosaic=0, paste=0)
    want = views(photos, sizes, drawn, varied)
    got = views(photos[order], sizes[order], drawn[order], varied)
    np.testing.assert_array_equal(got.pixels, want.pixels[order])
    np.testing.assert_array_equal(got.size, want.size[order])
    again = views(photos, sizes, keys(12, seed=1), varied)
    assert np.abs(again.pixels - want.pixels).mean((1, 2, 3)).min() > 0.01


def plain(sizes):
    """Photographs of one level each, and the index of the photograph at each place of a view."""
    photos = [np.full((*size, 3), 20 * (i + 1), np.uint8) for i, size in enumerate(sizes)]
    return on_canvas(photos)


def owners(seen):
    """(b, s, s): whose level is shown, -1 beyond the view."""
    found = np.rint(levels(seen)[..., 0] / 20).astype(int) - 1
    return np.where(seen.inside(found.shape[1]), found, -1)


def rectangle(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return rows[0], columns[0], rows[-1] + 1, columns[-1] + 1


def test_a_mosaic_has_a_quarter_of_each_of_four():
    found = owners(views(*plain([(96, 96)] * 12), keys(12), changed(mosaic=1)))
    cuts = []
    for row, view in enumerate(found):
        top, left, bottom, right = rectangle(view == row)
        assert (top, left) == (0, 0)
        assert SIDE / 4 - 1 <= min(bottom, right) and max(bottom, right) <= 3 * SIDE / 4 + 1
        want = np.full((SIDE, SIDE), row)
        want[:bottom, right:] = (row - 1) % 12
        want[bottom:, :right] = (row - 2) % 12
        want[bottom:, right:] = (row - 3) % 12
        np.testing.assert_array_equal(view, want)
        cuts.append((bottom, right))
    assert len(set(cuts)) > 1


def test_a_paste_is_an_ellipse_of_the_next():
    count = 12
    found = owners(views(*plain([(96, 96)] * count), keys(count), changed(paste=1)))
    areas = []
    for row, view in enumerate(found):
        there = view == (row + 1) % count
        assert np.all(there | (view == row))
        top, left, bottom, right = rectangle(there)
        if 0 < top and 0 < left and bottom < SIDE and right < SIDE:  # wholly in the view
            areas.append(there.sum() / ((bottom - top) * (right - left)))
            for side in (bottom - top, right - left):
                assert 0.2 * SIDE - 2 <= side <= 0.7 * SIDE + 2
    assert len(areas) > 1
    np.testing.assert_allclose(areas, np.pi / 4, atol=0.05)


@pytest.mark.parametrize("share", ["mosaic", "paste"])
def test_others_are_shown_where_both_are(share):
    sizes = [(96, 30), (30, 96), (96, 60), (50, 96)] * 3
    seen = views(*plain(sizes), keys(12), changed(**{share: 1}))
    inside, found = np.asarray(seen.inside(SIDE)), owners(seen)
    others = 0
    for row, view in enumerate(found):
        assert set(np.unique(view[inside[row]])) <= set(range(12))
        for other in set(range(12)) - {row}:
            assert not np.any((view == other) & ~inside[other])
            others += (view == other).sum()
    assert others > 150


@pytest.mark.parametrize("share", ["mosaic", "paste"])
def test_shares_of_mixtures(share):
    count = MANY
    found = owners(views(*plain([(90, 90)] * 2), keys(2), changed(**{share: 1})))
    assert np.any(found[0] == 1) and np.any(found[1] == 0)  # a batch of two
    alone = owners(views(*plain([(90, 90)]), keys(1), changed(**{share: 1})))
    assert np.all(alone == 0)
    photos, sizes = on_canvas(
        [np.full((90, 90, 3), 20 * (i % 8 + 1), np.uint8) for i in range(count)]
    )
    found = owners(views(photos, sizes, keys(count), changed(**{share: 0.3}), CANVAS))
    mixed = np.mean([np.any(view != row % 8) for row, view in enumerate(found)])
    assert 0.1 <= mixed <= 0.5  # 0.3, within three and a half deviations


def test_masks_lie_on_what_they_mask():
    """A photograph that is white where its mask is: the view's mask is where the view is white."""
    canvas, side, low = 96, 64, 16
    shape = np.zeros((canvas, canvas), bool)
    shape[16:60, 24:76] = True
    photo = np.repeat(shape[..., None] * np.uint8(255), 3, axis=2)
    small = shape.reshape(24, 4, 24, 4).mean((1, 3)) > 0.5
    count = 24
    sizes = np.array([[72, 96], [96, 80]] * (count // 2), np.int32)
    photos = np.stack([photo] * count)
    masks = np.stack([[small, np.zeros_like(small)]] * count).astype(np.uint8)
    varied = Augment(colour=0, flip=0.5, whole=0.2).alone()
    given = keys(count)
    seen = augment.views(photos, sizes, given, varied, side)
    got = np.asarray(augment.masks(masks, sizes, given, varied, side, low))
    assert got.shape == (count, 2, low, low) and not got[:, 1].any()
    white = levels(seen)[..., 0].reshape(count, low, 4, low, 4).mean((2, 4))
    white = np.where(np.asarray(seen.inside(low)), white, 0)
    sure = abs(white - 127.5) > 80  # away from the edge
    assert sure.mean() > 0.7
    assert (got[:, 0] == (white > 127.5))[sure & np.asarray(seen.inside(low))].all()
    shares = got[:, 0].mean((1, 2))
    assert shares.min() < shares.max() / 2  # the crops do differ

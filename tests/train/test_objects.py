import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samlight_jax.preprocess import Frame
from samlight_jax.prompts import assemble
from tests import models
from tests.conftest import normal
from train import objects

LOW_RES = 32  # of a frame of 128
SIZE = np.array([80, 128])  # of a view in it
CENTRES = 4 * np.arange(LOW_RES) + 2
SEEN = (CENTRES < SIZE[0])[:, None] & (CENTRES < SIZE[1])
SURE, UNSURE = 0.8, 0.7
FAST = {"xla_backend_optimization_level": 0}  # to compile


def key(seed=0):
    return jax.random.key(seed)


def ellipse(middle, radii):
    """(low_res, low_res): low-resolution pixels with their centres in it; x first."""
    x, y = CENTRES[None, :], CENTRES[:, None]
    return ((x - middle[0]) / radii[0]) ** 2 + ((y - middle[1]) / radii[1]) ** 2 < 1


def fake(radius, iou=lambda x, y: SURE):
    """A teacher: a disc about a point, as the surest mask, 2; the ellipse in a box, as mask 0."""

    def one(coords, labels):
        boxed = labels[0] == 2
        disc = ellipse(coords[0], (radius, radius))
        within = ellipse((coords[0] + coords[1]) / 2, (coords[1] - coords[0]) / 2)
        wrong = ~disc
        masks = jnp.stack([jnp.where(boxed, within, wrong), wrong, disc, wrong])
        surest = jnp.asarray(iou(*coords[0]), jnp.float32)
        return jnp.where(masks, 5.0, -5.0), jnp.stack([surest + 0.1, 0.1, surest, 0.2])

    return lambda prompts: jax.vmap(one)(prompts.coords, prompts.labels)


def by(decode, count=12, seed=0):
    def of_teacher(key):
        return objects.of_teacher(decode, SIZE, key, count, LOW_RES)

    program = jax.jit(of_teacher, compiler_options=FAST)
    return jax.device_get(program(key(seed)))


@functools.cache
def asked(radius, seed=0):
    return by(fake(radius), seed=seed)


# Boxes.


@hypothesis.settings(max_examples=50)
@hypothesis.given(hnp.arrays(bool, (8, 8)))
def test_tight_box_touches_the_outermost_pixels(mask):
    y, x = np.nonzero(mask)
    want = [0, 0, 0, 0] if not len(x) else [x.min(), y.min(), x.max() + 1, y.max() + 1]
    np.testing.assert_array_equal(jax.jit(objects.tight_box)(mask), 4 * np.array(want))


JITTERED = jax.jit(objects.jittered)


@hypothesis.given(
    st.tuples(*[st.floats(0, 130, width=32)] * 4),
    st.tuples(*[st.integers(2, 128)] * 2),
    st.integers(0, 10**6),
)
def test_jittered_boxes_stay_inside_and_have_an_area(box, size, seed):
    x1, y1, x2, y2 = np.asarray(JITTERED(np.array(box, np.float32), np.array(size), key(seed)))
    assert 0 <= x1 and x1 + 2 <= x2 and x2 <= size[1]
    assert 0 <= y1 and y1 + 2 <= y2 and y2 <= size[0]


@pytest.mark.parametrize("side, deviation, most", [(60, 6.0, 20), (600, 20.0, 20)])
def test_corners_move_by_a_tenth_of_the_sides(side, deviation, most):
    box = np.array([200, 300, 200 + side, 300 + side], np.float32)
    shake = jax.vmap(lambda key: objects.jittered(box, np.array([1024, 1024]), key) - box)
    moved = np.asarray(jax.jit(shake)(jax.random.split(key(), 500)))
    assert abs(moved).max() <= most + 1e-3
    assert (abs(moved.mean(0)) < 4 * deviation / 500**0.5).all()
    if deviation < most:
        np.testing.assert_allclose(moved.std(0), deviation, rtol=0.15)
    else:  # most are cut
        assert (abs(moved) > most - 1e-3).mean() > 0.5


# Objects.


def test_half_of_the_objects_are_boxes_the_rest_points():
    found = asked(16)
    np.testing.assert_array_equal(found.single, np.arange(12) < 6)
    np.testing.assert_array_equal(found.prompts.labels[:6], [[2, 3, -1, -1]] * 6)
    np.testing.assert_array_equal(found.prompts.labels[6:], [[1, -1, -1, -1]] * 6)
    np.testing.assert_array_equal(found.prompts.valid, [[True, True, False, False]] * 12)
    assert found.counts.all()
    coords = found.prompts.coords
    assert (coords >= 0).all() and (coords <= SIZE[::-1]).all()
    for i in range(6):  # a frame of the teacher's answer to a point, moved a little
        x1, y1, x2, y2 = coords[i, :2].ravel()
        assert 2 <= x2 - x1 <= 32 * 1.8 and 2 <= y2 - y1 <= 32 * 1.8
    assert len({tuple(point) for point in coords[6:, 0]}) == 6


def test_targets_are_the_teachers_answers_to_the_same_prompts():
    found = asked(16)
    for i, target in enumerate(found.target):
        first, second = found.prompts.coords[i, :2]
        box = (first + second) / 2, (second - first) / 2
        want = ellipse(*box) if i < 6 else ellipse(first, (16, 16))
        np.testing.assert_array_equal(target, want & SEEN)
        # All four answers to the same prompt, with what the teacher thinks of them.
        answers = (found.logits[i] > 0) & SEEN
        np.testing.assert_array_equal(answers[0 if i < 6 else 2], target)
        np.testing.assert_array_equal(answers[1], ~ellipse(first, (16, 16)) & SEEN)
        np.testing.assert_allclose(found.iou[i], [SURE + 0.1, 0.1, SURE, 0.2])


def test_the_unsure_do_not_count():
    found = by(fake(16, lambda x, y: jnp.where(x < 64, SURE, UNSURE)), 24)
    np.testing.assert_array_equal(found.counts[12:], found.prompts.coords[12:, 0, 0] < 64)
    assert 0 < found.counts[12:].sum() < 12
    assert 0 < found.counts[:12].sum() < 12
    assert not by(fake(16, lambda x, y: UNSURE)).counts.any()


@pytest.mark.parametrize("radius", [1.5, 200])
def test_too_small_and_too_large_do_not_count(radius):
    """A radius of 1.5 holds the centre of no low-resolution pixel but for luck; 200 holds all."""
    found = asked(radius)
    share = found.target[6:].sum((1, 2)) / SEEN.sum()
    np.testing.assert_array_equal(found.counts[6:], (share >= 0.002) & (share <= 0.7))
    assert found.counts[6:].sum() < 6


def test_the_share_is_of_the_view():
    """What is 78 % of the view is 49 % of the frame."""

    def decode(prompts):
        mask = np.broadcast_to(np.arange(LOW_RES) < 25, (LOW_RES, LOW_RES))
        answer = jnp.broadcast_to(jnp.where(mask, 5.0, -5.0), (len(prompts.coords), 4, 32, 32))
        return answer, jnp.full((len(prompts.coords), 4), SURE)

    found = by(decode)
    np.testing.assert_allclose(found.target.sum((1, 2)) / SEEN.sum(), 25 / 32)
    assert not found.counts.any()


def test_an_empty_answer_to_a_box_does_not_count():
    decode = fake(16)

    def without_boxes(prompts):
        logits, iou = decode(prompts)
        return logits.at[:, 0].set(-5.0), iou

    found = by(without_boxes)
    np.testing.assert_array_equal(found.counts, np.arange(12) >= 6)


def test_the_key_decides():
    one, same, other = asked(16), by(fake(16)), asked(16, seed=1)
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert np.all(one.prompts.coords[6:, 0] != other.prompts.coords[6:, 0])


def test_best_is_the_surest_of_three():
    logits = normal(3, 4, 2, 2)
    iou = np.array([[9, 1, 2, 3], [9, 3, 2, 1], [9, 1, 3, 2]], np.float32)
    mask, sure = objects.best(logits, iou)
    np.testing.assert_array_equal(mask, logits[range(3), [3, 1, 2]])
    np.testing.assert_array_equal(sure, [3, 3, 3])


def test_inside_is_the_view():
    np.testing.assert_array_equal(objects.inside(SIZE, LOW_RES), SEEN)


# Corrections.

CORRECTED = jax.jit(objects.corrected, compiler_options=FAST)


def answered(seed=0):
    """Objects, logits that are wrong in places, the masks chosen."""
    found = asked(16)
    rng = np.random.default_rng(seed)
    logits = 40 * rng.normal(size=(12, 4, LOW_RES, LOW_RES)).astype(np.float32)
    choice = rng.integers(0, 4, 12)
    right = np.where(found.target, 5, -5)
    for i in range(12):
        logits[i, choice[i]] = right[i]
        if i % 4 == 1:  # misses its left part
            logits[i, choice[i], :, : round(np.nonzero(found.target[i])[1].mean())] = -50
        if i % 4 == 2:  # adds a stripe
            logits[i, choice[i], 3:6] = 50
        if i % 4 == 3:  # beyond the view
            logits[i, choice[i], 20:] = 50
    return found, logits, choice


def test_a_click_lies_in_the_larger_error_and_says_which_it_is():
    found, logits, choice = answered()
    later = jax.device_get(CORRECTED(found, logits, choice, SEEN, key()))
    clicks = 0
    for i in range(12):
        guess = (logits[i, choice[i]] > 0) & SEEN
        missed, added = found.target[i] & ~guess, ~found.target[i] & guess
        np.testing.assert_array_equal(later.prompts.valid[i, :3], found.prompts.valid[i, :3])
        np.testing.assert_array_equal(later.prompts.coords[i, :3], found.prompts.coords[i, :3])
        np.testing.assert_array_equal(later.prompts.labels[i, :3], found.prompts.labels[i, :3])
        if not (missed | added).any():
            assert not later.prompts.valid[i, 3] and later.prompts.labels[i, 3] == -1
            continue
        clicks += 1
        assert later.prompts.valid[i, 3]
        column, row = (later.prompts.coords[i, 3] / 4).astype(int)
        np.testing.assert_array_equal(later.prompts.coords[i, 3], [4 * column + 2, 4 * row + 2])
        larger = missed if missed.sum() >= added.sum() else added
        assert larger[row, column]
        assert later.prompts.labels[i, 3] == found.target[i, row, column]
    assert clicks == 6
    labels = later.prompts.labels[:, 3]
    assert set(labels[1::4]) == {1} and set(labels[2::4]) == {0} and set(labels[3::4]) == {-1}


def test_a_correction_starts_from_the_answer():
    found, logits, choice = answered()
    later = CORRECTED(found, logits, choice, SEEN, key())
    chosen = logits[range(12), choice]
    np.testing.assert_array_equal(later.prompts.masks, np.clip(chosen, -32, 32))
    assert later.prompts.has_mask.all() and later.single.all()
    np.testing.assert_array_equal(later.target, found.target)
    np.testing.assert_array_equal(later.counts, found.counts)


def test_clicks_are_random():
    """On an answer of nothing: every pixel of the target in turn."""
    found, logits, choice = answered()
    logits = np.full_like(logits, -5)
    draws = jax.jit(jax.vmap(objects.corrected, (None, None, None, None, 0)), compiler_options=FAST)
    later = draws(found, logits, choice, SEEN, jax.random.split(key(), 400))
    clicks = np.asarray(later.prompts.coords)[:, 8, 3]
    there = 4 * np.argwhere(found.target[8])[:, ::-1] + 2
    assert {tuple(click) for click in clicks.tolist()} <= {tuple(p) for p in there.tolist()}
    deviation = there.std(0) / 400**0.5
    assert (abs(clicks.mean(0) - there.mean(0)) < 4 * deviation).all()


# The same prompts as a user's.

FRAME = Frame((64, 64), 64)  # of models.TINY, as large as its photograph
DECODE = jax.jit(
    lambda model, embedding, prompts: model.decode(embedding, prompts),
    compiler_options=FAST,
)


def tokens(prompts):
    """What each prompt says, in no order."""
    prompts = jax.device_get(prompts)
    return [
        sorted((label, *place) for place, label, valid in zip(*each, strict=True) if valid)
        for each in zip(prompts.coords.tolist(), prompts.labels, prompts.valid, strict=True)
    ]


def pairs():
    """(ours, a user's) prompts by name."""
    rng = np.random.default_rng(0)
    places = rng.uniform(0, 64, (3, 1, 2)).astype(np.float32)
    corners = np.array([[3, 5, 40.5, 30], [0, 0, 64, 64], [10, 20, 12, 63]], np.float32)
    ones = np.ones((3, 1), int)
    points, boxes = objects.points(places[:, 0]), objects.boxes(corners)

    def user(*, logits=None, **prompts):
        return assemble(FRAME, models.TINY, 3, masks=logits, absent=False, **prompts)

    yield points, user(point_coords=places, point_labels=ones)
    yield boxes, user(boxes=corners)

    # Each answered by one pixel wrong, at row 3 of column 5, too much or too little.
    target = np.zeros((3, 16, 16), bool)
    target[0, 3, 5] = True
    logits = np.full((3, 4, 16, 16), -3, np.float32)
    logits[1:, 2, 3, 5] = 50
    click, labels = np.full((3, 1, 2), [22, 14]), np.array([[1], [0], [0]])
    start = np.clip(logits[:, 2], -32, 32)
    for prompts, before in ((points, places), (boxes, None)):
        every = np.ones(3, bool)
        found = objects.Objects(prompts, target, every, every)
        later = CORRECTED(found, logits, np.full(3, 2), np.ones((16, 16), bool), key())
        coords = click if before is None else np.concatenate([before, click], 1)
        kinds = labels if before is None else np.concatenate([ones, labels], 1)
        framed = {"boxes": corners} if before is None else {}
        yield (
            later.prompts,
            user(point_coords=coords, point_labels=kinds, logits=start, **framed),
        )


def test_prompts_and_answers_are_a_users():
    model, embedding = models.random_model(), normal(4, 4, 256)
    for ours, users in pairs():
        assert tokens(ours) == tokens(users)
        np.testing.assert_array_equal(ours.has_mask, users.has_mask)
        np.testing.assert_array_equal(ours.masks, users.masks)
        got, want = DECODE(model, embedding, ours), DECODE(model, embedding, users)
        for a, b in zip(got, want, strict=True):
            assert np.std(b) > 0.01
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_annotated_objects_all_come_before_any_comes_again():
    masks = np.zeros((5, LOW_RES, LOW_RES), bool)
    for i in range(3):
        masks[i, 4 * i : 4 * i + 4, 2:9] = True
    masks[3, 0, 0] = True  # too small a share
    size = np.array([4 * LOW_RES, 4 * LOW_RES])
    found = jax.jit(objects.of_annotations, static_argnums=3)(masks, size, key(), 6)
    names = [int(np.flatnonzero((masks == t).all((1, 2)))[0]) for t in np.asarray(found.target)]
    assert sorted(names[:3]) == sorted(names[3:]) == [0, 1, 2]
    assert found.counts.all() and found.single.tolist() == [True] * 3 + [False] * 3
    for q in range(3, 6):
        x, y = np.asarray(found.prompts.coords[q, 0]) / 4
        assert found.target[q, int(y), int(x)]
        assert found.prompts.labels[q, 0] == 1


def test_a_view_without_annotated_objects_asks_for_nothing():
    nothing = np.zeros((5, LOW_RES, LOW_RES), bool)
    found = objects.of_annotations(nothing, np.array([4 * LOW_RES, 4 * LOW_RES]), key(), 4)
    assert not found.counts.any()
    assert all(np.isfinite(x).all() for x in found.prompts[:1])

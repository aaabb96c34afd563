import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import losses
from train.losses import Moments

CHANNELS = ["plain", "half", "full"]
KINDS = ["mse", "l1", "huber", "cosine"]
FEATURES = jax.jit(losses.features, static_argnames=("kind", "channels"))
GRADIENT = jax.jit(jax.grad(losses.features), static_argnames=("kind", "channels"))
MASKS = jax.jit(losses.masks)
TOKENS = jax.jit(losses.tokens, static_argnames="kind")


def photographs(*shape):
    """(features of uneven channels, a student's, tokens that count, their moments)."""
    rng = np.random.default_rng(0)
    deviation = np.geomspace(0.001, 0.2, shape[-1])
    place, noise, error = rng.normal(size=shape[-1]), rng.normal(size=shape), rng.normal(size=shape)
    teacher = ((2 * place + noise) * deviation).astype(np.float32)
    student = (teacher + error * deviation).astype(np.float32)
    inside = rng.random(shape[:-1]) < 0.7
    tokens = teacher[inside]
    return teacher, student, inside, Moments(tokens.mean(0), tokens.std(0))


def by_hand(student, teacher, inside, moments, kind, channels):
    """`losses.features`, token by token."""
    power = {"plain": 0, "half": 0.5, "full": 1}[channels]
    size = moments.deviation.astype(float) ** power
    typical = np.mean((moments.deviation / size) ** 2) ** 0.5
    found = []
    for a, b in zip(student[inside].astype(float), teacher[inside].astype(float), strict=True):
        if kind == "cosine":
            a, b = a / size, b / size
            found.append(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            continue
        for e in abs(a - b) / size / typical:
            huber = e**2 if e <= 1 else 2 * e - 1
            found.append({"mse": e**2, "l1": e, "huber": huber}[kind])
    return np.mean(found)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_features_against_numpy(kind, channels):
    teacher, student, inside, moments = photographs(2, 3, 4, 8)
    got = FEATURES(student, teacher, inside, moments, kind=kind, channels=channels)
    want = by_hand(student, teacher, inside, moments, kind, channels)
    assert want > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize("channels", CHANNELS)
def test_a_constant_guess_has_a_mean_square_of_one(channels):
    teacher, _, inside, moments = photographs(2, 8, 8, 16)
    guess = np.broadcast_to(moments.mean, teacher.shape)
    got = FEATURES(guess, teacher, inside, moments, kind="mse", channels=channels)
    np.testing.assert_allclose(got, 1, rtol=1e-5)


def test_channels_decide_by_their_weighting():
    """An error of one deviation in one channel: its share of the loss, by hand."""
    deviation = np.array([1.0, 4.0], np.float32)
    moments = Moments(np.zeros(2, np.float32), deviation)
    teacher, inside = np.zeros((1, 1, 1, 2), np.float32), np.ones((1, 1, 1), bool)
    for channels, weights in (("plain", (1, 16)), ("half", (1, 4)), ("full", (1, 1))):
        for i in range(2):
            student = np.zeros_like(teacher)
            student[..., i] = deviation[i]
            got = FEATURES(student, teacher, inside, moments, kind="mse", channels=channels)
            np.testing.assert_allclose(got, weights[i] / sum(weights), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_outside_the_photograph_do_not_matter(kind):
    teacher, student, inside, moments = photographs(2, 3, 4, 8)
    other = np.where(inside[..., None], student, 1e3)
    elsewhere = np.where(inside[..., None], teacher, -1e3)
    want = FEATURES(student, teacher, inside, moments, kind=kind, channels="half")
    assert FEATURES(other, elsewhere, inside, moments, kind=kind, channels="half") == want
    slope = GRADIENT(other, elsewhere, inside, moments, kind=kind, channels="half")
    assert not np.any(slope[~inside])
    assert np.all(np.any(slope[inside], axis=-1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 1e4])
def test_gradients_of_features_are_finite(kind, size):
    teacher, _, inside, moments = photographs(1, 2, 2, 8)
    student = np.full_like(teacher, size)
    for counted in (inside, np.zeros_like(inside)):
        slope = GRADIENT(student, teacher, counted, moments, kind=kind, channels="full")
        assert np.isfinite(slope).all()


def test_mean_weighs_and_is_zero_where_nothing_counts():
    values = np.array([[1.0, 2.0], [3.0, 5.0]], np.float32)
    assert losses.mean(values, np.array([True, False])) == 1.5
    assert losses.mean(values, np.array([0.5, 1.5])) == (0.5 * 3 + 1.5 * 8) / 4
    assert losses.mean(values, np.zeros(2, bool)) == 0


# Masks.


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, float)))


def test_focal_and_cross_entropy_by_hand():
    logits = np.array([[0.0, np.log(3)], [-np.log(3), 9.0]])  # 1/2, 3/4, 1/4 and one outside
    target = np.array([[True, True], [True, False]])
    inside = np.array([[True, True], [True, False]])
    right = np.array([0.5, 0.75, 0.25])
    got = losses.cross_entropy(logits, target, inside)
    np.testing.assert_allclose(got, -np.log(right).mean(), rtol=1e-6)
    for gamma in (2.0, 1.0):
        got = losses.focal(logits, target, inside, gamma)
        np.testing.assert_allclose(got, -((1 - right) ** gamma * np.log(right)).mean(), rtol=1e-6)
    # The other way round, all is as right.
    np.testing.assert_allclose(
        losses.focal(-logits, ~target, inside), losses.focal(logits, target, inside), rtol=1e-6
    )


def test_dice_by_hand():
    inside = np.ones((2, 3), bool)
    target = np.array([[1, 1, 0], [0, 0, 0]], bool)
    sure = np.array([[9e3, -9e3, 9e3], [-9e3, -9e3, -9e3]])  # one of two, and one too many
    np.testing.assert_allclose(losses.dice(sure, target, inside), 1 - 3 / 5, rtol=1e-6)
    unsure = np.zeros((2, 3))  # halves everywhere
    np.testing.assert_allclose(losses.dice(unsure, target, inside), 1 - 3 / 6, rtol=1e-6)
    half = np.array([[1, 0, 0], [1, 0, 0]], bool)  # of it the first column counts
    np.testing.assert_allclose(losses.dice(sure, target, half), 1 - 3 / 3, atol=1e-6)
    nothing = np.zeros((2, 3), bool)
    assert losses.dice(np.full((2, 3), -1e4), nothing, inside) == 0


def test_overlap_by_hand():
    inside = np.array([[1, 1, 1], [1, 1, 0]], bool)
    target = np.array([[1, 1, 0], [0, 0, 1]], bool)
    guess = np.array([[1, 0, 1], [0, 0, 0]], bool)
    np.testing.assert_allclose(losses.overlap(guess, target, inside), 1 / 3)
    nothing = np.zeros((2, 3), bool)
    assert losses.overlap(nothing, nothing, inside) == 1
    assert losses.overlap(nothing, target, inside) == 0
    assert losses.overlap(target, nothing, inside) == 0


def asked(q=6, side=5, seed=0):
    """Arguments of `losses.masks`: half of the prompts single, the last does not count."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(q, 4, side, side)).astype(np.float32)
    iou = rng.random((q, 4)).astype(np.float32)
    target = rng.random((q, side, side)) < 0.4
    inside = np.ones((side, side), bool)
    inside[:, -1] = False
    return logits, iou, target, np.arange(q) < q // 2, np.arange(q) < q - 1, inside


def masks_by_hand(logits, iou, target, single, counts, inside):
    """(pixels, dice, iou, agreement) and which mask is trained, prompt by prompt."""
    weights, pixels, shapes, wrong, agreement, chosen = [], [], [], [], [], []
    for q in np.flatnonzero(counts):
        found = []
        for k in [0] if single[q] else [1, 2, 3]:
            guess, truth = logits[q, k][inside], target[q][inside]
            right = np.where(truth, sigmoid(guess), sigmoid(-guess))
            focal = -((1 - right) ** 2 * np.log(right)).mean()
            share = sigmoid(guess)
            dice = 1 - (2 * share[truth].sum() + 1) / (share.sum() + truth.sum() + 1)
            reached = (truth & (guess > 0)).sum() / (truth | (guess > 0)).sum()
            found.append((20 * focal + dice, k, focal, dice, reached, iou[q, k]))
        _, k, focal, dice, reached, _ = min(found)
        chosen.append((q, k))
        pixels.append(focal)
        shapes.append(dice)
        weights.append(1.5 - reached)
        agreement.append(max(found, key=lambda one: one[5])[4])
        wrong += [(predicted - reached) ** 2 for *_, reached, predicted in found]
    means = np.average(pixels, weights=weights), np.average(shapes, weights=weights)
    return (*means, np.mean(wrong), np.mean(agreement)), chosen


@pytest.mark.parametrize("seed", range(3))
def test_masks_against_numpy(seed):
    arguments = asked(seed=seed)
    want, _ = masks_by_hand(*arguments)
    np.testing.assert_allclose(MASKS(*arguments), want, rtol=1e-5)


def asked_by_token(seed=0):
    """Arguments of `losses.tokens`: those of `losses.masks` with four answers and their IoU."""
    logits, iou, _, *rest = asked(seed=seed)
    rng = np.random.default_rng(seed + 100)
    target = 2 * rng.normal(size=logits.shape).astype(np.float32) - 0.5
    return logits, iou, target, 1.3 * rng.random(iou.shape).astype(np.float32), *rest


@pytest.mark.parametrize("kind", ["focal", "soft"])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_against_numpy(seed, kind):
    logits, iou, answers, target_iou, single, counts, inside = asked_by_token(seed)
    weights, pixels, shapes, agreement = [], [], [], []
    target = answers > 0
    for q in np.flatnonzero(counts):
        for k in range(4):
            guess, truth = logits[q, k][inside], target[q, k][inside]
            right = np.where(truth, sigmoid(guess), sigmoid(-guess))
            share, wanted = sigmoid(guess), sigmoid(answers[q, k][inside])
            pixels.append(
                -((1 - right) ** 2 * np.log(right)).mean()
                if kind == "focal"
                else -(wanted * np.log(share) + (1 - wanted) * np.log(1 - share)).mean()
            )
            shapes.append(1 - (2 * share[truth].sum() + 1) / (share.sum() + truth.sum() + 1))
            reached = (truth & (guess > 0)).sum() / (truth | (guess > 0)).sum()
            weights.append(min(1, target_iou[q, k]) * (1.5 - reached))
        some = slice(0, 1) if single[q] else slice(1, 4)
        ours, theirs = (
            x[q, np.argmax(v[q, some]) + some.start][inside] > 0
            for x, v in ((logits, iou), (target, target_iou))
        )
        agreement.append((ours & theirs).sum() / (ours | theirs).sum())
    wrong = np.square(iou - target_iou)[counts].mean()
    means = np.average(pixels, weights=weights), np.average(shapes, weights=weights)
    got = TOKENS(logits, iou, answers, target_iou, single, counts, inside, kind)
    np.testing.assert_allclose(got, (*means, wrong, np.mean(agreement)), rtol=1e-5)


def test_a_student_that_answers_as_its_teacher_has_nothing_to_learn():
    _, _, answers, target_iou, *rest = asked_by_token()
    sure = np.where(answers > 0, 50.0, -50.0)
    terms = TOKENS(sure, target_iou, answers, target_iou, *rest)
    np.testing.assert_allclose(terms, (0, 0, 0, 1), atol=1e-6)


def total(logits, iou, *rest):
    pixels, dice, wrong, _ = losses.masks(logits, iou, *rest)
    return pixels + dice + wrong


SLOPES = jax.jit(jax.grad(total, argnums=(0, 1)))


def test_the_nearest_mask_gets_all_of_the_gradient():
    arguments = asked()
    logits, inside = arguments[0], arguments[-1]
    _, chosen = masks_by_hand(*arguments)
    by_logits, by_iou = SLOPES(*arguments)
    taught = [tuple(each) for each in np.argwhere(np.any(by_logits, axis=(2, 3))).tolist()]
    assert taught == chosen  # so the last prompt, which does not count, gets none
    assert not np.any(by_logits[..., ~inside])
    # IoU is predicted for all masks that may be answered.
    answered = np.zeros(logits.shape[:2], bool)
    answered[:3, 0] = answered[3:5, 1:] = True
    np.testing.assert_array_equal(by_iou != 0, answered)


def test_hard_prompts_weigh_up_to_three_times_as_much():
    """Of two prompts one is right and one wholly wrong; the wrong one's focal has 3/4 of all."""
    target = np.zeros((2, 2, 2), bool)
    target[:, 0] = True
    right = np.where(target[0], 50.0, -50.0)
    logits = np.stack([np.stack([right] * 4), np.stack([-right] * 4)]).astype(np.float32)
    everything = np.ones(2, bool), np.ones(2, bool), np.ones((2, 2), bool)
    terms = MASKS(logits, np.zeros((2, 4)), target, *everything)
    np.testing.assert_allclose(terms.pixels, 0.75 * 50, rtol=1e-6)
    np.testing.assert_allclose(terms.agreement, 0.5)


def test_no_prompt_counts():
    logits, iou, target, single, counts, inside = asked()
    nothing = MASKS(logits, iou, target, single, counts & False, inside)
    assert all(term == 0 for term in nothing)
    for slope in SLOPES(logits, iou, target, single, counts & False, inside):
        assert not np.any(slope)


@pytest.mark.parametrize("size", [-1e4, 1e4])
@pytest.mark.parametrize("full", [False, True])
def test_gradients_are_finite_at_extremes(size, full):
    logits, iou, target, single, counts, inside = asked()
    extreme = np.full_like(logits, size)
    targets = np.full_like(target, full)
    for seen in (inside, np.zeros_like(inside)):
        terms = MASKS(extreme, iou, targets, single, counts, seen)
        assert np.isfinite(terms).all()
        for slope in SLOPES(extreme, iou, targets, single, counts, seen):
            assert np.isfinite(slope).all()


def test_losses_are_float32_inside():
    logits, iou, *rest = asked()
    low = functools.partial(jnp.asarray, dtype=jnp.bfloat16)
    got = MASKS(low(logits), low(iou), *rest)
    assert all(term.dtype == jnp.float32 for term in got)
    want = MASKS(low(logits).astype(jnp.float32), low(iou).astype(jnp.float32), *rest)
    np.testing.assert_array_equal(got, want)

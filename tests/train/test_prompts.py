import json

import cv2
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from tests import oracles
from train import prompts
from train.annotations import open_dataset

MASKS = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)).filter(np.any)


def rng(seed=0):
    return np.random.default_rng(seed)


def pixels(mask):
    """The (x, y) of a mask, row by row."""
    return [(x, y) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]


@hypothesis.given(MASKS)
def test_center_is_the_first_pixel_nearest_the_centroid(mask):
    points = pixels(mask)
    # In integers, n times larger: a tie is a tie.
    n, sum_x, sum_y = len(points), sum(x for x, _ in points), sum(y for _, y in points)
    distances = [(n * x - sum_x) ** 2 + (n * y - sum_y) ** 2 for x, y in points]
    assert prompts.point_center(mask) == points[distances.index(min(distances))]


def test_center_lies_in_a_ring():
    mask = np.ones((7, 9), bool)
    mask[2:5, 2:7] = False  # its centroid (4, 3) is a hole
    assert prompts.point_center(mask) == (4, 1)


@hypothesis.given(MASKS, st.integers(1, 8), st.integers(0, 99))
def test_random_points_are_different_pixels_of_the_mask(mask, n, seed):
    points = [tuple(point) for point in prompts.points_n(mask, n, rng(seed)).tolist()]
    assert len(points) == len(set(points)) == min(n, mask.sum())
    assert set(points) <= set(pixels(mask))
    assert prompts.point_random(mask, rng(seed)) in pixels(mask)


def test_random_points_are_uniform():
    mask = np.zeros((5, 7), bool)
    mask[1, 2:6] = mask[4, 0] = True
    draw = rng()
    drawn = [prompts.point_random(mask, draw) for _ in range(5000)]
    share = [drawn.count(point) / 5000 for point in pixels(mask)]
    np.testing.assert_allclose(share, 0.2, atol=0.03)  # five deviations


@hypothesis.given(MASKS)
def test_dt_point_is_the_farthest_from_the_background(mask):
    """Euclid by brute force; OpenCV's 5x5 steps are 1, 1.4 and 2.1969 long: 3 % off at most."""
    padded = np.pad(mask, 1)
    outside = np.argwhere(~padded)
    distance = {
        (x, y): np.sqrt(((outside - (y + 1, x + 1)) ** 2).sum(axis=1).min())
        for x, y in pixels(mask)
    }
    assert distance[prompts.point_dt(mask)] >= 0.97 * max(distance.values())


def test_dt_point_counts_the_border_as_edge_and_takes_the_first():
    assert prompts.point_dt(np.ones((5, 9), bool)) == (2, 2)
    two = np.zeros((3, 7), bool)
    two[1, 1] = two[1, 5] = True
    assert prompts.point_dt(two) == (1, 1)


@pytest.mark.parametrize("name", ["bsds500", "coco", "davis", "ecssd", "people", "polyp", "street"])
def test_dt_points_are_those_of_the_independent_evaluation(name):
    rows = json.loads(oracles.shared("data/teacher_minisam.json").read_text())[name]
    dataset = open_dataset("coco", oracles.shared(f"data/eval/{name}"))
    instances = {i.id: (p.name, i) for p in dataset.photos for i in p.instances if not i.crowd}
    assert len(instances) == len(rows)
    for row in rows:
        photo, instance = instances[str(row["ann"])]
        assert photo == row["image"]
        assert list(prompts.point_dt(instance.mask())) == row["point"], row


@hypothesis.given(
    st.tuples(st.floats(-5, 40), st.floats(-5, 20), st.floats(0.5, 60), st.floats(0.5, 40)),
    st.sampled_from([0.1, 0.5, 10.0]),
    st.integers(0, 999),
)
def test_jittered_boxes_lie_in_the_photo_and_are_never_degenerate(box, share, seed):
    x, y, width, height = box
    hypothesis.assume(x + width > 1 and y + height > 1)
    drawn = prompts.box_jitter((x, y, x + width, y + height), (30, 50), rng(seed), share=share)
    assert 0 <= drawn[0] < drawn[2] <= 50 and 0 <= drawn[1] < drawn[3] <= 30
    again = prompts.box_jitter((x, y, x + width, y + height), (30, 50), rng(seed), share=share)
    assert again == drawn


def test_jitter_is_normal_of_a_tenth_of_the_box_up_to_20_pixels():
    draw, size = rng(), (4000, 4000)
    small = [prompts.box_jitter((1000, 1000, 1100, 1050), size, draw) for _ in range(4000)]
    moved = np.array(small) - (1000, 1000, 1100, 1050)
    np.testing.assert_allclose(moved.std(axis=0), [10, 5, 10, 5], rtol=0.08)
    np.testing.assert_allclose(moved.mean(axis=0), 0, atol=0.6)
    assert abs(moved[:, 0]).max() <= 20
    assert abs(np.corrcoef(moved.T) - np.eye(4)).max() < 0.08  # each side by itself
    large = [prompts.box_jitter((500, 500, 3500, 3500), size, draw) for _ in range(50)]
    moved = abs(np.array(large) - (500, 500, 3500, 3500))
    assert moved.max() == 20  # a deviation of 300, cut


def flood(mask):
    """The regions of a mask with 8 neighbours, as sets of pixels."""
    left = set(pixels(mask))
    while left:
        region, edge = set(), {left.pop()}
        while edge:
            region |= edge
            near = {(x + i, y + j) for x, y in edge for i in (-1, 0, 1) for j in (-1, 0, 1)}
            edge = near & left
            left -= edge
        yield region


@hypothesis.given(st.data())
def test_corrective_click_is_in_a_largest_error_region(data):
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=9))
    prediction, truth = (data.draw(hnp.arrays(bool, shape)) for _ in range(2))
    click = prompts.corrective_click(prediction, truth)
    missed = list(flood(truth & ~prediction))
    wrong = list(flood(prediction & ~truth))
    if click is None:
        assert not missed + wrong
        return
    x, y, label = click
    largest = max(map(len, missed + wrong))
    assert label == (largest in map(len, missed))
    assert any((x, y) in r and len(r) == largest for r in (missed if label else wrong))


def test_corrective_click_by_hand():
    truth = np.zeros((12, 20), bool)
    truth[2:9, 2:9] = True
    prediction = truth.copy()
    prediction[4:7, 4:7] = False  # 9 pixels missed
    prediction[11, 10:18] = True  # 8 wrong
    assert prompts.corrective_click(prediction, truth) == (5, 5, 1)
    prediction[10:12, 9:19] = True  # 20 wrong, two rows of ten
    assert prompts.corrective_click(prediction, truth) == (9, 10, 0)
    assert prompts.corrective_click(truth, truth) is None
    mended = prediction.copy()
    mended[10:12, 9:19] = False
    assert prompts.corrective_click(mended, truth) == (5, 5, 1)


def test_dt_is_that_of_opencv_5x5():
    mask = rng(3).random((40, 60)) < 0.97
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_5)
    x, y = prompts.point_dt(mask)
    assert distance[y + 1, x + 1] == distance.max()

import itertools

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from samlight_jax.errors import InputError
from tests import oracles
from train import metrics
from train.annotations import Instance, Photo, open_dataset


def disc(size, center, radius):
    y, x = np.mgrid[: size[0], : size[1]]
    return (y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2


def rle(mask):
    return mask_utils.encode(np.asfortranarray(mask, np.uint8))


def test_iou_of_counts_and_of_two_empty_masks():
    got = metrics.mask_iou([[0, 3], [2, 0]], [[5, 4], [2, 0]])
    np.testing.assert_array_equal(got, [[0, 0.75], [1, 1]])
    assert got.dtype == np.float64


@pytest.mark.parametrize("size", [(1, 1), (31, 47), (60, 20), (128, 96)])
@pytest.mark.parametrize("ratio", [0.02, 0.05])
def test_boundary_is_what_a_square_around_it_leaves(size, ratio):
    """By brute force: boundary is what has a pixel outside within d rows and columns."""
    mask = np.random.default_rng(0).random(size) < 0.995
    mask[: size[0] // 3, : size[1] // 4] = False
    d = max(1, round(ratio * (size[0] ** 2 + size[1] ** 2) ** 0.5))
    assert metrics.boundary_reach(size, ratio) == d
    padded = np.pad(mask, d)
    inner = np.ones(size, bool)
    for i, j in itertools.product(range(2 * d + 1), repeat=2):
        inner &= padded[i : i + size[0], j : j + size[1]]
    np.testing.assert_array_equal(metrics.boundary(mask, ratio), mask & ~inner)


def test_boundary_iou_is_that_of_opencv_s_erosion():
    truth, mask = disc((90, 120), (40, 60), 30), disc((90, 120), (42, 63), 28)
    edges = []
    for each in (mask, truth):
        eroded = cv2.erode(
            each.astype(np.uint8),
            np.ones((3, 3), np.uint8),
            iterations=3,  # 2 % of the diagonal of 150
            borderType=cv2.BORDER_CONSTANT,
            borderValue=0,
        )
        edges.append(each & ~eroded.astype(bool))
    want = (edges[0] & edges[1]).sum() / (edges[0] | edges[1]).sum()
    assert 0 < want < 0.6
    assert metrics.boundary_iou(mask, truth) == pytest.approx(want, abs=1e-12)
    assert metrics.boundary_iou(truth, truth) == 1
    whole = np.ones((50, 50), bool)  # its edge is the photograph's
    assert metrics.boundary(whole).sum() == 50 * 50 - 48 * 48


def test_area_classes_begin_at_their_limits():
    areas = (1, 1023.9, 1024, 9215.9, 9216, 1e6)
    got = [metrics.area_class(area) for area in areas]
    assert got == ["small", "small", "medium", "medium", "large", "large"]


def test_interval_of_a_mean_is_that_of_the_normal_for_many_values():
    values = np.random.default_rng(1).normal(0.7, 0.2, 4000)
    got = metrics.mean_interval(values)
    assert got.value == pytest.approx(values.mean()) and got.n == 4000
    reach = 1.96 * values.std() / 4000**0.5
    assert (got.low, got.high) == pytest.approx((got.value - reach, got.value + reach), abs=5e-4)
    assert got == metrics.mean_interval(values) != metrics.mean_interval(values, seed=1)
    assert metrics.mean_interval([0.25]) == (0.25, 0.25, 0.25, 1)


def test_interval_of_two_values_by_hand():
    # Means of two draws of {0, 1}: 0, 1/2, 1 with 1/4, 1/2, 1/4.
    assert metrics.mean_interval([0.0, 1.0]) == (0.5, 0.0, 1.0, 2)


def test_paired_difference_sees_what_two_intervals_hide():
    a = np.random.default_rng(2).random(200)
    got = metrics.paired_difference(a + 0.01, a)
    assert got[:3] == pytest.approx((0.01, 0.01, 0.01))
    with pytest.raises(InputError, match="expected pairs"):
        metrics.paired_difference(a, a[1:])


@pytest.mark.parametrize("values", [[], [0.1, float("nan")], [[0.1]]])
def test_no_mean_of_nothing(values):
    with pytest.raises(InputError, match="No mean of values"):
        metrics.mean_interval(values)


def made(category=1, crowd=False, radius=20, key="1", center=(50, 50)):
    mask = disc((200, 200), center, radius)
    x, y, w, h = mask_utils.toBbox(rle(mask)).tolist()
    return Instance(key, rle(mask), (x, y, x + w, y + h), float(mask.sum()), crowd, category)


def result(photo, mask, score, category=1):
    return {"image_id": photo, "category_id": category, "segmentation": rle(mask), "score": score}


def test_ap_of_perfect_results_is_one():
    photos = [Photo("a", "a.jpg", (200, 200), (made(), made(2, radius=10, key="2")))]
    found = [result("a", i.mask(), 0.5, i.category) for i in photos[0].instances]
    got = metrics.average_precision(photos, found)
    assert tuple(got) == metrics.AP_NAMES
    for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AR1", "AR100"):
        assert got[name] == pytest.approx(1), name
    assert got["AP_large"] is None  # there is none


def test_ap_by_hand():
    """Two objects; the best result misses, the second hits one with an IoU from 0.65 to 0.7.

    At a hit: precision 1/2 up to recall 1/2, which are 51 of COCO's 101 points: 0.2525.
    """
    photos = [
        Photo("a", "a.jpg", (200, 200), (made(radius=40),)),
        Photo("b", "b.jpg", (200, 200), (made(radius=40, key="2"),)),
    ]
    truth = photos[0].instances[0].mask()
    hit = truth.copy()
    hit[:38] = False
    iou = hit.sum() / truth.sum()
    assert 0.65 < iou < 0.7
    found = [result("b", disc((200, 200), (150, 150), 40), 0.9), result("a", hit, 0.8)]
    got = metrics.average_precision(photos, found)
    at_hit = 51 / 101 / 2
    assert got["AP50"] == pytest.approx(at_hit)
    assert got["AP75"] == 0
    assert got["AP"] == pytest.approx(at_hit * 4 / 10)  # 0.50, 0.55, 0.60, 0.65
    assert got["AR1"] == pytest.approx(0.5 * 4 / 10)


def test_crowds_excuse_what_lies_in_them():
    crowd = made(crowd=True, radius=60, key="2", center=(120, 120))
    photos = [Photo("a", "a.jpg", (200, 200), (made(), crowd))]
    inside = result("a", disc((200, 200), (120, 120), 20), 0.9)
    found = [inside, result("a", photos[0].instances[0].mask(), 0.8)]
    assert metrics.average_precision(photos, found)["AP"] == pytest.approx(1)
    plain = [Photo("a", "a.jpg", (200, 200), (made(),))]
    assert metrics.average_precision(plain, found)["AP"] == pytest.approx(0.5)


def test_ap_is_that_of_pycocotools_on_coco_s_own_file():
    path = oracles.shared("data/eval/coco/annotations.json")
    dataset = open_dataset(str(path))
    rng, found = np.random.default_rng(0), []
    for photo in dataset.photos:
        for instance in photo.instances:
            mask = np.roll(instance.mask(), rng.integers(0, 12, 2), (0, 1))
            if mask.any() and rng.random() < 0.9:
                found.append(result(photo.id, mask, rng.random(), instance.category))
    coco = COCO(str(path))
    evaluation = COCOeval(
        coco, coco.loadRes([{**each, "image_id": int(each["image_id"])} for each in found]), "segm"
    )
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    got = metrics.average_precision(dataset.photos, found)
    assert list(got.values()) == pytest.approx(evaluation.stats.tolist(), abs=1e-12)
    assert 0.1 < got["AP"] < 0.9 and len(set(got.values())) == 12


def test_ap_without_categories_or_results(capsys):
    photos = [Photo("a", "a.jpg", (200, 200), (made(None),)), Photo("b", "b.jpg", (200, 200))]
    hit = result("a", photos[0].instances[0].mask(), 0.5, None)
    assert metrics.average_precision(photos, [hit])["AP"] == pytest.approx(1)
    elsewhere = result("b", disc((200, 200), (50, 50), 20), 0.9, None)
    assert metrics.average_precision(photos, [hit, elsewhere])["AP"] == pytest.approx(0.5)
    assert metrics.average_precision(photos, [])["AP"] == 0
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match="A result is of photo 'c'"):
        metrics.average_precision(photos, [result("c", np.ones((2, 2)), 1.0)])

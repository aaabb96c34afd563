"""report.json, report.md and the pictures, from records written by hand."""

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from samlight_jax.errors import InputError
from train import report, report_pictures
from train.annotations import Dataset, Instance, Photo, Problem
from train.protocol import Protocol


def rle(x1, x2):
    mask = np.zeros((40, 60), np.uint8, order="F")
    mask[:, x1:x2] = 1
    return coco_mask.encode(mask)


def text(found):
    return {**found, "counts": found["counts"].decode()}


@pytest.fixture
def dataset():
    """Two instances on "a", none that was evaluated on "b", one on "c"; one bad annotation."""
    made = [
        Instance("1", rle(0, 10), (0, 0, 10, 40), 400.0, category=5),
        Instance("2", rle(20, 60), (20, 0, 60, 40), 1600.0, category=5),
        Instance("3", rle(0, 60), (0, 0, 60, 40), 10000.0, category=5),
        Instance("4", rle(0, 9), (0, 0, 9, 40), 360.0, category=5),
    ]
    photos = (
        Photo("a", "a.jpg", (40, 60), tuple(made[:2])),
        Photo("b", "b.jpg", (40, 60), (made[3],)),
        Photo("c", "c.jpg", (40, 60), (made[2],)),
    )
    problems = [Problem("annotation 9", "its mask is empty")]
    return Dataset("three", "coco", photos, {5: "cat"}, problems, "data-print", lambda name: None)  # type: ignore


def instance(number, area, value, **more):
    return {
        "id": number, "category": 5, "box": [0, 0, 5, 5], "points": [], "predicted_iou": 0.9,
        "mask": 0, "area": area, "iou": value, **more,
    }  # fmt: skip


def records(*instances, **more):
    first, second, third = instances
    failed = [{"what": "b.jpg", "why": "There is no image b.jpg."}]
    return {
        "c": {"photo": "c", "name": "c.jpg", "problems": [], "instances": [third], **more},
        "a": {"photo": "a", "name": "a.jpg", "problems": [], "instances": [first, second], **more},
        "b": {"photo": "b", "name": "b.jpg", "problems": failed, "instances": []},
    }


def build(dataset, found, **fields):
    protocol = Protocol(**fields)
    header = {
        "protocol": protocol.to_json(), "model": {"name": "tiny", "fingerprint": "m" * 64},
        "teacher": None, "data": {"name": "three", "fingerprint": "d" * 64}, "detections": None,
        "limit": None, "batch": 1, "versions": {"jax": "1.2.3"},
    }  # fmt: skip
    return report.build(header, dataset, dataset.photos, found, None, protocol)


def test_the_numbers_by_hand(dataset):
    found = records(instance("1", 400.0, 0.2), instance("2", 1600.0, 0.6), instance("3", 1e4, 1.0))
    got = build(dataset, found)
    miou = got["results"]["miou"]
    assert (miou["value"], miou["n"]) == (0.6, 3)
    assert 0.2 <= miou["low"] < 0.6 < miou["high"] <= 1
    by_area = {name: (part["value"], part["n"]) for name, part in miou["by_area"].items()}
    assert by_area == {"small": (0.2, 1), "medium": (0.6, 1), "large": (1.0, 1)}
    assert got["counts"] == {
        "photographs in the data": 3, "photographs chosen": 3, "photographs that failed": 1,
        "instances": 3, "problems": 2,
    }  # fmt: skip
    assert [photo.get("miou") for photo in got["photos"]] == [0.4, None, 1.0]
    assert [i["photo"] + i["id"] for i in got["instances"]] == ["a1", "a2", "c3"]
    assert [problem["what"] for problem in got["problems"]] == ["annotation 9", "b.jpg"]
    page = report.markdown(got)
    assert "# tiny on three" in page and got["protocol"]["sentence"] in page
    assert "| mIoU | 0.6000 |" in page and "| - small | 0.2000 | 0.2000 to 0.2000 | 1 |" in page
    assert "## Problems: 2" in page and "- b.jpg: There is no image b.jpg." in page


def test_clicks_agreement_and_embeddings_are_averaged(dataset):
    more = [{"rounds": [0.1 * k, 0.2 * k], "agreement": 0.3 * k} for k in (1, 2, 3)]
    instances = [instance(str(k), 50.0, 0.2 * k, **m) for k, m in enumerate(more, 1)]
    found = records(*instances, embedding={"mse": 0.5, "cosine": 0.25})
    results = build(dataset, found, refine=1, agree_with="x")["results"]
    assert [part["value"] for part in results["miou"]["after_clicks"]] == [0.2, 0.4]
    assert results["agreement"]["value"] == pytest.approx(0.6)
    assert results["embedding_mse"]["value"] == 0.5 and results["embedding_mse"]["n"] == 2
    assert results["embedding_cosine"]["value"] == 0.25


def test_a_small_error_keeps_its_digits(dataset):
    instances = [instance(str(k), 50.0, 0.0) for k in (1, 2, 3)]
    found = records(*instances, embedding={"mse": 0.000291234567, "cosine": 0.9})
    got = build(dataset, found, agree_with="x")
    assert got["results"]["embedding_mse"]["value"] == 0.000291235
    page = report.markdown(got)
    assert "| embedding: mean squared error | 0.000291 | 0.000291 to 0.000291 | 2 |" in page
    assert "| mIoU | 0.0000 | 0.0000 to 0.0000 | 3 |" in page


def test_ap_is_of_the_photographs_that_could_be_read(dataset):
    exact = [text(rle(0, 10)), text(rle(20, 60)), text(rle(0, 60))]
    numbers = zip(("1", "2", "3"), (400.0, 1600.0, 1e4), exact, strict=True)
    found = records(*(instance(n, area, 1.0, rle=mask) for n, area, mask in numbers))
    got = build(dataset, found, metric=("ap",))
    assert got["results"].keys() == {"ap"}
    assert got["results"]["ap"]["AP"] == 1.0, "b's instance was never asked about"
    assert all("rle" not in i for i in got["instances"])
    assert "| AP | AP50 |" in report.markdown(got)
    found["c"]["instances"][0]["rle"] = text(rle(0, 5))  # 1/12 of it
    worse = build(dataset, found, metric=("ap",))["results"]["ap"]
    assert worse["AP_large"] == 0.0 and worse["AP_small"] == 1.0


def test_nothing_left_is_refused_with_the_first_problem(dataset):
    found = records(*(instance(str(k), 9.0, 1.0) for k in range(3)))
    for record in found.values():
        record["instances"] = []
    with pytest.raises(InputError, match="Nothing of three could be evaluated; the first problem"):
        build(dataset, found)


def test_many_problems_are_all_in_the_json(dataset):
    dataset.problems = [Problem(f"annotation {k}", "why") for k in range(99)]
    found = records(*(instance(str(k), 9.0, 1.0) for k in range(3)))
    got = build(dataset, found)
    assert len(got["problems"]) == 100
    assert "and 70 more, in report.json" in report.markdown(got)


def test_a_run_that_had_nothing_to_do_keeps_the_speed_of_the_one_that_had(dataset, tmp_path):
    got = build(dataset, records(*(instance(str(k), 9.0, 1.0) for k in range(3))))
    report.write(tmp_path, got, {"photographs": 3})
    report.write(tmp_path, got, {"photographs": 0})
    assert json.loads((tmp_path / "run.json").read_text()) == {"photographs": 3}
    assert json.loads((tmp_path / "report.json").read_text()) == got


# Pictures: their looks are for the eye; these are the choices that they make.


def test_bands_take_one_instance_a_photograph_while_they_can():
    scored = [(v, photo, {"id": str(k)}) for k, (v, photo) in enumerate(
        [(0.9, "a"), (0.8, "a"), (0.7, "b"), (0.5, "c"), (0.2, "b"), (0.1, "c")])]  # fmt: skip
    found = report_pictures.bands(scored, 2)
    assert [[value for value, *_ in band] for band in found.values()] == [
        [0.9, 0.7], [0.7, 0.5], [0.2, 0.1],
    ]  # fmt: skip
    assert [len(band) for band in report_pictures.bands(scored, 9).values()] == [6, 6, 6]


@pytest.mark.parametrize("place", [(0, 0), (200, 150), (395, 295)])
def test_the_window_shows_everything_within_the_photograph(place):
    x, y = place
    mask = np.zeros((300, 400), bool)
    mask[y : y + 5, x : x + 5] = True
    prompt = {"box": None, "points": [[x + 2, y + 2, 1]]}
    x1, y1, x2, y2 = report_pictures.window([mask, np.zeros_like(mask)], prompt, (300, 400))
    assert 0 <= x1 <= x and x + 5 <= x2 <= 400 and 0 <= y1 <= y and y + 5 <= y2 <= 300
    assert (x2 - x1) / (y2 - y1) == pytest.approx(4 / 3, rel=0.03)
    assert x2 - x1 == pytest.approx(400 / 3, abs=2)

import json

import pytest

from samlight_jax.errors import InputError
from train.annotations import Dataset, Photo
from train.detections import read_detections

GOOD = {"image_id": 7, "category_id": 3, "bbox": [1, 2, 10, 20], "score": 0.5}


@pytest.fixture
def dataset():
    photos = (Photo("7", "a.jpg", (50, 60)), Photo("8", "b.jpg", (50, 60)))
    return Dataset("two", "coco", photos, {3: "cat"}, [], "print", lambda name: None)  # type: ignore


def write(tmp_path, content):
    path = tmp_path / "boxes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_boxes_become_corners_and_keep_their_order(tmp_path, dataset):
    found = read_detections(write(tmp_path, [GOOD, {**GOOD, "score": 0.9}]), dataset)
    first, second = found.by_photo["7"]
    assert first == ("detection-0", (1, 2, 11, 22), 3, 0.5)
    assert second.id == "detection-1" and second.score == 0.9
    assert not found.problems and "8" not in found.by_photo


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"image_id": 9}, "image_id 9 is not in the data"),
        ({"category_id": 4}, "category_id 4 is not in the data"),
        ({"bbox": [1, 2, 0, 5]}, "covers nothing"),
        ({"bbox": [1, 2, 3]}, "lacks"),
        ({"score": float("nan")}, "not finite"),
    ],
)
def test_a_bad_entry_is_a_problem(tmp_path, dataset, change, why):
    found = read_detections(write(tmp_path, [{**GOOD, **change}, GOOD]), dataset)
    assert [p.what for p in found.problems] == ["detection 0"] and why in found.problems[0].why
    assert len(found.by_photo["7"]) == 1
    with pytest.raises(InputError, match=f"No detection .* can be used.*{why}"):
        read_detections(write(tmp_path, [{**GOOD, **change}]), dataset)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("[{", "not whole JSON"), ({"a": 1}, "holds a dict"), ([], "the list is empty")],
)
def test_a_bad_file_is_refused(tmp_path, dataset, content, sentence):
    with pytest.raises(InputError, match=sentence):
        read_detections(write(tmp_path, content), dataset)
    with pytest.raises(InputError, match="cannot be read"):
        read_detections(tmp_path / "absent.json", dataset)

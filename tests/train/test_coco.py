import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from samlight_jax.errors import InputError
from train.annotations import open_dataset

SQUARE = [[1, 1, 4, 1, 4, 4, 1, 4]]  # 3x3 pixels
BAR = [[5, 0, 7, 0, 7, 6, 5, 6]]  # 2x6 pixels


def content(names, **image):
    """A photograph of 6x8 pixels by name, two objects in the first, one in the last."""
    images = [
        {"id": i + 1, "file_name": name, "height": 6, "width": 8, **image}
        for i, name in enumerate(names)
    ]
    place = [(1, SQUARE), (1, BAR), (len(names), SQUARE)]
    annotations = [
        {"id": 10 + i, "image_id": image_id, "category_id": 5, "segmentation": polygons}
        for i, (image_id, polygons) in enumerate(place)
    ]
    return {"images": images, "annotations": annotations, "categories": [{"id": 5, "name": "cat"}]}


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def save(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.new("RGB", (8, 6), (i, 0, 0)).save(folder / name)


def pack(folder, prefix):
    """The folder to a tar of its name."""
    with tarfile.open(folder.with_name(f"{folder.name}.tar"), "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, f"{prefix}{path.name}")
    shutil.rmtree(folder)


def assert_whole(dataset, name):
    assert dataset.name == name and dataset.problems == []
    assert [len(photo.instances) for photo in dataset.photos] == [2, 0, 1]
    assert [dataset.read(photo)[0, 0, 0] for photo in dataset.photos] == [0, 1, 2]
    assert {photo.size for photo in dataset.photos} == {(6, 8)}
    assert dataset.categories == {5: "cat"}
    assert [i.id for i in dataset.photos[0].instances] == ["10", "11"]
    assert dataset.photos[0].instances[1].box == (5, 0, 7, 6)


NAMES = ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize(
    "images, packed",
    [
        *((folder, None) for folder in ("val2017", "images/val2017", "images", ".")),
        *((tar, prefix) for tar in ("val2017", "images") for prefix in ("", "./", "val2017/")),
    ],
)
def test_coco_s_folders_and_tars(tmp_path, images, packed):
    write(tmp_path / "annotations/instances_val2017.json", content(NAMES))
    save(tmp_path / images, NAMES)
    if packed is not None:
        pack(tmp_path / images, packed)
    assert_whole(open_dataset("coco", tmp_path, "val2017"), "coco/val2017")
    assert_whole(open_dataset("coco", tmp_path), "coco/val2017")  # the only split
    path = str(tmp_path / "annotations/instances_val2017.json")
    assert_whole(open_dataset(path), "instances_val2017")


def test_annotations_json_beside_images(tmp_path):
    write(tmp_path / "zoo/annotations.json", content(NAMES))
    save(tmp_path / "zoo/images", NAMES)
    assert_whole(open_dataset("coco", tmp_path / "zoo"), "zoo")
    assert_whole(open_dataset(str(tmp_path / "zoo/annotations.json")), "zoo")


def test_a_json_with_its_root_elsewhere(tmp_path):
    path = write(tmp_path / "x/boats.json", content(NAMES))
    save(tmp_path / "y/parts", NAMES)
    assert_whole(open_dataset(str(path), tmp_path / "y"), "boats")
    pack(tmp_path / "y/parts", "")
    assert_whole(open_dataset(str(path), tmp_path / "y/parts.tar"), "boats")


@pytest.mark.parametrize("folder", ["annotations", "."])
def test_lvis_has_urls_and_photographs_of_both_splits(tmp_path, folder):
    data = content(NAMES, neg_category_ids=[5], not_exhaustive_category_ids=[])
    for image, split in zip(data["images"], ("val2017", "train2017", "train2017"), strict=True):
        name = image.pop("file_name")
        image["coco_url"] = f"http://images.cocodataset.org/{split}/{name}"
    write(tmp_path / folder / "lvis_v1_val.json", data)
    for split in ("train2017", "val2017"):
        save(tmp_path / split, NAMES)  # the same names in both: the url decides
    pack(tmp_path / "train2017", "train2017/")
    Image.new("RGB", (8, 6), (99, 0, 0)).save(tmp_path / "val2017/1.png")
    dataset = open_dataset("lvis", tmp_path, "val")
    assert_whole(dataset, "lvis/val")
    assert [photo.name for photo in dataset.photos][:2] == ["val2017/0.png", "train2017/1.png"]


def test_splits_are_named(tmp_path):
    for split in ("val2017", "train2017"):
        write(tmp_path / f"annotations/instances_{split}.json", content(NAMES))
    with pytest.raises(InputError, match=r"split=None: .* holds train2017, val2017; .* name one"):
        open_dataset("coco", tmp_path)
    with pytest.raises(InputError, match=r"split='test': .* holds train2017, val2017"):
        open_dataset("coco", tmp_path, "test")
    with pytest.raises(InputError, match=r"holds no split; expected annotations/lvis_v1_<split>"):
        open_dataset("lvis", tmp_path, "val")


def test_crowds_boxes_areas_and_rles_are_kept(tmp_path):
    data = content(["0.png"])
    data["annotations"] = [
        {
            **{"id": 1, "image_id": 1, "category_id": 5, "iscrowd": 1, "area": 7.5},
            **{"bbox": [0.5, 0, 3, 4], "segmentation": {"size": [6, 8], "counts": [6, 6, 36]}},
        }
    ]
    save(tmp_path, ["0.png"])
    ((photo,), problems) = _open(tmp_path, data)
    (only,) = photo.instances
    assert (only.crowd, only.area, only.box) == (True, 7.5, (0.5, 0, 3.5, 4))
    np.testing.assert_array_equal(np.argwhere(only.mask()), [(y, 1) for y in range(6)])
    assert not problems


def _open(tmp_path, data):
    dataset = open_dataset(str(write(tmp_path / "x.json", data)))
    return dataset.photos, dataset.problems


def test_wrong_annotations_are_listed_and_the_rest_is_kept(tmp_path):
    save(tmp_path, NAMES)
    data = content(NAMES)
    good = data["annotations"][0]
    wrong = [
        ({"image_id": 77}, "its photo of id 77 does not exist"),
        ({"image_id": None}, "its photo of id None does not exist"),
        ({"image_id": [1]}, r"its photo of id [1] does not exist"),
        ({"category_id": 6}, "its category of id 6 does not exist"),
        ({"category_id": [5]}, "its category of id [5] does not exist"),
        ({"id": 10}, "another annotation has this id"),
        ({"segmentation": {"size": [8, 6], "counts": [0, 48]}}, "its RLE has (height, width)"),
        ({"segmentation": {"size": [6, 8], "counts": [48]}}, "its mask is empty"),
        ({"bbox": [1, 1, 0, 0]}, "its box is degenerate"),
    ]
    for i, (fields, _) in enumerate(wrong):
        data["annotations"].append({**good, "id": 100 + i, **fields})
    data["annotations"] += [{"image_id": 1}, 7]
    photos, problems = _open(tmp_path, data)
    assert [len(photo.instances) for photo in photos] == [2, 0, 1]
    assert len(problems) == len(wrong) + 2
    for problem, (_, why) in zip(problems, wrong, strict=False):
        assert problem.why.startswith(why)
    assert problems[3].what == "annotation 103 of 0.png"
    assert all("it has no id" in problem.why for problem in problems[-2:])


def test_wrong_photographs_are_listed_and_the_rest_is_kept(tmp_path):
    save(tmp_path, NAMES[:2])
    data = content(NAMES)  # 2.png is missing
    data["images"] += [
        {"id": 1, "file_name": "1.png", "height": 6, "width": 8},
        {"id": 21, "file_name": "1.png", "height": 6, "width": 8},
        {"id": 22, "file_name": "5.png", "width": 8},
        {"id": 23, "height": 6, "width": 8},
        {"file_name": "0.png", "height": 6, "width": 8},
        None,
    ]
    photos, problems = _open(tmp_path, data)
    assert [photo.name for photo in photos] == NAMES[:2]
    whys = [problem.why for problem in problems]
    assert problems[0].what == "photo 2.png" and whys[0] == "the file is missing"
    assert whys[1] == "its id 1 is that of 0.png too"
    assert whys[2] == "another photograph has this file name"
    assert "expected two positive integers" in whys[3]
    assert all("needs an id and a file_name" in why for why in whys[4:7])
    assert whys[7] == "its photo of id 3 is left out"
    assert len(whys) == 8


def test_an_ambiguous_photograph_is_a_problem(tmp_path):
    for folder in ("a", "b"):
        save(tmp_path / folder, ["0.png"])
    save(tmp_path, ["1.png"])
    photos, problems = _open(tmp_path, content(["0.png", "1.png"]))
    assert [photo.name for photo in photos] == ["1.png"]
    assert "could be 'a/0.png' or 'b/0.png'" in problems[0].why


@pytest.mark.parametrize(
    "text, why",
    [
        (json.dumps(content(NAMES))[:-30], "no whole JSON file"),
        ("\0\1", "no whole JSON file"),
        ("[]", "not in COCO's format"),
        ('{"images": []}', "not in COCO's format"),
        ('{"images": {}, "annotations": []}', "not in COCO's format"),
        ('{"images": [], "annotations": []}', "it names none"),
        (json.dumps(content(["7.png"])), r"of its 1 photographs none is found \(photo 7.png"),
    ],
)
def test_files_of_which_nothing_is_left_are_refused(tmp_path, text, why):
    save(tmp_path, NAMES)
    with pytest.raises(InputError, match=why):
        _open(tmp_path, text)
    with pytest.raises(InputError, match="There is no file"):
        open_dataset(str(tmp_path / "y.json"))


def test_the_fingerprint_follows_annotations_and_photographs(tmp_path):
    def now(data):
        return open_dataset(str(write(tmp_path / "x.json", data))).fingerprint

    save(tmp_path, NAMES)
    first = now(content(NAMES))
    assert now(content(NAMES)) == first
    changed = content(NAMES)
    changed["annotations"][0]["category_id"] = None
    assert now(changed) != first
    (tmp_path / "1.png").unlink()
    assert now(content(NAMES)) != first

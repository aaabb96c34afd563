import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

from samlight_jax.errors import InputError
from train.annotations import open_dataset

SIZE = (6, 8)


def mask(i):
    result = np.zeros(SIZE, bool)
    result[1 : 2 + i, 2:6] = True
    return result


def annotation(i, key, **fields):
    rle = mask_utils.encode(np.asfortranarray(mask(i), np.uint8))
    return {
        **{"id": key, "bbox": [2, 1, 4, 1 + i], "area": 4 * (1 + i)},
        "segmentation": {"size": list(SIZE), "counts": rle["counts"].decode()},
        **{"predicted_iou": 0.9, "stability_score": 0.97, "point_coords": [[3, 2]]},
        **{"crop_box": [0, 0, 8, 6], **fields},
    }


def pair(i, **fields):
    """The two files of a photograph, by name."""
    image = {"image_id": i, "width": 8, "height": 6, "file_name": f"sa_{i}.jpg", **fields}
    content = {"image": image, "annotations": [annotation(1, 10 * i), annotation(2, 10 * i + 1)]}
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (0, 40 * i, 0)).save(file, "jpeg")
    return {f"sa_{i}.jpg": file.getvalue(), f"sa_{i}.json": json.dumps(content).encode()}


def write(folder, files):
    for name, data in files.items():
        (folder / name).write_bytes(data)


def assert_whole(dataset):
    assert [photo.name for photo in dataset.photos] == ["sa_1.jpg", "sa_2.jpg"]
    for i, photo in enumerate(dataset.photos, 1):
        assert (photo.id, photo.size) == (str(i), SIZE)
        assert [each.id for each in photo.instances] == [str(10 * i), str(10 * i + 1)]
        for k, each in enumerate(photo.instances, 1):
            np.testing.assert_array_equal(each.mask(), mask(k))
            assert (each.box, each.area) == ((2, 1, 6, 2 + k), 4 * (1 + k))
            assert (each.category, each.crowd) == (None, False)
        assert abs(int(dataset.read(photo)[0, 0, 1]) - 40 * i) <= 2  # JPEG
    assert dataset.problems == []


def test_pairs_in_a_folder_and_in_tars(tmp_path):
    write(tmp_path, {**pair(1), **pair(2)})
    folder = open_dataset("sa1b", tmp_path)
    assert_whole(folder)
    for i in (1, 2):
        with tarfile.open(tmp_path / f"sa_00000{i}.tar", "w") as tar:
            for name in pair(i):
                tar.add(tmp_path / name, f"./{name}")
    packed = open_dataset("sa1b", str(tmp_path / "*.tar"))
    assert_whole(packed)
    assert packed.fingerprint == folder.fingerprint
    assert len(open_dataset("sa1b", tmp_path / "sa_000001.tar").photos) == 1


def test_what_is_wrong_is_listed(tmp_path):
    files = {**pair(1), **pair(2), **pair(3), **pair(4), **pair(5, height=None), **pair(6)}
    del files["sa_2.json"], files["sa_3.jpg"]
    files["sa_4.json"] = files["sa_4.json"][:50]
    files["sa_6.json"] = b'{"image": {"height": 6, "width": 8}}'
    content = json.loads(files["sa_1.json"])
    content["annotations"] += [
        annotation(1, 10),
        annotation(1, 12, segmentation={"size": [8, 6], "counts": [0, 48]}),
        {},
        None,
    ]
    files["sa_1.json"] = json.dumps(content).encode()
    write(tmp_path, files)
    dataset = open_dataset("sa1b", tmp_path)
    assert [photo.name for photo in dataset.photos] == ["sa_1.jpg"]
    assert len(dataset.photos[0].instances) == 2
    told = [(problem.what, problem.why[:40]) for problem in dataset.problems]
    assert told == [
        ("annotation 10 of sa_1.jpg", "another one has this id"),
        ("annotation 12 of sa_1.jpg", "its RLE has (height, width) [8, 6]; the p"[:40]),
        ("annotation None of sa_1.jpg", "it has no id"),
        ("annotation None of sa_1.jpg", "it has no id"),
        ("photo sa_2.jpg", "its annotations sa_2.json are missing"),
        ("photo sa_4.jpg", "its annotations are no whole JSON file (Unt"[:40]),
        ("photo sa_5.jpg", "its annotations lack 'image' with height and"[:40]),
        ("photo sa_6.jpg", "its annotations lack the list 'annotatio"),
        ("sa_3.json", "its photograph is missing"),
    ]


def test_no_pair_is_refused(tmp_path):
    write(tmp_path, {"sa_1.json": pair(1)["sa_1.json"]})
    with pytest.raises(InputError, match="holds no pair of a photograph and its JSON file"):
        open_dataset("sa1b", tmp_path)

"""tfds's own writer prepares small array_record copies; TensorFlow takes no part."""

import functools
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from samlight_jax.errors import InputError
from train.annotations import open_dataset
from train.data import Photos

tfds = pytest.importorskip("tensorflow_datasets")

SIZES = ((20, 30), (24, 16), (10, 40))  # (height, width) of the photographs


def photograph(i):
    return np.random.default_rng(i).integers(0, 256, (*SIZES[i], 3), np.uint8)


def encoded(array, suffix):
    file = io.BytesIO()
    Image.fromarray(array).save(file, suffix)
    return file.getvalue()


def mask(i):
    """Rows 2 to 5, columns 3 to 10 + i."""
    result = np.zeros(SIZES[i], bool)
    result[2:6, 3 : 11 + i] = True
    return result


def bbox(i):
    height, width = SIZES[i]
    return tfds.features.BBox(
        ymin=2 / height, xmin=3 / width, ymax=6 / height, xmax=(11 + i) / width
    )


def instance(i, key, **more):
    return {"id": key, "area": 4 * (8 + i), "bbox": bbox(i), "label": i % 2, **more}


@functools.cache
def features():
    f = tfds.features
    objects = {"id": np.int64, "area": np.int64, "bbox": f.BBoxFeature()}
    objects["label"] = f.ClassLabel(names=["cat", "dog"])
    image = {"image": f.Image(encoding_format="jpeg"), "image/id": np.int64}
    named = {**image, "image/filename": f.Text()}
    crowd = {**objects, "is_crowd": np.bool_}
    return {
        "lvis": {
            **image,
            "objects": f.Sequence({**objects, "segmentation": f.Image(shape=(None, None, 1))}),
        },
        "coco/2017": {**named, "objects": f.Sequence(crowd)},
        "coco/2017_panoptic": {
            **named,
            "panoptic_image": f.Image(encoding_format="png"),
            "panoptic_objects": f.Sequence(crowd),
        },
        "other": {"text": f.Text()},
    }


def examples(name):
    for i in range(len(SIZES)):
        example = {"image": io.BytesIO(encoded(photograph(i), "jpeg")), "image/id": i + 7}
        if name == "lvis":
            png = encoded(mask(i).astype(np.uint8) * 255, "png")
            example["objects"] = [instance(i, 50 + i, segmentation=io.BytesIO(png))]
        else:
            example["image/filename"] = f"{i}.jpg"
            crowd = [instance(i, 300 + i, is_crowd=bool(i == 2))]
        if name == "coco/2017":
            example["objects"] = crowd
        if name == "coco/2017_panoptic":
            colours = np.zeros((*SIZES[i], 3), np.uint8)
            colours[mask(i)] = (44 + i, 1, 0)  # 300 + i
            example["panoptic_image"] = io.BytesIO(encoded(colours, "png"))
            example["panoptic_objects"] = crowd
        yield {"text": "x"} if name == "other" else example


def prepare(data_dir, name, split="validation", version="1.10.0", rows=None):
    folder = data_dir / name / version
    folder.mkdir(parents=True)
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name.split("/")[0],
        version=tfds.core.Version(version),
        data_dir=str(folder),
        module_name="",
    )
    info = tfds.core.DatasetInfo(
        builder=identity, features=tfds.features.FeaturesDict(features()[name])
    )
    writer = tfds.core.SequentialWriter(info, 2, file_format="array_record")  # two shards
    writer.initialize_splits([split])
    writer.add_examples({split: list(examples(name) if rows is None else rows)})
    writer.close_all()
    return folder


def assert_stored(dataset):
    for i, photo in enumerate(dataset.photos):
        assert photo.size == SIZES[i]
        stored = Image.open(io.BytesIO(encoded(photograph(i), "jpeg")))
        np.testing.assert_array_equal(dataset.read(photo), np.asarray(stored))


def test_lvis_has_masks(tmp_path):
    prepare(tmp_path, "lvis")
    dataset = open_dataset("tfds:lvis", tmp_path, "validation")
    assert [photo.name for photo in dataset.photos] == [f"{i + 7:012d}.jpg" for i in range(3)]
    assert [photo.id for photo in dataset.photos] == ["7", "8", "9"]
    for i, photo in enumerate(dataset.photos):
        (only,) = photo.instances
        np.testing.assert_array_equal(only.mask(), mask(i))
        assert (only.id, only.area, only.crowd) == (str(50 + i), 4 * (8 + i), False)
        assert only.box == pytest.approx((3, 2, 11 + i, 6), abs=1e-5)
        assert dataset.categories[only.category] == ("cat", "dog", "cat")[i]
    assert_stored(dataset)
    assert not dataset.problems
    again = open_dataset("tfds:lvis", tmp_path / "lvis" / "1.10.0")  # its one split
    assert again.photos == dataset.photos and again.fingerprint == dataset.fingerprint


def test_panoptic_masks_are_colours(tmp_path):
    prepare(tmp_path, "coco/2017_panoptic")
    dataset = open_dataset("tfds:coco/2017_panoptic", tmp_path)
    for i, photo in enumerate(dataset.photos):
        (only,) = photo.instances
        np.testing.assert_array_equal(only.mask(), mask(i))
        assert (only.id, only.crowd) == (f"{i + 7}/{300 + i}", i == 2)
    assert_stored(dataset)


def test_coco_without_masks_says_so(tmp_path):
    prepare(tmp_path, "coco/2017")
    dataset = open_dataset("tfds:coco/2017", tmp_path)
    assert [photo.instances for photo in dataset.photos] == [()] * 3
    assert "boxes but no masks" in dataset.problems[0].why
    assert_stored(dataset)


@pytest.mark.parametrize("place", ["annotations", "downloads/extracted/ZIP.x/annotations"])
def test_coco_takes_its_masks_from_the_json(tmp_path, place):
    prepare(tmp_path, "coco/2017")
    images = [
        {"id": i + 7, "file_name": f"{i}.jpg", "height": h, "width": w}
        for i, (h, w) in enumerate(SIZES)
    ]
    square = [[2, 2, 6, 2, 6, 6, 2, 6]]
    annotation = {"id": 1, "image_id": 8, "category_id": 3, "segmentation": square}
    content = {"images": images, "annotations": [annotation], "categories": [{"id": 3}]}
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "instances_val2017.json").write_text(json.dumps(content))
    dataset = open_dataset("tfds:coco/2017", tmp_path, "validation")
    assert [len(photo.instances) for photo in dataset.photos] == [0, 1, 0]
    assert dataset.photos[1].instances[0].mask().sum() == 16
    assert dataset.kind == "tfds" and not dataset.problems
    assert_stored(dataset)


def test_the_newest_version_is_read(tmp_path):
    prepare(tmp_path, "coco/2017", version="1.9.0", rows=list(examples("coco/2017"))[:1])
    prepare(tmp_path, "coco/2017", version="1.10.0")
    assert len(open_dataset("tfds:coco/2017", tmp_path).photos) == 3


def test_a_damaged_photograph_is_a_problem(tmp_path):
    rows = list(examples("lvis"))
    rows[1]["image"] = io.BytesIO(b"no picture")
    prepare(tmp_path, "lvis", rows=rows)
    dataset = open_dataset("tfds:lvis", tmp_path)
    assert [photo.id for photo in dataset.photos] == ["7", "9"]
    assert "000000000008.jpg" in dataset.problems[0].what
    assert dataset.read(dataset.photos[1]).shape == (10, 40, 3)


def test_bad_copies_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds no copy prepared by tfds"):
        open_dataset("tfds:lvis", tmp_path, "validation")
    folder = prepare(tmp_path, "lvis")
    with pytest.raises(InputError, match=r"split='train': .* holds validation"):
        open_dataset("tfds:lvis", tmp_path, "train")
    prepare(tmp_path, "other")
    with pytest.raises(InputError, match=r"features \['text'\]; expected those of coco or lvis"):
        open_dataset("tfds:other", tmp_path)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match="not in array_record format"):
        open_dataset("tfds:lvis", tmp_path)


def test_tensorflow_is_not_imported(tmp_path):
    prepare(tmp_path, "lvis")
    code = (
        "import sys\n"
        "from train.annotations import open_dataset\n"
        f"dataset = open_dataset('tfds:lvis', {str(tmp_path)!r})\n"
        "print(dataset.read(dataset.photos[0]).shape, 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(20, 30, 3) False"


def test_training_reads_a_copy_with_its_masks(tmp_path, monkeypatch):
    prepare(tmp_path, "lvis")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    photos = Photos(["tfds:lvis@validation"], [], 40, annotated=True)
    assert len(photos) == len(SIZES)
    for i in range(len(SIZES)):
        one = photos[i]
        height, width = SIZES[i]
        assert one["sizes"].tolist() == [height, width]
        stored = Image.open(io.BytesIO(encoded(photograph(i), "jpeg")))
        assert np.array_equal(one["photos"][:height, :width], np.asarray(stored))
        rows = np.flatnonzero(one["masks"][0].any(1))
        assert rows.tolist() in ([1], [0, 1])  # 2 to 5 of the photograph's

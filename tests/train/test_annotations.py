import concurrent.futures
import itertools
import json

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

from samlight_jax.errors import InputError
from tests import oracles
from train.annotations import fingerprint, make_instance, open_dataset, to_rle

MASKS = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40))


def runs_of(mask):
    """Run lengths by columns, the first of background."""
    flat = mask.T.ravel().tolist()
    runs = [(value, len(list(group))) for value, group in itertools.groupby(flat)]
    return ([0] if runs[0][0] else []) + [length for _, length in runs]


def instance(segmentation, size=(6, 8), **fields):
    fields = {"id": 1, "bbox": None, "area": None, **fields}
    return make_instance(segmentation=segmentation, size=size, **fields)


@hypothesis.given(MASKS)
def test_every_form_of_an_rle_is_the_mask(mask):
    encoded = mask_utils.encode(np.asfortranarray(mask, np.uint8))
    for counts in (encoded["counts"], encoded["counts"].decode(), runs_of(mask)):
        got = to_rle({"size": list(mask.shape), "counts": counts}, mask.shape)
        np.testing.assert_array_equal(mask_utils.decode(got), mask)
        assert got == encoded


def test_long_runs_are_counted():
    mask = np.zeros((3000, 4000), bool)
    mask[1000:, 2000:3500] = True
    encoded = mask_utils.encode(np.asfortranarray(mask, np.uint8))
    assert to_rle(encoded, mask.shape) == encoded


@hypothesis.given(MASKS, st.data())
def test_a_damaged_rle_is_refused_or_another_whole_mask(mask, data):
    """As pycocotools: where it decodes, all of the mask was written."""
    counts = mask_utils.encode(np.asfortranarray(mask, np.uint8))["counts"]
    place = data.draw(st.integers(0, len(counts) - 1))
    bad = counts[:place] + bytes([data.draw(st.integers(48, 111))]) + counts[place + 1 :]
    rle = {"size": list(mask.shape), "counts": bad}
    try:
        got = to_rle(rle, mask.shape)
    except InputError:
        return
    decoded = mask_utils.decode(got)  # raises where runs go beyond the mask
    assert decoded.max(initial=0) <= 1 and decoded.sum() == mask_utils.area(got)


@pytest.mark.parametrize(
    "counts",
    [b"", "", b"5", "5", "zzz", "\xe9", "P" * 30, [], [3], [40, -1, 9], [47.5, 0.5], "49", 48],
)
def test_runs_that_do_not_fill_the_photo_are_refused(counts):
    with pytest.raises(InputError, match="its runs do not add up to 48 pixels"):
        to_rle({"size": [6, 8], "counts": counts}, (6, 8))


def test_polygons_are_merged_as_pycocotools_does():
    polygons = [[1, 1, 5, 1, 5, 4, 1, 4], [6.0, 2.0, 8.0, 2.0, 8.0, 6.0, 6.0, 6.0]]
    mask = np.zeros((6, 8), bool)
    mask[1:4, 1:5] = mask[2:6, 6:8] = True
    got = instance(polygons)
    np.testing.assert_array_equal(got.mask(), mask)
    assert (got.box, got.area) == ((1, 1, 8, 6), 20)  # the mask's own


def test_the_annotation_s_box_and_area_are_kept():
    got = instance(
        [[1, 1, 5, 1, 5, 4, 1, 4]], bbox=[0.5, 0.25, 3.25, 5], area=11.5, crowd=True, category=3
    )
    assert (got.box, got.area, got.crowd, got.category) == ((0.5, 0.25, 3.75, 5.25), 11.5, True, 3)


@pytest.mark.parametrize(
    "segmentation, fields, why",
    [
        (None, {}, "no segmentation"),
        ([], {}, "no segmentation"),
        ({"size": [6, 8]}, {}, "no segmentation"),
        ([[1, 1, 4, 4]], {}, "not three points"),  # pycocotools: a box
        ([[1, 1, 5, 1, 5, 4, 1]], {}, "not three points"),
        ([{}], {}, "not three points"),
        ([[1, 1, 5, 1, 5, float("nan")]], {}, "finite numbers"),
        ([[1, 1, 5, 1, 5, "x"]], {}, "finite numbers"),
        ([[1, 1, 1e9, 1, 5, 4]], {}, "far behind"),
        ([[1.1, 1.1, 1.2, 1.1, 1.2, 1.2]], {}, "its mask is empty"),
        ({"size": [6, 8], "counts": [48]}, {}, "its mask is empty"),
        ({"size": [8, 6], "counts": [0, 48]}, {}, r"\[8, 6\]; the photograph \[6, 8\]"),
        ({"size": 48, "counts": [0, 48]}, {}, r"48; the photograph"),
        ("full", {"bbox": [1, 1, 0, 3]}, "degenerate: 0x3"),
        ("full", {"bbox": [1, 1, 2, -3]}, "degenerate: 2x-3"),
        ("full", {"bbox": [9, 1, 2, 3]}, "outside the photograph of 8x6"),
        ("full", {"bbox": [1, 2, 3]}, "bbox is .* expected 4 finite numbers"),
        ("full", {"bbox": "abcd"}, "expected 4 finite numbers"),
        ("full", {"bbox": 7}, "expected 4 finite numbers"),
        ("full", {"area": "big"}, "its area is .* expected 1 finite"),
    ],
)
def test_bad_annotations_are_told_in_words(segmentation, fields, why):
    if segmentation == "full":
        segmentation = {"size": [6, 8], "counts": [0, 48]}
    with pytest.raises(InputError, match=why):
        instance(segmentation, **fields)


def test_a_folder_without_annotations(tmp_path):
    for i in range(3):
        Image.new("RGB", (8, 6), (i, 0, 0)).save(tmp_path / f"{i}.png")
    dataset = open_dataset("folder", tmp_path)
    assert [photo.name for photo in dataset.photos] == ["0.png", "1.png", "2.png"]
    assert all(photo.size is None and not photo.instances for photo in dataset.photos)
    assert [dataset.read(photo)[0, 0, 0] for photo in dataset.photos] == [0, 1, 2]
    before = dataset.fingerprint
    assert open_dataset("folder", tmp_path).fingerprint == before
    (tmp_path / "2.png").rename(tmp_path / "3.png")
    assert open_dataset("folder", tmp_path).fingerprint != before


def test_a_photo_of_another_size_is_refused(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "0.png")
    path = tmp_path / "x.json"
    image = {"id": 1, "file_name": "0.png", "height": 8, "width": 6}
    path.write_text(json.dumps({"images": [image], "annotations": []}))
    dataset = open_dataset(str(path))
    with pytest.raises(InputError, match=r"^0\.png has 8x6 pixels; its annotations are for 6x8"):
        dataset.read(dataset.photos[0])


def test_data_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"data='voc': expected 'coco', 'lvis'"):
        open_dataset("voc", tmp_path)
    for data in ("coco", "lvis", "sa1b", "folder"):
        with pytest.raises(InputError, match="needs a root"):
            open_dataset(data)
        with pytest.raises(InputError, match="There is no"):
            open_dataset(data, tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no photographs"):
        open_dataset("folder", tmp_path)
    with pytest.raises(InputError, match="takes one folder"):
        open_dataset("coco", [tmp_path, tmp_path])


def test_a_data_set_of_several_folders_says_so(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.png").touch()
    both = [tmp_path / "first", tmp_path / "second"]
    assert open_dataset("folder", both).name == "first and 1 more"
    assert open_dataset("folder", both[1]).name == "second"


def test_fingerprint_depends_on_where_a_part_ends():
    assert fingerprint(["ab", "c"]) == fingerprint([b"ab", b"c"]) != fingerprint(["a", "bc"])


@pytest.mark.parametrize("name", ["coco", "street"])
def test_real_photographs_from_many_threads(name):
    dataset = open_dataset("coco", oracles.shared(f"data/eval/{name}"))
    content = json.loads(oracles.shared(f"data/eval/{name}/annotations.json").read_text())
    assert dataset.name == name and not dataset.problems
    assert sum(len(photo.instances) for photo in dataset.photos) == len(content["annotations"])
    for photo, image in zip(dataset.photos, content["images"], strict=True):
        assert (photo.id, photo.name) == (str(image["id"]), image["file_name"])
        for each in photo.instances:
            assert mask_utils.area(each.rle) == each.area
            assert each.box == (*(box := mask_utils.toBbox(each.rle))[:2], *(box[:2] + box[2:]))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        images = list(pool.map(dataset.read, dataset.photos))
    assert [image.shape[:2] for image in images] == [photo.size for photo in dataset.photos]

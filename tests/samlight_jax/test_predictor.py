"""`SamPredictor`: the same results as `predict`, one image held whole, embeddings kept in files."""

import numpy as np
import pytest

import samlight_jax
from samlight_jax import InputError, SamPredictor
from tests.models import TINY, random_model

BOX = [10, 5, 50, 35]


@pytest.fixture
def predictor():
    return SamPredictor(random_model())


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def test_it_gives_what_predict_gives(predictor, image):
    predictor.set_image(image)
    mask = np.ones((1, 16, 16))
    for parts in (
        {"box": BOX},
        {"point_coords": [[3, 4]], "point_labels": [0], "mask_input": mask},
    ):
        want = samlight_jax.predict(image, **parts, model=predictor.model)
        for a, b in zip(want, predictor.predict(**parts), strict=True):
            np.testing.assert_array_equal(a, b)


def test_its_batch_gives_what_single_calls_give(predictor, image):
    predictor.set_image(image)
    boxes = [BOX, [0, 0, 20, 20], [5, 5, 9, 30]]
    masks = np.stack([np.full((1, 16, 16), value) for value in (-1.0, 2, 3)])
    masks, iou, low_res = predictor.predict_batch(boxes=boxes, mask_inputs=masks)
    assert masks.shape == (3, 3, 40, 60) and iou.shape == (3, 3) and low_res.shape == (3, 3, 16, 16)
    for i, value in enumerate((None, 2, 3)):
        mask = None if value is None else np.full((1, 16, 16), value)
        want = predictor.predict(box=boxes[i], mask_input=mask)
        np.testing.assert_allclose(low_res[i], want[2], atol=1e-4)
        np.testing.assert_allclose(iou[i], want[1], atol=1e-4)


def test_masks_of_a_wrong_shape_are_refused_in_one_sentence(predictor, image):
    predictor.set_image(image)
    for masks in (np.zeros((2, 16, 16)), np.zeros((1, 2, 16, 16)), [[0.0]]):
        with pytest.raises(InputError, match=r"`mask_inputs` has shape .*expected \(q, 1, 256"):
            predictor.predict_batch(boxes=[BOX], mask_inputs=masks)
    with pytest.raises(InputError, match="`boxes` has shape"):
        predictor.predict_batch(boxes=BOX)


def test_it_asks_for_an_image_first(predictor, image):
    with pytest.raises(InputError, match=r"call set_image\(image\) first"):
        predictor.predict(box=BOX)
    predictor.set_image(image)
    assert predictor.is_image_set and predictor.original_size == (40, 60)
    assert predictor.input_size == (43, 64)
    predictor.reset_image()
    assert not predictor.is_image_set
    with pytest.raises(InputError, match="No image is set"):
        predictor.get_image_embedding()


def test_the_embedding_has_sams_shape_and_is_encodes(predictor, image):
    predictor.set_image(image)
    embedding = predictor.get_image_embedding()
    assert embedding.shape == (1, 256, 4, 4)
    want = samlight_jax.encode(image, model=predictor.model)
    np.testing.assert_array_equal(np.moveaxis(embedding[0], 0, -1), want)


def test_a_bad_image_leaves_the_one_that_was_set(predictor, image):
    predictor.set_image(image)
    before = predictor.predict(box=BOX)
    with pytest.raises(InputError):
        predictor.set_image(image.astype(float))
    for a, b in zip(before, predictor.predict(box=BOX), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_saved_embedding_gives_the_same_masks_and_knows_its_model(predictor, image, tmp_path):
    file = tmp_path / "image.safetensors"
    predictor.set_image(image)
    want = predictor.predict(box=BOX)
    predictor.save_embedding(file)

    again = SamPredictor(random_model())
    again.load_embedding(file)
    for a, b in zip(want, again.predict(box=BOX), strict=True):
        np.testing.assert_array_equal(a, b)

    other = SamPredictor(random_model(TINY, seed=1))
    with pytest.raises(InputError, match=r"made by another model \(fingerprint"):
        other.load_embedding(file)
    assert not other.is_image_set


def test_files_that_are_no_embedding_are_refused(predictor, tmp_path):
    with pytest.raises(InputError, match="There is no file"):
        predictor.load_embedding(tmp_path / "absent")
    (tmp_path / "junk").write_bytes(b"junk" * 99)
    with pytest.raises(InputError, match="not a whole"):
        predictor.load_embedding(tmp_path / "junk")
    samlight_jax.weights.write_safetensors(tmp_path / "other", {"x": np.zeros(3)}, {})
    with pytest.raises(InputError, match="is not an embedding"):
        predictor.load_embedding(tmp_path / "other")

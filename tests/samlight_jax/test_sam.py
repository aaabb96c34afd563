"""The whole model against segment-anything's and Hugging Face's, from photograph to masks."""

import gc

import jax
import numpy as np
import pytest
import torch

from convert.apply import rename, to_flax
from convert.table import RULES
from samlight_jax import weights
from samlight_jax.config import PRESETS
from samlight_jax.postprocess import photo_logits
from samlight_jax.preprocess import Frame, host_pixels
from samlight_jax.prompts import assemble
from tests import oracles
from tests.conftest import assert_parity, normal

SIZE = (60, 101)  # of the photograph
PHOTO = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
COORDS = np.array([[[10.0, 20], [100, 0.5]], [[0, 0], [33.3, 59]]])
LABELS = np.array([[1, 0], [0, 1]])
BOXES = np.array([[5.0, 6, 70, 50], [0, 0, 101, 60]])
MASKS = 5 * normal(2, 20, 20)
PROMPTS = {
    "points": {"point_coords": COORDS, "point_labels": LABELS},
    "boxes": {"boxes": BOXES},
    "masks": {"masks": MASKS},
    "points and boxes": {"point_coords": COORDS, "point_labels": LABELS, "boxes": BOXES},
    "points and masks": {"point_coords": COORDS, "point_labels": LABELS, "masks": MASKS},
    "a label of -1": {"point_coords": COORDS, "point_labels": np.array([[1, -1], [-1, 1]])},
}

encode = jax.jit(lambda sam, pixels: sam.encode(pixels)[0])
decode = jax.jit(lambda sam, embedding, prompts: sam.decode(embedding, prompts))


def record(image_size, photo, point_coords=None, point_labels=None, boxes=None, masks=None):
    """One image and its prompts as `Sam.forward` takes them, by SAM's own transforms."""
    transform = oracles.segment_anything().utils.transforms.ResizeLongestSide(image_size)
    size = photo.shape[:2]
    image = torch.from_numpy(transform.apply_image(photo)).permute(2, 0, 1)
    entry = {"image": image, "original_size": size}
    if point_coords is not None:
        coords = transform.apply_coords(point_coords, size)
        entry["point_coords"] = torch.tensor(coords, dtype=torch.float32)
        entry["point_labels"] = torch.from_numpy(point_labels)
    if boxes is not None:
        entry["boxes"] = torch.tensor(transform.apply_boxes(boxes, size), dtype=torch.float32)
    if masks is not None:
        entry["mask_inputs"] = torch.from_numpy(masks)[:, None]
    return entry


def assert_masks(logits, want):
    """Equal masks, but for pixels whose logit is 0 within the tolerance of parity."""
    differing = (logits > 0) != want.numpy()
    assert 0.01 < want.float().mean() < 0.99
    assert not (differing & (np.abs(logits) > 1e-4)).any()


def assert_equals_segment_anything(torch_sam, sam, photo, prompts):
    count = len(next(iter(prompts.values())))
    frame = Frame(photo.shape[:2], sam.config.image_size)
    embedding = encode(sam, host_pixels(photo, frame)[None])[0]
    ours = assemble(frame, sam.config, count, **prompts, absent=False)
    low_res, iou = (np.asarray(x) for x in decode(sam, embedding, ours))
    for multimask, chosen in ((True, slice(1, 4)), (False, slice(0, 1))):
        (want,) = torch_sam([record(frame.image_size, photo, **prompts)], multimask)
        assert_parity(low_res[:, chosen], want["low_res_logits"])
        error = np.abs(iou[:, chosen] - want["iou_predictions"].numpy()).max()
        assert error <= 1e-4
        assert_masks(photo_logits(low_res[:, chosen], frame), want["masks"])
    assert iou.std() > 0.01


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_photo_and_prompts_to_masks_as_in_segment_anything(twins, prompts):
    assert_equals_segment_anything(twins.torch, twins.flax, PHOTO, prompts)


def test_every_norm_has_segment_anythings_epsilon(twins):
    """1e-5 or 1e-6: too small a difference for the comparison of masks."""
    norms = {name: m.eps for name, m in twins.torch.named_modules() if hasattr(m, "eps")}
    assert len(norms) == 22
    for name, epsilon in norms.items():
        ((ours, _),) = rename(f"{name}.weight", [(r.torch, r.flax, r.transform) for r in RULES])
        module = twins.flax
        for part in ours.removesuffix(".scale").split("."):
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        assert module.epsilon == epsilon, name


@pytest.fixture(scope="module")
def hugging_face():
    """(their model, ours) of the same weights."""
    theirs = oracles.tiny_hugging_face().requires_grad_(False)
    oracles.randomise(theirs.vision_encoder, 1, std=0.2)  # as in `twins`
    for module in theirs.mask_decoder.transformer.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5  # Meta's; transformers' 1e-6 moves these logits by 9e-5
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    return theirs, weights.build(oracles.TINY, to_flax(state, oracles.TINY))


@pytest.mark.parametrize("prompts", ["points", "boxes", "points and boxes"])
def test_pixels_and_prompts_to_low_res_masks_as_in_transformers(hugging_face, prompts):
    theirs, sam = hugging_face
    prompts, names = PROMPTS[prompts], {"boxes": "input_boxes", "point_coords": "input_points"}
    pixels = normal(1, 80, 80, 3)
    given = {
        names.get(name, "input_labels"): torch.tensor(
            array[None], dtype=torch.int64 if name == "point_labels" else torch.float32
        )
        for name, array in prompts.items()
    }
    frame = Frame((80, 80), 80)
    ours = assemble(frame, sam.config, 2, **prompts, absent=False)
    low_res, iou = decode(sam, encode(sam, pixels)[0], ours)
    for multimask, chosen in ((True, slice(1, 4)), (False, slice(0, 1))):
        want = theirs(
            torch.from_numpy(pixels).permute(0, 3, 1, 2), **given, multimask_output=multimask
        )
        assert_parity(low_res[:, chosen], want.pred_masks[0])
        np.testing.assert_allclose(iou[:, chosen], want.iou_scores[0], atol=1e-4)


@pytest.mark.slow
def test_a_full_size_vit_b_is_segment_anythings():
    torch_sam = oracles.segment_anything().sam_model_registry["vit_b"]()
    oracles.randomise(torch_sam.requires_grad_(False), 0)
    state = {name: tensor.numpy() for name, tensor in torch_sam.state_dict().items()}
    sam = weights.build(PRESETS["sam_vit_b"], to_flax(state, PRESETS["sam_vit_b"]))
    del state
    gc.collect()
    photo = np.random.default_rng(0).integers(0, 256, (300, 451, 3), np.uint8)
    prompts = {
        "point_coords": np.array([[[400.0, 20]], [[70, 250]]]),
        "point_labels": np.array([[1], [0]]),
        "boxes": np.array([[300.0, 10, 440, 200], [5, 150, 200, 299]]),
    }
    assert_equals_segment_anything(torch_sam, sam, photo, prompts)

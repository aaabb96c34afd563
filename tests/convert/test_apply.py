"""Running the table: strictness, detection, the report."""

from __future__ import annotations

import numpy as np
import pytest

from convert import apply
from convert.table import HUGGING_FACE
from samlight_jax.config import PRESETS
from samlight_jax.errors import InputError
from tests.models import random_arrays
from tests.oracles import TINY


@pytest.fixture(scope="module")
def tiny():
    """(Flax arrays, state dict) of the tiny SAM."""
    arrays = random_arrays(TINY)
    return arrays, apply.to_torch(arrays, TINY)


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], strict=True)


def test_there_and_back_is_bit_exact(tiny):
    arrays, state = tiny
    assert_equal(apply.to_flax(state, TINY), arrays)
    assert_equal(apply.to_torch(apply.to_flax(state, TINY), TINY), state)


def test_mobile_sam_there_and_back_is_bit_exact(mobile_sam):
    arrays, state = mobile_sam
    assert_equal(apply.to_flax(state, PRESETS["mobile_sam"]), arrays)


def test_all_problems_are_in_one_error(tiny):
    state = dict(tiny[1])
    state["image_encoder.adapter.weight"] = np.zeros(3, np.float32)
    state["image_encoder.blocks.9.norm1.weight"] = np.zeros(32, np.float32)  # a fifth block
    state["image_encoder.blocks.0.attn.qkv.weight"] = np.zeros((90, 32), np.float32)
    state["image_encoder.pos_embed"] = np.zeros((1, 5, 5, 32), np.int8)
    state["mask_decoder.iou_token.weight"] = np.full((1, 256), np.nan, np.float32)
    del state["prompt_encoder.point_embeddings.1.weight"]
    with pytest.raises(InputError) as error:
        apply.to_flax(state, TINY)
    text = str(error.value)
    assert "'tiny_sam'" in text and "6 problems" in text
    assert "unmatched: image_encoder.adapter.weight, image_encoder.blocks.9.norm1.weight\n" in text
    assert "misshapen: " in text
    assert "blocks.0.attn.qkv.weight (got (90, 32) float32, expected (96, 32) float32)" in text
    assert "pos_embed (got (1, 5, 5, 32) int8, expected (1, 5, 5, 32) float32)" in text
    assert "not finite: mask_decoder.iou_token.weight\n" in text
    assert "unfilled: prompt_encoder.point_embeddings.1.embedding" in text


def test_two_keys_for_one_array_are_an_error(tiny):
    back = [(rule.flax, rule.torch, "same") for rule in HUGGING_FACE]
    state = {}
    for key, array in tiny[1].items():
        renamed = apply.rename(key, back)
        state[renamed[0][0] if renamed else key] = array
    assert_equal(apply.to_flax(state, TINY), tiny[0])  # all by Hugging Face's names
    state["image_encoder.pos_embed"] = state["vision_encoder.pos_embed"]
    with pytest.raises(InputError, match=r"matched twice: .*\(again image_encoder\.pos_embed\)"):
        apply.to_flax(state, TINY)


def test_a_key_for_two_rules_is_an_error(tiny, monkeypatch):
    monkeypatch.setattr(apply, "RULES", (*apply.RULES, apply.RULES[0]))
    with pytest.raises(InputError, match=r"matched twice: image_encoder\.pos_embed\n"):
        apply.to_flax(tiny[1], TINY)


def test_back_to_torch_is_as_strict(tiny):
    arrays = {name: a for name, a in tiny[0].items() if name != "image_encoder.pos_embed"}
    arrays["image_encoder.other"] = np.zeros(3, np.float32)
    with pytest.raises(InputError, match=r"(?s)unmatched: .*other\n.*unfilled: .*pos_embed"):
        apply.to_torch(arrays, TINY)


@pytest.mark.parametrize("name", ["samlight_t", "samlight_t_paper", "samlight_s"])
def test_a_dilated_student_has_no_twin(name):
    with pytest.raises(InputError, match=r"no PyTorch twin.*dilated attention.*ONNX export"):
        apply.to_torch({}, PRESETS[name])


def state_of(preset):
    """The keys that tell a preset's family and size."""
    encoder = PRESETS[preset].encoder
    blocks, width = ("blocks", encoder.width) if "vit" in preset else ("layers", encoder.widths[-1])
    return {
        f"image_encoder.{blocks}.0.norm1.weight": np.zeros(width),
        "image_encoder.neck.0.weight": np.zeros((256, width, 1, 1)),
    }


@pytest.mark.parametrize("preset", ["sam_vit_b", "sam_vit_l", "sam_vit_h", "mobile_sam"])
def test_family_and_size_are_detected(preset):
    state = state_of(preset)
    assert apply.detect(state) == PRESETS[preset]
    assert apply.detect(state, preset) == PRESETS[preset]


def test_minisam_is_the_users_word():
    assert apply.detect(state_of("mobile_sam"), "minisam") == PRESETS["minisam"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "sam_vit_l",
            "--model sam_vit_l: the checkpoint is of another.*expected --model sam_vit_b,",
        ),
        ("mobile_sam", "--model mobile_sam: the checkpoint is of another"),
        ("vit_b", "--model vit_b: expected one of sam_vit_b, "),
        ("samlight_t", "--model samlight_t: expected one of sam_vit_b, "),
    ],
)
def test_a_wrong_model_is_refused(model, message):
    with pytest.raises(InputError, match=message):
        apply.detect(state_of("sam_vit_b"), model)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("image_encoder.trunk.blocks.0.norm1.weight", "is SAM 2; expected Meta's SAM"),
        ("mask_decoder.hf_token.weight", "is SAM-HQ; expected Meta's SAM"),
        ("mask_decoder.hq_token.weight", "is SAM-HQ"),
        ("vision_encoder.backbone.pos_embed", "is SAM 2 or 3"),
        ("mask_decoder.iou_token.embedding", "is a file of this project"),
    ],
)
def test_another_family_is_named(key, message):
    state = {**state_of("sam_vit_b"), key: np.zeros(1)}
    with pytest.raises(InputError, match=message):
        apply.detect(state)


def test_a_random_state_dict_is_of_another_family():
    with pytest.raises(InputError, match=r"another family.*\(1 keys: conv1\.weight .*Meta's"):
        apply.detect({"conv1.weight": np.zeros((3, 3))})
    with pytest.raises(InputError, match=r"another family.*\(0 keys: no keys"):
        apply.detect({})


def test_a_width_of_no_preset_is_named():
    state = {**state_of("sam_vit_b"), "image_encoder.neck.0.weight": np.zeros((256, 192, 1, 1))}
    with pytest.raises(InputError, match=r"ViT encoder has width 192.*sam_vit_b 768, "):
        apply.detect(state)


def test_the_report_counts_and_sums(tiny):
    text = apply.report(tiny[0])
    gaussian = 2 * 128
    parameters = sum(array.size for array in tiny[0].values()) - gaussian
    assert text.startswith(f"{len(tiny[0])} arrays, {parameters:,} parameters, sha256 ")

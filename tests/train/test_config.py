import dataclasses
import re

import pytest

from samlight_jax.errors import InputError
from train.config import PRESETS, Augment, TrainConfig

WRONG = [
    (dict(steps=0), "steps=0: expected 1 or more."),
    (dict(batch=0), "batch=0: expected 1 or more."),
    (dict(accumulate=0), "accumulate=0: expected 1 or more."),
    (dict(canvas=0), "canvas=0: expected 1 or more."),
    (dict(log_every=0), "log_every=0: expected 1 or more."),
    (dict(save_every=-5), "save_every=-5: expected 1 or more."),
    (dict(keep=0), "keep=0: expected 1 or more."),
    (dict(lr=0.0), "lr=0.0: expected more than 0."),
    (dict(decoder_lr=-1.0), "decoder_lr=-1.0: expected more than 0."),
    (dict(clip=float("nan")), "clip=nan: expected more than 0."),
    (dict(warmup=-1), "warmup=-1: expected 0 or more."),
    (dict(max_bad=-0.1), "max_bad=-0.1: expected 0 or more."),
    (dict(image_size=100), "image_size=100: expected a multiple of 16 pixels."),
    (dict(batch=6, accumulate=4), "batch=6 is not a multiple of accumulate=4"),
    (dict(prompts=7), "prompts=7: expected an even number"),
    (dict(prompts=0), "prompts=0: expected an even number"),
    (dict(layers_share=1.0), "layers_share=1.0: expected 0 up to below 1."),
    (dict(layers_share=-0.1), "layers_share=-0.1: expected 0 up to below 1."),
    (dict(ema=1.0), "ema=1.0: expected 0 (no averaging) up to below 1."),
    (dict(stage=2), "stage=2 starts from a student: --init-from"),
    (dict(stage=3), "stage=3 starts from a student: --init-from"),
    (dict(inherit=True, init_from="a"), "two ways to start; give one."),
    (
        dict(teacher_cache="a", schedule="ramp"),
        "--schedule output_only; got stage=1, schedule='ramp'.",
    ),
    (dict(mask_loss="soft", match="nearest"), "match='token'; got 'teacher' and 'nearest'."),
    (
        dict(teacher_cache="a", schedule="output_only", stage=2, init_from="b"),
        "got stage=2, schedule='output_only'.",
    ),
]
WRONG_VIEWS = [
    (dict(scale=(0.0, 1.0)), "augment.scale=(0.0, 1.0): expected 0 < least <= most <= 1."),
    (dict(scale=(0.5, 0.4)), "augment.scale=(0.5, 0.4)"),
    (dict(scale=(0.5, 1.1)), "augment.scale=(0.5, 1.1)"),
    (dict(aspect=0.9), "augment.aspect=0.9: expected a factor of 1 or more."),
    *(
        ({name: share}, f"augment.{name}={share}: expected 0 to 1.")
        for name in ("whole", "flip", "colour", "mosaic", "paste")
        for share in (-0.1, 1.1)
    ),
]


@pytest.mark.parametrize("fields, sentence", WRONG)
def test_a_wrong_run_is_refused(fields, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        TrainConfig(**fields)


@pytest.mark.parametrize("fields, sentence", WRONG_VIEWS)
def test_wrong_views_are_refused(fields, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        Augment(**fields)


def test_what_is_just_right_is_accepted():
    TrainConfig(steps=1, batch=4, accumulate=4, prompts=2, layers_share=0, ema=0, sheet_every=0)
    TrainConfig(stage=2, init_from="runs/a")
    TrainConfig(teacher_cache="a", schedule="output_only")
    Augment(scale=(1.0, 1.0), aspect=1, whole=0, flip=1, colour=0, mosaic=1, paste=0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_runs_and_say_what_they_are_for(name):
    text, config = PRESETS[name]
    assert dataclasses.replace(config, steps=3).steps == 3  # checked again
    assert text.endswith(".")


def test_debug_is_small():
    debug = PRESETS["debug"][1]
    assert debug.image_size <= 256 and debug.steps <= 100 and debug.dtype == "float32"


def test_configs_are_hashable_and_frozen():
    config = TrainConfig()
    assert hash(config) == hash(TrainConfig())  # a static argument of jitted functions
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3

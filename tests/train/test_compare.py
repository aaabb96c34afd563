import json

import pytest

from samlight_jax.errors import InputError
from train import compare


def write(path, values, *, data="same", prompt="box", ap=None, key="iou"):
    instances = [
        {"photo": "p", "id": str(k), "area": 10.0 if k < 2 else 1e4, key: value}
        for k, value in values.items()
    ]
    content = {
        "protocol": {"prompt": prompt, "seed": 0, "sentence": "words"},
        "model": {"name": path.stem, "fingerprint": "f" * 64},
        "data": {"name": "coco", "fingerprint": data},
        "results": {"ap": {"AP": ap, "AP_small": None}} if ap is not None else {},
        "instances": instances,
    }
    path.write_text(json.dumps(content))
    return path


def rows(text):
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    return {each[0]: each[1:] for each in cells if len(each) == 6}


def test_the_differences_are_over_common_instances(tmp_path):
    a = write(tmp_path / "a.json", {0: 0.1, 1: 0.2, 2: 0.3, 9: 1.0}, ap=0.25)
    b = write(tmp_path / "b.json", {1: 0.4, 2: 0.5, 0: 0.3, 8: 0.0}, ap=0.5)
    text = compare.table(a, b)
    got = rows(text)
    # Every difference is 0.2, so that its interval is a point.
    assert got["mIoU"] == ["0.2000", "0.4000", "+0.2000", "+0.2000 to +0.2000", "3"]
    assert got["- small"][:3] == ["0.1500", "0.3500", "+0.2000"] and got["- small"][-1] == "2"
    assert got["- large"][-1] == "1" and "- medium" not in got
    assert got["AP"] == ["0.2500", "0.5000", "+0.2500", "-", "-"] and "AP_small" not in got
    assert "3 common instances of 4 and 4 of coco" in text and "protocols differ" not in text


def test_differences_of_the_protocols_are_stated(tmp_path):
    a = write(tmp_path / "a.json", {0: 0.1})
    b = write(tmp_path / "b.json", {0: 0.1}, prompt="point-dt")
    assert "The protocols differ: prompt: box and point-dt." in compare.table(a, b)


def test_what_does_not_compare_is_refused(tmp_path):
    a = write(tmp_path / "a.json", {0: 0.1})
    other = write(tmp_path / "b.json", {0: 0.1}, data="other")
    with pytest.raises(InputError, match="only reports of the same data"):
        compare.table(a, other)
    with pytest.raises(InputError, match="no instance in common"):
        compare.table(a, write(tmp_path / "c.json", {5: 0.1}))
    with pytest.raises(InputError, match="no metric in common"):
        compare.table(a, write(tmp_path / "d.json", {0: 0.1}, key="agreement"))
    with pytest.raises(InputError, match="cannot be read"):
        compare.table(a, tmp_path / "absent.json")
    for content in ("{", "[]", "{}"):
        (tmp_path / "e.json").write_text(content)
        with pytest.raises(InputError, match=r"not a report\.json that"):
            compare.table(a, tmp_path / "e.json")

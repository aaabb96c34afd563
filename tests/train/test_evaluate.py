"""The program: resuming, repeating, refusing; what it computes is tested in test_evaluator.py."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from samlight_jax import weights
from samlight_jax.errors import InputError
from tests.models import TINY, random_arrays
from train import evaluate as program
from train.annotations import Photo
from train.evaluate import Options, choose, evaluate, steady_speed
from train.evaluate_store import Store
from train.evaluate_tiny import tiny_data
from train.protocol import Protocol

FILES = ("report.json", "report.md", "contact.jpg", "iou_histogram.png", "iou_by_area.png")


@pytest.fixture
def options(tmp_path):
    """A model file and six photographs."""
    weights.save(tmp_path / "model.safetensors", random_arrays(TINY), TINY)
    data = tiny_data(tmp_path / "tiny", photographs=6)
    return Options(
        model=str(tmp_path / "model.safetensors"),
        data=str(data),
        out=tmp_path / "whole",
        batch=2,
        metric=("miou", "ap"),
        pictures=2,
    )


def test_a_killed_run_continues_to_the_identical_report(options, tmp_path, monkeypatch, capsys):
    evaluate(options)
    page = capsys.readouterr().out
    assert "# model on tiny" in page and "| mIoU |" in page
    again = dataclasses.replace(options, out=tmp_path / "killed")
    add, count = Store.add, []

    def add_until_killed(self, records):
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(add(self, records))

    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", add_until_killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(again)
    assert not (again.out / "report.json").exists()
    with (again.out / "partial.jsonl").open("a") as file:
        file.write('[{"photo": "2", "na')  # the line that was being written
    evaluate(again)
    assert json.loads((again.out / "run.json").read_text())["photographs"] == 2
    for name in FILES:
        assert (again.out / name).read_bytes() == (options.out / name).read_bytes(), name
    report = json.loads((again.out / "report.json").read_text())
    assert report["counts"]["instances"] == 12 and report["model"]["config"] == "tiny"
    with Image.open(again.out / "contact.jpg") as sheet:
        assert sheet.width > 1000


def test_a_detectors_boxes_are_scored_by_ap(options, tmp_path):
    entry = {"image_id": 1, "category_id": 1, "bbox": [2, 4, 30, 30], "score": 0.5}
    unknown = {**entry, "category_id": 77}
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps([entry, unknown, {**entry, "image_id": 4}]))
    evaluate(dataclasses.replace(options, prompt="detector", detections=boxes, metric=("ap",)))
    report = json.loads((options.out / "report.json").read_text())
    found = [(i["photo"], i["id"], i["score"]) for i in report["instances"]]
    assert found == [("1", "detection-0", 0.5), ("4", "detection-2", 0.5)]
    assert report["counts"]["photographs chosen"] == 6, "those without a box count as missed"
    assert report["results"].keys() == {"ap"} and report["results"]["ap"]["AP"] is not None
    assert [problem["what"] for problem in report["problems"]] == ["detection 1"]
    assert report["detections"] and not (options.out / "contact.jpg").exists()


def test_another_evaluation_in_the_same_folder_is_refused(options):
    evaluate(options)
    other = dataclasses.replace(options, mask_select="oracle", limit=3)
    with pytest.raises(
        InputError, match=r"another evaluation \(other limit, photographs, protocol\)"
    ):
        evaluate(other)
    evaluate(dataclasses.replace(other, overwrite=True))
    report = json.loads((options.out / "report.json").read_text())
    assert report["protocol"]["mask_select"] == "oracle"
    assert [photo["name"] for photo in report["photos"]] == ["0.png", "2.png", "4.png"]


def test_bad_photographs_are_listed_and_all_bad_ones_refused(options):
    folder = Path(options.data).parent / "images"
    (folder / "3.png").write_bytes(b"no picture")
    evaluate(options)
    report = json.loads((options.out / "report.json").read_text())
    assert report["counts"]["photographs that failed"] == 1
    assert [problem["what"] for problem in report["problems"]] == ["3.png"]
    assert "3.png" in (options.out / "report.md").read_text()
    for path in folder.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"Nothing of .* could be evaluated; the first problem"):
        evaluate(dataclasses.replace(options, overwrite=True))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": None}, "--model is missing"),
        ({"data": None}, "--data is missing"),
        ({"limit": 0}, "--limit 0: expected 1 or more"),
        ({"batch": -1}, "--batch -1: expected 1 or more"),
        ({"pictures": -1}, "--pictures -1: expected 0"),
        ({"model": "absent.safetensors"}, "no model file absent"),
        ({"data": "absent.json"}, "absent"),
        ({"prompt": "teacher-grid"}, "add --agree-with"),
        ({"min_area": 1e9}, "6 photographs and none with an instance to evaluate"),
        ({"only": (Path("absent"),)}, "absent cannot be read"),
        (
            {"only": (Path(__file__),)},
            "leave none of the 6 photographs of .*; the first is '0.png'",
        ),
    ],
)
def test_bad_options_are_refused_in_a_sentence(options, change, sentence):
    with pytest.raises(InputError, match=sentence):
        evaluate(dataclasses.replace(options, **change))


def test_a_limit_is_spread_evenly(options):
    dataset = program.open_dataset(options.data)

    def chosen(limit):
        return [photo.id for photo in choose(dataset, Protocol(), None, Options(limit=limit))]

    assert chosen(None) == chosen(6) == chosen(100) == list("012345")
    assert chosen(1) == ["0"] and chosen(2) == ["0", "3"] and chosen(4) == ["0", "1", "3", "4"]


def test_photographs_are_chosen_and_left_out_by_name(options, tmp_path):
    dataset = program.open_dataset(options.data)
    some, one = tmp_path / "some.csv", tmp_path / "one.txt"
    some.write_text("shard,file\na.tar,1.png\na.tar,4.png\na.tar,5.png\n")
    one.write_text("4.png\n")

    def chosen(**flags):
        return [photo.id for photo in choose(dataset, Protocol(), None, Options(**flags))]

    assert chosen(only=(some,)) == ["1", "4", "5"]
    assert chosen(exclude=(some,)) == ["0", "2", "3"]
    assert chosen(only=(some,), exclude=(one,), limit=1) == ["1"]


def test_speed_is_of_the_batches_that_compiled_nothing():
    small, large = Photo("a", "a", (60, 80)), Photo("b", "b", (600, 800))
    batches = [[small] * 2] * 3 + [[large] * 2] * 2
    ends = [9.0, 10.0, 19.0, 20.0, 21.0]  # the first and the third waited for the compiler
    assert steady_speed(batches, ends) == 2.0
    assert steady_speed(batches[:1], [9.0]) is None


def test_a_store_keeps_whole_lines_alone(tmp_path):
    first = Store(tmp_path, {"a": 1})
    first.add([{"photo": "x", "v": 0.1}])
    first.add([{"photo": "y", "v": 0.2}])
    path = tmp_path / "partial.jsonl"
    whole = path.read_bytes()
    for cut in (1, 5):  # without the newline; within the line
        path.write_bytes(whole[:-cut])
        store = Store(tmp_path, {"a": 1})
        assert store.finished == {"x"}
        assert path.read_bytes() == whole[: whole.rindex(b"[")]
    store.add([{"photo": "y", "v": 0.2}])
    assert path.read_bytes() == whole
    assert store.records()["y"]["v"] == 0.2
    with pytest.raises(InputError, match=r"other a\)"):
        Store(tmp_path, {"a": 2})
    assert Store(tmp_path, {"a": 2}, overwrite=True).finished == set()


@pytest.mark.slow
def test_the_command_line(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "train.evaluate", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=program_root())

    for name in "ab":
        done = run("--tiny", "--out", tmp_path / name, "--prompt", "point-dt", "--seed", 3)
        assert done.returncode == 0, done.stderr
        assert "point-dt" in done.stdout and "photos/s" in done.stderr
    reports = [tmp_path / name / "report.json" for name in "ab"]
    assert reports[0].read_bytes() == reports[1].read_bytes()
    done = run("--compare", *reports)
    assert done.returncode == 0 and "| mIoU |" in done.stdout
    done = run("--prompt", "box", "--mask-select", "single")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: --model is missing; see python -m train.evaluate --help."
    ]


def program_root():
    return Path(program.__file__).parents[1]

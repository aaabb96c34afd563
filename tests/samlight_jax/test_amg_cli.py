"""`samlight amg`: what it writes, how it goes on after a kill, and its exit codes."""

import csv
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from samlight_jax import SamAutomaticMaskGenerator, amg_cli, cli, load, weights
from tests.models import TINY, random_arrays

EASY = {  # a random model's masks cover all of the image: all stay
    "points_per_side": 2,
    "points_per_batch": 4,
    "pred_iou_thresh": 0.0,
    "stability_score_thresh": 0.0,
    "box_nms_thresh": 1.0,
}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in EASY.items()]
KILL = """
import os, signal, sys
from samlight_jax import amg_cli, cli
from PIL import Image

amg_cli.keep_compilations = lambda: None
save, count = Image.Image.save, 0

def save_or_die(self, *args, **kwargs):
    global count
    count += 1
    if count == 18:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, *args, **kwargs)

Image.Image.save = save_or_die
sys.argv = ["samlight", *sys.argv[1:]]
cli.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model under the default's name; `photos` with three photographs and more that is none."""
    folder = tmp_path_factory.mktemp("amg")
    weights.save(folder / "samlight_t.safetensors", random_arrays(TINY, 2), TINY)
    photos = folder / "photos"
    (photos / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (40, 60)), ("b.jpg", (50, 30)), ("c.JPG", (64, 64))):
        noise = rng.integers(0, 256, (6, 5, 3), np.uint8)
        Image.fromarray(noise).resize(size[::-1]).save(photos / name)
    (photos / "notes.txt").write_text("no photograph")
    (photos / ".hidden.png").write_bytes(b"")
    Image.new("RGB", (9, 9)).save(photos / "deeper" / "d.png")
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs `samlight amg` in this process: (exit code, stderr)."""
    monkeypatch.setenv("SAMLIGHT_CACHE", str(folder))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(amg_cli, "keep_compilations", lambda: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["samlight", "amg", *FLAGS, *map(str, arguments)])
        with warnings.catch_warnings():  # puts `showwarning` back, too
            warnings.simplefilter("always")
            try:
                cli.main()
                code = 0
            except SystemExit as end:
                code = end.code
        return code, capsys.readouterr().err

    return run


def tree(folder):
    """Every file below a folder and its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def want(folder):
    """The generator's own answer for each photograph."""
    generator = SamAutomaticMaskGenerator(load(folder / "samlight_t.safetensors"), **EASY)
    names = ("a.png", "b.jpg", "c.JPG")
    return {name: generator.generate(folder / "photos" / name) for name in names}


def test_both_forms_hold_the_generators_masks(run, folder, want, tmp_path):
    assert run("photos", "-o", tmp_path)[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(".parts", "a", "annotations.json", "b", "c", "settings.json")
    ]
    coco_module = pytest.importorskip("pycocotools.coco")
    coco = coco_module.COCO(tmp_path / "annotations.json")
    assert [image["file_name"] for image in coco.dataset["images"]] == ["a.png", "b.jpg", "c.JPG"]
    ids = [entry["id"] for entry in coco.dataset["annotations"]]
    assert ids == list(range(1, 1 + len(ids))) and len(ids) >= 24
    for image in coco.dataset["images"]:
        masks = want[image["file_name"]]
        entries = coco.imgToAnns[image["id"]]
        with (tmp_path / image["file_name"][0] / "metadata.csv").open() as file:
            table = list(csv.DictReader(file))
        assert len(entries) == len(table) == len(masks) >= 3
        for i, (mask, entry, row) in enumerate(zip(masks, entries, table, strict=True)):
            shown = np.asarray(Image.open(tmp_path / image["file_name"][0] / f"{i}.png"))
            assert shown.shape == (image["height"], image["width"])
            np.testing.assert_array_equal(shown, mask["segmentation"] * np.uint8(255))
            np.testing.assert_array_equal(coco.annToMask(entry), mask["segmentation"])
            assert entry["area"] == mask["area"] == int(row["area"]) == coco.annToMask(entry).sum()
            rows, columns = np.nonzero(mask["segmentation"])
            x, y, w, h = entry["bbox"]
            assert (x, y) == (columns.min(), rows.min())
            assert (x + w - 1, y + h - 1) == (columns.max(), rows.max())
            assert [float(row[f"bbox_{k}"]) for k in ("x0", "y0", "w", "h")] == mask["bbox"]
            assert [float(row[f"point_input_{k}"]) for k in "xy"] == mask["point_coords"][0]
            assert float(row["stability_score"]) == entry["stability_score"]
            assert float(row["predicted_iou"]) == mask["predicted_iou"] == entry["predicted_iou"]


@pytest.mark.parametrize(
    ("form", "absent"), [("coco", {"a", "b", "c"}), ("png", {".parts", "annotations.json"})]
)
def test_a_form_alone_and_the_other_one_later(run, tmp_path, form, absent):
    assert run("photos", "-o", tmp_path / "x", "--format", form)[0] == 0
    assert not absent & {path.name for path in (tmp_path / "x").iterdir()}
    assert run("photos", "-o", tmp_path / "x", "--format", "both")[0] == 0
    assert run("photos", "-o", tmp_path / "y", "--format", "both")[0] == 0
    assert tree(tmp_path / "x") == tree(tmp_path / "y")


def test_a_killed_run_goes_on_and_gives_the_same_files(run, folder, tmp_path, monkeypatch):
    assert run("photos", "-o", tmp_path / "whole")[0] == 0
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", KILL, "amg", "photos", "-o", killed, *FLAGS]
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == -9
    left = {path.name for path in killed.iterdir()}
    assert (killed / "a" / "metadata.csv").exists() and "annotations.json" not in left
    assert any(name.startswith(".b.") for name in left) and "b" not in left

    read = []
    monkeypatch.setattr(amg_cli, "as_array", lambda p: read.append(p.name) or Image.open(p))
    assert run("photos", "-o", killed)[0] == 0
    assert read == ["b.jpg", "c.JPG"]
    assert tree(killed) == tree(tmp_path / "whole")


def test_a_broken_photograph_is_named_and_skipped(run, folder, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "b.jpg"):
        (photos / name).write_bytes((folder / "photos" / name).read_bytes())
    (photos / "aa.png").write_bytes((folder / "photos" / "a.png").read_bytes()[:300])
    code, err = run(photos, "-o", tmp_path / "o")
    assert code == 1 and f"skipped: {photos / 'aa.png'}" in err.replace("\n", "")
    assert "1 of 3 photographs were skipped." in err
    coco = json.loads((tmp_path / "o" / "annotations.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == ["a.png", "b.jpg"]
    assert [image["id"] for image in coco["images"]] == [1, 2]
    # Mended, it is done; the others are not done again.
    (photos / "aa.png").write_bytes((photos / "a.png").read_bytes())
    done = (tmp_path / "o" / "a" / "0.png").stat().st_mtime_ns
    assert run(photos, "-o", tmp_path / "o")[0] == 0
    assert (tmp_path / "o" / "a" / "0.png").stat().st_mtime_ns == done
    coco = json.loads((tmp_path / "o" / "annotations.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == ["a.png", "aa.png", "b.jpg"]


def test_if_all_are_broken_the_code_is_two(run, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").write_bytes(b"not a picture")
    code, err = run(tmp_path / "p", "-o", tmp_path / "o")
    assert code == 2 and err.splitlines()[-1].startswith("error: No photograph of ")
    assert "is not an image that Pillow can read" in err
    assert json.loads((tmp_path / "o" / "annotations.json").read_text())["images"] == []


def test_no_masks_are_an_empty_list(run, folder, tmp_path):
    assert run("photos/a.png", "-o", tmp_path, "--pred-iou-thresh", "99")[0] == 0
    coco = json.loads((tmp_path / "annotations.json").read_text())
    assert len(coco["images"]) == 1 and coco["annotations"] == []
    assert (tmp_path / "a" / "metadata.csv").read_text().count("\n") == 1


def test_a_full_disk_keeps_what_is_finished(run, tmp_path, monkeypatch):
    write, count = amg_cli._write_pngs, []

    def fill(folder, masks):
        count.append(folder)
        if len(count) == 2:
            raise OSError(28, "No space left on device")
        write(folder, masks)

    monkeypatch.setattr(amg_cli, "_write_pngs", fill)
    code, err = run("photos", "-o", tmp_path / "o")
    assert code == 2 and "No space left on device" in err.splitlines()[-1]
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [".parts", "a", "settings.json"]


BAD = [
    (["absent", "-o", "o"], "There is no folder absent"),
    (["photos/deeper/..", "-o", "samlight_t.safetensors"], "is a file; give a folder"),
    (["empty", "-o", "o"], "There is no photograph in empty"),
    (["twins", "-o", "o"], "2 photographs in twins are called one"),
    (["photos", "-o", "o", "--model", "samlight_s"], "no released weights of 'samlight_s'"),
    (["photos", "-o", "o", "--crop-n-layers", "-1"], "crop_n_layers=-1: expected a whole number"),
    (["photos", "-o", "old", "--crop-n-layers", "1"], "made with crop_n_layers 0, not 1"),
    (["twins/one.png", "-o", "old"], "old was made with folder "),
    (["photos", "-o", "foreign"], "settings.json is not what this command writes"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[b[1][:30] for b in BAD])
def test_bad_input_ends_with_one_sentence_and_code_two(run, folder, arguments, sentence):
    for name in ("empty", "twins", "foreign"):
        (folder / name).mkdir(exist_ok=True)
    for name in ("one.png", "one.jpg"):
        Image.new("RGB", (9, 9)).save(folder / "twins" / name)
    (folder / "foreign" / "settings.json").write_text("{}")
    if "old" in arguments:
        assert run("photos", "-o", "old", "--format", "coco")[0] == 0
    code, err = run(*arguments)
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ")
    assert sentence in err
    assert not (folder / "o").exists()

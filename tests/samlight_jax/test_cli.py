"""The command line: what it writes, and one sentence with exit code 2 for what it cannot do."""

import json
import re
import subprocess
import sys
import types
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

from pallas_kernels import chain
from samlight_jax import cli, weights
from samlight_jax.preprocess import as_array
from tests.models import TINY, random_arrays

METRIC = {"protocol": "box", "set": "coco", "metric": "miou", "n": 9}
METRIC |= {"value": 0.5, "low": 0.25, "high": 0.75}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cache folder with a tiny model under the default's name; photographs, one broken."""
    folder = tmp_path_factory.mktemp("cli")
    metadata = {"a": "b", "source": "a test", "metrics": json.dumps([METRIC])}
    weights.save(folder / "samlight_t.safetensors", random_arrays(TINY), TINY, metadata=metadata)
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        photo = rng.integers(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(photo).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes((folder / "one.png").read_bytes()[:900])
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs the command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("SAMLIGHT_CACHE", str(folder))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(cli, "keep_compilations", lambda: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["samlight", *map(str, arguments)])
        with warnings.catch_warnings():  # puts `showwarning` back, too
            warnings.simplefilter("always")
            try:
                cli.main()
                code = 0
            except SystemExit as end:
                code = end.code
        return (code, *capsys.readouterr())

    return run


def decode(segmentation):
    """Uncompressed COCO run lengths, as pycocotools reads them."""
    mask_utils = pytest.importorskip("pycocotools.mask")
    height, width = segmentation["size"]
    return mask_utils.decode(mask_utils.frPyObjects(segmentation, height, width)).astype(bool)


def test_one_photograph_gives_an_overlay_and_json(run, folder):
    code, out, _ = run(
        "predict", "one.png", "--point", "30,20", "--point", "5,5,0", "--box", "10,5,50,35",
        "--output", "o/out.png", "--json", "o/out.json",
    )  # fmt: skip
    assert code == 0 and "one.png" in out
    (row,) = json.loads((folder / "o" / "out.json").read_text())
    mask = decode(row["segmentation"])
    assert mask.shape == (40, 60) and mask.sum() == row["area"] > 0
    assert row["points"] == [[30, 20, 1], [5, 5, 0]] and row["box"] == [10, 5, 50, 35]
    x, y, w, h = row["bbox"]
    assert mask[y : y + h, x : x + w].sum() == row["area"]
    assert mask[y].any() and mask[y + h - 1].any() and mask[:, x].any() and mask[:, x + w - 1].any()
    assert 0 <= row["predicted_iou"] <= 1
    shown = as_array(folder / "o" / "out.png")
    photo = as_array(folder / "one.png")
    assert shown.shape == photo.shape and (shown[mask] != photo[mask]).any()
    assert sorted(p.name for p in (folder / "o").iterdir()) == ["out.json", "out.png"]


def test_several_photographs_go_to_a_folder_and_a_broken_one_is_named(run, folder):
    code, out, err = run(
        "predict", "one.png", "broken.png", "two.png", "--point", "30,20", "-o", "many"
    )
    assert code == 2
    assert "1 of 3 photographs failed: broken.png is damaged or unreadable" in err
    assert "one.png" in out and "two.png" in out
    assert sorted(p.name for p in (folder / "many").iterdir()) == ["one.png", "two.png"]


BAD = [
    (["predict", "one.png"], "No prompt was given"),
    (["predict", "--point", "1,2"], "No photograph was given"),
    (["predict", "absent.png", "--point", "1,2"], "There is no image absent.png"),
    (["predict", "broken.png", "--point", "1,2"], "broken.png is damaged or unreadable"),
    (
        ["predict", "samlight_t.safetensors", "--point", "1,2"],
        "is not an image that Pillow can read",
    ),
    (["predict", "one.png", "--point", "1"], "--point 1: expected x,y or x,y,label"),
    (["predict", "one.png", "--point", "1,b"], "expected x,y or x,y,label"),
    (["predict", "one.png", "--point", "1,2,3"], "the label is 3; expected 1 or 0"),
    (["predict", "one.png", "--point", "nan,2"], "`point_coords` holds NaN"),
    (["predict", "one.png", "--box", "1,2,3"], "--box 1,2,3: expected x1,y1,x2,y2"),
    (["predict", "one.png", "--box", "9,9,3,3"], "is empty; expected x1, y1, x2, y2"),
    (["predict", "one.png", "two.png", "--box", "1,2,3,4", "-o", "a.png"], "give a folder"),
    (["predict", "one.png", "one.png", "--box", "1,2,3,4", "-o", "a"], "the same name"),
    (["predict", "one.png", "--box", "1,2,3,4", "--model", "x.safetensors"], "no model file x.saf"),
    (["predict", "one.png", "--box", "1,2,3,4", "--model", "one.png"], "not a whole .safetensors"),
    (["predict", "one.png", "--box", "1,2,3,4", "--model", "samlight_s"], "no released weights"),
    (["predict", "one.png", "--box", "1,2,3,4", "-o", "one.png/x.png"], "File exists"),
    (["info", "absent"], "There is no model file absent"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[b[1][:30] for b in BAD])
def test_bad_input_ends_with_one_sentence_and_code_two(run, arguments, sentence):
    code, _, err = run(*arguments)
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ")
    assert sentence in err


def test_a_point_outside_is_a_warning(run):
    code, _, err = run("predict", "one.png", "--point", "30,50")
    assert code == 0 and err.startswith("warning: A point lies outside the image: x=30, y=50")


def test_models_and_info_tell_parameters_and_sources(run, folder):
    code, out, _ = run("models")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "93.7 M" in lines["sam_vit_b"] and "from_torch.py sam_vit_b.pth" in lines["sam_vit_b"]
    assert str(folder / "samlight_t.safetensors") in lines["samlight_t"]
    code, out, _ = run("info", "samlight_t")
    assert code == 0
    head, metrics = out.split("\n\n")
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in head.splitlines())
    assert facts["model"] == "tiny" and facts["dtypes"] == "float32"
    assert list(facts)[4:6] == ["source", "a"] and facts["a"] == "b" and "metrics" not in facts
    assert [re.split(r"  +", line) for line in metrics.splitlines()] == [
        ["protocol", "set", "metric", "n", "value", "95 % interval"],
        ["box", "coco", "miou", "9", "0.5000", "0.2500 to 0.7500"],
    ]


def test_info_takes_metrics_of_another_form_as_they_are(run, folder):
    for text in ("[1]", "none", '[{"set": "coco"}]'):
        path = folder / "other.safetensors"
        weights.save(path, random_arrays(TINY), TINY, metadata={"metrics": text})
        code, out, _ = run("info", path.name)
        assert code == 0 and re.search(rf"^metrics +{re.escape(text)}$", out, re.MULTILINE)


def test_models_names_the_packages_own_file(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMLIGHT_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(sys.modules["samlight_jax.build_sam"], "PACKAGED", tmp_path)
    file = tmp_path / "samlight_t.safetensors"
    file.touch()
    _, out, _ = run("models")
    lines = {line.split()[0]: line.split()[-1] for line in out.splitlines()}
    assert lines["samlight_t"] == str(file)


def test_doctor_tells_what_would_run_and_why_nothing_better(run, folder, monkeypatch):
    def unsupported(qkv, rel, **_):
        return None if qkv[0].dtype == "bfloat16" and not rel else "takes bfloat16 without rel."

    picky, any_ = (
        types.SimpleNamespace(unsupported=f) for f in (unsupported, lambda *_, **__: None)
    )
    monkeypatch.setattr(chain, "CHAIN", {"picky": picky, "any": any_, "never": picky})
    code, out, _ = run("doctor")
    assert code == 0
    facts, table, why = (part.splitlines() for part in out.split("\n\n"))
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in facts)
    assert facts["jax"] == jax.__version__ and facts["cache folder"] == str(folder)
    assert facts["weights there"] == "samlight_t" and "jax-triton" in facts
    assert facts["devices"] == f"{jax.device_count()} x cpu (cpu)"
    rows = [re.split(r"  +", line) for line in table]
    assert rows[0] == ["model", "attention", "bfloat16", "float32"]
    assert ["samlight_t", "segment 64x64, dilation 4", "picky", "any"] in rows
    assert ["samlight_t_paper", "segment 1024, dilation 2", "picky", "any"] in rows
    assert ["sam_vit_h", "all tokens", "any", "any"] in rows
    assert ["sam_vit_h", "segment 14x14", "any", "any"] in rows
    refused = sum(row[2:].count("any") for row in rows)
    assert why[1].split(maxsplit=4) == [
        *("picky", str(refused), "of", str(2 * len(rows) - 2)), "takes bfloat16 without rel."
    ]  # fmt: skip
    assert len(why) == 2


def test_doctor_says_so_where_jax_finds_no_device(run, monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'cuda': no driver\nmore")

    monkeypatch.setattr(jax, "devices", devices)
    code, out, _ = run("doctor")
    assert code == 0
    last = out.splitlines()[-1]
    assert last.split(maxsplit=1)[1] == (
        "JAX finds none: Unable to initialize backend 'cuda': no driver"
    )


def test_a_program_ends_without_a_traceback(folder):
    command = [sys.executable, "-m", "samlight_jax", "predict", "absent.png", "--point", "1,2"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr

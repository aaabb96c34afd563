"""The real teacher and real photographs, at 256 pixels: a student learns four by heart."""

import json
import subprocess
import sys

import pytest
import skimage.data
from PIL import Image

from tests.oracles import shared
from tests.train import runs

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
AS_THEY_ARE = {f"augment.{name}": 0 for name in ("flip", "colour", "mosaic", "paste")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minisam")
    source = shared("weights/minisam_vit_t.pt")
    convert = [sys.executable, "convert/from_torch.py", source, "--model", "minisam"]
    made = [*convert, "-o", folder / "minisam.safetensors"]
    subprocess.run(made, cwd=runs.ROOT, check=True, capture_output=True)
    (folder / "photographs").mkdir()
    for name in PHOTOGRAPHS:
        photo = Image.fromarray(getattr(skimage.data, name)())
        photo.save(folder / "photographs" / f"{name}.png")
    return folder


def distil(folder, out, **flags):
    given = {
        **{"config": "debug", "teacher": folder / "minisam.safetensors"},
        **{"data": folder / "photographs", "out": folder / out, "sheet-every": 0},
    } | flags
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in given.items())
    command = [sys.executable, "-m", "train.distill", *(part for pair in pairs for part in pair)]
    done = subprocess.run(
        command, cwd=runs.ROOT, env=runs.environment(folder), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def agreement(folder, out):
    """(box, point) mIoU with the teacher, by `train.evaluate`."""
    report = folder / f"{out}_report"
    command = [sys.executable, "-m", "train.evaluate", "--prompt", "teacher-grid"]
    for name, value in {
        "model": folder / out / "model.safetensors",
        "agree-with": folder / "minisam.safetensors",
        "data": "folder",
        "root": folder / "photographs",
        "image-size": 256,
        "pictures": 0,
        "out": report,
    }.items():
        command += [f"--{name}", str(value)]
    subprocess.run(command, cwd=runs.ROOT, check=True, capture_output=True)
    results = json.loads((report / "report.json").read_text())["results"]
    return results["agreement"]["value"], results["agreement_point"]["value"]


@pytest.mark.slow
def test_learns_four_photographs_by_heart(folder):
    flags = {"steps": 300, "lr": 5e-3, "schedule": "output_only", "augment.whole": 1}
    distil(folder, "heart", **flags, **AS_THEY_ARE)
    box, point = agreement(folder, "heart")
    assert box >= 0.95
    assert point >= 0.6  # of three masks the surer one is often another


@pytest.mark.slow
def test_the_debug_preset_goes_through_all_stages(folder):
    before = None
    for stage in (1, 2, 3):
        start = {"init-from": folder / before} if before else {}
        before = f"stage{stage}"
        distil(folder, before, stage=stage, steps=10, **start)
    assert (folder / "stage3" / "model.safetensors").exists()

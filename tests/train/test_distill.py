"""Whole runs: continued, divided over devices and processes, refused; each in a process apart."""

import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import samlight_jax
from samlight_jax import weights
from tests.train import runs
from train import distill
from train.evaluate_tiny import tiny_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny teacher, ten photographs, and `whole`: one run without interruption."""
    folder = tmp_path_factory.mktemp("distill")
    runs.teacher(folder)
    runs.photographs(folder / "photographs")
    code, said = runs.run(folder, out=folder / "whole")
    assert code == 0, said
    return folder


def differences(a, b):
    """The largest one of each array."""
    a, b = runs.model(a), runs.model(b)
    assert a.keys() == b.keys()
    return {name: np.abs(a[name] - b[name]).max() for name in a}


def assert_same_run(a, b, tolerance):
    """Measures of every step and the models' embeddings differ by at most `tolerance`."""
    for x, y in zip(runs.metrics(a), runs.metrics(b), strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert abs(x[name] - y[name]) <= tolerance * max(1, abs(x[name])), (x["step"], name)
    far = {name: x for name, x in differences(a, b).items() if x > tolerance}
    # A key's bias shifts all scores of a query alike: its gradient is rounding, which Adam scales
    # to a whole step.
    assert all(name.endswith("attn.qkv.bias") for name in far), far
    photo = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    one, other = (samlight_jax.encode(photo, model=str(x / "model.safetensors")) for x in (a, b))
    assert np.abs(one).max() > 100 * tolerance
    assert np.abs(one - other).max() <= tolerance


def test_runs_of_other_lengths_and_rates_share_one_program(folder, tmp_path):
    """So that a sweep compiles once."""

    def program(**flags):
        words = runs.command(folder, out=tmp_path / str(len(flags)), **flags)[3:]
        run = distill.Run(distill.parse([str(word) for word in words]))
        abstract, where = run._abstract()
        step = distill.make_step(run.task, run.look, where)
        text = step.lower(abstract, run.teacher, run._pace(3), next(run.batches(0))).as_text()
        return run.config.program(), text

    other = {"steps": 30, "lr": 0.1, "lr_end": 0.5, "warmup": 7, "ema": 0.9, "layers_share": 0.7}
    first = program()
    assert first == program(**other, decoder_lr=0.2, seed=5)
    assert all(a != b for a, b in zip(first, program(clip=0.5), strict=True))


def test_a_run_is_whole(folder):
    out = folder / "whole"
    rows = runs.metrics(out)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["embedding"] < rows[0]["embedding"]
    model = samlight_jax.load(out / "model.safetensors")
    masks, _, _ = samlight_jax.predict(
        np.zeros((48, 64, 3), np.uint8), [[20, 20]], [1], model=model
    )
    assert masks.shape == (3, 48, 64)
    teacher, student = weights.read(folder / "teacher.safetensors")[0], runs.model(out)
    parts = ("prompt_encoder.", "mask_decoder.")
    kept = [name for name in student if name.startswith(parts)]
    assert kept and all(np.array_equal(student[name], teacher[name]) for name in kept)


def test_killed_and_continued_is_the_same_to_the_bit(folder):
    out = folder / "killed"
    process = runs.start(folder, out=out)
    deadline = time.monotonic() + 300
    while not (out / "checkpoints" / "4").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()  # SIGKILL
    process.communicate()
    assert not (out / "model.safetensors").exists(), "the run was over before it was killed"
    code, said = runs.run(folder, out=out)
    assert code == 0 and "continues at step" in said, said
    assert max(differences(folder / "whole", out).values()) == 0
    assert runs.metrics(out) == runs.metrics(folder / "whole")


def test_sigterm_saves_and_the_same_command_continues(folder):
    out = folder / "told"
    process = runs.start(folder, out=out, steps=400, **{"save-every": 1000})
    deadline = time.monotonic() + 300
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "the same command continues" in said, said
    (step,) = (int(path.name) for path in (out / "checkpoints").iterdir())
    assert 0 < step < 400
    code, said = runs.run(folder, out=out, steps=399)  # other settings
    assert code == 2 and "steps was 400 and is 399" in said, said


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_eight_devices_equal_one(folder, mesh):
    out = folder / f"devices{''.join(map(str, mesh))}"
    axes = {f"mesh.{name}": n for name, n in zip(("data", "fsdp", "tensor"), mesh, strict=True)}
    code, said = runs.run(folder, out=out, devices=8, **axes)
    assert code == 0, said
    assert_same_run(folder / "whole", out, 1e-5)


def test_a_checkpoint_restores_onto_another_number_of_devices(folder):
    out = folder / "moved"
    code, said = runs.run(folder, out=out, devices=8, steps=12, **{"mesh.fsdp": 8})
    assert code == 0, said
    for path in (out / "checkpoints" / "12", out / "model.safetensors"):
        subprocess.run(["rm", "-r", path], check=True)
    code, said = runs.run(folder, out=out, devices=2)
    assert code == 0 and "continues at step 8" in said, said
    assert_same_run(folder / "whole", out, 1e-5)


def test_two_processes_equal_one(folder):
    address = f"127.0.0.1:{runs.free_port()}"
    flags = {"out": folder / "processes", "cluster.coordinator": address, "cluster.processes": 2}
    each = [runs.start(folder, devices=4, **flags, **{"cluster.process": i}) for i in range(2)]
    said = [process.communicate(timeout=600)[0] for process in each]
    assert [process.returncode for process in each] == [0, 0], said
    assert_same_run(folder / "whole", folder / "processes", 1e-5)


def test_photographs_in_device_memory_change_nothing(folder):
    out = folder / "resident"
    code, said = runs.run(folder, out=out, devices=4, **{"cache-photos": "device"})
    assert code == 0, said
    assert_same_run(folder / "whole", out, 1e-5)


def test_learns_from_views_again(folder):
    """On eight devices as on one, and killed between two fillings of the pool."""
    again = {"reuse": 3, "pool": 2, "schedule": "output_only"}
    for out, flags in (("again", {}), ("again8", {"devices": 8}), ("again_killed", {"steps": 12})):
        code, said = runs.run(folder, out=folder / out, **again, **flags)
        assert code == 0, said
    assert_same_run(folder / "again", folder / "again8", 1e-5)
    out = folder / "again_killed"
    for path in (out / "checkpoints" / "12", out / "model.safetensors"):
        subprocess.run(["rm", "-r", path], check=True)
    code, said = runs.run(folder, out=out, **again)
    assert code == 0 and "continues at step 8" in said, said
    assert max(differences(folder / "again", out).values()) == 0
    code, said = runs.run(
        folder, out=folder / "again2", stage=2, init_from=out, steps=3, reuse=2, pool=2
    )
    assert code == 0, said


def test_parts_of_a_batch_have_the_gradient_of_the_whole(folder):
    """Batch norm aside, which knows only its part: a student with a patch stem has none."""
    flags = {"student": "samlight_t_paper", "batch": 8, "steps": 4}
    for out, parts in (("at_once", 1), ("in_parts", 4)):
        code, said = runs.run(folder, out=folder / out, accumulate=parts, **flags)
        assert code == 0, said
    far = differences(folder / "at_once", folder / "in_parts")
    assert max(x for name, x in far.items() if not name.endswith("qkv.bias")) <= 1e-5


def test_remat_changes_nothing(folder):
    code, said = runs.run(folder, out=folder / "remat", remat=True, steps=12)
    assert code == 0, said
    assert_same_run(folder / "whole", folder / "remat", 1e-5)


def test_stages_chain(folder):
    """Stage 2 moves encoder and decoder and nothing else; stage 3 begins where it ended."""
    before = folder / "whole"
    for stage in (2, 3):
        out = folder / f"stage{stage}"
        code, said = runs.run(
            folder, out=out, stage=stage, init_from=before, steps=3, **{"sheet-every": 3}
        )
        assert code == 0, said
        assert all(np.isfinite(list(row.values())).all() for row in runs.metrics(out))
        assert (out / "sheet-000003.png").exists()
        far = differences(before, out)
        frozen = {name for name, x in far.items() if name.startswith("prompt_encoder.")}
        assert all(far[name] == 0 for name in frozen)
        assert max(x for n, x in far.items() if n.startswith("mask_decoder.")) > 0
        assert max(x for n, x in far.items() if n.startswith("image_encoder.")) > 0
        before = out


def test_learns_the_datas_own_masks(folder):
    tiny_data(folder / "set")
    flags = {"data": f"coco:{folder / 'set'}", "targets": "annotations", "stage": 3}
    out = folder / "annotated"
    code, said = runs.run(folder, out=out, init_from=folder / "whole", steps=4, **flags)
    assert code == 0, said
    rows = runs.metrics(out)
    assert len(rows) == 4 and all(row["dice_1"] > 0 for row in rows)
    code, said = runs.run(folder, out=out, steps=4, **flags | {"stage": 1})
    assert code == 2 and "targets='annotations' is for 2 and 3" in said, said


def test_a_loss_that_is_not_finite_stops_the_run(folder):
    code, said = runs.run(folder, out=folder / "wild", lr=1e30, warmup=0, clip=1e30)
    assert code == 2
    assert "is not finite, so training stopped" in said
    assert "there is no checkpoint yet" in said or "the last good checkpoint is of step" in said


def test_trains_on_a_teachers_cache(folder):
    """Nothing of the teacher's encoder is left to run; a cache of other sizes is refused."""
    cached = folder / "cache"
    flags = {
        **{"data": folder / "photographs", "teacher": folder / "teacher.safetensors"},
        **{"out": cached, "canvas": 64, "image-size": 64, "views": 3, "batch": 8},
    }
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "train.cache_teacher", *given]
    subprocess.run(command, cwd=runs.ROOT, env=runs.environment(folder), check=True)
    learns = {"teacher-cache": cached, "schedule": "output_only", "steps": 8}
    code, said = runs.run(folder, out=folder / "cached", **learns)
    assert code == 0, said
    rows = runs.metrics(folder / "cached")
    assert rows[-1]["embedding"] < rows[0]["embedding"]
    code, said = runs.run(folder, out=folder / "other", canvas=32, **learns)
    assert code == 2 and "canvas is 64, this run has 32" in said, said


def test_unreadable_photographs_are_replaced_and_named(folder):
    some = runs.photographs(folder / "some_bad", 20)
    (some / "03.png").write_bytes((some / "03.png").read_bytes()[:100])
    flags = {"data": some, "steps": 4}
    code, said = runs.run(folder, out=folder / "some", **flags, **{"max-bad": 0.05})
    assert code == 0 and "1 unreadable photographs were replaced: 03.png" in said, said
    code, said = runs.run(folder, out=folder / "none", **flags, **{"max-bad": 0.04})
    assert code == 2 and "1 of 20 photographs are unreadable, more than max_bad=0.04" in said, said


SENTENCES = {
    "data": ({"data": "/nowhere"}, "There is no /nowhere"),
    "teacher": ({"teacher": "/nowhere.safetensors"}, "There is no model file"),
    "student": ({"student": "resnet"}, "There is no preset 'resnet'"),
    "mesh": ({"mesh.data": 3}, "must multiply to 1"),
    "start": ({"stage": 2}, "stage=2 starts from a student"),
    "size": ({"image-size": 100}, "image_size=100"),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_refuses_in_one_sentence(folder, name, monkeypatch, capsys):
    flags, sentence = SENTENCES[name]
    monkeypatch.setattr(distill, "keep_compilations", lambda: None)
    monkeypatch.setattr("sys.argv", runs.command(folder, out=folder / "refused", **flags)[2:])
    with pytest.raises(SystemExit) as ended:
        distill.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1


def test_a_batch_that_does_not_divide_is_refused(folder):
    code, said = runs.run(folder, out=folder / "refused", devices=2, batch=3)
    assert code == 2 and "batch=3 does not divide over 2" in said, said


def test_a_full_disk_is_one_sentence(folder):
    """A limit on the size of files stands in for the disk's."""
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash"]
    done = subprocess.run(
        [*limited, *map(str, runs.command(folder, out=folder / "full"))],
        cwd=runs.ROOT,
        env=runs.environment(folder / "full"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    # TensorStore's threads print what they like, before, after and on the same line.
    said = re.findall("error: A checkpoint in .*File too large", done.stderr)
    assert len(said) == 1, done.stderr

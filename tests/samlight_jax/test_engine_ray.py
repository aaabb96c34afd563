"""`--engine ray`: parts that nothing is lost from or doubled in, and the single machine's masks."""

import collections
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image

from samlight_jax import amg_cli, cli, engine_ray, engine_ray_work, weights
from samlight_jax import engine_ray_parts as parts
from samlight_jax.engine_ray_parts import Output
from samlight_jax.errors import InputError
from tests.models import TINY, random_arrays

fsspec = pytest.importorskip("fsspec")
EASY = {  # a random model's masks cover all of the image: all stay
    "points_per_side": 2,
    "points_per_batch": 4,
    "pred_iou_thresh": 0.0,
    "stability_score_thresh": 0.0,
    "box_nms_thresh": 1.0,
}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in EASY.items()]
PHOTOS = ("a.png", "b.jpg", "c.png", "d.png", "e.jpg")
# A cluster of two workers in a process of its own: JAX and Ray's forks do not go together. The
# third photograph kills the worker that looks at it, once.
CLUSTER = """
import dataclasses, json, os, signal, sys
import ray
from samlight_jax import amg_cli, cli, engine_ray

@dataclasses.dataclass(frozen=True)
class Deadly:
    generator: amg_cli.Generator
    flag: str

    def build(self, model):
        masks_of = self.generator.build(model)

        def deadly(image):
            if image.shape[0] == 42 and not os.path.exists(self.flag):
                open(self.flag, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return masks_of(image)

        return deadly

def command(*arguments):
    sys.argv = ["samlight", *arguments]
    try:
        cli.main()
        print("code 0")
    except SystemExit as end:
        print("code", end.code)

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
flags = sys.argv[1:]
engine = engine_ray.Engine("ray", workers=2, photos_per_part=2)
generator = amg_cli.Generator(**json.loads(os.environ["EASY"]))
task = Deadly(generator, os.path.abspath("died"))
engine_ray.run(engine, "amg", task, ["photos", "t.tar"], "deadly", "parquet", "samlight_t")
many = ["--engine", "ray", "--workers", "2", "--photos-per-part", "3"]
command("amg", "photos", "-o", "coco", "--format", "coco", *flags, *many)
command("amg", "photos", "-o", "coco", "--format", "coco", *flags, *many)
command("amg", "photos", "-o", "coco", "--format", "coco", "--crop-n-layers", "1", *flags, *many)
command("amg", "photos", "-o", "x", "--crop-n-layers", "-1", *flags, *many)
command("amg", "photos", "-o", "x", *flags, "--engine", "ray", "--workers", "3")
command("predict", "photos", "--point", "9,9", "-o", "points", *many)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model under the default's name; `photos` with five photographs, two of them in `t.tar`."""
    folder = tmp_path_factory.mktemp("engine")
    weights.save(folder / "samlight_t.safetensors", random_arrays(TINY, 2), TINY)
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i, name in enumerate(PHOTOS):
        noise = rng.integers(0, 256, (6, 5, 3), np.uint8)
        Image.fromarray(noise).resize((50, 40 + i)).save(folder / "photos" / name)
    (folder / "photos" / "notes.txt").write_text("no photograph")
    with tarfile.open(folder / "t.tar", "w") as tar:
        tar.add(folder / "photos" / "a.png", "in/z.png")
        tar.add(folder / "photos" / "notes.txt", "in/notes.txt")
        tar.add(folder / "photos" / "b.jpg", "in/y.jpg")
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs `samlight` in this process: (exit code, stderr)."""
    monkeypatch.setenv("SAMLIGHT_CACHE", str(folder))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(amg_cli, "keep_compilations", lambda: None)
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
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def single(run, tmp_path):
    """The single machine's annotations, without ids, of each of `photos`."""
    assert run("amg", "photos", "-o", tmp_path / "single", "--format", "coco", *FLAGS)[0] == 0
    return annotations(json.loads((tmp_path / "single" / "annotations.json").read_text()))


def annotations(coco):
    """COCO's annotations by photograph, without the ids, that must count up."""
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    assert len(set(names.values())) == len(names)
    found = {name: [] for name in names.values()}
    for number, entry in enumerate(coco["annotations"], 1):
        assert entry.pop("id") == number
        found[names[entry.pop("image_id")]].append(entry)
    return found


def worker(monkeypatch, output, form="coco", run="first", task=None):
    monkeypatch.setattr(engine_ray_work, "keep_compilations", lambda: None)
    task = task or amg_cli.Generator(**EASY)
    return engine_ray_work.Worker(TINY, random_arrays(TINY, 2), task, output, form, None, run)


def do(worker, *todo):
    """The records of some parts."""
    batch = {"part": np.array([part.to_json() for part in todo])}
    return [json.loads(text) for text in worker(batch)["record"]]


def store(files):
    """A store in memory with these files; the URLs of its root."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for name, data in files.items():
        memory.pipe_file(f"/in/{name}", data)
    return "memory://in", Output.of("memory://out")


def photo(folder, name="a.png"):
    return (folder / "photos" / name).read_bytes()


def test_from_a_store_come_the_single_machines_masks(folder, single, monkeypatch):
    files = {f"deep/{name}": photo(folder, name) for name in PHOTOS}
    url, output = store({**files, "t.tar": (folder / "t.tar").read_bytes(), ".hidden.png": b""})
    plan = parts.planned(output, *parts.found([url]), 2)
    records = do(worker(monkeypatch, output), *plan)
    assert [record["photographs"] for record in records] == [2, 2, 1, 2]
    got = {}
    for part in plan:
        coco = json.loads(output.read(f"parts/{part.name}.json"))
        assert coco["info"]["source"] == part.source
        got |= annotations(coco)
    want = {f"deep/{name}": single[name] for name in PHOTOS}
    assert got == {**want, "in/z.png": single["a.png"], "in/y.jpg": single["b.jpg"]}
    assert sum(record["masks"] for record in records) == sum(map(len, got.values())) >= 60
    assert not parts.unfinished(output, plan) and not output.names("tries")


def test_parquet_holds_compressed_masks(folder, single, monkeypatch, tmp_path):
    mask_utils = pytest.importorskip("pycocotools.mask")
    parquet = pytest.importorskip("pyarrow.parquet")
    output = Output.of(str(tmp_path / "o"))
    plan = parts.planned(output, *parts.found([str(folder / "photos")]), 9)
    do(worker(monkeypatch, output, "parquet"), *plan)
    rows = parquet.read_table(tmp_path / "o" / "parts" / "part-000000.parquet").to_pylist()
    assert [row["file_name"] for row in rows] == sorted(PHOTOS)
    for row in rows:
        assert row["source"] == (folder / "photos").as_uri()
        for mask, want in zip(row["masks"], single[row["file_name"]], strict=True):
            size = row["height"], row["width"]
            rle = mask_utils.frPyObjects(want["segmentation"], *size)
            assert mask["segmentation"] == {"size": list(size), "counts": rle["counts"].decode()}
            del mask["segmentation"]
            assert mask == {name: want[name] for name in mask}


def test_what_is_bad_is_named_and_the_rest_is_done(folder, monkeypatch):
    url, output = store({"a.png": photo(folder)[:300], "b.jpg": photo(folder, "b.jpg")})
    (part,) = parts.planned(output, *parts.found([url]), 2)
    part = dataclasses.replace(part, files=(*part.files, "gone.png"))
    (record,) = do(worker(monkeypatch, output), part)
    named = {one["file_name"]: one["reason"] for one in record["skipped"]}
    assert record["photographs"] == 1 and named.keys() == {"a.png", "gone.png"}
    assert named["a.png"].startswith("a.png is damaged or unreadable")
    assert named["gone.png"] == "There is no image gone.png."
    assert not parts.unfinished(output, [part])


def test_a_part_without_its_record_is_redone_and_one_with_it_is_not(folder, monkeypatch, tmp_path):
    output = Output.of(str(tmp_path / "o"))
    plan = parts.planned(output, *parts.found([str(folder / "photos")]), 3)
    at_work = worker(monkeypatch, output)
    records = do(at_work, *plan)
    files = {path: path.read_bytes() for path in (tmp_path / "o" / "parts").iterdir()}
    # A kill between the file and its record, and one while the file was being written.
    (tmp_path / "o" / "records" / "part-000001.json").unlink()
    (tmp_path / "o" / "parts" / "part-000001.json").write_text("half")
    (tmp_path / "o" / "parts" / ".part-000001.json.x1y2").mkdir()
    output.sweep()
    assert parts.unfinished(output, plan) == plan[1:]
    read = []
    as_array = engine_ray_work.as_array
    monkeypatch.setattr(
        engine_ray_work, "as_array", lambda path: read.append(path.name) or as_array(path)
    )
    again = do(at_work, *plan)
    assert read == ["d.png", "e.jpg"]
    assert {path: path.read_bytes() for path in (tmp_path / "o" / "parts").iterdir()} == files
    assert [r["photographs"] for r in again] == [r["photographs"] for r in records] == [3, 2]


def test_a_part_that_kills_its_workers_is_left_alone_until_the_next_run(folder, monkeypatch):
    url, output = store({"a.png": photo(folder)})
    (part,) = parts.planned(output, *parts.found([url]), 9)

    def die(self, part, scratch):
        raise SystemExit

    monkeypatch.setattr(engine_ray_work.Worker, "_do", die)
    for _ in range(engine_ray_work.DEATHS):
        with pytest.raises(SystemExit):
            do(worker(monkeypatch, output), part)
    (record,) = do(worker(monkeypatch, output), part)
    assert record["error"].startswith("3 workers died over it")
    assert parts.unfinished(output, [part]) == [part]
    monkeypatch.undo()
    (record,) = do(worker(monkeypatch, output, run="second"), part)
    assert record["photographs"] == 1


def test_a_failing_store_or_disk_leaves_the_part_for_the_next_run(folder, monkeypatch):
    url, output = store({"a.png": photo(folder)})
    plan = parts.planned(output, *parts.found([url]), 9)
    at_work = worker(monkeypatch, output)
    memory = fsspec.filesystem("memory")
    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "cat_file", lambda *_, **__: 1 / 0)
        (record,) = do(at_work, *plan)
    assert "cannot be used (ZeroDivisionError" in record["error"]
    write = Output.write

    def full(self, name, data):
        if name.startswith("parts/"):
            raise OSError(28, "No space left on device")
        write(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", full)
        (record,) = do(at_work, *plan)
    assert "No space left" in record["error"] and parts.unfinished(output, plan) == plan
    assert do(at_work, *plan)[0]["photographs"] == 1


def test_warnings_of_a_worker_are_in_its_record(folder, monkeypatch):
    url, output = store({"a.png": photo(folder)})
    task = cli.Prompt([(9.0, 500.0, 1)], None)
    (record,) = do(
        worker(monkeypatch, output, task=task), *parts.planned(output, *parts.found([url]), 9)
    )
    (one,) = record["warnings"]
    assert one["file_name"] == "a.png" and "outside the image" in one["warning"]


def test_a_worker_for_each_gpu_or_else_for_each_cpu():
    assert engine_ray.pool({"CPU": 16.0, "GPU": 2.0}, None) == (2, {"num_gpus": 1})
    assert engine_ray.pool({"CPU": 16.0}, None) == (16, {"num_cpus": 1})
    assert engine_ray.pool({"CPU": 16.0}, 5) == (5, {"num_cpus": 3})
    for resources, workers in (({"CPU": 2.0}, 3), ({"CPU": 8.0, "GPU": 1.0}, 2), ({}, None)):
        with pytest.raises(InputError, match="the Ray cluster has"):
            engine_ray.pool(resources, workers)


RAY = ["--engine", "ray"]
BAD = [
    (["amg", "photos", "-o", "o", "--engine", "dask"], "--engine dask: expected ray"),
    (["amg", "photos", "-o", "o", "--workers", "2"], "--workers needs --engine ray"),
    (["amg", "photos", "-o", "o", *RAY, "--workers", "0"], "--workers 0: expected 1 or more"),
    (["amg", "photos", "-o", "o", *RAY, "--format", "png"], "expected parquet or coco"),
    (["amg", "photos", "-o", "o", "--format", "parquet"], "parquet needs --engine ray"),
    (["amg", "photos", "photos", "-o", "o"], "Got 2 folders"),
    (["amg", "-o", "o", *RAY], "No folder was given"),
    (["amg", "absent", "-o", "o", *RAY], "There is no folder, tar or photograph absent"),
    (["amg", "empty", "-o", "o", *RAY], "no photograph and no tar in empty"),
    (["amg", "absent/*.tar", "-o", "o", *RAY], "no photograph and no tar in absent/*.tar"),
    (["amg", "nosuch://x", "-o", "o", *RAY], "nosuch://x cannot be used"),
    (["amg", "http://127.0.0.1:9/", "-o", "o", *RAY], "http://127.0.0.1:9/ cannot be used"),
    (["amg", "photos", "-o", "t.tar", *RAY], "--output t.tar is a file"),
    (["amg", "photos", "-o", "o", *RAY, "--model", "x.safetensors"], "no model file x.saf"),
    (["predict", "photos", "--point", "1,2", *RAY], "give it --output FOLDER"),
    (["predict", "photos", "-o", "o", *RAY], "No prompt was given"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[b[1][:30] for b in BAD])
def test_bad_input_ends_with_one_sentence_and_code_two(
    run, folder, monkeypatch, arguments, sentence
):
    monkeypatch.setattr(engine_ray, "_library", lambda: None)  # ends before Ray is needed
    (folder / "empty").mkdir(exist_ok=True)
    code, err = run(*arguments)
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ")
    assert sentence in err and not (folder / "o").exists()


def test_without_ray_or_fsspec_a_sentence_says_so(run, monkeypatch):
    for name in ("ray.data", "fsspec.core"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            if name == "fsspec.core":
                patch.setattr(engine_ray, "_library", lambda: None)
            code, err = run("amg", "photos", "-o", "o", *RAY)
        assert code == 2 and err.count("\n") == 1
        assert f"needs {name.split('.')[0].replace('ray', 'Ray')}, which is not installed" in err
        assert "samlight-jax[ray]" in err


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="ray is not installed")
def test_on_two_workers_one_killed_nothing_is_lost_or_doubled(folder, single, run, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    mask_utils = pytest.importorskip("pycocotools.mask")
    environment = {**os.environ, "EASY": json.dumps(EASY), "HOME": str(tmp_path)}
    environment |= {"SAMLIGHT_CACHE": str(folder), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CLUSTER, *FLAGS]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "died").exists()
    out = iter(re.findall(r"^(?:\d+ parts, |code ).*", done.stdout, re.M))  # Ray writes there, too

    masks = sum(map(len, single.values())) + len(single["a.png"]) + len(single["b.jpg"])
    assert next(out) == (
        f"4 parts, 0 of them finished before; now 7 photographs with {masks} masks, 0 skipped."
    )
    rows = [
        row
        for path in sorted((folder / "deadly" / "parts").iterdir())
        for row in parquet.read_table(path).to_pylist()
    ]
    names = collections.Counter(row["file_name"] for row in rows)
    assert names == collections.Counter([*PHOTOS, "in/z.png", "in/y.jpg"])
    for row in rows:
        want = single[{"in/z.png": "a.png", "in/y.jpg": "b.jpg"}.get(*[row["file_name"]] * 2)]
        for mask, one in zip(row["masks"], want, strict=True):
            rle = mask_utils.frPyObjects(one["segmentation"], row["height"], row["width"])
            assert mask["segmentation"]["counts"] == rle["counts"].decode()
            assert mask["predicted_iou"] == one["predicted_iou"] and mask["bbox"] == one["bbox"]

    got = {}
    for path in (folder / "coco" / "parts").iterdir():
        got |= annotations(json.loads(path.read_text()))
    assert got == single
    photographs = f"5 photographs with {sum(map(len, single.values()))} masks"
    assert next(out) == f"2 parts, 0 of them finished before; now {photographs}, 0 skipped."
    assert next(out) == "code 0"
    assert next(out).startswith("2 parts, 2 of them finished before; now 0 photographs")
    assert [next(out) for _ in range(4)] == ["code 0", "code 2", "code 2", "code 2"]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "was made with crop_n_layers 0, not 1" in errors[0]
    assert "crop_n_layers=-1: expected a whole number" in errors[1]
    assert "--workers 3: the Ray cluster has 2 CPUs" in errors[2]
    assert not (folder / "x").exists()

    assert (
        next(out)
        == "2 parts, 0 of them finished before; now 5 photographs with 5 masks, 0 skipped."
    )
    paths = [f"photos/{name}" for name in PHOTOS]
    assert run("predict", *paths, "--point", "9,9", "--json", tmp_path / "one.json")[0] == 0
    want = {row["image"][7:]: row for row in json.loads((tmp_path / "one.json").read_text())}
    for path in (folder / "points" / "parts").iterdir():
        for row in parquet.read_table(path).to_pylist():
            (mask,), one = row["masks"], want.pop(row["file_name"])
            rle = mask_utils.frPyObjects(one["segmentation"], row["height"], row["width"])
            assert mask["segmentation"]["counts"] == rle["counts"].decode()
            assert mask["predicted_iou"] == one["predicted_iou"] and mask["area"] == one["area"]
    assert not want

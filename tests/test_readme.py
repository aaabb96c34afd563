"""The README's code runs, its tables are what the JSON says, its links lead somewhere."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image

from benchmarks.report import TABLES, report
from demo import segment
from samlight_jax import cli, weights
from samlight_jax.config import PRESETS
from samlight_jax.errors import InputError
from samlight_jax.preprocess import as_array
from tests.models import random_arrays
from train import distill, evaluate

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder: two photographs, and a model under the default's name at a small size."""
    data = pytest.importorskip("skimage.data")
    for name in ("coffee", "chelsea"):
        Image.fromarray(getattr(data, name)()).save(tmp_path / f"{name}.png")
    preset = PRESETS["samlight_t"]
    small = weights.resize(preset, random_arrays(preset), 128)
    weights.save(tmp_path / "samlight_t.safetensors", small[1], small[0])
    monkeypatch.setenv("SAMLIGHT_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_blocks_run_and_print_what_they_say(folder, capsys):
    names = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    said = re.findall(r"print\(.*\)  # (.*)", README)
    assert capsys.readouterr().out.splitlines() == said and said
    assert np.abs(names["where_to_move_the_click"]).max() > 0


def test_the_command_lines_run(folder, monkeypatch):
    monkeypatch.setattr(cli, "keep_compilations", lambda: None)
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    # amg and export have tests of their own: what they do to a whole photograph takes minutes.
    quick = ("samlight predict", "samlight models", "samlight info")
    commands = [shlex.split(line) for line in commands if line.startswith(quick)]
    assert len(commands) >= 4
    for command in commands:
        monkeypatch.setattr(sys, "argv", command)
        cli.main()
    assert (folder / "out.png").exists() and json.loads((folder / "out.json").read_text())
    assert sorted(p.name for p in (folder / "overlays").iterdir()) == ["chelsea.png", "coffee.png"]


def test_the_demo_writes_nine_overlays_and_a_sheet(folder, monkeypatch, capsys):
    (folder / "demo").mkdir()
    monkeypatch.setattr(segment, "FOLDER", folder / "demo")
    segment.main()
    assert capsys.readouterr().out.count("demo/") == 9
    sizes = {path.name: as_array(path).shape for path in (folder / "demo").iterdir()}
    assert len(sizes) == 10 and sizes["sheet.png"] == (900, 1200, 3)
    assert sizes["coffee_box.png"] == (400, 600, 3)


def test_the_tables_are_what_the_json_says():
    report(check=True)


def test_a_table_that_drifts_is_noticed(monkeypatch):
    page, name, table, results = TABLES[0]
    monkeypatch.setattr("benchmarks.report.TABLES", ((page, name, (*table, table[0]), results),))
    with pytest.raises(InputError, match=r"README\.md differs from benchmarks/results/cpu\.json"):
        report(check=True)


def test_links_to_files_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_models_table_has_every_preset_with_its_parameters():
    rows = [line.split("|") for line in README.split("## Models")[1].splitlines() if "`" in line]
    said = {}
    for row in rows[: rows.index(next(r for r in rows if len(r) < 5))]:
        names, counts = re.findall(r"`(\w+)`", row[1]), row[3].split(",")
        said |= {n: c.strip() for n, c in zip(names, counts * len(names), strict=False)}
    for name, config in PRESETS.items():
        count = sum(np.prod(leaf.shape) for leaf in weights.expected(config).values())
        assert said[name] == f"{count / 1e6:.1f}", name


def test_the_training_commands_have_the_flags_they_say():
    texts = [README, (ROOT / "docs" / "training.md").read_text()]
    shell = "\n".join(block for text in texts for block in re.findall(SHELL, text, re.DOTALL))
    lines = [line.split("  #")[0] for line in shell.replace("\\\n", " ").splitlines()]
    seen = set()
    for line in lines:
        words = [word for word in shlex.split(line) if word != "..."]
        if words[:2] == ["python", "-m"] and words[2] in PROGRAMS:
            PROGRAMS[words[2]](words[3:])
            seen.add(words[2])
    assert seen == set(PROGRAMS)


SHELL = r"```sh\n(.*?)```"
PROGRAMS = {
    "train.distill": distill.parse,
    "train.evaluate": lambda words: tyro.cli(evaluate.Options, args=words).protocol(),
}

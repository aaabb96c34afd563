"""The notebook: it runs from top to bottom, and what it keeps is small."""

import json
from pathlib import Path

import pytest

from samlight_jax import weights
from samlight_jax.config import PRESETS
from tests.models import random_arrays

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "quickstart.ipynb"
CODE = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Jupyter's own
def test_it_runs_and_every_picture_is_made_anew(tmp_path, monkeypatch):
    for module in ("nbclient", "nbformat", "ipykernel", "skimage"):
        pytest.importorskip(module, reason=f"{module} is not installed (extra docs)")
    import nbclient
    import nbformat

    preset = PRESETS["samlight_t"]
    weights.save(tmp_path / "samlight_t.safetensors", random_arrays(preset), preset)
    monkeypatch.setenv("SAMLIGHT_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    made = [kinds(cell) for cell in notebook.cells if cell["cell_type"] == "code"]
    assert made == [kinds(cell) for cell in CODE] and any(made)


def kinds(cell):
    """The kinds of picture that a cell shows."""
    return [
        kind
        for output in cell["outputs"]
        for kind in output.get("data", {})
        if kind.startswith("image/")
    ]


def test_what_it_keeps_is_small_and_says_nothing_of_a_machine():
    assert NOTEBOOK.stat().st_size < 150_000
    for cell in CODE:
        assert cell["execution_count"] is None
        assert all(output["output_type"] == "execute_result" for output in cell["outputs"])
        assert all(list(output["data"]) == ["image/jpeg"] for output in cell["outputs"])

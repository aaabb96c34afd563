"""Back to PyTorch: bit-exact, loadable strictly, whole or absent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

from convert import from_torch, to_torch  # noqa: E402
from samlight_jax import weights  # noqa: E402
from samlight_jax.config import PRESETS  # noqa: E402
from tests import oracles  # noqa: E402
from tests.models import random_arrays  # noqa: E402


def assert_same(got, want):
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype
        np.testing.assert_array_equal(got[key].numpy(), tensor.numpy(), strict=True)


@pytest.fixture(scope="module")
def model(mobile_sam, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "mobile_sam.safetensors"
    weights.save(path, mobile_sam[0], PRESETS["mobile_sam"])
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_real_checkpoint_comes_back_key_for_key(suffix, tmp_path, run):
    path = oracles.shared("weights/minisam_vit_t.pt")
    model, output = tmp_path / "m.safetensors", tmp_path / f"back{suffix}"
    from_torch.from_torch(path, model)
    code, out, _ = run(to_torch.main, model, "-o", output)
    assert code == 0
    assert "31 arrays of zeros added" in out and "strict\nload" in out
    back = load_file(output) if suffix == ".safetensors" else torch.load(output, weights_only=True)
    assert_same(back, torch.load(path, weights_only=True))


def test_metas_sam_loads_it_strictly(tmp_path, run):
    sam, other = oracles.tiny_sam(), oracles.tiny_sam(seed=1)
    arrays = from_torch_state(sam)
    weights.save(tmp_path / "tiny", arrays, oracles.TINY)
    code, out, _ = run(to_torch.main, tmp_path / "tiny", "-o", tmp_path / "tiny.pth")
    assert code == 0 and "zeros" not in out
    other.load_state_dict(torch.load(tmp_path / "tiny.pth", weights_only=True), strict=True)
    assert_same(other.state_dict(), sam.state_dict())


def from_torch_state(sam):
    from convert.apply import to_flax

    return to_flax({key: t.numpy() for key, t in sam.state_dict().items()}, oracles.TINY)


def test_a_student_is_refused_with_the_way_out(tmp_path, run):
    config = PRESETS["samlight_t"]
    student = tmp_path / "student.safetensors"
    weights.save(student, random_arrays(config), config)
    code, _, err = run(to_torch.main, student, "-o", tmp_path / "student.pth")
    assert code == 2
    assert err.startswith("error: The model 'samlight_t' has no PyTorch twin")
    assert "a convolutional stem, local convolutions, dilated attention" in err
    assert "ONNX export" in err
    assert [path.name for path in tmp_path.iterdir()] == ["student.safetensors"]


def test_bad_inputs_are_one_sentence(model, tmp_path, run):
    code, _, err = run(to_torch.main, model, "-o", tmp_path / "out.onnx")
    assert code == 2 and "out.onnx: expected a name that ends in .pth" in err
    code, _, err = run(to_torch.main, tmp_path / "none.safetensors", "-o", tmp_path / "out.pth")
    assert code == 2 and "none.safetensors" in err
    (tmp_path / "file").touch()
    code, _, err = run(to_torch.main, model, "-o", tmp_path / "file" / "out.pth")
    assert code == 2 and err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file(model, tmp_path, run, monkeypatch):
    output = tmp_path / "out.pth"
    output.write_text("old")

    def fill_the_disk(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    code, _, err = run(to_torch.main, model, "-o", output)
    assert code == 2 and "No space left" in err
    assert [path.name for path in tmp_path.iterdir()] == ["out.pth"]
    assert output.read_text() == "old"


def test_the_program_runs_uninstalled(tmp_path):
    command = [sys.executable, to_torch.__file__, "none.safetensors", "-o", "out.pth"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr

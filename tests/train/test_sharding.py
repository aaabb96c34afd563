import functools
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from samlight_jax import weights
from samlight_jax.config import PRESETS
from samlight_jax.errors import InputError
from tests.models import TINY, random_arrays
from train import sharding
from train.config import Mesh, TrainConfig
from train.step import make_optimizer

AXES = ("data", "fsdp", "tensor")
MESH = AbstractMesh((2, 4, 2), AXES)


@functools.cache
def shapes(name):
    return {n: x.shape for n, x in weights.expected(PRESETS[name]).items()}


def parts(spec, mesh=MESH):
    """Into how many an array is cut."""
    return math.prod(mesh.shape[axis] for axis in spec if axis)


@pytest.mark.parametrize("preset", ["samlight_t", "sam_vit_h", "minisam"])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 3, 5)])
def test_every_spec_divides_its_shape(preset, sizes):
    mesh = AbstractMesh(sizes, AXES)
    for name, shape in shapes(preset).items():
        spec = sharding.spec_of(name, shape, mesh)
        assert len(spec) <= len(shape)
        assert all(axis in (None, "fsdp", "tensor") for axis in spec)
        for size, axis in zip(shape, spec, strict=False):
            assert axis is None or size % mesh.shape[axis] == 0


@pytest.mark.parametrize("preset, most", [("sam_vit_h", 0.13), ("samlight_t", 0.2)])
def test_a_device_holds_its_part(preset, most):
    """An eighth of the matrices of the blocks, a quarter of other kernels, all of small vectors."""
    whole = {n: math.prod(shape) for n, shape in shapes(preset).items()}
    cuts = {n: parts(sharding.spec_of(n, shape, MESH)) for n, shape in shapes(preset).items()}
    blocks = [n for n in whole if ".blocks." in n and n.endswith(("qkv.kernel", "proj.kernel"))]
    blocks += [n for n in whole if ".blocks." in n and ".mlp." in n and n.endswith(".kernel")]
    assert {cuts[n] for n in blocks} == {8}
    assert sum(whole[n] for n in blocks) > 0.5 * sum(whole.values())
    assert sum(size / cuts[n] for n, size in whole.items()) < most * sum(whole.values())


@pytest.mark.parametrize(
    "name, shape, want",
    [
        ("image_encoder.blocks.0.attn.qkv.kernel", (384, 1152), ("fsdp", "tensor")),
        ("image_encoder.blocks.0.attn.qkv.bias", (1152,), ("tensor",)),
        ("image_encoder.blocks.0.attn.proj.kernel", (384, 384), ("tensor", "fsdp")),
        ("image_encoder.blocks.0.attn.proj.bias", (384,), ()),
        ("image_encoder.blocks.0.mlp.lin1.kernel", (384, 1536), ("fsdp", "tensor")),
        ("image_encoder.blocks.0.mlp.lin2.kernel", (1536, 384), ("tensor", "fsdp")),
        ("image_encoder.layers.1.blocks.0.mlp.fc1.kernel", (128, 512), ("fsdp", "tensor")),
        ("mask_decoder.transformer.layers.0.self_attn.q_proj.bias", (256,), ("tensor",)),
        ("image_encoder.neck.conv2.kernel", (3, 3, 256, 256), (None, None, None, "fsdp")),
        ("image_encoder.pos_embed", (1, 64, 64, 384), (None, None, None, "fsdp")),
        ("image_encoder.blocks.0.norm1.scale", (384,), ()),
        ("projectors.blocks.0.kernel", (384, 320), (None, "fsdp")),
        ("image_encoder.blocks.0.attn.qkv.kernel", (6, 9), (None, None)),  # divides by nothing
        ("image_encoder.blocks.0.attn.qkv.kernel", (8, 9), ("fsdp", None)),
        ("", (), ()),
    ],
)
def test_the_tables_answers(name, shape, want):
    assert sharding.spec_of(name, shape, MESH) == PartitionSpec(*want)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_optimizer_state_lies_as_its_parameters(optimizer):
    arrays = random_arrays(TINY)
    params = {n: x for n, x in arrays.items() if not n.startswith("prompt_encoder")}
    params["projectors.blocks.0.kernel"] = np.zeros((32, 48), np.float32)
    state = jax.eval_shape(make_optimizer(TrainConfig(optimizer=optimizer)).init, params)
    of_params = sharding.shardings(params, MESH)
    of_state = sharding.shardings(state, MESH)
    found = []
    for (path, x), where in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(of_state), strict=True
    ):
        name = next((key.key for key in path if getattr(key, "key", None) in params), None)
        if name is None:
            assert x.ndim == 0 or x.size < 10, path  # counts and constants
            assert where.spec == PartitionSpec()
        elif x.shape == params[name].shape:
            assert where == of_params[name]
            found.append(name)
    assert set(found) == set(params)
    # AdamW keeps two moments of a parameter, Muon one of a matrix.
    matrix = "image_encoder.blocks.0.attn.qkv.kernel"
    assert found.count(matrix) == (1 if optimizer == "muon" else 2)
    assert parts(of_params[matrix].spec) == 8


@pytest.mark.parametrize(
    "shape",
    [
        Mesh(data=2),
        Mesh(fsdp=2),
        Mesh(fsdp=0),
        Mesh(tensor=0),
        Mesh(data=0),
        Mesh(fsdp=-1, tensor=-1),
        Mesh(data=-2),
    ],
)
def test_wrong_meshes_are_refused(shape):
    assert jax.device_count() == 1
    sentence = f"fsdp={shape.fsdp}, tensor={shape.tensor} does not use the 1 devices there are"
    with pytest.raises(InputError, match=sentence):
        sharding.make_mesh(shape)


def test_tensor_stays_within_a_process(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    with pytest.raises(InputError, match="mesh tensor=4 spans processes of 2 devices"):
        sharding.make_mesh(Mesh(tensor=4))


def test_rows_of_processes_are_the_batch():
    rows = [list(range(12))[sharding.rows_of(process, 3, 12)] for process in range(3)]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


ON_EIGHT = """
import jax, numpy as np, pytest
from samlight_jax.errors import InputError
from train import sharding
from train.config import Mesh

mesh = sharding.make_mesh(Mesh(fsdp=2, tensor=2))
assert dict(mesh.shape) == dict(data=2, fsdp=2, tensor=2)
assert dict(sharding.make_mesh(Mesh()).shape) == dict(data=8, fsdp=1, tensor=1)
for shape in (Mesh(data=3), Mesh(fsdp=3), Mesh(tensor=16), Mesh(data=2, fsdp=2)):
    with pytest.raises(InputError, match="does not use the 8 devices"):
        sharding.make_mesh(shape)

tree = {
    "blocks.0.attn.qkv.kernel": np.arange(8 * 12, dtype=np.float32).reshape(8, 12),
    "blocks.0.norm1.scale": np.arange(8, dtype=np.float32),
}
placed = sharding.placed(tree, sharding.shardings(tree, mesh))
kernel = placed["blocks.0.attn.qkv.kernel"]
assert {shard.data.shape for shard in kernel.addressable_shards} == {(4, 6)}
assert placed["blocks.0.norm1.scale"].is_fully_replicated
whole = sharding.everywhere(placed, mesh)
for name, x in tree.items():
    np.testing.assert_array_equal(placed[name], x)
    np.testing.assert_array_equal(whole[name], x)
    assert whole[name].is_fully_replicated

rows = {"item": np.arange(8), "photos": np.arange(8 * 3).reshape(8, 3)}
batch = sharding.from_rows(rows, mesh)
for name, x in rows.items():
    np.testing.assert_array_equal(batch[name], x)
    # Photographs go over data and fsdp; those of one tensor group have the same.
    assert [shard.data.shape[0] for shard in batch[name].addressable_shards] == [2] * 8
starts = {shard.device.id: shard.index[0].start for shard in batch["item"].addressable_shards}
assert sorted(starts.values()) == [0, 0, 2, 2, 4, 4, 6, 6]
print("as it should")
"""


def test_arrays_on_eight_devices():
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ON_EIGHT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "as it should\n", done.stderr

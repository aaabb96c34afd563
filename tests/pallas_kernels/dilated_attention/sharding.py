"""A back end's calls divided among the devices of this process; for `suite`, one of its own."""

import contextlib
import dataclasses
import functools
import importlib

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels.device import Device, assume
from tests.pallas_kernels.dilated_attention.cases import Case

MESSAGES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
CASES = (
    Case(size=(8, 8), segment=(8, 8), dtype="bfloat16", rel="float32", packed=True, head_dim=64),
    Case(size=(8, 16), segment=(8, 16), dilation=(2, 2), dtype="bfloat16", head_dim=64),
    Case(
        size=(8, 16),
        segment=(8, 16),
        dilation=(2, 2),
        offsets="per_head",
        dtype="bfloat16",
        packed=True,
        head_dim=64,
    ),
)


def check(name: str, device: Device | None) -> None:
    """Every case that the back end takes, with its gradients: no message, equal numbers."""
    backend = importlib.import_module(f"pallas_kernels.dilated_attention.{name}")
    rows = jax.device_count() // 2
    mesh = jax.make_mesh((rows, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    with assume(device) if device else contextlib.nullcontext():
        for case in CASES:
            case = dataclasses.replace(case, batch=2 * rows)
            if backend.unsupported(*case.draw(), **case.static) is None:
                _check_case(functools.partial(backend.run, **case.static), case, mesh)


def _check_case(run, case, mesh):
    def both(qkv, rel, cotangents):
        results, pull_back = jax.vjp(run, qkv, rel)
        return results, pull_back(cotangents)

    def spec(x):  # batch and heads; per_head, where a head's number matters, the batch alone
        last = x.ndim - 1
        if case.offsets == "per_head":
            return PartitionSpec(("rows", "columns"), *[None] * last)
        heads = last if x.shape == (case.batch, *case.size, case.heads) else last - 1
        middle = ["columns" if i == heads else None for i in range(1, x.ndim)]
        return PartitionSpec("rows", *middle)

    dout, dlse = case.draw_cotangents()
    arrays = (*case.draw(), (dout, dlse.astype(np.float32)))
    want = jax.jit(both)(*arrays)
    specs = jax.tree.map(spec, arrays)
    placed = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), arrays, specs)
    compiled = jax.jit(both).lower(*placed).compile()
    assert not (sent := [m for m in MESSAGES if m in compiled.as_text()]), f"{case}: {sent}"
    got = compiled(*placed)
    for x in jax.tree.leaves(got):
        assert x.addressable_shards[0].data.size * mesh.size == x.size, f"{case}: {x.sharding}"
    mapped = jax.shard_map(
        both, mesh=mesh, in_specs=specs, out_specs=jax.tree.map(spec, want), check_vma=False
    )
    for result in (got, jax.jit(mapped)(*placed)):
        for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(*(np.asarray(a).astype(float) for a in (x, y)), atol=2e-2)

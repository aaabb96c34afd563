"""Where arrays lie on the devices: one mesh, one short table.

Axes: `data`, photographs; `fsdp`, photographs too, and parts of parameters and optimizer state;
`tensor`, heads and MLP width. XLA adds the communication.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from samlight_jax.errors import InputError
from train.config import Mesh

BATCH = PartitionSpec(("data", "fsdp"))
RULES = (  # name, of the first that fits: axes of its array, from the last backwards
    (r"(attn\.qkv|[qkv]_proj|mlp\.lin1|fc1)\.kernel$", ("tensor", "fsdp")),
    (r"(attn\.proj|out_proj|mlp\.lin2|fc2)\.kernel$", ("fsdp", "tensor")),
    (r"(attn\.qkv|[qkv]_proj|mlp\.lin1|fc1)\.bias$", ("tensor",)),
    (r"(kernel|pos_embed)$", ("fsdp",)),
)


def make_mesh(shape: Mesh) -> jax.sharding.Mesh:
    """All devices of all processes.

    Raises:
      InputError: the axes do not multiply to the number of devices, or `tensor` spans processes.
    """
    devices, others = jax.device_count(), max(1, shape.fsdp * shape.tensor)
    data = devices // others if shape.data == -1 else shape.data
    if min(data, shape.fsdp, shape.tensor) < 1 or data * others != devices:
        raise InputError(
            f"mesh data={shape.data}, fsdp={shape.fsdp}, tensor={shape.tensor} does not use the "
            f"{devices} devices there are; the three must multiply to {devices}."
        )
    if jax.local_device_count() % shape.tensor:  # every process gives rows of its own
        raise InputError(
            f"mesh tensor={shape.tensor} spans processes of {jax.local_device_count()} devices; "
            "take a divisor of that."
        )
    sizes = data, shape.fsdp, shape.tensor
    return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def spec_of(name: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> PartitionSpec:
    """The table's answer for one array; an axis that a size does not divide is left whole."""
    for pattern, axes in RULES:
        if re.search(pattern, name):
            spec: list[str | None] = [None] * len(shape)
            for i, axis in enumerate(axes[: len(shape)]):
                if shape[-1 - i] % mesh.shape[axis] == 0:
                    spec[-1 - i] = axis
            return PartitionSpec(*spec)
    return PartitionSpec()


def shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """A sharding for every array of a tree; an array goes by the last name on its way.

    Optimizer state holds dicts with the parameters' names, so it lies as they do.
    """

    def one(path: tuple, x: Any) -> NamedSharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        name = next((n for n in reversed(names) if isinstance(n, str) and "." in n), "")
        return NamedSharding(mesh, spec_of(name, np.shape(x), mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Of arrays whose first axis is the batch."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def placed(tree: Any, where: Any) -> Any:
    """Host arrays, the same in every process, on the devices."""

    def one(x: Any, sharding: NamedSharding) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree, where)


def everywhere(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Whole copies on every device of every process."""
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)


def rows_of(process: int, processes: int, batch: int) -> slice:
    """The rows of a global batch that a process gives."""
    each = batch // processes
    return slice(process * each, (process + 1) * each)


def from_rows(rows: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """A process's rows as its part of global arrays."""
    where = batch_sharding(mesh)
    return {n: jax.make_array_from_process_local_data(where, x) for n, x in rows.items()}

"""How the evaluator's functions are spread over devices: one axis, photographs along it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from samlight_jax.flat import Flat, flat
from samlight_jax.sam import Sam
from samlight_jax.weights import cast


class Devices:
    """One axis of devices: models on each, everything else split along its first axis.

    Args:
      devices: to use; None, all.
    """

    def __init__(self, devices: Any = None):
        devices = jax.devices() if devices is None else devices
        self.mesh = Mesh(np.array(devices), ("data",))
        self.count, self.platform = len(devices), devices[0].platform

    def put(self, tree: Any) -> Any:
        """Host arrays (devices * n, ...) to the devices."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec("data")))

    def put_model(self, model: Sam, dtype: Any) -> Flat:
        """A model in a dtype, whole on every device."""
        return jax.device_put(flat(cast(model, dtype)), NamedSharding(self.mesh, PartitionSpec()))

    def compiled(self, function: Any, **static: Any) -> Any:
        """`function` with its first argument on every device and the others split."""
        return _compiled(self.mesh, function, **static)


@functools.lru_cache(maxsize=64)
def _compiled(mesh: Mesh, function: Any, **static: Any) -> Any:
    split = PartitionSpec("data")

    def call(models: Any, *parts: Any) -> Any:
        specs = (PartitionSpec(), *(split for _ in parts))
        models = jax.tree.map(Flat.model, models, is_leaf=lambda x: isinstance(x, Flat))
        body = functools.partial(function, **static)
        # Each device walks over its own number of rows, which the check of varying axes forbids.
        sharded = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
        return sharded(models, *parts)

    return jax.jit(call)

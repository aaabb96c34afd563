"""Makes a kernel, which JAX cannot see into, a function that maps and shards.

A mapped axis joins the batch (`custom_vmap`), and the partitioner learns which axes divide freely
(`custom_partitioning`), so that a sharded call gathers nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def opaque(kernel: Callable[..., Any], maps: int, rule: str, free: str) -> Any:
    """The kernel as JAX may use it.

    Args:
      kernel: of arrays to one array or a tuple of them; the first `maps` arguments and the results
        have the batch first, and images do not see each other.
      maps: how many; the other arguments are shared by all images.
      rule: the axes by name, "b y x c, t c -> b y x c".
      free: the axes among them that devices may divide, "b c".
    """
    operands, results = (
        [names.split() for names in side.split(", ")] for side in rule.split(" -> ")
    )
    several = len(results) > 1
    every_result = (True,) * len(results) if several else True
    divide = set(free.split())
    whole = dict.fromkeys(
        name for names in (*operands, *results) for name in names if name not in divide
    )
    kernel = jax.jit(kernel)
    sharded = custom_partitioning(kernel)

    def partition(mesh: Mesh, given: Sequence[Any], _: Any) -> Any:
        axes: dict[str, Any] = {}
        for names, x in zip(operands, given, strict=True):
            found = zip(names, x.sharding.spec, strict=False)
            axes |= {name: axis for name, axis in found if name in divide and axis is not None}

        def place(names: Sequence[str]) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*map(axes.get, names)))

        made = [place(names) for names in results]
        return mesh, kernel, tuple(made) if several else made[0], tuple(map(place, operands))

    sharded.def_partition(
        partition=partition, sharding_rule=rule, need_replication_factors=tuple(whole)
    )
    mapped = custom_vmap(sharded)

    @mapped.def_vmap
    def _fold(size: int, batched: Sequence[bool], *args: jax.Array) -> Any:
        one_by_one = any(batched[maps:])
        every = len(args) if one_by_one else maps
        full = [
            jnp.broadcast_to(x, (size, *x.shape)) if i < every and not own else x
            for i, (x, own) in enumerate(zip(args, batched, strict=True))
        ]
        if one_by_one:
            return lax.map(lambda one: mapped(*one), tuple(full)), every_result
        out = mapped(*(x.reshape(-1, *x.shape[2:]) for x in full[:maps]), *full[maps:])
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, every_result

    return mapped

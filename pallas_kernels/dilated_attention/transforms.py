"""Makes a back end's two kernels one JAX function: gradients, `vmap`, sharding under `jit`.

A kernel is opaque to JAX. Here its gradient is its other kernel (`custom_vjp`); a mapped axis joins
the batch (`custom_vmap`); and the partitioner learns that batch and heads divide freely
(`custom_partitioning`), so that a sharded call gathers nothing.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import device
from pallas_kernels.dilated_attention import groups

Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Call:
    """The static arguments of a call; hashable.

    Attributes:
      grid: how the tokens are cut.
      offsets: "all" or "per_head".
      scale: factor of the products.
      device: what the kernels run on.
    """

    grid: groups.Grid
    offsets: str
    scale: float
    device: device.Device

    @property
    def own(self) -> bool:
        """Each head attends within one residue only."""
        return self.offsets == "per_head"


Forward = Callable[[Call, Arrays, Arrays], tuple[jax.Array, jax.Array]]
Backward = Callable[..., tuple[Arrays, Arrays]]


def run_of(forward: Forward, backward: Backward) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A back end's `run`, out of its kernels.

    Args:
      forward: `(call, qkv, rel) -> out, lse`, with `qkv`, `rel` and `out` as in `reference.run`,
        and the natural log-sum-exp grouped: (b, segments, residues, n, tokens of a group) float32,
        1 residue where `call.own`.
      backward: `(call, qkv, rel, out, lse, dout, dlse) -> dqkv, drel`, shaped and typed as `qkv`
        and `rel`; `lse` and `dlse` are grouped.

    Returns:
      `run`, as `reference.run`.
    """

    @functools.cache
    def attend(call: Call) -> Any:
        @jax.custom_vjp
        def function(qkv: Arrays, rel: Arrays) -> tuple[jax.Array, jax.Array]:
            return save(qkv, rel)[0]

        def save(qkv: Arrays, rel: Arrays) -> Any:
            out, lse = _entry(forward, call)(qkv, rel)
            return (out, _ungrouped(lse, call)), (qkv, rel, out, lse)

        def pull_back(saved: Any, cotangents: tuple[jax.Array, jax.Array]) -> Any:
            dout, dlse = cotangents
            return _entry(backward, call)(*saved, dout, _grouped(dlse, call))

        function.defvjp(save, pull_back)
        return function

    def run(
        qkv: Arrays, rel: Arrays, *, grid: groups.Grid, offsets: str, scale: float
    ) -> tuple[jax.Array, jax.Array]:
        return attend(Call(grid, offsets, scale, device.current()))(qkv, rel)

    return run


def _grouped(x: jax.Array, call: Call) -> jax.Array:
    """(b, H, W, n) -> (b, segments, residues, n, tokens of a group)."""
    x = groups.group(x[..., None], call.grid)
    return (groups.take_own(x) if call.own else x)[..., 0]


def _ungrouped(x: jax.Array, call: Call) -> jax.Array:
    x = x[..., None]
    x = groups.put_own(x, call.grid, -jnp.inf) if call.own else x
    return groups.ungroup(x, call.grid)[..., 0]


@functools.cache
def _entry(kernel: Callable[..., Any], call: Call) -> Any:
    """The kernel as a function of arrays alone, the batch first in each, that maps and shards."""
    plain = jax.jit(functools.partial(kernel, call))

    # Jitted: outside of a user's own jit, the next call finds it compiled.
    @custom_vmap
    @jax.jit
    def entry(*args: Any) -> Any:
        return _sharded(plain, args, split_heads=not call.own)(*args)

    @entry.def_vmap
    def _fold(axis_size: int, in_batched: Any, *args: Any) -> Any:
        def enter(x: jax.Array, batched: bool) -> jax.Array:
            x = x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        out = entry(*jax.tree.map(enter, args, tuple(in_batched)))
        out = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return entry


def _sharded(plain: Callable[..., Any], args: Any, *, split_heads: bool) -> Any:
    """Tells the partitioner that axis 0, the batch, and axis -2, the heads, divide freely."""
    function = custom_partitioning(plain)
    numbers = itertools.count()
    whole: list[str] = []  # the factors that stay whole, in their order

    def factors(x: jax.Array) -> str:
        shared = {0: "b", x.ndim - 2: "n"} if split_heads else {0: "b"}
        fresh = {i: f"i{next(numbers)}" for i in range(x.ndim) if i not in shared}
        whole.extend(fresh.values())
        return " ".join((shared | fresh)[i] for i in range(x.ndim))

    results = jax.eval_shape(plain, *args)
    rule = " -> ".join(", ".join(map(factors, jax.tree.leaves(x))) for x in (args, results))

    def partition(mesh: Mesh, given: Any, results: Any) -> Any:
        spec = jax.tree.leaves(given)[0].sharding.spec
        batch, heads = spec[0], spec[-2] if split_heads else None

        def place(x: Any) -> NamedSharding:
            middle = [None] * (len(x.shape) - 3)
            return NamedSharding(mesh, PartitionSpec(batch, *middle, heads, None))

        return mesh, plain, *(jax.tree.map(place, x) for x in (results, given))

    function.def_partition(
        partition=partition, sharding_rule=rule, need_replication_factors=tuple(whole)
    )
    return function

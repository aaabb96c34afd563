"""The gradients of `mosaic_gpu`, in two kernels that recompute the scores (no atomics).

The first owns a tile of queries and stores, besides dq, the sums that the second needs; this owns a
tile of keys. Of a packed array both fill their part of one packed gradient.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dilated_attention.mosaic_gpu_cut import (
    ACC,
    BLOCK,
    LOG2E,
    MATRIX,
    PER_COLUMN,
    PER_ROW,
    ROWS,
    SHARED_MEMORY,
    Cut,
    Kernel,
    Pair,
    Ring,
    cut_of,
    load,
    mesh,
    params,
    spread,
    transposed,
    zeros,
)
from pallas_kernels.dilated_attention.transforms import Arrays, Call


class _Kernel(Kernel):
    """What both have in common: a unit is a tile of a pair's queries, or of its keys.

    Attributes:
      tile: tokens of a tile that streams past.
    """

    def __init__(self, cut: Cut, tile: int):
        self.tile, self.blocks, self.tiles = tile, cut.keys // BLOCK, cut.keys // tile
        self.factor = cut.call.scale * LOG2E
        super().__init__(cut, cut.pairs * self.blocks)

    def _unit(self, unit: Any) -> tuple[Pair, Any]:
        return Pair(self.cut, lax.div(unit, self.blocks)), lax.rem(unit, self.blocks)


class _Queries(_Kernel):
    """Gradients of a tile of queries: keys and values stream past."""

    def __init__(self, *refs: Any, cut: Cut, tile: int):
        *self.inputs, self.dq, self.delta, own, tiles, self.sums = refs
        self.own, self.ring = Ring(own), Ring(tiles)
        super().__init__(cut, tile)

    def load(self, step: Any, unit: Any) -> None:
        pair, block = self._unit(unit)
        q, k, v, out, dout = self.inputs[:5]
        own = pair.window(q, block, BLOCK, 0), *(pair.window(x, block, BLOCK) for x in (out, dout))
        self.own.fill(step, *own)

        @pl.loop(0, self.tiles)
        def _(i: Any) -> None:
            keys = 2 * (step * self.tiles + i)
            self.ring.fill(keys, pair.window(k, i, self.tile, 1))
            self.ring.fill(keys + 1, pair.window(v, i, self.tile, 2))

    def compute(self, step: Any, unit: Any) -> None:
        pair, block = self._unit(unit)
        half, wg = 2 * block + self.warpgroup, self.warpgroup
        lse, dlse = (
            load(pair.sums(ref, half, ROWS), PER_ROW, optimized=False) for ref in self.inputs[-2:]
        )
        self.own.wait(step)
        q, out, dout = (self.own.rows(step, wg, ref) for ref in range(3))
        products = (load(x, MATRIX).astype(jnp.float32) for x in (out, dout))
        delta = jnp.multiply(*products).sum(axis=1) - dlse
        self.sums[wg] = delta
        fold = functools.partial(self._fold, step, q, dout, lse * LOG2E, delta)
        dq = lax.fori_loop(0, self.tiles, fold, zeros(self.cut.head_dim))
        q[...] = (dq * self.cut.call.scale).astype(self.cut.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.own.box(step, wg), pair.window(self.dq, half, ROWS, 0))
        plgpu.copy_smem_to_gmem(self.sums.at[wg], pair.sums(self.delta, half, ROWS))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.own.release(step)

    def _fold(self, step: Any, q: Any, dout: Any, lse: Any, delta: Any, tile: Any, dq: Any) -> Any:
        keys = 2 * (step * self.tiles + tile)
        values = keys + 1
        self.ring.wait(keys)
        self.ring.wait(values)

        def dscores(scores: Any, dweights: Any) -> jax.Array:
            plgpu.wgmma(scores, q, transposed(self.ring.tile(keys)))
            plgpu.wgmma(dweights, dout, transposed(self.ring.tile(values)))
            s = plgpu.wgmma_accumulator_load(scores, wait_n=1)
            weights = jnp.exp2(s * self.factor - spread(lse, s))
            dw = dweights[...]
            self.ring.release(values)
            return (weights * (dw - spread(delta, dw))).astype(self.cut.dtype)

        ds = pl.run_scoped(dscores, *[ACC((ROWS, self.tile), jnp.float32)] * 2)
        dq = pl.run_state(lambda ref: plgpu.wgmma(ref, ds, self.ring.tile(keys)))(ACC.init(dq))
        self.ring.release(keys)
        return dq


class _Keys(_Kernel):
    """Gradients of a tile of keys and values: queries and what belongs to them stream past."""

    def __init__(self, *refs: Any, cut: Cut, tile: int):
        *self.inputs, self.dk, self.dv, own, tiles = refs
        self.own, self.ring = Ring(own), Ring(tiles)
        super().__init__(cut, tile)

    def load(self, step: Any, unit: Any) -> None:
        pair, block = self._unit(unit)
        q, k, v, dout, lse, delta = self.inputs
        self.own.fill(step, pair.window(k, block, BLOCK, 1), pair.window(v, block, BLOCK, 2))

        @pl.loop(0, self.tiles)
        def _(i: Any) -> None:
            tiles = pair.window(q, i, self.tile, 0), pair.window(dout, i, self.tile)
            sums = (pair.sums(x, i, self.tile) for x in (lse, delta))
            self.ring.fill(step * self.tiles + i, *tiles, *sums)

    def compute(self, step: Any, unit: Any) -> None:
        pair, block = self._unit(unit)
        half, wg = 2 * block + self.warpgroup, self.warpgroup
        self.own.wait(step)
        k, v = (self.own.rows(step, wg, ref) for ref in range(2))

        def sums(dk: Any, dv: Any) -> tuple[jax.Array, jax.Array]:
            @pl.loop(0, self.tiles)
            def _(i: Any) -> None:
                self._add(step * self.tiles + i, k, v, dk, dv)

            return dk[...], dv[...]

        shape = (ROWS, self.cut.head_dim)
        dk, dv = pl.run_scoped(sums, *[ACC(shape, jnp.float32)] * 2)
        k[...] = (dk * self.cut.call.scale).astype(self.cut.dtype)
        v[...] = dv.astype(self.cut.dtype)
        plgpu.commit_smem()
        for i, ref in enumerate((self.dk, self.dv)):
            window = pair.window(ref, half, ROWS, i + 1)
            plgpu.copy_smem_to_gmem(self.own.box(step, wg, i), window)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.own.release(step)

    def _add(self, queries: Any, k: Any, v: Any, dk: Any, dv: Any) -> None:
        """Adds a tile of queries; all is transposed, (keys, queries)."""
        self.ring.wait(queries)
        q, dout = (self.ring.tile(queries, ref) for ref in range(2))
        dtype = self.cut.dtype

        def products(scores: Any, dweights: Any) -> None:
            plgpu.wgmma(scores, k, transposed(q))
            plgpu.wgmma(dweights, v, transposed(dout))
            lse, delta = (
                load(ref.at[self.ring.at(queries)], PER_COLUMN) for ref in self.ring.refs[2:]
            )
            s = plgpu.wgmma_accumulator_load(scores, wait_n=1)
            weights = jnp.exp2(s * self.factor - spread(lse * LOG2E, s, 1))
            plgpu.wgmma(dv, weights.astype(dtype), dout)
            dw = plgpu.wgmma_accumulator_load(dweights, wait_n=1)
            plgpu.wgmma(dk, (weights * (dw - spread(delta, dw, 1))).astype(dtype), q)

        pl.run_scoped(products, *[ACC((ROWS, self.tile), jnp.float32)] * 2)
        plgpu.wgmma_wait(0)
        self.ring.release(queries)


def backward(
    call: Call,
    qkv: Arrays,
    rel: Arrays,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
) -> tuple[Arrays, Arrays]:
    """The gradients of `qkv`; see `transforms.run_of`."""
    cut = cut_of(call, qkv)
    views = [cut.view(x) for x in (qkv if len(qkv) == 3 else qkv * 3)]
    out, dout = cut.view(out), cut.view(dout)
    lse, dlse = (x.reshape(cut.sums().shape) for x in (lse, dlse))
    dq, delta = _dq(cut, *views, out, dout, lse, dlse)
    gradients = _dkv(cut, dq if len(qkv) == 1 else None, *views, dout, lse, delta)
    gradients = gradients if len(qkv) == 1 else (dq, *gradients)
    return tuple(x.reshape(y.shape) for x, y in zip(gradients, qkv, strict=True)), ()


def _slots(cut: Cut, own: int, tile: int, tiles: int) -> int:
    """As many as there is room for beside `own` tiles of `BLOCK`."""
    row = cut.head_dim * 2
    return (SHARED_MEMORY - own * BLOCK * row) // (tiles * tile * (row + 4))


def _dq(cut: Cut, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q's gradient, or a packed one with q's part alone filled; the rows' sums."""
    tile = 128 if cut.head_dim == 64 else 64  # as many as registers hold without spilling
    scratch = [cut.ring(1, BLOCK, 3), cut.ring(_slots(cut, 3, tile, 1), tile)]
    return plgpu.kernel(
        lambda *refs: _Queries(*refs, cut=cut, tile=tile).run(),
        out_type=[jax.ShapeDtypeStruct(inputs[0].shape, cut.dtype), cut.sums()],
        scratch_types=[*scratch, plgpu.SMEM((2, ROWS), jnp.float32)],
        compiler_params=params(),
        **mesh(cut.pairs * cut.keys // BLOCK),
    )(*inputs)


def _dkv(cut: Cut, packed: jax.Array | None, *inputs: jax.Array) -> Arrays:
    """The gradients of k and v, or `packed` with them filled in."""
    tile = 64
    scratch = [cut.ring(1, BLOCK, 2), cut.ring(_slots(cut, 2, tile, 2), tile, 2, 2)]
    units = cut.pairs * cut.keys // BLOCK

    def body(*refs: Any) -> None:
        _Keys(*refs, cut=cut, tile=tile).run()

    if packed is None:
        shape = jax.ShapeDtypeStruct(inputs[0].shape, cut.dtype)
        return plgpu.kernel(
            body,
            out_type=[shape, shape],
            scratch_types=scratch,
            compiler_params=params(),
            **mesh(units),
        )(*inputs)

    def scoped(*refs: Any) -> None:
        run = functools.partial(body, *refs, refs[-1])  # both gradients are of one array
        pl.run_scoped(run, *scratch, collective_axes="warpgroup")

    # A ref is written where it lies; `plgpu.kernel` has no such argument.
    ref = jax.new_ref(packed)
    fill: Any = pl.kernel(scoped, (), mesh=plgpu.Mesh(**mesh(units)), compiler_params=params())
    fill(*inputs, ref)
    return (jax.freeze(ref),)

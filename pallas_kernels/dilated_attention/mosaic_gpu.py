"""Dilated attention through Pallas's Mosaic GPU back end (Hopper): wgmma, fed by the TMA.

Programs stay on their multiprocessor and take one unit of work after another, so that tiles of the
next are loaded while this one computes. Two kernels share the calls: up to 256 keys, all keys and
values of a group stay in shared memory, and the softmax sees a whole row at once; beyond, they
stream past in tiles (FlashAttention-3, arXiv 2407.08608), and the two computing warpgroups take
turns: one multiplies while the other exponentiates.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import device
from pallas_kernels.dilated_attention import groups, mosaic_gpu_backward, transforms
from pallas_kernels.dilated_attention.mosaic_gpu_cut import (
    ACC,
    BLOCK,
    LOG2E,
    PER_ROW,
    PROGRAMS,
    ROWS,
    SHARED_MEMORY,
    Cut,
    Kernel,
    Pair,
    Ring,
    cut_of,
    mesh,
    params,
    spread,
    transposed,
    zeros,
)
from pallas_kernels.dilated_attention.transforms import Arrays, Call

NAME = "mosaic_gpu"
RESIDENT = 2 * BLOCK  # the most keys whose scores fit in registers at once


def unsupported(
    qkv: Arrays, rel: Arrays, *, grid: groups.Grid, offsets: str, scale: float
) -> str | None:
    """One sentence that says why `run` would not do, or None."""
    here = device.current()
    if here.platform != "gpu" or here.capability is None:
        return f"needs an NVIDIA GPU, but the device is {here.kind!r} ({here.platform})."
    if here.capability != (9, 0):
        return f"needs compute capability 9.0 (Hopper), but {here.kind!r} has {here.capability}."
    if here.interpret:
        return "is compiled alone, since Mosaic GPU's interpreter lacks what the kernels use."
    if qkv[0].dtype not in (jnp.float16, jnp.bfloat16):
        return f"takes float16 and bfloat16, but {qkv[0].dtype=}."
    if qkv[0].shape[-1] not in (64, 128):
        return f"takes a head_dim of 64 or 128, but head_dim={qkv[0].shape[-1]}."
    if rel:
        return "takes no relative positions, but rel_h and rel_w are given."
    if offsets != "all":
        return f"takes offsets='all', but {offsets=}."
    if scale <= 0:
        return f"takes a positive scale, but {scale=}."
    return _unsupported_grid(grid)


def _unsupported_grid(grid: groups.Grid) -> str | None:
    if grid.size != grid.padded:
        return f"takes whole segments, but {grid.segment=} does not divide {grid.size=}."
    columns, keys = grid.group[1], grid.keys
    if columns % 8 or (ROWS % columns and columns % BLOCK):
        return f"takes groups 8, 16, 32, 64 or a multiple of {BLOCK} wide, but {grid.group=}."
    if keys % BLOCK:
        return f"takes a multiple of {BLOCK} tokens a group, but {grid.group=} has {keys}."
    return None


class _Resident(Kernel):
    """Some of a pair's queries and all its keys and values: for up to `RESIDENT` keys."""

    def __init__(self, *refs: Any, cut: Cut, tiles: int):
        *self.inputs, self.out, self.lse, ring, self.sums = refs
        self.ring, self.tiles = Ring(ring), tiles
        self.parts = cut.keys // (tiles * BLOCK)
        keys = range(cut.keys // BLOCK)
        # What fills the ring for one unit: the first queries, the keys, the values, the rest.
        self.order = [(0, 0), *((1, i) for i in keys), *((2, i) for i in keys)]
        self.order += [(0, i) for i in range(1, tiles)]
        super().__init__(cut, cut.pairs * self.parts)

    def _unit(self, unit: Any) -> tuple[Pair, Any]:
        """The pair, and the first of the tiles of queries."""
        return Pair(self.cut, lax.div(unit, self.parts)), lax.rem(unit, self.parts) * self.tiles

    def _at(self, step: Any, which: int, tile: int) -> Any:
        return step * len(self.order) + self.order.index((which, tile))

    def load(self, step: Any, unit: Any) -> None:
        pair, first = self._unit(unit)
        for which, tile in self.order:
            source = pair.window(self.inputs[which], tile if which else first + tile, BLOCK, which)
            self.ring.fill(self._at(step, which, tile), source)

    def compute(self, step: Any, unit: Any) -> None:
        pair, first = self._unit(unit)
        for tile in range(self.tiles):
            self._attend(step, tile)
            self._store(pair, first + tile, self._at(step, 0, tile))

    def _slots(self, step: Any, which: int) -> list[Any]:
        return [self._at(step, which, tile) for tile in range(self.cut.keys // BLOCK)]

    def _attend(self, step: Any, tile: int) -> None:
        """Output over the queries in the ring, log-sum-exp to `sums`."""
        queries, cut = self._at(step, 0, tile), self.cut
        self.ring.wait(queries)
        scores = self._scores(step, queries, wait=tile == 0)
        if tile == self.tiles - 1:
            for slot in self._slots(step, 1):
                self.ring.release(slot)
        factor = cut.call.scale * LOG2E
        top = functools.reduce(jnp.maximum, [x.max(axis=1) for x in scores]) * factor
        weights = jnp.exp2(scores[0] * factor - spread(top, scores[0]))

        def values(refs: Any) -> None:
            sums, total = refs
            p = weights
            for i, slot in enumerate(self._slots(step, 2)):
                if tile == 0:
                    self.ring.wait(slot)
                plgpu.wgmma(sums, p.astype(cut.dtype), self.ring.tile(slot))
                if i + 1 < len(scores):  # while the product runs
                    p = jnp.exp2(scores[i + 1] * factor - spread(top, scores[0]))
                    total[...] += p.sum(axis=1)

        start = ACC.init(zeros(cut.head_dim)), weights.sum(axis=1)
        out, total = pl.run_state(values)(start)
        if tile == self.tiles - 1:
            for slot in self._slots(step, 2):
                self.ring.release(slot)
        out = out * spread(1.0 / total, out)
        self.ring.rows(queries, self.warpgroup)[...] = out.astype(cut.dtype)
        self.sums[self.warpgroup] = (top + jnp.log2(total)) / LOG2E

    def _scores(self, step: Any, queries: Any, *, wait: bool) -> list[jax.Array]:
        q, slots = self.ring.rows(queries, self.warpgroup), self._slots(step, 1)

        def products(*sums: Any) -> list[jax.Array]:
            for slot, x in zip(slots, sums, strict=True):
                if wait:
                    self.ring.wait(slot)
                plgpu.wgmma(x, q, transposed(self.ring.tile(slot)))
            return [x[...] for x in sums]

        return pl.run_scoped(products, *[ACC((ROWS, BLOCK), jnp.float32)] * len(slots))

    def _store(self, pair: Pair, tile: Any, slot: Any) -> None:
        half, wg = 2 * tile + self.warpgroup, self.warpgroup
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.ring.box(slot, wg), pair.window(self.out, half, ROWS))
        plgpu.copy_smem_to_gmem(self.sums.at[wg], pair.sums(self.lse, half, ROWS))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.ring.release(slot)


class _Streamed(Kernel):
    """One tile of a pair's queries; keys and values stream past."""

    def __init__(self, *refs: Any, cut: Cut):
        *self.inputs, self.out, self.lse, queries, tiles, self.sums, self.turn = refs
        self.queries, self.ring = Ring(queries), Ring(tiles)
        self.tiles = cut.keys // BLOCK
        super().__init__(cut, cut.pairs * self.tiles)

    def _unit(self, unit: Any) -> tuple[Pair, Any]:
        return Pair(self.cut, lax.div(unit, self.tiles)), lax.rem(unit, self.tiles)

    def _at(self, step: Any, tile: Any) -> tuple[Any, Any]:
        """The fillings with a tile of keys and of values."""
        position = 2 * (step * self.tiles + tile)
        return position, position + 1

    def load(self, step: Any, unit: Any) -> None:
        pair, tile = self._unit(unit)
        q, k, v = self.inputs
        self.queries.fill(step, pair.window(q, tile, BLOCK, 0))

        @pl.loop(0, self.tiles)
        def _(i: Any) -> None:
            keys, values = self._at(step, i)
            self.ring.fill(keys, pair.window(k, i, BLOCK, 1))
            self.ring.fill(values, pair.window(v, i, BLOCK, 2))

    # The turns: warpgroup 1 gives the first to 0, which gives one back after its last.

    def begin(self) -> None:
        pl.when(self.warpgroup == 1)(self._pass_on)

    def end(self) -> None:
        pl.when(self.warpgroup == 0)(self._pass_on)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _pass_on(self) -> None:
        plgpu.barrier_arrive(self.turn)
        plgpu.barrier_wait(self.turn)

    def compute(self, step: Any, unit: Any) -> None:
        self.queries.wait(step)
        start = (
            zeros(self.cut.head_dim),
            plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), PER_ROW),
            plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), PER_ROW),
        )
        fold = functools.partial(self._fold, step)
        out, top, total = lax.fori_loop(0, self.tiles, fold, start)
        out = out * spread(1.0 / total, out)
        self.queries.rows(step, self.warpgroup)[...] = out.astype(self.cut.dtype)
        self.sums[self.warpgroup] = (top + jnp.log2(total)) / LOG2E
        self._store(step, unit)

    def _fold(self, step: Any, tile: Any, carry: Any) -> Any:
        """Adds a tile of keys to the sums: of values, the maximum, of weights."""
        out, top, total = carry
        keys, values = self._at(step, tile)
        scores = self._scores(step, keys)

        @pl.when((tile == 0) & (step > 0))
        def _() -> None:  # the unit before is stored: the loader may overwrite it
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.queries.release(step - 1)

        factor = self.cut.call.scale * LOG2E
        new_top = jnp.maximum(top, scores.max(axis=1) * factor)
        fade = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores * factor - spread(new_top, scores))
        total = total * fade + weights.sum(axis=1)
        out, weights = out * spread(fade, out), weights.astype(self.cut.dtype)
        # Else the compiler moves some of this behind the turn.
        out, top, total, weights = lax.optimization_barrier((out, new_top, total, weights))
        plgpu.barrier_arrive(self.turn)
        self.ring.wait(values)
        plgpu.barrier_wait(self.turn)
        out = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, self.ring.tile(values)))(
            ACC.init(out)
        )
        self.ring.release(values)
        return out, top, total

    def _scores(self, step: Any, keys: Any) -> jax.Array:
        q = self.queries.rows(step, self.warpgroup)
        self.ring.wait(keys)

        def product(ref: Any) -> jax.Array:
            plgpu.wgmma(ref, q, transposed(self.ring.tile(keys)))
            self._pass_on()
            return ref[...]

        scores = pl.run_scoped(product, ACC((ROWS, BLOCK), jnp.float32))
        self.ring.release(keys)
        return scores

    def _store(self, step: Any, unit: Any) -> None:
        pair, tile = self._unit(unit)
        half, wg = 2 * tile + self.warpgroup, self.warpgroup
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.queries.box(step, wg), pair.window(self.out, half, ROWS))
        plgpu.copy_smem_to_gmem(self.sums.at[wg], pair.sums(self.lse, half, ROWS))


def forward(call: Call, qkv: Arrays, rel: Arrays) -> tuple[jax.Array, jax.Array]:
    """The output and the grouped log-sum-exp; see `transforms.run_of`."""
    cut = cut_of(call, qkv)
    inputs = [cut.view(x) for x in (qkv if len(qkv) == 3 else qkv * 3)]
    out = jax.ShapeDtypeStruct((*qkv[0].shape[:3], cut.heads, cut.head_dim), cut.dtype)
    blocks = cut.keys // BLOCK
    slots = SHARED_MEMORY // (BLOCK * cut.head_dim * 2)
    sums = plgpu.SMEM((2, ROWS), jnp.float32)
    if cut.keys <= RESIDENT:
        # With fewer pairs than multiprocessors, one pair's queries go to several.
        tiles = blocks if cut.pairs >= PROGRAMS else 1
        body = functools.partial(_Resident, cut=cut, tiles=tiles)
        units, scratch = cut.pairs * blocks // tiles, [cut.ring(slots, BLOCK), sums]
    else:
        body = functools.partial(_Streamed, cut=cut)
        rings = [cut.ring(2, BLOCK), cut.ring(slots - 2, BLOCK)]
        units, scratch = cut.pairs * blocks, [*rings, sums, plgpu.Barrier(num_arrivals=2)]
    result, lse = plgpu.kernel(
        lambda *refs: body(*refs).run(),
        out_type=[cut.view(out), cut.sums()],
        scratch_types=scratch,
        compiler_params=params(barriers=cut.keys <= RESIDENT),
        **mesh(units),
    )(*inputs)
    return result.reshape(out.shape), lse.reshape(cut.grouped())


run = transforms.run_of(forward, mosaic_gpu_backward.backward)

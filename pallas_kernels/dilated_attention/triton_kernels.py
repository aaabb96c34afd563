"""The bodies of the Pallas-Triton kernels; `triton` calls them.

A program owns a tile of one group and head. Token `i` of a group has its place on the map by a
division and a remainder, so every tile is read where it lies, through one pointer a token; nothing
is gathered beforehand, and a group of any size is masked at its end. The backward pass recomputes
the scores from the log-sum-exp (FlashAttention-2, arXiv 2307.08691), in two kernels without
atomics: the same bits every run.
"""

import dataclasses
import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.dilated_attention.transforms import Call
from pallas_kernels.tiles import Tiles

with warnings.catch_warnings():  # JAX 0.11 announces the end of this back end at its import
    warnings.simplefilter("ignore", DeprecationWarning)
    try:
        from jax.experimental.pallas import triton as plt
    except ImportError:
        plt: Any = None

LOG2E = math.log2(math.e)
LOWEST = -1e30  # of a maximum before its first key: finite, since -inf less -inf is NaN


def dot(x: jax.Array, y: jax.Array, interpret: bool) -> jax.Array:
    """A product with float32 sums; float32's own on tensor cores, where it takes three of TF32."""
    precision = None
    if x.dtype == jnp.float32:
        precision = "highest" if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return jnp.dot(x, y, preferred_element_type=jnp.float32, precision=precision)


@dataclasses.dataclass(frozen=True)
class Cut:
    """One kernel's view of a call: which program does what, where a group's tokens lie.

    Attributes:
      call: the static arguments.
      heads: n.
      head_dim: d.
      dtype: of q, k and v.
      rel: with relative positions.
      tiles: the sizes.
    """

    call: Call
    heads: int
    head_dim: int
    dtype: Any
    rel: bool
    tiles: Tiles

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """(start, size) of the powers of two that make up the head; 80 is 64 and 16."""
        bits = [1 << i for i in reversed(range(8)) if self.head_dim >> i & 1]
        return tuple((sum(bits[:i]), size) for i, size in enumerate(bits))

    def programs(self, batch: int, block: int) -> int:
        """How many tiles of `block` tokens there are."""
        grid = self.call.grid
        groups = batch * math.prod(grid.segments) * grid.residues
        return groups * self.heads * pl.cdiv(grid.keys, block)

    def place(self, program: Any, block: int) -> tuple[Any, Any, Any, Any, Any]:
        """(batch, segment, residue, head, tile) of a program; tiles of a group are neighbours."""
        grid = self.call.grid
        rest, tile = div_rem(program, pl.cdiv(grid.keys, block))
        rest, head = div_rem(rest, self.heads)
        rest, residue = div_rem(rest, grid.residues)
        batch, segment = div_rem(rest, math.prod(grid.segments))
        return batch, segment, residue, head, tile

    def tokens(self, segment: Any, residue: Any, index: jax.Array) -> tuple[jax.Array, Any]:
        """(flat position on the map, whether it is a real token) of a group's tokens."""
        grid = self.call.grid
        sy, sx = div_rem(segment, grid.segments[1])
        ry, rx = div_rem(residue, grid.dilation[1])
        row, column = div_rem(index, grid.group[1])
        y = sy * grid.segment[0] + ry + row * grid.dilation[0]
        x = sx * grid.segment[1] + rx + column * grid.dilation[1]
        real = index < grid.keys
        if grid.size != grid.padded:
            real &= (y < grid.size[0]) & (x < grid.size[1])
        return y * grid.size[1] + x, real

    def masked(self, block: int) -> bool:
        """Whether some tile of `block` tokens holds what is none."""
        grid = self.call.grid
        return grid.keys % block != 0 or grid.size != grid.padded


def div_rem(x: Any, by: int) -> tuple[Any, Any]:
    """Quotient and remainder of numbers that are not negative; `//` would treat the sign."""
    if by == 1:
        return x, jnp.zeros_like(x)
    return lax.div(x, jnp.full_like(x, by)), lax.rem(x, jnp.full_like(x, by))


class _Tile:
    """Tokens of one group, `block` of them from `start`.

    Attributes:
      index: (block,), place in the group.
      at: (block,), flat position on the map.
      real: (block,), neither beyond the group nor padding of the map; None where `masked` is False.
    """

    def __init__(self, cut: Cut, segment: Any, residue: Any, start: Any, block: int, masked: bool):
        self.cut, self.start = cut, start
        self.index = start + lax.iota(jnp.int32, block)
        self.at, real = cut.tokens(segment, residue, self.index)
        if masked:  # never where another token lies: Pallas's interpreter writes that back
            self.at = jnp.where(real, self.at, math.prod(cut.call.grid.size))
        self.real = real if masked else None
        self.inside = self.index < cut.call.grid.keys if masked else None

    def load(self, ref: Any, slot: int) -> list[jax.Array]:
        """(block, size) of q, k, v, an output or a gradient, for each part of the head."""
        parts = []
        for part in self.cut.parts:
            at, columns, mask = self._pairs(part[0] + lax.iota(jnp.int32, part[1]))
            parts.append(plt.load(ref.at[at, slot, columns], mask=mask, other=_zero(mask)))
        return parts

    def store(self, ref: Any, slot: int, parts: list[jax.Array]) -> None:
        """Undoes `load`."""
        for part, x in zip(self.cut.parts, parts, strict=True):
            at, columns, mask = self._pairs(part[0] + lax.iota(jnp.int32, part[1]))
            plt.store(ref.at[at, slot, columns], x.astype(ref.dtype), mask=mask)

    def load_sums(self, ref: Any) -> jax.Array:
        """(block,) of a grouped row, as the log-sum-exp is kept."""
        return plt.load(ref.at[self.index], mask=self.inside, other=_zero(self.inside))

    def store_sums(self, ref: Any, x: jax.Array) -> None:
        """Undoes `load_sums`."""
        plt.store(ref.at[self.index], x, mask=self.inside)

    def load_relative(self, ref: Any, of_key: jax.Array, transposed: bool = False) -> jax.Array:
        """Relative terms of these queries by the keys' rows or columns, float32.

        Args:
          ref: (tokens, rows or columns of keys).
          of_key: (keys,) of them, or one number.
          transposed: gives (keys, block) for (block, keys); one number gives (block,).
        """
        at, of_key, mask = self._pairs(of_key, transposed)
        return plt.load(ref.at[at, of_key], mask=mask, other=_zero(mask)).astype(jnp.float32)

    def store_relative(self, ref: Any, of_key: jax.Array, x: jax.Array) -> None:
        """Undoes `load_relative`, leaving out what `of_key` names beyond the last."""
        at, of_key, mask = self._pairs(of_key)
        inside = of_key < ref.shape[-1] if of_key.ndim else None
        mask = inside if mask is None else mask if inside is None else mask & inside
        plt.store(ref.at[at, of_key], x.astype(ref.dtype), mask=mask)

    def _pairs(self, of_key: jax.Array, transposed: bool = False) -> Any:
        if of_key.ndim == 0:
            return self.at, of_key, self.real
        sizes = self.at.shape[0], of_key.shape[0]
        shape = sizes[::-1] if transposed else sizes

        def spread(x: jax.Array, axis: int) -> jax.Array:
            return lax.broadcast_in_dim(x, shape, (1 - axis if transposed else axis,))

        mask = None if self.real is None else spread(self.real, 0)
        return spread(self.at, 0), spread(of_key, 1), mask


def _zero(mask: Any) -> float | None:
    return None if mask is None else 0.0


class _Program:
    """One program's place: its group, its head and its tile of `block` tokens."""

    def __init__(self, cut: Cut, block: int):
        self.cut = cut
        _, self.segment, self.residue, self.head, tile = cut.place(pl.program_id(0), block)
        self.mine = self.tile(tile * block, block, cut.masked(block))

    def tile(self, start: Any, block: int, masked: bool) -> _Tile:
        """Other tokens of the same group."""
        return _Tile(self.cut, self.segment, self.residue, start, block, masked)

    def run(self, attend: Any, nothing: Any) -> None:
        """Runs `attend`, or `nothing` where the head does not attend within this residue."""
        residues = self.cut.call.grid.residues
        if not self.cut.call.own or residues == 1:
            attend()
            return
        own = self.residue == div_rem(self.head, residues)[1]
        pl.when(own)(attend)
        pl.when(jnp.logical_not(own))(nothing)

    def fold(self, block: int, step: Any, carry: Any) -> Any:
        """Folds `step(tile, carry)` over the group's tiles; masked are only those that need it."""
        grid = self.cut.call.grid
        ragged = grid.size != grid.padded
        whole, rest = divmod(grid.keys, block)
        carry = lax.fori_loop(
            0, whole, lambda i, c: step(self.tile(i * block, block, ragged), c), carry
        )
        return step(self.tile(whole * block, block, True), carry) if rest else carry


def _dot(x: jax.Array, y: jax.Array, cut: Cut) -> jax.Array:
    return dot(x, y, cut.call.device.interpret)


def _over_parts(x: list[jax.Array], y: list[jax.Array], cut: Cut) -> jax.Array:
    """Products x @ y.T, summed over the parts of the head."""
    return functools.reduce(jnp.add, (_dot(a, b.T, cut) for a, b in zip(x, y, strict=True)))


def _add_product(sums: Any, weights: jax.Array, parts: list[jax.Array], cut: Cut) -> Any:
    weights = weights.astype(cut.dtype)
    return [a + _dot(weights, b, cut) for a, b in zip(sums, parts, strict=True)]


def _zeros(rows: int, cut: Cut) -> list[jax.Array]:
    return [jnp.zeros((rows, size), jnp.float32) for _, size in cut.parts]


class _Relative:
    """The relative terms of a tile of queries, and their gradients; nothing where `refs` is ().

    Where a tile of keys is one row of the group (SAM's global blocks), the column term is the same
    for every tile and the row term is one number a query; else both are looked up a score.
    """

    def __init__(self, refs: Any, queries: _Tile, transposed: bool = False):
        self.refs, self.queries, self.transposed = refs, queries, transposed
        self.rows, self.columns = queries.cut.call.grid.group
        self.by_row = self.columns == queries.cut.tiles.block_k
        if refs and self.by_row:
            self.column_term = self._look_up(1, lax.iota(jnp.int32, self.columns))

    def _look_up(self, which: int, of_key: jax.Array) -> jax.Array:
        return self.queries.load_relative(self.refs[which], of_key, self.transposed)

    def add(self, scores: jax.Array, keys: _Tile) -> jax.Array:
        """(queries, keys) or transposed `scores`, in the units of `exp2`, with both terms."""
        if not self.refs:
            return scores
        if self.by_row:
            row_term = self._look_up(0, self._row(keys))
            row_term = row_term[None] if self.transposed else row_term[:, None]
            return scores + LOG2E * (row_term + self.column_term)
        row, column = div_rem(keys.index, self.columns)
        row = jnp.minimum(row, self.rows - 1)  # a last tile may go on beyond the last row
        return scores + LOG2E * (self._look_up(0, row) + self._look_up(1, column))

    def _row(self, keys: _Tile) -> jax.Array:
        return div_rem(jnp.asarray(keys.start, jnp.int32), self.columns)[0]

    def zeros(self) -> list[jax.Array]:
        """The sums that `grow` adds to: of columns, and of rows unless `grow` stores them."""
        if not self.refs:
            return []
        widths = (self.columns,) if self.by_row else (self.rows, self.columns)
        block = self.queries.at.shape[0]
        # 16 is the least that a product takes.
        sizes = [max(16, pl.next_power_of_2(width)) for width in widths]
        return [jnp.zeros((block, size), jnp.float32) for size in sizes]

    def grow(self, sums: list[jax.Array], dscores: jax.Array, keys: _Tile, refs: Any) -> Any:
        """Adds one tile of keys to the gradients' sums; rows that are complete are stored."""
        if not self.refs:
            return sums
        if self.by_row:
            self.queries.store_relative(refs[0], self._row(keys), dscores.sum(1))
            return [sums[0] + dscores]
        # Summed by a product with 0 and 1; a narrow dtype holds a float32 in two numbers.
        of_key = div_rem(keys.index, self.columns)
        cut, dtype = self.queries.cut, self.queries.cut.dtype
        numbers = [dscores.astype(dtype)]
        if dtype != jnp.float32:
            numbers.append((dscores - numbers[0].astype(jnp.float32)).astype(dtype))
        grown = []
        for total, i in zip(sums, of_key, strict=True):
            shape = (i.shape[0], total.shape[1])
            number = lax.broadcasted_iota(jnp.int32, shape, 1)
            same = (lax.broadcast_in_dim(i, shape, (0,)) == number).astype(dtype)
            grown.append(functools.reduce(jnp.add, (_dot(x, same, cut) for x in numbers), total))
        return grown

    def store(self, refs: Any, sums: list[jax.Array]) -> None:
        """Stores the gradients."""
        for ref, x in zip(refs[-len(sums) :] if sums else (), sums, strict=True):
            self.queries.store_relative(ref, lax.iota(jnp.int32, x.shape[1]), x)

    def store_zeros(self, refs: Any) -> None:
        """Stores gradients of 0."""
        for ref in refs:
            width = pl.next_power_of_2(ref.shape[-1])
            zeros = jnp.zeros((self.queries.at.shape[0], width), jnp.float32)
            self.queries.store_relative(ref, lax.iota(jnp.int32, width), zeros)


def _scores(q: Any, k: Any, relative: _Relative, keys: _Tile) -> jax.Array:
    """(queries, keys), times the scale, in the units of `exp2`; -inf for keys that are none."""
    scores = relative.add(_over_parts(q, k, keys.cut) * (keys.cut.call.scale * LOG2E), keys)
    return scores if keys.real is None else jnp.where(keys.real[None], scores, -jnp.inf)


def forward_kernel(*refs: Any, cut: Cut, slots: tuple[int, int, int]) -> None:
    """Refs: q, k, v, [rel_h, rel_w]; output, log-sum-exp. `slots`: where q, k, v lie in theirs."""
    (q_ref, k_ref, v_ref), (out_ref, lse_ref), rel_refs = refs[:3], refs[-2:], refs[3:-2]
    program = _Program(cut, cut.tiles.block_q)
    mine = program.mine

    def attend() -> None:
        q = mine.load(q_ref, slots[0])
        relative = _Relative(rel_refs, mine)

        def step(keys: _Tile, carry: Any) -> Any:
            top, total, sums = carry
            scores = _scores(q, keys.load(k_ref, slots[1]), relative, keys)
            new_top = jnp.maximum(top, scores.max(1))
            weights = jnp.exp2(scores - new_top[:, None])
            fade = jnp.exp2(top - new_top)
            sums = [x * fade[:, None] for x in sums]
            sums = _add_product(sums, weights, keys.load(v_ref, slots[2]), cut)
            return new_top, total * fade + weights.sum(1), sums

        rows = cut.tiles.block_q
        start = jnp.full((rows,), LOWEST, jnp.float32), jnp.zeros((rows,), jnp.float32)
        top, total, sums = program.fold(cut.tiles.block_k, step, (*start, _zeros(rows, cut)))
        nothing = total == 0  # every key at -inf
        inverse = 1 / jnp.where(nothing, 1.0, total)
        mine.store(out_ref, 0, [x * inverse[:, None] for x in sums])
        lse = (top + jnp.log2(jnp.where(nothing, 1.0, total))) / LOG2E
        mine.store_sums(lse_ref, jnp.where(nothing, -jnp.inf, lse))

    program.run(attend, lambda: mine.store(out_ref, 0, _zeros(cut.tiles.block_q, cut)))


def _weights(scores: jax.Array, lse: jax.Array) -> jax.Array:
    """exp(scores - lse) of scores in the units of `exp2`; 0 in a row of -inf."""
    return jnp.exp2(scores - jnp.where(lse == -jnp.inf, 0.0, lse) * LOG2E)


def dq_kernel(*refs: Any, cut: Cut, slots: tuple[int, int, int], rels: int) -> None:
    """Refs: q, k, v, [rel_h, rel_w], out, lse, dout, dlse; dq, delta, [drel_h, drel_w]."""
    (q_ref, k_ref, v_ref), rel_refs, rest = refs[:3], refs[3 : 3 + rels], refs[3 + rels :]
    out_ref, lse_ref, dout_ref, dlse_ref, dq_ref, delta_ref, *drel_refs = rest
    program = _Program(cut, cut.tiles.block_q)
    mine = program.mine
    relative = _Relative(rel_refs, mine)

    def attend() -> None:
        q, dout = mine.load(q_ref, slots[0]), mine.load(dout_ref, 0)
        products = (
            (a.astype(jnp.float32) * b.astype(jnp.float32)).sum(1)
            for a, b in zip(dout, mine.load(out_ref, 0), strict=True)
        )
        delta = functools.reduce(jnp.add, products) - mine.load_sums(dlse_ref)
        mine.store_sums(delta_ref, delta)
        lse = mine.load_sums(lse_ref)

        def step(keys: _Tile, carry: Any) -> Any:
            sums, rel_sums = carry
            k = keys.load(k_ref, slots[1])
            weights = _weights(_scores(q, k, relative, keys), lse[:, None])
            dweights = _over_parts(dout, keys.load(v_ref, slots[2]), cut)
            dscores = weights * (dweights - delta[:, None])
            rel_sums = relative.grow(rel_sums, dscores, keys, drel_refs)
            return _add_product(sums, dscores, k, cut), rel_sums

        start = _zeros(cut.tiles.block_q, cut), relative.zeros()
        sums, rel_sums = program.fold(cut.tiles.block_k, step, start)
        mine.store(dq_ref, 0, [x * cut.call.scale for x in sums])
        relative.store(drel_refs, rel_sums)

    def nothing() -> None:
        mine.store(dq_ref, 0, _zeros(cut.tiles.block_q, cut))
        relative.store_zeros(drel_refs)

    program.run(attend, nothing)


def dkv_kernel(*refs: Any, cut: Cut, slots: tuple[int, int, int], rels: int) -> None:
    """Refs: q, k, v, [rel_h, rel_w], lse, dout, delta; dk and dv, or the packed gradient twice."""
    (q_ref, k_ref, v_ref), rel_refs, rest = refs[:3], refs[3 : 3 + rels], refs[3 + rels :]
    lse_ref, dout_ref, delta_ref, *outs = rest
    # Two gradients; or the packed one, once as an input, to be written where it lies.
    (dk_ref, dv_ref), packed = (outs[-1:] * 2, True) if slots[1] else (outs, False)
    program = _Program(cut, cut.tiles.block_k)
    mine = program.mine

    def store(dk: list[jax.Array], dv: list[jax.Array]) -> None:
        mine.store(dk_ref, slots[1] if packed else 0, dk)
        mine.store(dv_ref, slots[2] if packed else 0, dv)

    def attend() -> None:
        k, v = mine.load(k_ref, slots[1]), mine.load(v_ref, slots[2])

        # Transposed, (keys, queries): so both products take their left side from registers.
        # Queries that are none are 0, and so are their dout and delta: they add 0.
        def step(queries: _Tile, carry: Any) -> Any:
            dk, dv = carry
            q, dout = queries.load(q_ref, slots[0]), queries.load(dout_ref, 0)
            scores = _over_parts(k, q, cut) * (cut.call.scale * LOG2E)
            scores = _Relative(rel_refs, queries, transposed=True).add(scores, mine)
            weights = _weights(scores, queries.load_sums(lse_ref)[None])
            dv = _add_product(dv, weights, dout, cut)
            dweights = _over_parts(v, dout, cut)
            dscores = weights * (dweights - queries.load_sums(delta_ref)[None])
            return _add_product(dk, dscores, q, cut), dv

        zeros = _zeros(cut.tiles.block_k, cut)
        dk, dv = program.fold(cut.tiles.block_q, step, (zeros, zeros))
        store([x * cut.call.scale for x in dk], dv)

    zeros = _zeros(cut.tiles.block_k, cut)
    program.run(attend, lambda: store(zeros, zeros))

"""What the Mosaic GPU kernels share: where a group's tokens lie, and how warpgroups pass tiles on.

Seen as (b H / rh, rh W / rw, rw n d), a map holds each group of each head as one box, which the
Tensor Memory Accelerator copies to shared memory by itself. One warpgroup does nothing but ask for
such copies; two compute.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dilated_attention.transforms import Arrays, Call

JAX_0_10 = jax.__version_info__ < (0, 11)
LOG2E = math.log2(math.e)
BLOCK = 128  # tokens that a program owns: 64, wgmma's rows, for each computing warpgroup
ROWS = 64
SHARED_MEMORY = 227 * 1024 - 2048  # of one program, less what barriers and sums take
PROGRAMS = 132  # an H200's multiprocessors; each holds one program
ACC: Any = plgpu.ACC  # type: ignore[attr-defined]  # registers that wgmma adds to
MATRIX = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Cut:
    """One kernel's view of a call.

    Attributes:
      call: the static arguments.
      batch: b.
      heads: n.
      head_dim: d.
      dtype: of q, k and v.
    """

    call: Call
    batch: int
    heads: int
    head_dim: int
    dtype: Any

    @property
    def keys(self) -> int:
        """Tokens of a group."""
        return self.call.grid.keys

    @property
    def pairs(self) -> int:
        """Pairs of a group and a head."""
        return (
            self.batch * math.prod(self.call.grid.segments) * self.call.grid.residues * self.heads
        )

    def view(self, x: Any) -> Any:
        """q, k, v, all three packed, or an output, as (b H / rh, rh W / rw, ...); a bitcast."""
        (h, w), (rh, rw) = self.call.grid.size, self.call.grid.dilation
        shape = self.batch * h // rh, rh * w // rw, rw * math.prod(x.shape[3:])
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(shape, x.dtype)
        return x.reshape(shape)

    def sums(self) -> jax.ShapeDtypeStruct:
        """One number a query, as the kernels see it."""
        return jax.ShapeDtypeStruct((self.pairs, self.keys), jnp.float32)

    def grouped(self) -> tuple[int, ...]:
        """The shape of such numbers outside of the kernels."""
        segments, residues = math.prod(self.call.grid.segments), self.call.grid.residues
        return self.batch, segments, residues, self.heads, self.keys

    def box(self, tokens: int) -> tuple[int, int]:
        """(rows, columns) that `tokens` of a group fill."""
        columns = min(tokens, self.call.grid.group[1])
        return tokens // columns, columns

    def ring(self, slots: int, tokens: int, tiles: int = 1, sums: int = 0) -> tuple[Any, ...]:
        """The scratch of a `Ring` whose slots hold tiles of `tokens`, and sums of as many."""
        transforms = (plgpu.TilingTransform((1, 8, 64)), plgpu.SwizzleTransform(128))
        shape = (slots, *self.box(tokens), self.head_dim)
        return (
            *[plgpu.SMEM(shape, self.dtype, transforms=transforms)] * tiles,
            *[plgpu.SMEM((slots, tokens), jnp.float32)] * sums,
            plgpu.Barrier(num_barriers=slots, num_arrivals=tiles + sums),
            plgpu.Barrier(num_barriers=slots, num_arrivals=2),
        )


def cut_of(call: Call, qkv: Arrays) -> Cut:
    """The view of a call of these arrays."""
    heads, head_dim = qkv[0].shape[-2:]
    return Cut(call, qkv[0].shape[0], heads, head_dim, qkv[0].dtype)


class Pair:
    """A pair of a group and a head, inside a kernel.

    Attributes:
      index: its place among all pairs, in the order of the grouped log-sum-exp.
    """

    def __init__(self, cut: Cut, index: Any):
        grid, (down, across) = cut.call.grid, cut.call.grid.segments
        self.cut, self.index = cut, index
        rest, self.head = _divmod(index, cut.heads)
        rest, residue = _divmod(rest, grid.residues)
        batch, segment = _divmod(rest, down * across)
        row, self.residue_x = _divmod(residue, grid.dilation[1])
        segment_y, segment_x = _divmod(segment, across)
        self.y = (batch * down + segment_y) * grid.group[0]
        self.x = (row * across + segment_x) * grid.group[1]

    def window(self, ref: Any, tile: Any, tokens: int, which: int = 0) -> Any:
        """Tile `tile` of `tokens` in a map's view; `which` of q, k and v, if it is packed."""
        cut = self.cut
        (rows, columns), width = cut.box(tokens), cut.heads * cut.head_dim
        # Whole tiles: Mosaic must be able to prove that a start is a multiple of 8.
        down, across = _divmod(tile, cut.call.grid.group[1] // columns)
        packed = ref.shape[-1] // (cut.call.grid.dilation[1] * width)
        slot = self.residue_x * packed + (which if packed == 3 else 0)
        return ref.at[
            pl.ds(self.y + down * rows, rows),
            pl.ds(self.x + across * columns, columns),
            pl.ds(slot * width + self.head * cut.head_dim, cut.head_dim),
        ]

    def sums(self, ref: Any, tile: Any, tokens: int) -> Any:
        """The numbers of tile `tile` of `tokens`."""
        return ref.at[self.index, pl.ds(tile * tokens, tokens)]


class Ring:
    """Slots of shared memory: the loading warpgroup fills them in turn, the others release them.

    Attributes:
      slots: how many.
    """

    def __init__(self, scratch: tuple[Any, ...]):
        *self.refs, self.full, self.empty = scratch
        self.slots = self.refs[0].shape[0]

    def at(self, position: Any) -> Any:
        """The slot of the `position`th filling."""
        return _divmod(position, self.slots)[1]

    def fill(self, position: Any, *sources: Any) -> None:
        """Copies `sources`, as many as the ring has refs, when the slot is free."""
        slot = self.at(position)

        @pl.when(position >= self.slots)
        def _() -> None:
            plgpu.barrier_wait(self.empty.at[slot])

        for source, ref in zip(sources, self.refs, strict=True):
            plgpu.copy_gmem_to_smem(source, ref.at[slot], self.full.at[slot])

    def wait(self, position: Any) -> None:
        """Waits until the slot is filled."""
        plgpu.barrier_wait(self.full.at[self.at(position)])

    def release(self, position: Any) -> None:
        """This warpgroup has read the slot."""
        plgpu.barrier_arrive(self.empty.at[self.at(position)])

    def tile(self, position: Any, ref: int = 0) -> Any:
        """The slot's tile as (tokens, d)."""
        slots, rows, columns, d = self.refs[ref].shape
        return self.refs[ref].reshape(slots, rows * columns, d).at[self.at(position)]

    def rows(self, position: Any, warpgroup: Any, ref: int = 0) -> Any:
        """This warpgroup's rows of a tile of `BLOCK`, as (tokens, d)."""
        slots, rows, columns, d = self.refs[ref].shape
        flat = self.refs[ref].reshape(slots, rows * columns, d)
        return flat.at[self.at(position), pl.ds(warpgroup * ROWS, ROWS)]

    def box(self, position: Any, warpgroup: Any, ref: int = 0) -> Any:
        """The same rows, as a box of the map."""
        _, rows, _, _ = self.refs[ref].shape
        if rows > 1:
            half = pl.ds(warpgroup * (rows // 2), rows // 2)
            return self.refs[ref].at[self.at(position), half]
        return self.refs[ref].at[self.at(position), :, pl.ds(warpgroup * ROWS, ROWS)]


class Kernel:
    """Programs that take one unit of work after another; a subclass says what a unit is.

    Attributes:
      cut: of the call.
      units: how many there are.
      warpgroup: 0 and 1 compute, 2 loads.
    """

    def __init__(self, cut: Cut, units: int):
        self.cut, self.units = cut, units
        self.warpgroup = lax.axis_index("warpgroup")

    def load(self, step: Any, unit: Any) -> None:
        """Fills the rings for the unit, this program's `step`th."""
        raise NotImplementedError

    def compute(self, step: Any, unit: Any) -> None:
        """Computes one half of the unit."""
        raise NotImplementedError

    def begin(self) -> None:
        """Comes before a computing warpgroup's first unit."""

    def end(self) -> None:
        """Comes after its last."""

    def run(self) -> None:
        """Runs this program."""
        program, programs = lax.axis_index("program"), min(self.units, PROGRAMS)
        steps = lax.div(self.units - program + (programs - 1), programs)

        def load() -> None:
            plgpu.set_max_registers(40, action="decrease")
            pl.loop(0, steps)(lambda step: self.load(step, program + step * programs))

        def compute() -> None:
            plgpu.set_max_registers(232, action="increase")
            self.begin()
            pl.loop(0, steps)(lambda step: self.compute(step, program + step * programs))
            self.end()

        lax.cond(self.warpgroup < 2, compute, load)


def mesh(units: int) -> dict[str, Any]:
    """How many programs run `units`, and their warpgroups: arguments of `plgpu.kernel`."""
    return {
        "grid": (min(units, PROGRAMS),),
        "grid_names": ("program",),
        "num_threads": 3,
        "thread_name": "warpgroup",
    }


def params(*, barriers: bool = False) -> plgpu.CompilerParams:
    """The compiler's; `barriers` lets it add those that a kernel does not place by itself."""
    return plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        approx_math=True,
        unsafe_no_auto_barriers=not barriers,
        reduction_scratch_bytes=0,
    )


def transposed(ref: Any) -> Any:
    """(d, tokens) of a tile."""
    return plgpu.transpose_ref(ref, (1, 0)) if JAX_0_10 else ref.T


def load(ref: Any, layout: Any, *, optimized: bool = True) -> jax.Array:
    """All of a ref; not `optimized` where that would be refused, as it is of global memory."""
    # The index was an argument that had to be given, and is now one that is deprecated.
    return plgpu.load(ref, *[()] * JAX_0_10, layout=layout, optimized=optimized)


def spread(x: jax.Array, like: jax.Array, axis: int = 0) -> jax.Array:
    """One number a row, or a column, as a matrix."""
    return lax.broadcast_in_dim(x, like.shape, (axis,))


def zeros(columns: int) -> jax.Array:
    """(ROWS, columns) of an accumulator."""
    return plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), MATRIX)


def _divmod(x: Any, by: int) -> tuple[Any, Any]:
    if isinstance(x, int):
        return divmod(x, by)
    if by == 1:
        return x, 0
    # Of numbers that are not negative; `//` would treat the sign.
    return lax.div(x, by), lax.rem(x, by)

"""The calls that every back end is tested on: small ones for any machine, real ones for a GPU."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels import shapes
from pallas_kernels.dilated_attention import groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call of a back end.

    Attributes:
      size: (H, W), tokens.
      segment: (sh, sw), tokens.
      dilation: (rh, rw).
      offsets: "all" or "per_head".
      dtype: of q, k and v.
      rel: the dtype of the relative positions; None leaves them out.
      packed: q, k and v in one array.
      batch: b.
      heads: n.
      head_dim: d.
    """

    size: tuple[int, int]
    segment: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    offsets: str = "all"
    dtype: str = "float32"
    rel: str | None = None
    packed: bool = False
    batch: int = 1
    heads: int = 2
    head_dim: int = 32

    @property
    def grid(self):
        return groups.fit(self.size, self.segment, self.dilation)

    @property
    def static(self):
        """The arguments of `run` that are no arrays."""
        return {"grid": self.grid, "offsets": self.offsets, "scale": self.head_dim**-0.5}

    def draw(self, seed=0):
        """(qkv, rel) as `run` takes them."""
        rng = np.random.default_rng(seed)
        lead, tail = (self.batch, *self.size), (self.heads, self.head_dim)

        def normal(*shape, dtype):
            return jnp.asarray(rng.normal(size=shape).astype(np.float32)).astype(dtype)

        qkv = [(*lead, 3, *tail)] if self.packed else [(*lead, *tail)] * 3
        rel = [(*lead, self.heads, m) for m in self.grid.group] if self.rel else []
        return (
            tuple(normal(*shape, dtype=self.dtype) for shape in qkv),
            tuple(normal(*shape, dtype=self.rel) for shape in rel),
        )

    def draw_cotangents(self, seed=1):
        """Those of output and log-sum-exp, both in q's dtype."""
        rng = np.random.default_rng(seed)
        shape = (self.batch, *self.size, self.heads, self.head_dim)
        return tuple(
            jnp.asarray(rng.normal(size=x).astype(np.float32)).astype(self.dtype)
            for x in (shape, shape[:-1])
        )


SMALL = {
    "window": Case(size=(16, 16), segment=(8, 8)),
    "window_batch": Case(
        size=(16, 8), segment=(8, 8), dtype="bfloat16", packed=True, batch=2, head_dim=64
    ),
    "window14_rel": Case(size=(14, 28), segment=(14, 14), rel="float32", head_dim=64, heads=1),
    "window14_rel_half": Case(
        size=(14, 14), segment=(14, 14), dtype="float16", rel="float16", packed=True, head_dim=64
    ),
    "grid_r2": Case(size=(16, 16), segment=(16, 16), dilation=(2, 2), dtype="float16", head_dim=64),
    "grid_r4": Case(
        size=(16, 16),
        segment=(16, 16),
        dilation=(4, 4),
        dtype="bfloat16",
        packed=True,
        heads=3,
        head_dim=128,
    ),
    "grid_unlike": Case(size=(8, 32), segment=(4, 32), dilation=(2, 4), packed=True),
    "dense": Case(size=(8, 8), segment=(8, 8), head_dim=80, batch=2),
    "dense_rel": Case(
        size=(8, 16), segment=(8, 16), dtype="bfloat16", rel="float32", packed=True, head_dim=80
    ),
    "grid_rel": Case(
        size=(16, 16),
        segment=(16, 16),
        dilation=(2, 2),
        dtype="bfloat16",
        rel="bfloat16",
        head_dim=64,
        batch=2,
    ),
    "ragged": Case(size=(13, 9), segment=(8, 8), dilation=(2, 2)),
    "ragged_rel": Case(
        size=(11, 5), segment=(8, 4), dtype="bfloat16", rel="bfloat16", packed=True, head_dim=64
    ),
    # Of the lower and of the right segments some groups are nothing but padding.
    "ragged_empty": Case(
        size=(9, 17), segment=(8, 16), dilation=(4, 4), dtype="bfloat16", packed=True, head_dim=64
    ),
    "clamped": Case(size=(13, 9), segment=(64, 64), dilation=(4, 4), dtype="float16"),
    "row": Case(size=(1, 64), segment=(1, 32), dilation=(1, 2), packed=True, batch=2),
    "row_ragged": Case(
        size=(1, 50), segment=(1, 32), dilation=(1, 4), dtype="bfloat16", head_dim=64
    ),
    "row_r16": Case(size=(1, 256), segment=(1, 256), dilation=(1, 16), head_dim=128),
    # More keys than one tile, the last tile not full.
    "row_long": Case(size=(1, 300), segment=(1, 300), dtype="bfloat16", heads=1, head_dim=128),
    "row_lonely": Case(size=(1, 8), segment=(1, 4), dilation=(1, 4)),  # groups of one token
    "own_row": Case(
        size=(1, 64), segment=(1, 64), dilation=(1, 4), offsets="per_head", packed=True, heads=5
    ),
    "own_plane": Case(
        size=(16, 8),
        segment=(8, 8),
        dilation=(2, 2),
        offsets="per_head",
        dtype="bfloat16",
        batch=2,
        heads=6,
        head_dim=64,
    ),
    "own_ragged_rel": Case(
        size=(7, 9),
        segment=(8, 4),
        dilation=(2, 2),
        offsets="per_head",
        dtype="bfloat16",
        rel="float32",
        heads=4,
        head_dim=64,
    ),
    "double": Case(
        size=(8, 8), segment=(4, 8), dilation=(2, 2), dtype="float64", rel="float32", packed=True
    ),
}
REAL = {  # one image or two of each of the models' shapes
    name: Case(
        size=shape.size,
        segment=shape.segment,
        dilation=shape.grid.dilation,
        dtype="bfloat16",
        rel="bfloat16" if shape.rel else None,
        packed=True,
        batch=min(shape.batch, 2),
        heads=shape.heads,
        head_dim=shape.head_dim,
    )
    for name, shape in shapes.SHAPES.items()
    if shape.batch <= 16
}

"""Real shapes by name: what the models run, and what tests, tuning and benchmarks read."""

import dataclasses
from typing import Any

from pallas_kernels.dilated_attention.groups import Grid, fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One call of dilated attention on a packed qkv (b, H, W, 3, n, d).

    Attributes:
      batch: b.
      size: (H, W), tokens; (1, L) for a raster, the 1-D form.
      segment: (sh, sw), tokens.
      dilation: the same on both axes; along the raster alone where H is 1.
      heads: n.
      head_dim: d.
      rel: with SAM's decomposed relative positions.
    """

    batch: int
    size: tuple[int, int] = (64, 64)
    segment: tuple[int, int] = (64, 64)
    dilation: int = 1
    heads: int
    head_dim: int
    rel: bool = False

    @property
    def grid(self) -> Grid:
        """How the tokens are cut."""
        across = self.dilation if self.size[0] > 1 else 1
        return fit(self.size, self.segment, (across, self.dilation))

    @property
    def keys(self) -> int:
        """Tokens of a group: what every query sees."""
        return self.grid.keys

    @property
    def flops(self) -> int:
        """Of the two products of one forward pass, 2 a multiply-add."""
        h, w = self.size
        return 4 * self.batch * h * w * self.keys * self.heads * self.head_dim

    def bytes_moved(self, itemsize: int = 2) -> int:
        """The least of one forward pass: q, k, v and the output once, log-sum-exp in float32."""
        tokens = self.batch * self.size[0] * self.size[1] * self.heads
        rel = sum(self.grid.group) if self.rel else 0
        return tokens * ((4 * self.head_dim + rel) * itemsize + 4)


Fields = dict[str, Any]
STUDENT: dict[str, Fields] = {"window16": {"segment": (16, 16)}, "grid_r4": {"dilation": 4}}
TEACHER: dict[str, Fields] = {"window14": {"size": (70, 70), "segment": (14, 14)}, "global": {}}
SHAPES = {
    # samlight_t's two blocks, in both of its splits into heads.
    **{
        f"{pattern}_b{b}_{n}x{d}": Shape(batch=b, heads=n, head_dim=d, **cut)
        for pattern, cut in STUDENT.items()
        for b in (1, 16, 64)
        for n, d in ((3, 128), (6, 64))
    },
    # samlight_t_paper's: the raster.
    "raster1024_r2_b16_6x64": Shape(
        batch=16, size=(1, 4096), segment=(1, 1024), dilation=2, heads=6, head_dim=64
    ),
    "raster4096_r4_b16_6x64": Shape(
        batch=16, size=(1, 4096), segment=(1, 4096), dilation=4, heads=6, head_dim=64
    ),
    # More keys a query.
    **{
        f"{pattern}_b16_{n}x{d}": Shape(batch=16, dilation=r, heads=n, head_dim=d)
        for pattern, r in (("grid_r2", 2), ("dense", 1))
        for n, d in ((3, 128), (6, 64))
    },
    # 16384 tokens: images of 2048 x 2048.
    **{
        f"grid128_r{r}_b4_{n}x{d}": Shape(
            batch=4, size=(128, 128), segment=(128, 128), dilation=r, heads=n, head_dim=d
        )
        for r in (4, 8)
        for n, d in ((3, 128), (6, 64))
    },
    # The teachers' blocks: windows of 14 on 64 x 64 tokens padded to 70 x 70, and the global ones.
    **{
        f"sam_vit_{size}_{block}": Shape(batch=1, heads=n, head_dim=d, rel=True, **cut)
        for size, n, d in (("b", 12, 64), ("h", 16, 80))
        for block, cut in TEACHER.items()
    },
}

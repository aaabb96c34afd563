"""Where the kernels look for a group's tokens, with NumPy in the place of a GPU's memory."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.device import Device
from pallas_kernels.dilated_attention import groups
from pallas_kernels.dilated_attention.mosaic_gpu_cut import Cut, Pair
from pallas_kernels.dilated_attention.transforms import Call


class Memory:
    """A ref of a kernel: `at` gives a part of it."""

    def __init__(self, array):
        self.array, self.shape, self.at = array, array.shape, self

    def __getitem__(self, box):
        return self.array[tuple(slice(s.start, s.start + s.size) for s in box)]


@pytest.mark.parametrize(
    ("size", "segment", "dilation"),
    [
        ((32, 32), (16, 16), (1, 1)),
        ((64, 32), (32, 32), (4, 2)),
        ((1, 1024), (1, 512), (1, 2)),
        ((2, 256), (2, 256), (1, 1)),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_windows_are_the_groups_tiles(size, segment, dilation, packed):
    grid, heads, d = groups.fit(size, segment, dilation), 2, 4
    call = Call(grid, "all", 1.0, Device("gpu", "NVIDIA H200", (9, 0)))
    cut = Cut(call, 2, heads, d, jnp.bfloat16)
    shape = (2, *size, *((3,) if packed else ()), heads, d)
    x = np.arange(np.prod(shape)).reshape(shape)
    for which in range(3) if packed else [0]:
        want = groups.group(x[:, :, :, which] if packed else x, grid)
        want = want.reshape(cut.pairs, cut.keys, d)
        for index in range(cut.pairs):
            for tile in range(cut.keys // 64):
                got = Pair(cut, index).window(Memory(cut.view(x)), tile, 64, which)
                tokens = want[index, tile * 64 : (tile + 1) * 64]
                np.testing.assert_array_equal(got.reshape(64, d), tokens)

"""What the partitioner learns of a kernel; mapping is tested with the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels.opaque import opaque
from tests.pallas_kernels.conftest import on_four_devices


def sharded():
    """The axes that may divide do, those that may not are gathered."""
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    shapes = []

    def kernel(x, scale):
        shapes.append((x.shape, scale.shape))
        return jnp.cumsum(x, 1) * scale

    run = jax.jit(opaque(kernel, 1, "b y c, c -> b y c", "b c"))
    x, scale = np.random.default_rng(0).normal(size=(4, 6, 8)), np.arange(8.0)
    for of_x, of_scale, seen in (
        (("rows", None, "columns"), (), ((2, 6, 4), (4,))),
        (("rows", "columns"), (), ((2, 6, 8), (8,))),
        ((), ("columns",), ((4, 6, 4), (4,))),
    ):
        placed = (
            jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))
            for a, spec in ((x, of_x), (scale, of_scale))
        )
        np.testing.assert_allclose(run(*placed), np.cumsum(x, 1) * scale, rtol=1e-5)
        assert shapes[-1] == seen, shapes


def test_axes_divide_among_devices():
    on_four_devices(f"from {__name__} import sharded; sharded()")

"""What the partitioner learns of a kernel; mapping is tested with the kernels."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels.opaque import opaque


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
    """In a process of its own: this one has begun with the devices that it has."""
    four = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import sharded; sharded()"],
        cwd=Path(__file__).parents[2],
        env=os.environ | four,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]

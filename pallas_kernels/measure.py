"""How tuning and benchmarks time a call on a device, and how they keep what they found.

One program makes several calls, each on inputs of its own and after the one before, and is sent
while it still runs, on other inputs that together no cache holds: a launch through `jit` costs tens
of microseconds, more than a small kernel.
"""

import dataclasses
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import chain
from pallas_kernels.shapes import Shape

BEYOND_CACHE = 1 << 28  # bytes of inputs in turn; an H200's L2 holds 50 MB


@dataclasses.dataclass(frozen=True)
class Times:
    """Of one call, over samples; a sample is the mean of many calls in a row.

    Attributes:
      median_us: microseconds, as the others.
      p10_us: the tenth percentile.
      p90_us: the ninetieth.
      samples: how many.
      calls: in each sample.
    """

    median_us: float
    p10_us: float
    p90_us: float
    samples: int
    calls: int


def arrays_of(shape: Shape, dtype: Any = jnp.bfloat16) -> list[jax.ShapeDtypeStruct]:
    """What a call of this shape is given: the packed qkv; rel_h and rel_w where it has them."""
    lead = (shape.batch, *shape.size)
    tails = [(3, shape.heads, shape.head_dim)]
    if shape.rel:
        tails += [(shape.heads, keys) for keys in shape.grid.group]
    return [jax.ShapeDtypeStruct((*lead, *tail), dtype) for tail in tails]


def refusals(shape: Shape, dtype: Any = jnp.bfloat16) -> dict[str, str | None]:
    """Why each back end would not run this shape here, best first; None where it would."""
    qkv, *rel = arrays_of(shape, dtype)
    return chain.explain(
        (qkv,), tuple(rel), grid=shape.grid, offsets="all", scale=shape.head_dim**-0.5
    )


def sets_beyond_cache(arrays: Sequence[jax.ShapeDtypeStruct]) -> int:
    """How many sets of such arrays no cache holds, from 4 to 32."""
    size = sum(x.size * x.dtype.itemsize for x in arrays)
    return min(max(-(-BEYOND_CACHE // size), 4), 32)


def inputs(arrays: Sequence[jax.ShapeDtypeStruct], count: int) -> list[Any]:
    """`count` sets of normal arrays, each a list of those described; no two are equal."""

    @jax.jit
    def draw(key: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(key, len(arrays))
        return [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, arrays, strict=True)]

    return [draw(jax.random.key(seed, impl="rbg")) for seed in range(count)]


def chained(function: Callable[..., Any]) -> Any:
    """A jitted program that calls `function` on each set of inputs in turn; returns all results.

    Inputs must differ and results must be kept: XLA merges equal calls and drops unused ones.
    """
    function = jax.jit(function)  # traced and lowered once; XLA inlines the calls

    def program(sets: Sequence[Sequence[jax.Array]]) -> list[Any]:
        results: list[Any] = []
        for arguments in sets:
            if results:  # the next call waits for this one, so their memory is never added up
                arguments, _ = jax.lax.optimization_barrier((arguments, results[-1]))
            results.append(function(*arguments))
        return results

    return jax.jit(program)


def times(program: Callable[[Any], Any], sets: list[Any], seconds: float = 0.1) -> Times:
    """Times a compiled `chained` program that has run before.

    Args:
      program: what `chained` returned, compiled.
      sets: a list of its inputs for each run in turn.
      seconds: to spend; a program too slow for 3 samples takes longer.
    """

    def spent(runs: int) -> float:
        start = time.perf_counter()
        last = None
        for some in sets * runs:
            last = program(some)  # while the device is busy with the one before
        jax.block_until_ready(last)
        return time.perf_counter() - start

    once = min(spent(1), spent(1))
    samples = int(min(max(seconds / once, 3), 15))
    runs = max(round(seconds / samples / once), 1)
    calls = runs * sum(map(len, sets))
    found = 1e6 / calls * np.array([spent(runs) for _ in range(samples)])
    low, middle, high = map(digits, np.percentile(found, (10, 50, 90)))
    return Times(middle, low, high, samples, calls)


def digits(x: Any) -> float:
    """To four significant digits: no time repeats to more."""
    return float(f"{x:.4g}")


def machine() -> dict[str, str]:
    """The first device and the software that drives it."""
    device = jax.devices()[0]
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.split()
    except FileNotFoundError:  # no NVIDIA driver
        driver = []
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": device.device_kind,
        "jax": jax.__version__,
        "platform": " ".join(device.client.platform_version.split()),
        "driver": driver[0] if driver else "",
    }


def slug(kind: str) -> str:
    """A device in the name of its JSON file."""
    return re.sub(r"[^a-z0-9]+", "_", kind.lower().removeprefix("nvidia ")).strip("_")


def write_json(path: Path, value: Any) -> None:
    """Writes the whole file or nothing: a run that is cut keeps what it wrote before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        scratch = Path(folder) / path.name
        scratch.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(scratch, path)

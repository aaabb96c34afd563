"""Program: times the `triton` back end's tiles on this device; writes tuned/<device>.json.

Run: `python -m pallas_kernels.autotune`. Shapes that share a key are tuned once. A file that is
there keeps the entries of keys that are not asked for; raw times of all candidates stay beside the
best, so that a choice can be judged later.
"""

import argparse
import dataclasses
import functools
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import device, measure, tiles
from pallas_kernels.dilated_attention import triton
from pallas_kernels.dilated_attention.transforms import Call
from pallas_kernels.dilated_attention.triton_kernels import Cut
from pallas_kernels.shapes import SHAPES, Shape

KERNELS = ("forward", "dq", "dkv")
CHAINED = 2  # calls in a program; XLA compiles a kernel anew for each
BATCH = 16  # the one tuned, where shapes share a key


def main(arguments: Sequence[str] | None = None) -> None:
    """Tunes key by key; a run that is cut keeps what it has tuned."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.autotune", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, metavar="NAME", help="of pallas_kernels.shapes")
    add("--most", type=int, metavar="N", help="of the heuristic's candidates; default: all")
    add("--time-budget", type=float, default=600, metavar="SECONDS", help="then keys are left out")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.time_budget
    path = tiles.path(device.current().kind)
    entries = json.loads(path.read_text())["entries"] if path.exists() else {}
    report = {**measure.machine(), "device": device.current().kind, "entries": entries}
    for name in representatives(options.shapes or list(SHAPES)):
        if time.monotonic() > deadline:
            print(f"{name}: left out, the time budget was spent.")
            continue
        for key, entry in tune(SHAPES[name], options.most).items():
            entries[key] = {"shape": name, **entry}
            print(f"{key}: {entry.get('us', 'every candidate failed')} {entry.get('config', '')}")
        measure.write_json(path, report)
    print(path)


def representatives(names: Sequence[str]) -> list[str]:
    """One shape for each key, of batch 16 where there is one."""
    found: dict[str, str] = {}
    for name in sorted(names, key=lambda name: abs(SHAPES[name].batch - BATCH)):
        found.setdefault(tiles.key(_cut(SHAPES[name])), name)
    return list(found.values())


def tune(shape: Shape, most: int | None = None, seconds: float = 0.03) -> dict[str, Any]:
    """Times the candidates of each kernel.

    Args:
      shape: of the call, with bfloat16 in a packed qkv.
      most: candidates of one kernel; None means all.
      seconds: to time each.

    Returns:
      For each key of tuned/<device>.json the best `config`, its `us`, and all `candidates`.
      The times of `dkv` include zeros that it writes its gradients into.
    """
    cut = _cut(shape)
    sets = _inputs(cut.call, shape)
    found = {}
    for kernel in KERNELS:
        given = [_arguments(kernel, arrays) for arrays in sets]
        chains = [given[i : i + CHAINED] for i in range(0, len(given) - CHAINED + 1, CHAINED)]
        # Leaving the pool waits for it: nothing else runs on the machine while one is timed.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            configs = map(dataclasses.asdict, triton.candidates(kernel, cut)[:most])
            jobs = [(x, _compile(pool, kernel, cut.call, x, chains[0])) for x in configs]
        tried = [{"config": config, **_timed(job, chains, seconds)} for config, job in jobs]
        best = min((x for x in tried if "us" in x), key=lambda x: x["us"], default={})
        found[tiles.name(triton.NAME, kernel, tiles.key(cut))] = {**best, "candidates": tried}
    return found


def _cut(shape: Shape) -> Cut:
    call = Call(shape.grid, "all", shape.head_dim**-0.5, device.current())
    nothing = tiles.Tiles(0, 0, 0, 0)
    return Cut(call, shape.heads, shape.head_dim, jnp.bfloat16, shape.rel, nothing)


def _inputs(call: Call, shape: Shape) -> list[dict[str, Any]]:
    """What the kernels of one call after another read, by name."""
    out = jax.ShapeDtypeStruct((shape.batch, *shape.size, shape.heads, shape.head_dim), "bfloat16")
    arrays = [*measure.arrays_of(shape), out]

    @jax.jit
    def complete(qkv: jax.Array, *rest: jax.Array) -> dict[str, Any]:
        *rel, dout = rest
        out, lse = triton.forward(call, (qkv,), tuple(rel))
        zeros = jnp.zeros_like(lse)
        _, delta, _ = triton.dq(call, (qkv,), tuple(rel), out, lse, dout, zeros)
        return {"out": out, "lse": lse, "delta": delta}

    sets = measure.inputs(arrays, measure.sets_beyond_cache(arrays))
    names = ("qkv", "rel_h", "rel_w")[: len(arrays) - 1]
    return [dict(zip((*names, "dout"), x, strict=True)) | complete(*x) for x in sets]


def _arguments(kernel: str, arrays: dict[str, Any]) -> list[Any]:
    """Of `_run`: qkv and rel as tuples, then what this kernel reads besides."""
    rel = tuple(arrays[name] for name in ("rel_h", "rel_w") if name in arrays)
    besides = {"forward": (), "dq": ("out", "lse", "dout"), "dkv": ("lse", "dout", "delta")}
    return [(arrays["qkv"],), rel, *(arrays[name] for name in besides[kernel])]


def _run(kernel: str, call: Call, qkv: Any, rel: Any, *rest: Any) -> Any:
    if kernel == "forward":
        return triton.forward(call, qkv, rel)
    if kernel == "dq":
        out, lse, dout = rest
        return triton.dq(call, qkv, rel, out, lse, dout, jnp.zeros_like(lse))
    lse, dout, delta = rest
    return triton.dkv(call, qkv, rel, lse, dout, delta, jnp.zeros_like(qkv[0]))


def _compile(pool: Executor, kernel: str, call: Call, config: dict, chain: Any) -> Future:
    """Lowers with this configuration here, compiles there."""
    program = measure.chained(functools.partial(_run, kernel, call))
    try:
        with tiles.use(triton.NAME, kernel, config):
            lowered = program.lower(chain)
    except Exception as error:
        failed = Future()
        failed.set_exception(error)
        return failed
    return pool.submit(lowered.compile)


def _timed(job: Future, chains: list[Any], seconds: float) -> dict[str, Any]:
    try:
        program = job.result()
        jax.block_until_ready(program(chains[0]))
        found = measure.times(program, chains, seconds)
    except Exception as error:  # too much shared memory, most often: the next may do
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    return {"us": found.median_us, "p10_us": found.p10_us, "p90_us": found.p90_us}


if __name__ == "__main__":
    main()

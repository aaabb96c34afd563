"""Program: dilated attention's back ends on the models' shapes; writes attention_<device>.json.

Run: `python -m benchmarks.attention`; it needs jax and numpy alone. A call is what a model makes:
one packed qkv in bfloat16 (`cudnn` cuts and transposes the same array), forward, and forward with
the gradient under a random cotangent. Before a program is timed its result is held against float32:
it may err at most twice as much as unfused bfloat16 attention does.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import chain, dilated_attention_qkvpacked, measure
from pallas_kernels.dilated_attention import groups
from pallas_kernels.shapes import SHAPES, Shape

RESULTS = Path(__file__).parent / "results"
DIRECTIONS = ("forward", "forward+backward")
BACKWARD_FLOPS = 2.5  # times the forward's: five products to its two
DENSE = "cudnn_dense"  # context: q, k and v apart and contiguous, nothing to transpose
UNFUSED = "unfused"  # what a user writes without kernels: scores and bias as arrays
SLOW = ("xla", UNFUSED, "reference")  # measured last, where the time budget may cut
TINY = {
    "tiny_window4": Shape(batch=2, size=(8, 8), segment=(4, 4), heads=2, head_dim=16, rel=True),
    "tiny_dense": Shape(batch=2, size=(8, 8), segment=(8, 8), heads=2, head_dim=16),
}
LATE = {"skipped": "the time budget was spent."}
Arrays = Sequence[Any]
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures row by row; a run that is cut keeps what it has measured."""
    options = _options(arguments)
    shapes = TINY if options.tiny else {name: SHAPES[name] for name in options.shapes or SHAPES}
    path = (
        options.output or RESULTS / f"attention_{measure.slug(jax.devices()[0].device_kind)}.json"
    )
    deadline = time.monotonic() + options.time_budget
    report = {
        **measure.machine(),
        "commit": options.commit or _commit(),
        "ceilings": ceilings(512 if options.tiny else 8192),
        "shapes": {name: _described(shape) for name, shape in shapes.items()},
        "rows": [],
    }
    names = options.implementations or [*chain.CHAIN, DENSE, UNFUSED]
    if not options.implementations and not options.tiny:
        names.remove("reference")  # the truth, whose time means nothing
    count = 2 if options.tiny else None
    parts = [(False, part) for part in _parts(shapes, 9)]
    by_rel = dict(sorted(shapes.items(), key=lambda item: not item[1].rel))  # cuDNN has no rel
    for slow, some in [*parts, *((True, part) for part in _parts(by_rel, 4))]:
        asked = [name for name in names if (name in SLOW) == slow]
        for rows in measured(some, asked, report["ceilings"], deadline, count):
            report["rows"] += rows
            compare(report["rows"])
            measure.write_json(path, report)
    failures = [row for row in report["rows"] if "failed" in row]
    for row in failures:
        print(f"{row['shape']}, {row['implementation']}, {row['direction']}: {row['failed']}")
    raise SystemExit(bool(failures))


def _parts(shapes: dict[str, Shape], n: int) -> list[dict[str, Shape]]:
    """Shapes that are compiled together: a run that is cut has measured the first parts."""
    return [dict(list(shapes.items())[i : i + n]) for i in range(0, len(shapes), n)]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention", description=(__doc__ or "").splitlines()[0]
    )
    names = [*chain.CHAIN, DENSE, UNFUSED]
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, metavar="NAME", help="of pallas_kernels.shapes")
    add("--implementations", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    add("--tiny", action="store_true", help="two tiny shapes: does everything run?")
    add("--time-budget", type=float, default=240, metavar="SECONDS", help="then rows are skipped")
    add("--output", type=Path, metavar="FILE", help=f"default: {RESULTS}/attention_<device>.json")
    add("--commit", metavar="HASH", help="default: what git says")
    return parser.parse_args(arguments)


def _commit() -> str:
    ask = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(ask, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _described(shape: Shape) -> dict[str, Any]:
    return {**dataclasses.asdict(shape), "keys": shape.keys, "flops": shape.flops}


def ceilings(side: int) -> dict[str, float]:
    """What this device reaches: TFLOP/s of a bfloat16 product, TB/s of a copy (read and write)."""
    square = jax.ShapeDtypeStruct((side, side), jnp.bfloat16)
    tall = jax.ShapeDtypeStruct((4 * side, side), jnp.bfloat16)

    def rate(function: Callable[..., jax.Array], arrays: list, work: int) -> float:
        sets = measure.inputs(arrays, measure.sets_beyond_cache(arrays))
        program = measure.chained(function)
        jax.block_until_ready(program(sets))
        return measure.digits(work / measure.times(program, [sets]).median_us / 1e6)

    return {
        "tflops": rate(jnp.matmul, [square, square], 2 * side**3),
        "tb_s": rate(jnp.copy, [tall], 2 * tall.size * tall.dtype.itemsize),
    }


@dataclasses.dataclass
class _Job:
    """What one shape waits for: its rows that will be timed, each with its program."""

    shape: Shape
    sets: int  # of inputs
    truth: Future
    programs: list[tuple[Row, Future]]


def measured(
    shapes: dict[str, Shape],
    names: Sequence[str],
    limits: dict[str, float],
    deadline: float,
    count: int | None = None,
) -> Iterator[list[Row]]:
    """The rows of each shape in turn: all are compiled at once, then timed one by one.

    Args:
      shapes: by name.
      names: of back ends, `DENSE` and `UNFUSED`.
      limits: of `ceilings`.
      deadline: of `time.monotonic`; what comes later is skipped, and its row says so.
      count: sets of inputs; None makes as many as no cache holds.
    """
    rows = {name: _rows(name, shape, names, deadline) for name, shape in shapes.items()}
    # Leaving the pool waits for it: nothing else runs on the machine while a program is timed.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [_job(pool, shapes[name], rows[name], limits, count) for name in shapes]
    for name, job in zip(shapes, jobs, strict=True):
        if job.programs:
            _time_all(job, deadline)
        for row in rows[name]:
            row |= _rates(row, job.shape, limits) if "median_us" in row else {}
        yield rows[name]


def _rows(name: str, shape: Shape, names: Sequence[str], deadline: float) -> list[Row]:
    """Of each implementation and direction; some say why they will not be timed."""
    reasons = _reasons(shape)
    if time.monotonic() > deadline:
        reasons = dict.fromkeys(names, LATE) | reasons
    return [
        {"shape": name, "implementation": other, "direction": direction, **reasons.get(other, {})}
        for other, direction in itertools.product(names, DIRECTIONS)
    ]


def _job(pool: Executor, shape: Shape, rows: Sequence[Row], limits: Any, count: Any) -> _Job:
    arrays = _arrays(shape)
    one = [jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for x in arrays]
    count = count or measure.sets_beyond_cache(arrays)
    programs = []
    for row in rows:
        if not {"refused", "skipped"} & row.keys():
            # XLA compiles a kernel anew for each call: as few as keep the device busy while the
            # next program is sent, were they 3 times slower than the floor.
            floor, _, _ = _work(shape, row["direction"], limits)
            row["chained"] = min(max(round(20 / floor), 2), 8, count)
            lower = functools.partial(_lower, row, shape)
            programs.append((row, _compile(pool, lower, [arrays] * row["chained"])))
    # Truth is not timed: its products are not tuned, which takes minutes.
    untuned = {"xla_gpu_autotune_level": 0} if jax.default_backend() == "gpu" else None
    truth = _compile(pool, _truth(shape).lower, one, untuned) if programs else Future()
    return _Job(shape, count, truth, programs)


def _time_all(job: _Job, deadline: float) -> None:
    """Fills the rows of one shape."""
    sets = measure.inputs(_arrays(job.shape), job.sets)
    truth, _ = job.truth.result()
    exact, plain = jax.device_get(truth(_last(sets[0])))
    bounds = [2 * _error(x, y) for x, y in zip(plain, exact, strict=True)]
    for row, program in job.programs:
        if time.monotonic() > deadline:
            row |= LATE
            continue
        try:
            compiled, row["compile_s"] = program.result()
            given, n = _given(row, sets), row["chained"]
            chains = [given[i : i + n] for i in range(0, len(given) - n + 1, n)]
            _check(row, compiled(chains[0])[0], exact, bounds)
            row |= dataclasses.asdict(measure.times(compiled, chains))
            row["memory_mib"] = _memory(compiled.memory_analysis(), n)
        except Exception as error:  # of one row: the others are still worth their time
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"


def _reasons(shape: Shape) -> dict[str, dict[str, str]]:
    """Why some rows are not measured, by implementation."""
    refusals = measure.refusals(shape)
    refusals[DENSE] = refusals.get("cudnn", "is not here.")
    if shape.keys != shape.size[0] * shape.size[1]:
        refusals[DENSE] = "is for dense attention."
    return {name: {"refused": reason} for name, reason in refusals.items() if reason}


def _arrays(shape: Shape) -> list[jax.ShapeDtypeStruct]:
    """Those of a call, and a cotangent."""
    size = (shape.batch, *shape.size, shape.heads, shape.head_dim)
    return [*measure.arrays_of(shape), jax.ShapeDtypeStruct(size, jnp.bfloat16)]


def _given(row: Row, sets: Sequence[Arrays]) -> Sequence[Arrays]:
    """The inputs of a row's program, out of sets that end with a cotangent."""
    if row["implementation"] == DENSE:
        sets = [_apart(*arrays) for arrays in sets]
    return [arrays[:-1] for arrays in sets] if row["direction"] == "forward" else sets


@jax.jit
def _apart(qkv: jax.Array, dout: jax.Array) -> Arrays:
    flat = dout.shape[0], -1, *dout.shape[-2:]
    return [*(x.reshape(flat) for x in groups.unpack((qkv,))), dout.reshape(flat)]


def attention(name: str, shape: Shape) -> Callable[..., jax.Array]:
    """An implementation as a function of qkv, and rel_h and rel_w where the shape has them."""
    if name == DENSE:
        return functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    if name == UNFUSED:
        return functools.partial(unfused, shape.grid)

    def call(qkv: jax.Array, *rel: jax.Array) -> jax.Array:
        return dilated_attention_qkvpacked(
            qkv,
            segment=shape.segment,
            dilation=shape.grid.dilation,
            implementation=name,
            **dict(zip(("rel_h", "rel_w"), rel, strict=False)),
        )

    return call


def unfused(grid: groups.Grid, qkv: jax.Array, *rel: jax.Array) -> jax.Array:
    """Transposes, then JAX's plain attention; relative positions are one bias array."""

    def cut(x: jax.Array) -> jax.Array:  # to (groups, tokens, heads, c)
        x = groups.group(x, grid)
        return x.reshape(-1, *x.shape[3:]).swapaxes(1, 2)

    q, k, v = map(cut, groups.unpack((qkv,)))
    bias = None
    if rel:
        rows, columns = (cut(x).swapaxes(1, 2) for x in rel)
        bias = rows[..., :, None] + columns[..., None, :]
        bias = bias.reshape(*bias.shape[:3], -1)
    out = jax.nn.dot_product_attention(q, k, v, bias=bias, implementation="xla").swapaxes(1, 2)
    out = out.reshape(qkv.shape[0], -1, grid.residues, *out.shape[1:])
    return groups.ungroup(out, grid)


def _both(call: Callable[..., jax.Array], *arrays: jax.Array) -> Arrays:
    *given, cotangent = arrays
    out, pull_back = jax.vjp(call, *given)
    return [out, *pull_back(cotangent)]


def _forward(call: Callable[..., jax.Array], *arrays: jax.Array) -> Arrays:
    return [call(*arrays)]


def _truth(shape: Shape) -> Any:
    """Of one image: output and gradients in float32, and those of unfused attention."""
    shape = dataclasses.replace(shape, batch=1)

    @jax.jit
    def truth(arrays: Arrays) -> tuple[Arrays, Arrays]:
        exact = _both(attention("reference", shape), *(x.astype(jnp.float32) for x in arrays))
        return exact, _both(attention(UNFUSED, shape), *arrays)

    return truth


@jax.jit
def _last(arrays: Arrays) -> Arrays:
    """The last image of each."""
    return [x[-1:] for x in arrays]


def _error(got: np.ndarray, exact: np.ndarray) -> float:
    return float(np.abs(got.reshape(exact.shape).astype(np.float32) - exact).max())


def _lower(row: Row, shape: Shape, sets: Sequence[Arrays]) -> Any:
    """The chained program of a row, for sets of inputs that end with a cotangent."""
    call = attention(row["implementation"], shape)
    directed = _forward if row["direction"] == "forward" else _both
    program = measure.chained(functools.partial(directed, call))
    return program.lower(jax.eval_shape(functools.partial(_given, row), sets))


def _compile(pool: Executor, lower: Any, arrays: Any, options: Any = None) -> Future:
    """Lowers here, compiles there."""
    try:
        lowered = lower(arrays)
    except Exception as error:
        failed = Future()
        failed.set_exception(error)
        return failed

    def compile_() -> Any:
        start = time.perf_counter()
        return lowered.compile(options), round(time.perf_counter() - start, 2)

    return pool.submit(compile_)


def _check(row: Row, results: Arrays, exact: Arrays, bounds: Sequence[float]) -> None:
    """Holds the last image of one call's results against float32."""
    results = jax.device_get(_last(results))
    if row["implementation"] == DENSE and len(results) > 1:
        results = [results[0], np.stack(results[1:], 2)]
    names = ("out", "qkv", "rel_h", "rel_w")[: len(results)]
    errors = [_error(got, want) for got, want in zip(results, exact, strict=False)]
    row["errors"] = dict(zip(names, map(measure.digits, errors), strict=True))
    row["error_bounds"] = dict(zip(names, map(measure.digits, bounds), strict=False))
    for name, error in row["errors"].items():
        if not error <= row["error_bounds"][name]:  # NaN is not
            raise AssertionError(f"{name} errs by {error}; at most {row['error_bounds'][name]}.")


def _memory(found: Any, calls: int) -> dict[str, float]:
    sizes = {
        "arguments": found.argument_size_in_bytes / calls,
        "outputs": found.output_size_in_bytes / calls,
        "temporary": found.temp_size_in_bytes,  # one call's: the next one takes the same
    }
    return {name: measure.digits(size / 2**20) for name, size in sizes.items()}


def _work(shape: Shape, direction: str, limits: dict[str, float]) -> tuple[float, float, float]:
    """(floor in microseconds, flops, bytes) of one call at the least."""
    tokens = shape.batch * shape.size[0] * shape.size[1] * shape.heads
    rel = sum(shape.grid.group) if shape.rel else 0
    # Back: reads q, k, v, out, its cotangent, log-sum-exp and rel; writes the gradients.
    back = tokens * (2 * (8 * shape.head_dim + 2 * rel) + 4)
    passes = [(shape.flops, shape.bytes_moved()), (BACKWARD_FLOPS * shape.flops, back)]
    passes = passes[: 1 + DIRECTIONS.index(direction)]
    flops, moved = map(sum, zip(*passes, strict=True))
    floor = sum(max(f / limits["tflops"], b / limits["tb_s"]) / 1e6 for f, b in passes)
    return floor, flops, moved


def _rates(row: Row, shape: Shape, limits: dict[str, float]) -> Row:
    """What the time means: rate, share of the peak, floor."""
    floor, flops, moved = _work(shape, row["direction"], limits)
    rate = flops / row["median_us"] / 1e6
    found = {
        "tflops": rate,
        "peak_share": rate / limits["tflops"],
        "least_mib": moved / 2**20,
        "floor_us": floor,
        "floor_ratio": row["median_us"] / floor,
    }
    return {name: measure.digits(value) for name, value in found.items()}


def compare(rows: Sequence[Row]) -> None:
    """Adds to each timed row how much faster it is than cuDNN and than unfused attention."""
    timed = [row for row in rows if "median_us" in row]
    times = {(r["shape"], r["direction"], r["implementation"]): r["median_us"] for r in timed}
    for row in timed:
        for other in ("cudnn", UNFUSED):
            if (there := times.get((row["shape"], row["direction"], other))) is not None:
                row[f"speed_up_over_{other}"] = measure.digits(there / row["median_us"])


if __name__ == "__main__":
    main()

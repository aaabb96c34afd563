"""What each of JAX's primitives is in ONNX; a primitive that is not here is refused by its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import helper

from convert.to_onnx_graph import Graph, Shape, Value, broadcast, constant

CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}
SAME = {"stop_gradient", "name", "copy", "optimization_barrier"}
ELEMENTWISE = {
    **{name: name.capitalize() for name in ("add", "sub", "mul", "div", "max", "min", "and", "or")},
    **{name: name.capitalize() for name in ("exp", "log", "sin", "cos", "erf", "sqrt", "neg")},
    **{"gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual", "eq": "Equal"},
}
OPEN = {"broadcast_in_dim", "dim_as_value"}  # never computed now: too large, or not yet known
Rule = Callable[[Graph, Sequence[Value], Any, Mapping[str, Any]], Value]


def convert(graph: Graph, jaxpr: Any, constants: Sequence[Value], inputs: Sequence[Value]):
    """Adds a jaxpr's equations to the graph; the values of its outputs.

    Raises:
      NotImplementedError: a primitive, or a use of one, that these models do not have.
    """
    found = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

    def read(atom: Any) -> Value:
        if hasattr(atom, "val"):
            return constant(np.asarray(atom.val, atom.aval.dtype))
        return found[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        if name in CALLS:
            inner = eqn.params[CALLS[name]]
            results = convert(graph, inner.jaxpr, [constant(c) for c in inner.consts], values)
        elif name in SAME:
            results = values
        elif name == "unstack":
            results = _unstack(graph, eqn, values)
        else:
            results = [_result(graph, eqn, values)]
        found.update(zip(eqn.outvars, results, strict=True))
    return [graph.whole(read(atom), tuple(atom.aval.shape)) for atom in jaxpr.outvars]


def _result(graph: Graph, eqn: Any, values: Sequence[Value]) -> Value:
    """One equation's result: computed now where it can be, else a node's."""
    name, out = eqn.primitive.name, eqn.outvars[0]
    shapes = [tuple(atom.aval.shape) for atom in eqn.invars]
    static = all(isinstance(size, int) for shape in [*shapes, out.aval.shape] for size in shape)
    known = [x.array for x in values if x.array is not None]
    one = len(eqn.outvars) == 1
    if one and static and name not in OPEN and len(known) == len(values):
        arrays = [np.broadcast_to(x, s) for x, s in zip(known, shapes, strict=True)]
        label = next((x.name for x in values if x.name), "")
        return constant(eqn.primitive.bind(*arrays, **eqn.params), label)
    if name in ELEMENTWISE:
        return graph.node(ELEMENTWISE[name], values, broadcast([x.shape for x in values]))
    if name in LAZY:
        return LAZY[name](graph, values, out.aval, eqn.params)
    if name not in RULES:
        raise NotImplementedError(f"JAX's primitive {name!r} has no rule for ONNX: {eqn}")
    whole = [graph.whole(x, shape) for x, shape in zip(values, shapes, strict=True)]
    return RULES[name](graph, whole, out.aval, eqn.params)


def _broadcast_in_dim(graph: Graph, values: Sequence[Value], out: Any, params: Any) -> Value:
    (x,), kept = values, params["broadcast_dimensions"]
    shape = [1] * len(out.shape)
    for axis, size in zip(kept, x.shape or (1,) * len(kept), strict=True):
        shape[axis] = size
    return _reshaped(graph, x, tuple(shape))


def _select(graph: Graph, values: Sequence[Value], _out: Any, _params: Any) -> Value:
    which, no, yes = values
    if which.array is not None and not which.shape:
        return yes if which.array else no
    return graph.node("Where", [which, yes, no], broadcast([x.shape for x in values]))


def _square(graph: Graph, values: Sequence[Value], _out: Any, _params: Any) -> Value:
    return graph.node("Mul", [values[0], values[0]], values[0].shape)


def _rsqrt(graph: Graph, values: Sequence[Value], _out: Any, _params: Any) -> Value:
    root = graph.node("Sqrt", values, values[0].shape)
    return graph.node("Reciprocal", [root], values[0].shape)


def _cast(graph: Graph, values: Sequence[Value], out: Any, _params: Any) -> Value:
    to = helper.np_dtype_to_tensor_dtype(np.dtype(out.dtype))
    return graph.node("Cast", values, values[0].shape, to=to)


def _reshape(graph: Graph, values: Sequence[Value], out: Any, _params: Any) -> Value:
    return _reshaped(graph, values[0], tuple(out.shape))


def _reshaped(graph: Graph, x: Value, shape: Shape) -> Value:
    if x.array is not None:
        return constant(np.reshape(x.array, shape), x.name)
    sizes = []
    for axis, size in enumerate(shape):
        if isinstance(size, int):
            sizes.append(size)
        else:  # 0 keeps the axis, -1 is what is left
            sizes.append(0 if axis < len(x.shape) and bool(x.shape[axis] == size) else -1)
    several = sizes.count(-1) > 1
    sizes = graph.sizes(shape) if several else constant(np.array(sizes, np.int64))
    return graph.node("Reshape", [x, sizes], shape)


def _transposed(graph: Graph, x: Value, axes: Sequence[int]) -> Value:
    if list(axes) == sorted(axes):
        return x
    if x.array is not None:
        return constant(x.array.transpose(axes), x.name)
    return graph.node("Transpose", [x], [x.shape[a] for a in axes], perm=list(axes))


def _transpose(graph: Graph, values: Sequence[Value], _out: Any, params: Any) -> Value:
    return _transposed(graph, values[0], params["permutation"])


def _concatenate(graph: Graph, values: Sequence[Value], out: Any, params: Any) -> Value:
    return graph.node("Concat", values, out.shape, axis=params["dimension"])


def _stack(graph: Graph, values: Sequence[Value], out: Any, params: Any) -> Value:
    shape = tuple(1 if a == params["axis"] else size for a, size in enumerate(out.shape))
    parts = [_reshaped(graph, x, shape) for x in values]
    return graph.node("Concat", parts, out.shape, axis=params["axis"])


def _unstack(graph: Graph, eqn: Any, values: Sequence[Value]) -> list[Value]:
    axis, shapes = eqn.params["axis"], [tuple(out.aval.shape) for out in eqn.outvars]
    whole = graph.whole(values[0], tuple(eqn.invars[0].aval.shape))
    places = [constant(np.array(i, np.int64)) for i in range(len(shapes))]
    return [
        graph.node("Gather", [whole, place], shape, axis=axis)
        for place, shape in zip(places, shapes, strict=True)
    ]


def _reduce_sum(graph: Graph, values: Sequence[Value], out: Any, params: Any) -> Value:
    axes = constant(np.array(params["axes"], np.int64))
    return graph.node("ReduceSum", [values[0], axes], out.shape, keepdims=0)


def _reduce_max(graph: Graph, values: Sequence[Value], out: Any, params: Any) -> Value:
    return graph.node("ReduceMax", values, out.shape, axes=list(params["axes"]), keepdims=0)


def _argmax(graph: Graph, values: Sequence[Value], out: Any, params: Any) -> Value:
    (axis,) = params["axes"]
    found = graph.node("ArgMax", values, out.shape, axis=axis, keepdims=0)
    return _cast(graph, [found], out, params)


def _dot_general(graph: Graph, values: Sequence[Value], out: Any, params: Any) -> Value:
    (summed, batch) = params["dimension_numbers"]
    (x, free_x), (y, free_y) = (
        (v, [a for a in range(len(v.shape)) if a not in (*s, *b)])
        for v, s, b in zip(values, summed, batch, strict=True)
    )
    terms = math.prod(x.shape[a] for a in summed[0])
    x = _transposed(graph, x, [*batch[0], *free_x, *summed[0]])
    y = _transposed(graph, y, [*batch[1], *summed[1], *free_y])
    lead, right = x.shape[: len(batch[0])], y.shape[len(y.shape) - len(free_y) :]
    columns = math.prod(right)
    if lead or len(summed[0]) > 1:  # else MatMul takes any number of rows' axes
        rows = math.prod(x.shape[len(lead) : len(lead) + len(free_x)])
        x = _as(graph, x, (*lead, rows, terms))
    y = _as(graph, y, (*lead, terms, columns))
    product = graph.node("MatMul", [x, y], (*x.shape[:-1], columns))
    return _as(graph, product, tuple(out.shape))


def _as(graph: Graph, x: Value, shape: Shape) -> Value:
    same = len(shape) == len(x.shape) and all(a == b for a, b in zip(shape, x.shape, strict=True))
    return x if same else _reshaped(graph, x, shape)


def _conv(graph: Graph, values: Sequence[Value], out: Any, params: Any) -> Value:
    numbers = params["dimension_numbers"]
    if set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1:
        raise NotImplementedError("A transposed or batch-grouped convolution in ONNX.")
    x = _transposed(graph, values[0], numbers.lhs_spec)
    kernel = _transposed(graph, values[1], numbers.rhs_spec)
    low, high = zip(*params["padding"], strict=True)
    y = graph.node(
        "Conv",
        [x, kernel],
        [out.shape[a] for a in numbers.out_spec],
        strides=[int(s) for s in params["window_strides"]],
        pads=[int(p) for p in (*low, *high)],
        dilations=[int(d) for d in params["rhs_dilation"]],
        group=int(params["feature_group_count"]),
    )
    return _transposed(graph, y, [int(a) for a in np.argsort(numbers.out_spec)])


def _pad(graph: Graph, values: Sequence[Value], out: Any, params: Any) -> Value:
    low, high, between = zip(*params["padding_config"], strict=True)
    if min(*low, *high) < 0 or any(between):
        raise NotImplementedError(f"The padding {params['padding_config']} in ONNX.")
    pads = constant(np.array([*low, *high], np.int64))
    return graph.node("Pad", [values[0], pads, values[1]], out.shape)


def _slice(graph: Graph, values: Sequence[Value], out: Any, params: Any) -> Value:
    strides = params["strides"] or (1,) * len(out.shape)
    return _sliced(graph, values[0], params["start_indices"], strides, out.shape)


def _sliced(
    graph: Graph, x: Value, starts: Sequence[int], strides: Sequence[int], shape: Shape
) -> Value:
    """Every axis from its start in its steps, until it has its length in `shape`."""
    cut = [a for a, (size, old) in enumerate(zip(shape, x.shape, strict=True)) if size != old]
    ends = [starts[a] + (shape[a] - 1) * strides[a] + 1 for a in cut]
    parts = [[starts[a] for a in cut], ends, cut, [strides[a] for a in cut]]
    vectors = [constant(np.array(part, np.int64)) for part in parts]
    return graph.node("Slice", [x, *vectors], shape)


def _dynamic_slice(graph: Graph, values: Sequence[Value], out: Any, params: Any) -> Value:
    starts = [int(x.array) for x in values[1:] if x.array is not None]
    if len(starts) < len(values) - 1:
        raise NotImplementedError(f"A slice of {params['slice_sizes']} from open places in ONNX.")
    return _sliced(graph, values[0], starts, [1] * len(starts), tuple(out.shape))


def _dim_as_value(_graph: Graph, _values: Sequence[Value], _out: Any, params: Any) -> Value:
    # Only for the choice "a negative index counts from the end", which a constant then decides; a
    # model that did use it would fail the checker.
    return Value((), f"the size {params['dim']}")


def _squeeze(graph: Graph, values: Sequence[Value], out: Any, _params: Any) -> Value:
    return _reshaped(graph, values[0], tuple(out.shape))


def _gather(graph: Graph, values: Sequence[Value], out: Any, params: Any) -> Value:
    (x, indices), numbers, sizes = values, params["dimension_numbers"], params["slice_sizes"]
    axes, gone = numbers.start_index_map, numbers.collapsed_slice_dims
    whole = [a for a, (size, old) in enumerate(zip(sizes, x.shape, strict=True)) if size == old]
    if not gone and indices.array is not None and indices.array.ndim == 1:
        starts = [0] * len(x.shape)
        for axis, start in zip(axes, indices.array, strict=True):
            starts[axis] = int(start)
        return _sliced(graph, x, starts, [1] * len(starts), tuple(out.shape))
    places = len(indices.shape) - 1
    (axis,) = axes if len(axes) == 1 else (None,)
    offsets = [a for a in range(len(out.shape)) if not (axis or 0) <= a < (axis or 0) + places]
    others = [a for a in range(len(x.shape)) if a != axis]
    if axis is None or gone != (axis,) or list(numbers.offset_dims) != offsets:
        raise NotImplementedError(f"The gather {numbers} in ONNX.")
    if not set(others) <= set(whole):
        raise NotImplementedError(f"A gather of slices of {sizes} of {x.shape} in ONNX.")
    indices = _reshaped(graph, indices, indices.shape[:-1])
    return graph.node("Gather", [x, indices], out.shape, axis=axis)


LAZY: Mapping[str, Rule] = {  # these leave broadcasting to whoever needs it
    "broadcast_in_dim": _broadcast_in_dim,
    "select_n": _select,
    "square": _square,
    "rsqrt": _rsqrt,
    "convert_element_type": _cast,
    "transpose": _transpose,
    "dim_as_value": _dim_as_value,
}
RULES: Mapping[str, Rule] = {
    "reshape": _reshape,
    "concatenate": _concatenate,
    "stack": _stack,
    "reduce_sum": _reduce_sum,
    "reduce_max": _reduce_max,
    "argmax": _argmax,
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "pad": _pad,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "squeeze": _squeeze,
    "gather": _gather,
}

"""A jaxpr to an ONNX graph: constants are folded, sizes chosen at each call stay open.

Written here, since jax2onnx 0.17 takes the length of a concatenation for its first part's where
another part is open, has no word for some of these models' primitives, and cannot be installed
beside this project's orbax.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from samlight_jax.export import Port

OPSET, IR_VERSION = 17, 8  # what front ends of 2022 on read
Shape = tuple[Any, ...]  # of whole numbers and JAX's symbolic dimensions


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor of the graph (`name`) or a constant (`array`).

    Attributes:
      shape: what the tensor really has. An axis of 1 may stand for a longer one: broadcasting is
        left to the operators, as long as they do it.
      name: in the graph; of a constant, what to call it.
      array: of a constant.
    """

    shape: Shape
    name: str = ""
    array: np.ndarray | None = None


def constant(array: Any, name: str = "") -> Value:
    """A constant."""
    array = np.asarray(array)
    return Value(array.shape, name, array)


class Graph:
    """Nodes in the order in which they run, and the constants that they take."""

    def __init__(self, inputs: Sequence[Port], avals: Sequence[Any]):
        self.inputs = [
            helper.make_tensor_value_info(p.name, _element(p.dtype), list(p.shape)) for p in inputs
        ]
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._names: dict[str, int] = {}
        self._sizes: dict[str, Value] = {}
        self._axes = {
            str(size): (port.name, axis)
            for port, aval in zip(inputs, avals, strict=True)
            for axis, size in reversed(list(enumerate(aval.shape)))
            if not isinstance(size, int)
        }
        self.arguments = [Value(tuple(a.shape), p.name) for p, a in zip(inputs, avals, strict=True)]

    def node(
        self, op: str, inputs: Sequence[Value | None], shape: Sequence[Any], **attributes: Any
    ) -> Value:
        """Adds a node of one output, which has `shape`."""
        name = self._fresh(op)
        names = ["" if x is None else self.name(x) for x in inputs]
        self.nodes.append(helper.make_node(op, names, [name], name=name, **attributes))
        return Value(tuple(shape), name)

    def name(self, value: Value) -> str:
        """A value's name in the graph; constants of equal content are stored once."""
        if value.array is None:
            return value.name
        array = np.ascontiguousarray(value.array)
        array = array.astype(array.dtype.newbyteorder("="))
        key = f"{array.dtype} {value.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
        if key not in self._constants:
            name = self._fresh(value.name or "constant")
            self._constants[key] = numpy_helper.from_array(array.reshape(value.shape), name)
        return self._constants[key].name

    def _fresh(self, stem: str) -> str:
        count = self._names[stem] = self._names.get(stem, -1) + 1
        return f"{stem}_{count}" if count else stem

    def whole(self, value: Value, shape: Shape) -> Value:
        """The value with every axis as long as `shape` says."""
        if len(value.shape) == len(shape) and all(map(_same, value.shape, shape)):
            return value
        if value.array is not None and all(isinstance(size, int) for size in shape):
            return constant(np.broadcast_to(value.array, shape), value.name)
        grows = [not _same(a, b) for a, b in _aligned(value.shape, shape)]
        sizes = [size if grow else 1 for size, grow in zip(shape, grows, strict=True)]
        return self.node("Expand", [value, self.sizes(sizes)], shape)

    def sizes(self, shape: Sequence[Any]) -> Value:
        """A shape as a tensor of int64: where it is open, read off the inputs' axes."""
        parts = [self._size(size) for size in shape]
        return self.node("Concat", parts, (len(parts),), axis=0)

    def _size(self, size: Any) -> Value:
        if isinstance(size, int):
            return constant(np.array([size], np.int64))
        if str(size) not in self._sizes:
            self._sizes[str(size)] = self._read(size)
        return self._sizes[str(size)]

    def _read(self, size: Any) -> Value:
        """An open size, an input's axis or so much more: "n", "n + 5"."""
        axis_size, _, more = str(size).partition(" + ")
        if axis_size not in self._axes or (more and not more.isdigit()):
            raise NotImplementedError(f"No input has an axis of {size}.")
        name, axis = self._axes[axis_size]
        found = self.node("Shape", [Value((), name)], (1,), start=axis, end=axis + 1)
        return self.node("Add", [found, constant([int(more)])], (1,)) if more else found

    def model(self, outputs: Sequence[tuple[Port, Value]]) -> onnx.ModelProto:
        """The ONNX model; what no output needs is left out."""
        for port, value in outputs:
            names = [self.name(value)]
            self.nodes.append(helper.make_node("Identity", names, [port.name], name=port.name))
        needed, nodes = {port.name for port, _ in outputs}, []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                nodes.append(node)
        results = [
            helper.make_tensor_value_info(p.name, _element(p.dtype), list(p.shape))
            for p, _ in outputs
        ]
        constants = [t for t in self._constants.values() if t.name in needed]
        graph = helper.make_graph(nodes[::-1], "samlight", self.inputs, results, constants)
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
        model.producer_name = "samlight-jax"
        return model


def _element(dtype: Any) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _same(a: Any, b: Any) -> bool:
    return bool(a == b)


def _aligned(short: Shape, long: Shape) -> list[tuple[Any, Any]]:
    return list(zip((1,) * (len(long) - len(short)) + short, long, strict=True))


def broadcast(shapes: Sequence[Shape]) -> Shape:
    """The shape of an operator's result that broadcasts."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(
        next((size for size in sizes if not _same(size, 1)), 1)
        for sizes in zip(*padded, strict=True)
    )

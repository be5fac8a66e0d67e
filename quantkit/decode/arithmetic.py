"""Float operators that stand in for a node: the graph being written, and the blocks of an axis."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir


class Arithmetic:
    """Operators written in front of a node, which they are to replace.

    Args:
        node: the node.
        taken: names in use in the model; new ones are added.
    """

    def __init__(self, node: ir.Node, taken: set[str]) -> None:
        assert isinstance(node.graph, ir.Graph)
        self.node, self.graph = node, node.graph
        self._taken = taken

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: int | np.ndarray) -> ir.Value:
        """Write an operator and return its output."""
        made = {k: ir.tensor(v) if isinstance(v, np.ndarray) else v for k, v in attributes.items()}
        node = ir.node(op_type, list(inputs), attributes=made, name=self._free_name(op_type))
        node.outputs[0].name = node.name
        self.graph.insert_before(self.node, node)
        return node.outputs[0]

    def constant(self, array: np.ndarray) -> ir.Value:
        """Write a constant."""
        return self.stored(ir.tensor(array))

    def floats(self, value: float) -> ir.Value:
        """Write a float32 scalar."""
        return self.constant(np.asarray(value, np.float32))

    def doubles(self, value: float) -> ir.Value:
        """Write a float64 scalar."""
        return self.constant(np.asarray(value, np.float64))

    def integers(self, *values: int) -> ir.Value:
        """Write an int64 vector."""
        return self.constant(np.asarray(values, np.int64))

    def stored(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Enter a tensor as an initializer."""
        name = self._free_name("constant")
        tensor.name = name
        value = ir.Value(
            name=name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Write a Cast, unless the value is of that type."""
        return value if value.dtype == dtype else self.typed(self.op("Cast", value, to=int(dtype)), dtype)

    def typed(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Say what type a value has."""
        value.type = ir.TensorType(dtype)
        return value

    def reduce_max(self, value: ir.Value, axis: int) -> ir.Value:
        """Write the greatest value along an axis, which stays with length 1."""
        return self.op("ReduceMax", value, self.integers(axis), keepdims=1)

    def replace(self, *values: ir.Value) -> None:
        """Let `values` stand for the node's outputs, under their names, and drop the node."""
        for old, new in zip(self.node.outputs, values, strict=True):
            name, shape = old.name, old.shape
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            old.name = None
            if not new.is_initializer() and new.producer() is not None:
                new.name = name
                new.shape = shape if new.shape is None else new.shape
        self.graph.remove(self.node, safe=True)

    def _free_name(self, op_type: str) -> str:
        name, number = f"{self.node.name}::{op_type}", 1
        while name in self._taken:
            number += 1
            name = f"{self.node.name}::{op_type}_{number}"
        self._taken.add(name)
        return name


def in_blocks(
    a: Arithmetic, value: ir.Value, axis: int, size: int
) -> tuple[ir.Value, Callable[[ir.Value], ir.Value]]:
    """Cut an axis of a float32 tensor into blocks: (…, K, …) → (…, ⌈K / size⌉, size, …), and how to undo it.

    A short last block is filled up with zeros, which undoing cuts off again. Nothing but the axis is known of the
    shape while this is written: it is all computed as the model runs.
    """
    before = a.op("Shape", value, start=0, end=axis)
    length = _length(a, value, axis)
    after = None if axis == -1 else a.op("Shape", value, start=axis + 1)
    whole = value
    if not _divides(value, axis, size):
        missing = a.op("Mod", a.op("Neg", length), a.integers(size))
        zeros = a.op("ConstantOfShape", _joined(a, before, missing, after))
        whole = a.op("Concat", value, zeros, axis=axis)
    blocks = a.op("Reshape", whole, _joined(a, before, a.integers(-1, size), after))

    def undo(found: ir.Value) -> ir.Value:
        flat = a.op("Reshape", found, _joined(a, before, a.integers(-1), after))
        if whole is value:
            return flat
        return a.op("Slice", flat, a.integers(0), length, a.integers(axis))

    return blocks, undo


def inner_axis(axis: int) -> int:
    """The axis that runs within a block, of a tensor whose `axis` was cut into blocks."""
    return axis + 1 if axis >= 0 else axis


def across(a: Arithmetic, vector: ir.Value, value: ir.Value, axis: int) -> ir.Value:
    """Shape a vector of one number an index of `axis` so that it broadcasts against `value`, of whatever rank."""
    if axis == -1:
        return vector
    rank_behind = a.op("Shape", a.op("Shape", value, start=axis + 1))
    ones = a.op("ConstantOfShape", rank_behind, value=np.ones(1, np.int64))
    return a.op("Reshape", vector, a.op("Concat", a.integers(-1), ones, axis=0))


def _length(a: Arithmetic, value: ir.Value, axis: int) -> ir.Value:
    if axis == -1:
        return a.op("Shape", value, start=axis)
    return a.op("Shape", value, start=axis, end=axis + 1)


def _divides(value: ir.Value, axis: int, size: int) -> bool:
    length = None if value.shape is None else value.shape[axis]
    return isinstance(length, int) and length % size == 0


def _joined(a: Arithmetic, *parts: ir.Value | None) -> ir.Value:
    return a.op("Concat", *(part for part in parts if part is not None), axis=0)

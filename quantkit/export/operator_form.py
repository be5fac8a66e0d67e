"""Turning a model with Q/DQ pairs into operators that work on codes themselves.

Three things happen to a graph, each exact by itself:

- `Q(op(DQ(a), DQ(b)))` becomes one operator on codes, where ONNX Runtime has it. What stands between `op` and `Q` and
  does not decrease moves behind the `Q`: a Relu or Clip limits codes, since Q(clip(x, l, h)) = clip(Q(x), Q(l), Q(h)),
  and is dropped where Q(l) and Q(h) are the least and the greatest code anyway; MaxPool, Reshape and their like
  handle codes as they do floats, so a `DQ` before them moves behind them too.
- `op(DQ(a), DQ(b))` with a float output becomes an integer product that is scaled behind.
- Any other node keeps its DequantizeLinear and QuantizeLinear.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from quantkit.export.integer_operators import Codes, array, codes_of, integer_operator, same_scale
from quantkit.export.operator_products import ProductWriter

# What handles codes as it handles floats, in its first input.
_MOVES = frozenset({"Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_LIMITS = frozenset({"Relu", "Clip"})
_FLOAT = ir.DataType.FLOAT


def to_operator_form(model: ir.Model, quantizers: Sequence[str]) -> None:
    """Rewrite a model in place.

    The codes of a tensor whose floats are computed no more are called `<tensor>_quantized`.

    Args:
        model: a model whose weights and biases are stored as codes behind DequantizeLinear.
        quantizers: the QuantizeLinear nodes that operators may take in.
    """
    writer = _OperatorWriter(model)
    for name in quantizers:
        for user, _ in list(writer.nodes[name].outputs[0].uses()):
            if user.op_type == "DequantizeLinear":
                writer.move_codes(user)
    for name in quantizers:
        writer.take_in(writer.nodes[name])
    for node in list(model.graph):
        if node.domain == "" and node.op_type in ("Conv", "Gemm", "MatMul"):
            writer.multiply(node)
    for node in reversed(model.graph):
        value = node.outputs[0]
        if node.op_type == "DequantizeLinear" and not value.uses() and not value.is_graph_output():
            model.graph.remove(node, safe=True)
    writer.drop_unused_initializers()


def codes_name(tensor: str) -> str:
    """Return what the codes of a tensor are called, unless something else has that name; then "_" follows."""
    return f"{tensor}_quantized"


class _OperatorWriter(ProductWriter):
    """Lets nodes compute codes, and moves what stands between them and their quantizers."""

    def __init__(self, model: ir.Model) -> None:
        super().__init__(model)
        # Codes that are to be named: the graph gives every value some name when its node comes in.
        self._unnamed: set[ir.Value] = set()

    def move_codes(self, dequantizer: ir.Node) -> None:
        """Let what only moves a dequantized tensor's elements move its codes, and dequantize behind it."""
        for user, index in list(dequantizer.outputs[0].uses()):
            if user.op_type not in _MOVES or index != 0 or not _does_not_decrease(user):
                continue
            codes, moved = dequantizer.inputs[0], user.outputs[0]
            assert codes is not None and codes.dtype is not None
            name = str(moved.name)
            node = ir.node(
                user.op_type, [codes, *user.inputs[1:]], attributes=dict(user.attributes), name=user.name
            )
            node.outputs[0].shape, node.outputs[0].type = moved.shape, ir.TensorType(codes.dtype)
            behind = self.node(
                "DequantizeLinear", name, [node.outputs[0], *dequantizer.inputs[1:]], {}, _FLOAT
            )
            behind.outputs[0].name, behind.outputs[0].shape = name, moved.shape
            ir.convenience.replace_nodes_and_values(
                self.model.graph, user, [user], [node, behind], [moved], [behind.outputs[0]]
            )
            node.outputs[0].name = self._free_name(codes_name(name))
            self.values[str(node.outputs[0].name)] = node.outputs[0]
            self.move_codes(behind)

    def take_in(self, quantizer: ir.Node) -> None:
        """Let the node before a QuantizeLinear compute its codes, where it can."""
        value, codes = quantizer.inputs[0], quantizer.outputs[0]
        assert codes.dtype is not None
        scale, zero = quantizer.inputs[1], quantizer.inputs[2]
        assert scale is not None and zero is not None
        y = Codes(value=codes, scale=scale, zero_point=zero, axis=None)
        behind: list[ir.Node] = []
        while True:
            stored = codes_of(value)
            if stored is not None and stored.axis is None and same_scale(stored, y):
                if all(node.op_type in _MOVES for node in behind):
                    self._replace(quantizer, stored.value, behind, y)
                return
            top = None if value is None else _only_maker(value)
            if top is None:
                return
            if not _does_not_decrease(top):
                break
            behind.append(top)
            value = top.inputs[0]
        operator = integer_operator(top, y)
        if operator is None:
            return
        made = self.make(operator, top, codes.dtype)
        self.model.graph.insert_before(quantizer, made)
        self._unnamed.add(made.outputs[0])
        self._replace(quantizer, made.outputs[0], [*behind, top], y)

    def _replace(self, quantizer: ir.Node, codes: ir.Value, old: Sequence[ir.Node], y: Codes) -> None:
        """Put codes, behind what limits or moves them, in the place of a quantizer's; `old` is removed, last first."""
        graph, dtype = self.model.graph, quantizer.outputs[0].dtype
        assert dtype is not None
        for mover in reversed(old):
            if not _does_not_decrease(mover):
                continue
            inputs = self._limits(mover, y) if mover.op_type in _LIMITS else list(mover.inputs[1:])
            if inputs is None:
                continue
            self._name(codes, mover.inputs[0])
            op_type = "Clip" if mover.op_type in _LIMITS else mover.op_type
            attributes = {} if mover.op_type in _LIMITS else dict(mover.attributes)
            node = ir.node(op_type, [codes, *inputs], attributes=attributes, name=mover.name)
            graph.insert_before(quantizer, node)
            codes = node.outputs[0]
            codes.shape, codes.type = mover.outputs[0].shape, ir.TensorType(dtype)
            self._unnamed.add(codes)
        self._name(codes, quantizer.inputs[0])
        quantizer.outputs[0].replace_all_uses_with(codes)
        for node in (quantizer, *old):
            graph.remove(node, safe=True)

    def _name(self, codes: ir.Value, tensor: ir.Value | None) -> None:
        """Name codes after the tensor that they are of, unless they have a name."""
        if codes in self._unnamed and tensor is not None:
            codes.name = self._free_name(codes_name(str(tensor.name)))
            self.values[codes.name] = codes
            self._unnamed.remove(codes)

    def _limits(self, node: ir.Node, y: Codes) -> list[ir.Value | None] | None:
        """Return the codes between which a Relu or Clip lets codes be; None where it lets all be."""
        dtype = y.value.dtype
        assert dtype is not None
        ends = np.iinfo(dtype.numpy())
        low, high = _bounds(node)
        least, greatest = (_quantized(end, y, ends) for end in (low, high))
        if (least, greatest) == (ends.min, ends.max):
            return None
        named = (f"{node.name}_least", least), (f"{node.name}_greatest", greatest)
        return [self.constant(name, np.asarray(end), dtype) for name, end in named]


def _only_maker(value: ir.Value) -> ir.Node | None:
    """The node that computes a tensor which nothing else reads; None where others need it."""
    if value.is_graph_output() or len(value.uses()) != 1:
        return None
    return value.producer()


def _does_not_decrease(node: ir.Node) -> bool:
    """Whether quantizing what a node reads, and then doing on codes what it does, gives its output's codes."""
    if node.domain != "" or len([v for v in node.outputs if v.name]) != 1:
        return False
    if node.op_type == "Clip":
        return all(v is None or v.const_value is not None for v in node.inputs[1:])
    return node.op_type in _MOVES or node.op_type in _LIMITS


def _bounds(node: ir.Node) -> tuple[float, float]:
    if node.op_type == "Relu":
        return 0.0, float("inf")
    given: list[ir.Value | None] = [*node.inputs[1:], None, None][:2]
    low, high = (None if v is None else float(array(v).item()) for v in given)
    return -float("inf") if low is None else low, float("inf") if high is None else high


def _quantized(x: float, y: Codes, ends: "np.iinfo[np.integer[np.typing.NBitBase]]") -> int:
    """The code of one number, as QuantizeLinear finds it: the quotient in float32, ties to even."""
    if np.isinf(x):
        return int(ends.max if x > 0 else ends.min)
    quotient = np.rint(np.float32(x) / np.float32(array(y.scale).item()))
    return int(np.clip(float(quotient) + float(array(y.zero_point).item()), ends.min, ends.max))

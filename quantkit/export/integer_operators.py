"""Which operator of ONNX Runtime computes a node's codes from the codes of what it reads.

Of ONNX: QLinearConv, QLinearMatMul. Of com.microsoft: QGemm, QLinearAdd, QLinearMul, QLinearConcat,
QLinearAveragePool, QLinearGlobalAveragePool, QLinearLeakyRelu, QLinearSigmoid. Their kernels add up in int32 or float32
and round once, to the nearest code, ties to even, as QuantizeLinear does; in another order of float operations, so a
sum that lies within 1e-4 of a boundary may fall on its other side.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

CONTRIB = "com.microsoft"
_UINT8, _INT8 = ir.DataType.UINT8, ir.DataType.INT8


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A tensor as codes: x = (value − zero_point) · scale.

    Attributes:
        value: the codes.
        scale: float32, stored; one along `axis`, or one in all.
        zero_point: of the codes' type, stored.
        axis: None for one scale.
    """

    value: ir.Value
    scale: ir.Value
    zero_point: ir.Value
    axis: int | None

    @property
    def inputs(self) -> list[ir.Value | None]:
        """Codes, scale and zero point, in the order that most operators take them."""
        return [self.value, self.scale, self.zero_point]


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A node that is to be."""

    op_type: str
    domain: str
    inputs: list[ir.Value | None]
    attributes: Mapping[str, ir.Attr]


def codes_of(value: ir.Value | None) -> Codes | None:
    """Return the codes that a DequantizeLinear turns into the float32 tensor `value`; None where none does."""
    node = None if value is None else value.producer()
    if (
        node is None
        or (node.domain, node.op_type) != ("", "DequantizeLinear")
        or len(node.inputs) < 3
        or "block_size" in node.attributes
    ):
        return None
    codes, scale, zero = node.inputs[:3]
    if codes is None or scale is None or zero is None or codes.dtype not in (_UINT8, _INT8):
        return None
    # Kernels read scales and zero points when they are made.
    if scale.const_value is None or scale.dtype != ir.DataType.FLOAT or zero.const_value is None:
        return None
    axis = None
    if scale.shape is not None and len(scale.shape):
        given = node.attributes.get("axis")
        rank = len(codes.shape) if codes.shape is not None else 0
        axis = (1 if given is None else given.as_int()) % max(rank, 1)
    return Codes(value=codes, scale=scale, zero_point=zero, axis=axis)


def activation(value: ir.Value | None) -> Codes | None:
    """Return a tensor's codes where they are uint8 under one scale, which all kernels take."""
    found = codes_of(value)
    return found if found is not None and found.axis is None and found.value.dtype == _UINT8 else None


def factor(value: ir.Value | None, axes: tuple[int, ...]) -> Codes | None:
    """Return the codes of what an activation is multiplied by: under one scale, or symmetric along one of `axes`."""
    found = codes_of(value)
    if found is None or found.axis is None:
        return found
    return found if found.axis in axes and not np.any(array(found.zero_point)) else None


def array(value: ir.Value) -> np.ndarray:
    """Return what a stored tensor holds."""
    assert value.const_value is not None
    return value.const_value.numpy()


def same_scale(first: Codes, second: Codes) -> bool:
    """Tell whether equal codes of both mean equal numbers."""
    return first.value.dtype == second.value.dtype and all(
        a is b or np.array_equal(array(a), array(b))
        for a, b in ((first.scale, second.scale), (first.zero_point, second.zero_point))
    )


def integer_bias(value: ir.Value | None, x: Codes, w: Codes) -> tuple[bool, ir.Value | None]:
    """Return whether sums of products of x and w can take this bias as int32, and its codes; None for no bias."""
    if value is None:
        return True, None
    node = value.producer()
    if node is None or (node.domain, node.op_type) != ("", "DequantizeLinear") or len(node.inputs) != 2:
        return False, None
    codes, scale = node.inputs
    if codes is None or scale is None or codes.dtype != ir.DataType.INT32 or scale.const_value is None:
        return False, None
    return np.array_equal(array(scale), array(x.scale) * array(w.scale)), codes


def weight_of(node: ir.Node) -> Codes | None:
    """Return what a convolution, a MatMul or a Gemm multiplies its input by, where kernels take it.

    Scales lie along output channels: axis 0 of a convolution's weight, the last of a matrix.
    """
    right = node.inputs[1]
    if node.op_type == "Conv":
        return factor(right, (0,))
    if node.op_type == "Gemm":
        return factor(right, (0 if int_attribute(node, "transB") else 1,))
    found = codes_of(right)
    if found is None or found.value.shape is None or len(found.value.shape) < 2:
        return None
    return factor(right, (len(found.value.shape) - 1,))


def integer_operator(node: ir.Node, y: Codes) -> Operator | None:
    """Return what computes the codes of a node's output, as `y` wants them; None where ONNX Runtime has nothing.

    Args:
        node: a node of the graph.
        y: its output's scale and zero point; the value stands for the type alone.
    """
    make = _OPERATORS.get(node.op_type) if node.domain == "" else None
    return None if make is None or y.value.dtype != _UINT8 else make(node, y)


def int_attribute(node: ir.Node, name: str, default: int = 0) -> int:
    """Return an attribute, or what it is where it is left out."""
    return node.attributes[name].as_int() if name in node.attributes else default


def _convolution(node: ir.Node, y: Codes) -> Operator | None:
    x, w = activation(node.inputs[0]), weight_of(node)
    if x is None or w is None:
        return None
    fits, bias = integer_bias(node.inputs[2] if len(node.inputs) > 2 else None, x, w)
    if not fits:
        return None
    inputs = [*x.inputs, *w.inputs, *y.inputs[1:], *([] if bias is None else [bias])]
    return _operator("QLinearConv", inputs, node.attributes, domain="")


def _product(node: ir.Node, y: Codes) -> Operator | None:
    a, b = activation(node.inputs[0]), weight_of(node)
    # It takes scales of the columns of a matrix, not of batches of them.
    batched = b is not None and b.value.shape is not None and len(b.value.shape) > 2
    if a is None or b is None or (batched and b.axis is not None):
        return None
    return _operator("QLinearMatMul", [*a.inputs, *b.inputs, *y.inputs[1:]], {}, domain="")


def _gemm(node: ir.Node, y: Codes) -> Operator | None:
    a, b = activation(node.inputs[0]), weight_of(node)
    if a is None or b is None:
        return None
    fits, bias = integer_bias(node.inputs[2] if len(node.inputs) > 2 else None, a, b)
    if not fits:
        return None
    return _operator("QGemm", [*a.inputs, *b.inputs, bias, *y.inputs[1:]], gemm_attributes(node))


def gemm_attributes(node: ir.Node) -> dict[str, ir.Attr]:
    """Return the attributes of a Gemm that QGemm has too."""
    return {name: node.attributes[name] for name in ("alpha", "transA", "transB") if name in node.attributes}


def _elementwise(op_type: str) -> Callable[[ir.Node, Codes], Operator | None]:
    def make(node: ir.Node, y: Codes) -> Operator | None:
        a, b = activation(node.inputs[0]), activation(node.inputs[1])
        if a is None or b is None:
            return None
        return _operator(op_type, [*a.inputs, *b.inputs, *y.inputs[1:]], {})

    return make


def _unary(op_type: str, *attributes: str) -> Callable[[ir.Node, Codes], Operator | None]:
    def make(node: ir.Node, y: Codes) -> Operator | None:
        x = activation(node.inputs[0])
        if x is None or node.attributes.keys() - set(attributes):
            return None
        return _operator(op_type, [*x.inputs, *y.inputs[1:]], node.attributes)

    return make


def _average(node: ir.Node, y: Codes) -> Operator | None:
    # It has no dilations, and its ceil_mode is that of older operator sets.
    if int_attribute(node, "ceil_mode") or any(d != 1 for d in _ints(node, "dilations")):
        return None
    found = _unary("QLinearAveragePool", *_POOLING, "ceil_mode", "dilations")(node, y)
    if found is None:
        return None
    attributes = {name: a for name, a in found.attributes.items() if name in _POOLING}
    return _operator(found.op_type, found.inputs, attributes)


def _concatenation(node: ir.Node, y: Codes) -> Operator | None:
    parts = [activation(value) for value in node.inputs]
    known = [part for part in parts if part is not None]
    if len(known) != len(parts):
        return None
    if all(same_scale(part, y) for part in known):
        return _operator("Concat", [part.value for part in known], node.attributes, domain="")
    inputs = y.inputs[1:] + [value for part in known for value in part.inputs]
    return _operator("QLinearConcat", inputs, node.attributes)


def _operator(
    op_type: str, inputs: list[ir.Value | None], attributes: Mapping[str, ir.Attr], domain: str = CONTRIB
) -> Operator:
    return Operator(op_type=op_type, domain=domain, inputs=inputs, attributes=dict(attributes))


def _ints(node: ir.Node, name: str) -> tuple[int, ...]:
    return tuple(node.attributes[name].as_ints()) if name in node.attributes else ()


_POOLING = ("auto_pad", "count_include_pad", "kernel_shape", "pads", "strides")
_OPERATORS: Mapping[str, Callable[[ir.Node, Codes], Operator | None]] = {
    "Add": _elementwise("QLinearAdd"),
    "AveragePool": _average,
    "Concat": _concatenation,
    "Conv": _convolution,
    "Gemm": _gemm,
    "GlobalAveragePool": _unary("QLinearGlobalAveragePool"),
    "LeakyRelu": _unary("QLinearLeakyRelu", "alpha"),
    "MatMul": _product,
    "Mul": _elementwise("QLinearMul"),
    "Sigmoid": _unary("QLinearSigmoid"),
}

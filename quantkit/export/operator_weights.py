"""Reading the weight of an operator on codes as the floats that it stands for."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from quantkit.export.integer_operators import array, int_attribute

# Operator → {which factor it is: where its codes, scale and zero point are}. Those that put out sums of codes have
# their scales in a product behind them.
_SLOTS: Mapping[str, Mapping[int, tuple[int, int | None, int]]] = {
    "ConvInteger": {1: (1, None, 3)},
    "MatMulInteger": {0: (0, None, 2), 1: (1, None, 3)},
    "MatMulIntegerToFloat": {0: (0, 2, 4), 1: (1, 3, 5)},
    "QGemm": {1: (3, 4, 5)},
    "QLinearConv": {1: (3, 4, 5)},
    "QLinearMatMul": {0: (0, 1, 2), 1: (3, 4, 5)},
}


def works_on_codes(node: ir.Node) -> bool:
    """Tell whether a node multiplies codes."""
    return node.op_type in _SLOTS


def stored_factor(node: ir.Node, index: int) -> np.ndarray | None:
    """Return what a node that multiplies codes has for the factor `index` of the node that it stands for, as float32.

    None where that is not stored.
    """
    slots = _SLOTS[node.op_type].get(index)
    if slots is None:
        return None
    codes, scale, zero = (None if slot is None else _input(node, slot) for slot in slots)
    if slots[1] is None:
        scale = _scale_behind(node)
    if codes is None or codes.const_value is None or scale is None or scale.const_value is None:
        return None
    values = array(codes).astype(np.float32)
    if zero is not None:
        values -= _along(node, array(zero).astype(np.float32), values.ndim)
    values *= _along(node, array(scale), values.ndim)
    return values


def _along(node: ir.Node, numbers: np.ndarray, rank: int) -> np.ndarray:
    """One number a channel, in a shape that multiplies the weight."""
    first = "Conv" in node.op_type or (node.op_type == "QGemm" and int_attribute(node, "transB"))
    return numbers.reshape(-1, *[1] * (rank - 1)) if first else numbers


def _scale_behind(node: ir.Node) -> ir.Value | None:
    """The second of the two scales that sums of products are multiplied by."""
    value = node.outputs[0]
    while len(value.uses()) == 1:
        user = next(iter(value.uses())).node
        if user.op_type == "Mul":
            product = None if user.inputs[1] is None else user.inputs[1].producer()
            return None if product is None or product.op_type != "Mul" else product.inputs[1]
        if user.op_type not in ("Add", "Cast"):
            return None
        value = user.outputs[0]
    return None


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None

"""Quantizing and dequantizing nodes that ONNX Runtime has no kernels for, written as float operators.

A tensor of a type that ONNX Runtime lacks becomes a float32 tensor of the values that its codes stand for: 1.5, not
the code 3. So every operator is rewritten by itself, whatever stands before and behind it, and those that only move
values need no rewriting at all.
"""

import onnx_ir as ir

from quantkit.decode import rounding
from quantkit.decode.arithmetic import Arithmetic, across, in_blocks, inner_axis
from quantkit.decode.capability import (
    TENSORRT_DOMAIN,
    is_matmul_nbits,
    is_quantized_gather,
)
from quantkit.decode.constants import NO_TYPES, output_type
from quantkit.decode.contrib import decode_matmul_nbits, decode_quantized_gather
from quantkit.errors import ModelError
from quantkit.formats import FP4_E2M1, FP8_E4M3

_FLOAT = ir.DataType.FLOAT
_FLOAT8_OPSET = 19
_E4M3 = ir.DataType.FLOAT8E4M3FN
_MOVES = frozenset(
    {
        *("Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split"),
        *("Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"),
    }
)


class Rewriter:
    """Rewrites nodes in topological order, and remembers which tensors hold values in place of codes.

    Args:
        taken: names of tensors and nodes in use.
        opset: the version of the default operator set.
    """

    def __init__(self, taken: set[str], opset: int) -> None:
        self._taken, self._opset = taken, opset
        self._values: set[ir.Value] = set()

    def holds_values(self, value: ir.Value) -> None:
        """Say that a tensor holds float32 values where the model meant codes."""
        # A new type: clones of a model share theirs.
        value.type = ir.TensorType(_FLOAT)
        self._values.add(value)

    def rewrite(self, node: ir.Node) -> None:
        """Replace a node where ONNX Runtime lacks it.

        Raises:
            ModelError: an operator of TensorRT that is not known here, or a use of a type that has no reading.
        """
        a = Arithmetic(node, self._taken)
        if node.domain == TENSORRT_DOMAIN:
            self._tensorrt(node, a)
        elif is_matmul_nbits(node):
            decode_matmul_nbits(node, a)
        elif is_quantized_gather(node):
            decode_quantized_gather(node, a)
        elif node.domain == "" and node.op_type == "QuantizeLinear":
            self._quantize(node, a)
        elif node.domain == "" and node.op_type == "DequantizeLinear":
            if self._is_value(node, 0) or self._is_value(node, 1):
                self._dequantize(node, a, output_type(node, _type(node, 1)))
        elif node.domain == "" and node.op_type == "Cast":
            self._cast(node, a)
        elif node.op_type in _MOVES and any(v in self._values for v in node.inputs if v is not None):
            for output in node.outputs:
                self.holds_values(output)

    def _tensorrt(self, node: ir.Node, a: Arithmetic) -> None:
        if self._opset < _FLOAT8_OPSET:
            raise ModelError(
                f"{node.name}: {TENSORRT_DOMAIN}::{node.op_type} in a model of operator set {self._opset}, which has "
                f"no float8; export it with opset {_FLOAT8_OPSET} or higher."
            )
        if node.op_type == "TRT_FP4DynamicQuantize":
            self._dynamic_fp4(node, a)
        elif node.op_type == "TRT_MXFP8DynamicQuantize":
            self._dynamic_mxfp8(node, a)
        elif node.op_type == "TRT_MXFP8DequantizeLinear":
            self._dequantize(node, a, output_type(node, _FLOAT), block_size=32)
        else:
            raise ModelError(
                f"{node.name}: {TENSORRT_DOMAIN}::{node.op_type} is an operator of TensorRT that has no reading here; "
                "run the model with TensorRT."
            )

    def _dynamic_fp4(self, node: ir.Node, a: Arithmetic) -> None:
        """Codes and E4M3 scales of blocks, under a float32 scale of the whole tensor that is fixed beforehand."""
        _check(node, "scale_type", int(_E4M3))
        axis = _int(node, "axis", -1)
        blocks, undo = in_blocks(a, a.cast(_input(node, 0), _FLOAT), axis, _int(node, "block_size", 16))
        shared = _input(node, 1)
        amax = rounding.block_amax(a, blocks, inner_axis(axis))
        scale = rounding.e4m3_scale(a, amax, shared, FP4_E2M1)
        ratio = a.op("Div", blocks, a.op("Mul", scale, a.cast(shared, _FLOAT)))
        self._replace_dynamic(a, undo(rounding.round_to(a, ratio, FP4_E2M1)), scale, inner_axis(axis))

    def _dynamic_mxfp8(self, node: ir.Node, a: Arithmetic) -> None:
        """E4M3 codes and E8M0 scales of blocks."""
        _check(node, "output_dtype", int(_E4M3))
        axis = _int(node, "axis", -1)
        blocks, undo = in_blocks(a, a.cast(_input(node, 0), _FLOAT), axis, _int(node, "block_size", 32))
        amax = rounding.block_amax(a, blocks, inner_axis(axis))
        scale = rounding.e8m0_scale(a, amax, FP8_E4M3)
        codes = rounding.round_to(a, a.op("Div", blocks, scale), FP8_E4M3)
        self._replace_dynamic(a, undo(codes), scale, inner_axis(axis))

    def _replace_dynamic(self, a: Arithmetic, codes: ir.Value, scale: ir.Value, inner: int) -> None:
        scales = a.op("Squeeze", scale, a.integers(inner))
        for value in (codes, scales):
            self.holds_values(value)
        a.replace(codes, scales)

    def _quantize(self, node: ir.Node, a: Arithmetic) -> None:
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        to = _int(node, "output_dtype", 0) or (ir.DataType.UINT8 if zero is None else zero.dtype)
        if to == ir.DataType.FLOAT4E2M1:
            x = a.cast(_input(node, 0), _FLOAT)
            ratio = self._scaled("Div", node, a, x, _int(node, "block_size", 0))
            codes = rounding.round_to(a, ratio, FP4_E2M1)
            self.holds_values(codes)
            a.replace(codes)
        elif self._is_value(node, 1):
            # The scale is float32 now, and has to be of the input's type.
            node.replace_input_with(0, a.cast(_input(node, 0), _FLOAT))

    def _dequantize(self, node: ir.Node, a: Arithmetic, to: ir.DataType, block_size: int = 0) -> None:
        codes = a.cast(_input(node, 0), _FLOAT)
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        size = _int(node, "block_size", block_size)
        if zero is not None and zero.dtype is not None and zero.dtype.is_integer():
            codes = self._scaled("Sub", node, a, codes, size, index=2)
        product = self._scaled("Mul", node, a, codes, size)
        a.replace(a.cast(a.typed(product, _FLOAT), to))

    def _scaled(
        self, op_type: str, node: ir.Node, a: Arithmetic, x: ir.Value, size: int, index: int = 1
    ) -> ir.Value:
        """Combine `x` with the node's scales (or zero points) in float32: one for all, one an index, or one a block."""
        scale = _input(node, index)
        if scale.dtype == ir.DataType.UINT8 and node.domain == TENSORRT_DOMAIN:
            scale = rounding.e8m0_value(a, scale)
        else:
            scale = a.cast(scale, _FLOAT)
        axis = _int(node, "axis", -1 if node.domain == TENSORRT_DOMAIN else 1)
        if size:
            blocks, undo = in_blocks(a, x, axis, size)
            return undo(a.op(op_type, blocks, a.op("Unsqueeze", scale, a.integers(inner_axis(axis)))))
        if scale.shape is not None and len(scale.shape) == 1 and scale.shape[0] != 1:
            scale = across(a, scale, x, axis)
        return a.op(op_type, x, scale)

    def _cast(self, node: ir.Node, a: Arithmetic) -> None:
        to = ir.DataType(node.attributes["to"].as_int())
        if to == ir.DataType.FLOAT4E2M1:
            codes = rounding.round_to(a, a.cast(_input(node, 0), _FLOAT), FP4_E2M1)
            self.holds_values(codes)
            a.replace(codes)
        elif to in NO_TYPES:
            raise ModelError(
                f"{node.name}: casts computed values to {to.name.lower()}, which ONNX Runtime has no kernel for and "
                "which has no reading here; run the model where it was made for."
            )

    def _is_value(self, node: ir.Node, index: int) -> bool:
        return node.inputs[index] in self._values


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise ModelError(f"{node.name}: {node.op_type} without its input {index}; export the model again.")
    return value


def _type(node: ir.Node, index: int) -> ir.DataType:
    return node.outputs[0].dtype or _input(node, index).dtype or _FLOAT


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _check(node: ir.Node, name: str, wanted: int) -> None:
    found = _int(node, name, wanted)
    if found != wanted:
        raise ModelError(
            f"{node.name}: {node.op_type} with {name} {found}, where only {wanted} (float8e4m3fn) has a reading here; "
            "run the model with TensorRT."
        )

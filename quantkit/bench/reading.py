"""What a linear operator multiplies, in whatever way the file stores it: float, Q/DQ, Cast and Mul, integer operators.

Each operand of a node is followed back to where its numbers lie: a constant, stored as floats or codes, or a tensor
that is computed, quantized on the way or not.
"""

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

# TensorRT's, whose codes are of one type.
_DYNAMIC: dict[str, np.dtype[Any]] = {
    "TRT_FP4DynamicQuantize": np.dtype(ml_dtypes.float4_e2m1fn),
    "TRT_MXFP8DynamicQuantize": np.dtype(ml_dtypes.float8_e4m3fn),
}
_QUANTIZERS = ("QuantizeLinear", "DynamicQuantizeLinear", *_DYNAMIC)
_DEQUANTIZERS = ("DequantizeLinear", "TRT_MXFP8DequantizeLinear")
# What codes are called in formats: element types by NumPy's names.
ELEMENTS = {
    "int8": "int8",
    "uint8": "int8",
    "float8_e4m3fn": "e4m3",
    "int4": "int4",
    "uint4": "int4",
    "int2": "int2",
    "uint2": "int2",
    "float4_e2m1fn": "e2m1",
}


@dataclass(frozen=True, kw_only=True)
class Operand:
    """One operand of a linear operator.

    Attributes:
        tensor: the name of the computed tensor before quantization; "" for a constant.
        codes: a constant's stored numbers; None for a computed tensor.
        element: the element type of the codes (int8, e4m3 …), "bf16" where it is not quantized; NumPy's name for one
            that no kernel knows.
        scale, zero_point: of the codes; None where it is not quantized, or computed as the model runs.
        axis, block_size: as DequantizeLinear has them. global_scale: what all scales were multiplied by (NVFP4).
        transposed: the codes lie with their last two axes exchanged.
        coded: of a computed tensor that holds codes itself, as between QLinearConvs: their scale and zero point.
    """

    tensor: str = ""
    codes: NDArray[Any] | None = None
    element: str = "bf16"
    scale: NDArray[np.float32] | None = None
    zero_point: NDArray[Any] | None = None
    axis: int | None = None
    block_size: int | None = None
    global_scale: NDArray[np.float32] | None = None
    transposed: bool = False
    coded: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a constant as the operator sees it."""
        assert self.codes is not None
        shape = tuple(self.codes.shape)
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    def floats(self) -> NDArray[np.float32]:
        """Return a constant's values, float32, as the operator sees them."""
        assert self.codes is not None
        x: NDArray[np.float32] = self.codes.astype(np.float32)
        if self.scale is not None:
            if self.zero_point is not None:
                x = x - self._spread(self.zero_point.astype(np.float32))
            x = x * self._spread(self.scale)
        return x.swapaxes(-1, -2) if self.transposed else x

    def values(self, x: NDArray[Any]) -> NDArray[np.float32]:
        """Return the values, float32, of a computed tensor's contents."""
        found: NDArray[np.float32] = np.asarray(x, np.float32)
        if self.coded is not None:
            scale, zero = self.coded
            found = (found - zero) * scale
        return found

    def _spread(self, parameter: NDArray[np.float32]) -> NDArray[np.float32]:
        """The scales or zero points, one for each element along the axis."""
        assert self.codes is not None
        shape = self.codes.shape
        if parameter.size == 1:
            return parameter.reshape(())
        if parameter.ndim == len(shape):
            if self.block_size:
                axis = self.axis or 0
                parameter = np.repeat(parameter, self.block_size, axis=axis)
                return parameter[tuple(slice(None, n) for n in shape)]
            return parameter
        axis = (self.axis if self.axis is not None else 1) % len(shape)
        return parameter.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def read_operand(value: ir.Value) -> Operand:
    """Return what an operator reads there."""
    constant = constant_of(value)
    if constant is not None:
        return Operand(codes=constant, element=_float_or_codes(constant))
    node = value.producer()
    if node is None:
        return Operand(tensor=str(value.name))
    if node.op_type in _DEQUANTIZERS:
        return _dequantized(node)
    if node.op_type in ("Identity", "Cast") and node.inputs[0] is not None:
        inner = read_operand(node.inputs[0])
        # A Cast of codes is the first half of a DequantizeLinear written by hand.
        return (
            inner
            if inner.codes is not None or node.op_type == "Identity"
            else Operand(tensor=str(value.name))
        )
    if node.op_type == "Transpose" and node.inputs[0] is not None:
        inner = read_operand(node.inputs[0])
        if inner.codes is not None and inner.codes.ndim == 2 and _swaps(node):
            return replace(inner, transposed=not inner.transposed)
    if node.op_type == "Mul":
        found = _cast_and_scaled(node)
        if found is not None:
            return found
    return Operand(tensor=str(value.name))


def read_codes(
    value: ir.Value, scale: ir.Value | None, zero_point: ir.Value | None, *, axis: int = 0
) -> Operand:
    """Return what an integer operator (QLinearConv, MatMulInteger) reads: codes with their scale beside them."""
    constant = constant_of(value)
    scales = None if scale is None else constant_of(scale)
    zero = None if zero_point is None else constant_of(zero_point)
    if constant is not None:
        spread = np.float32(1) if scales is None else scales
        return Operand(
            codes=constant,
            element=_element(constant.dtype),
            scale=np.asarray(spread, np.float32),
            zero_point=zero,
            axis=axis,
        )
    source = value.producer()
    kept = None if scales is None or _lopsided(zero) else np.asarray(scales, np.float32)
    if source is not None and source.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
        assert source.inputs[0] is not None
        return Operand(tensor=str(source.inputs[0].name), element="int8", scale=kept)
    coded = None
    if scales is not None and scales.size == 1:
        offset = np.zeros((), np.float32) if zero is None else zero.astype(np.float32).reshape(())
        coded = np.asarray(scales, np.float32).reshape(()), offset
    return Operand(tensor=str(value.name), element="int8", scale=kept, coded=coded)


def constant_of(value: ir.Value) -> NDArray[Any] | None:
    """Return the contents of a constant, also of one that is reshaped or repeated; None where it is none."""
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Constant" and "value" in node.attributes:
        return node.attributes["value"].as_tensor().numpy()
    if node.op_type in ("Reshape", "Expand") and None not in node.inputs:
        held, sizes = (constant_of(v) for v in node.inputs if v is not None)
        if held is None or sizes is None:
            return None
        if node.op_type == "Expand":
            return np.broadcast_to(held, np.broadcast_shapes(held.shape, tuple(sizes.tolist())))
        # 0 keeps a dimension.
        return held.reshape([size or held.shape[axis] for axis, size in enumerate(sizes.tolist())])
    return None


def _dequantized(node: ir.Node) -> Operand:
    codes, scale = node.inputs[0], node.inputs[1]
    assert codes is not None and scale is not None
    constant = constant_of(codes)
    scales = _scales(scale)
    if scales is not None and node.op_type == "TRT_MXFP8DequantizeLinear":
        scales = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)  # bytes of E8M0
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    zeros = None if zero is None else constant_of(zero)
    if constant is not None:
        axis, block = node.attributes.get("axis"), node.attributes.get("block_size")
        return Operand(
            codes=constant,
            element=_element(constant.dtype),
            scale=scales,
            zero_point=zeros,
            axis=1 if axis is None else axis.as_int(),
            block_size=None if block is None else block.as_int() or None,
            global_scale=_global_scale(scale),
        )
    source = codes.producer()
    if source is None or source.op_type not in _QUANTIZERS:
        return Operand(tensor=str(codes.name), element="int8")
    assert source.inputs[0] is not None
    block = node.attributes.get("block_size") or source.attributes.get("block_size")
    kind = _code_type(source)
    lopsided = _lopsided(zeros) or kind.kind == "u"
    return Operand(
        tensor=str(source.inputs[0].name),
        element=_element(kind),
        scale=None if lopsided or scales is None or scales.size != 1 else scales,
        block_size=None if block is None else block.as_int() or None,
    )


def _lopsided(zero: NDArray[Any] | None) -> bool:
    """Whether codes reach further up than down: activations of int8 are run symmetric, with a scale of their own."""
    return zero is not None and (zero.dtype.kind == "u" or bool(np.any(zero.astype(np.float32))))


def _scales(value: ir.Value) -> NDArray[np.float32] | None:
    """Return constant scales, also those that are stored quantized themselves (NVFP4)."""
    constant = constant_of(value)
    if constant is not None:
        return constant.astype(np.float32)
    operand = read_operand(value)
    return operand.floats() if operand.codes is not None else None


def _global_scale(value: ir.Value) -> NDArray[np.float32] | None:
    """What scales that are stored quantized are multiplied by."""
    operand = read_operand(value) if constant_of(value) is None else Operand()
    return operand.scale if operand.scale is not None and operand.scale.size == 1 else None


def _cast_and_scaled(node: ir.Node) -> Operand | None:
    """Cast(codes) · scale, as a file writes a DequantizeLinear that no optimizer shall know."""
    for cast, scale in (node.inputs[:2], node.inputs[1::-1]):
        if cast is None or scale is None:
            continue
        source, scales = cast.producer(), constant_of(scale)
        if source is None or source.op_type != "Cast" or source.inputs[0] is None or scales is None:
            continue
        inner = source.inputs[0]
        constant = constant_of(inner)
        if constant is not None:
            return Operand(codes=constant, element=_element(constant.dtype), scale=scales.astype(np.float32))
        quantizer = inner.producer()
        if (
            quantizer is not None
            and quantizer.op_type == "QuantizeLinear"
            and quantizer.inputs[0] is not None
        ):
            kind = _code_type(quantizer)
            return Operand(
                tensor=str(quantizer.inputs[0].name),
                element=_element(kind),
                scale=scales.astype(np.float32) if scales.size == 1 and kind.kind != "u" else None,
            )
    return None


def _code_type(quantizer: ir.Node) -> np.dtype[Any]:
    """What a QuantizeLinear writes: as its zero point, else as it says, else bytes."""
    if quantizer.op_type in _DYNAMIC:
        return _DYNAMIC[quantizer.op_type]
    zero = quantizer.inputs[2] if len(quantizer.inputs) > 2 else None
    constant = None if zero is None else constant_of(zero)
    if constant is not None:
        return constant.dtype
    told = quantizer.attributes.get("output_dtype")
    if told is not None and told.as_int():
        return np.dtype(ir.DataType(told.as_int()).numpy())
    return np.dtype(np.uint8)


def _element(dtype: np.dtype[Any]) -> str:
    name = np.dtype(dtype).name
    return ELEMENTS.get(name, name)


def _float_or_codes(constant: NDArray[Any]) -> str:
    return (
        "bf16" if constant.dtype.kind == "f" or constant.dtype == ml_dtypes.bfloat16 else constant.dtype.name
    )


def _swaps(node: ir.Node) -> bool:
    order = node.attributes.get("perm")
    return order is None or list(order.as_ints()) == [1, 0]

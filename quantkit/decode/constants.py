"""Constants behind codes: what a DequantizeLinear, or a Cast and a Mul, make of stored codes, reckoned when it is read.

Nothing is computed while the graph is walked. A constant is a recipe, and the weights that a model ends up with are
lazy tensors over such recipes, made anew each time that they are read and kept by nobody.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from quantkit.decode.capability import TENSORRT_DOMAIN
from quantkit.errors import ModelError
from quantkit.formats import E8M0, QParams, QTensor, QuantSpec, dequantize, scale_shape
from quantkit.graph.qdq_parameters import CODE_FORMATS
from quantkit.graph.tensors import read_tensor

# ONNX Runtime has no kernels at all for these.
NO_TYPES = frozenset({ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E8M0})
# Codes that are decoded where they are constant: they take ONNX Runtime up to twenty times an int8's time.
_LOW = NO_TYPES | {
    ir.DataType.FLOAT8E4M3FN,
    ir.DataType.FLOAT8E5M2,
    ir.DataType.INT4,
    ir.DataType.UINT4,
    ir.DataType.INT2,
    ir.DataType.UINT2,
}
_RESHAPES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_FLOATS = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE},
)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """An array that can be had.

    Attributes:
        dtype: its element type.
        shape: its shape.
        read: makes it.
        decoded: it comes of codes in few bits, so it is worth to be stored in their place.
    """

    dtype: ir.DataType
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    decoded: bool = False

    def tensor(self) -> ir.LazyTensor:
        """Return it as a tensor that is made when it is read."""
        return ir.LazyTensor(
            lambda: ir.tensor(self.read(), dtype=self.dtype), self.dtype, ir.Shape(self.shape)
        )


def stored(value: ir.Value) -> Constant | None:
    """Return what an initializer or a Constant node holds; None where the value is computed.

    What is of a type that ONNX Runtime lacks is given as the float32 values of its codes.
    """
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or (value.is_graph_input() and not value.is_initializer()):
        return None
    shape = tuple(tensor.shape.numpy())
    if tensor.dtype in NO_TYPES:
        return Constant(
            dtype=ir.DataType.FLOAT,
            shape=shape,
            read=lambda: read_tensor(tensor).astype(np.float32),
            decoded=True,
        )
    return Constant(dtype=tensor.dtype, shape=shape, read=partial(read_tensor, tensor))


def folded(node: ir.Node, constants: dict[ir.Value, Constant]) -> Constant | None:
    """Return what a node makes of constants, if codes in few bits are among them; None where it is not to be folded.

    Args:
        node: the node.
        constants: what is known of the values before it.
    """
    inputs = [None if v is None else constants.get(v) or stored(v) for v in node.inputs]
    if not inputs or any(v is not None and c is None for v, c in zip(node.inputs, inputs, strict=True)):
        return None
    found = [c for c in inputs if c is not None]
    first = inputs[0]
    if first is None:
        return None
    if node.domain == TENSORRT_DOMAIN and node.op_type == "TRT_MXFP8DequantizeLinear":
        return _exponents(node, first, inputs)
    if node.domain != "":
        return None
    if node.op_type == "DequantizeLinear":
        return _dequantized(node, first, inputs)
    if node.op_type == "Cast":
        to = ir.DataType(node.attributes["to"].as_int())
        return _cast(first, to) if to in _FLOATS and (first.decoded or first.dtype in _LOW) else None
    if not first.decoded and not (node.op_type == "Mul" and found[-1].decoded):
        return None
    if node.op_type == "Mul" and len(found) == 2 and first.dtype == found[1].dtype in _FLOATS:
        left, right = found
        shape = np.broadcast_shapes(left.shape, right.shape)
        return Constant(dtype=first.dtype, shape=shape, read=lambda: left.read() * right.read(), decoded=True)
    return _laid_out(node, first)


def _dequantized(node: ir.Node, codes: Constant, inputs: list[Constant | None]) -> Constant | None:
    scale, zero = inputs[1], inputs[2] if len(inputs) > 2 else None
    original = ir.convenience.get_const_tensor(node.inputs[0]) if node.inputs[0] is not None else None
    dtype = None if original is None else original.dtype
    if (
        scale is None
        or dtype not in CODE_FORMATS
        or (dtype not in _LOW and "block_size" not in node.attributes)
    ):
        return None
    to = output_type(node, scale.dtype)
    assert original is not None and dtype is not None
    fmt = CODE_FORMATS[dtype]
    size = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    if not size and np.prod(scale.shape) == 1:
        spec = QuantSpec(format=fmt)
    else:
        spec = QuantSpec(format=fmt, axis=axis, block_size=size or None)
    shape = codes.shape
    wanted = scale_shape(shape, spec)
    # One scale may come as a vector of one; all else is as the operator says.
    if spec.axis is not None and scale.shape != wanted:
        raise ModelError(
            f"{node.name}: scales of shape {scale.shape} for codes of {shape}, where {wanted} is wanted; "
            "export the model again."
        )

    def read() -> np.ndarray:
        stored_zero = None
        if fmt.kind == "integer":
            stored_zero = np.zeros(wanted, fmt.dtype) if zero is None else zero.read().reshape(wanted)
        qparams = QParams(scale.read().astype(np.float32).reshape(wanted), stored_zero)
        return dequantize(QTensor(read_tensor(original), qparams, spec)).astype(to.numpy(), copy=False)

    return Constant(dtype=to, shape=shape, read=read, decoded=True)


def _exponents(node: ir.Node, codes: Constant, inputs: list[Constant | None]) -> Constant | None:
    """TensorRT's MXFP8: float8 codes under bytes that are exponents plus 127."""
    scale = inputs[1]
    if scale is None or codes.dtype not in CODE_FORMATS:
        return None
    spec = QuantSpec(
        format=CODE_FORMATS[codes.dtype],
        axis=node.attributes["axis"].as_int() if "axis" in node.attributes else -1,
        block_size=node.attributes["block_size"].as_int() if "block_size" in node.attributes else 32,
        scale_format=E8M0,
    )
    to = output_type(node, ir.DataType.FLOAT)

    def read() -> np.ndarray:
        powers = scale.read()
        if powers.dtype == np.uint8:
            powers = powers.view(E8M0.dtype)
        qparams = QParams(powers.astype(np.float32))
        return dequantize(QTensor(codes.read(), qparams, spec)).astype(to.numpy(), copy=False)

    return Constant(dtype=to, shape=codes.shape, read=read, decoded=True)


def output_type(node: ir.Node, scale: ir.DataType) -> ir.DataType:
    """The type that a dequantizing node puts out: what it names, else that of its scale."""
    if "output_dtype" in node.attributes and node.attributes["output_dtype"].as_int():
        return ir.DataType(node.attributes["output_dtype"].as_int())
    return scale


def _cast(codes: Constant, to: ir.DataType) -> Constant:
    def read() -> np.ndarray:
        # By way of float32: ml_dtypes has no cast from one small type to another that rounds once for all pairs.
        return codes.read().astype(np.float32).astype(to.numpy(), copy=False)

    return Constant(dtype=to, shape=codes.shape, read=read, decoded=True)


def _laid_out(node: ir.Node, data: Constant) -> Constant | None:
    """Operators that only order values anew; their shape is that of the graph, so it has to be known there."""
    shape = node.outputs[0].shape
    if shape is None or not all(isinstance(d, int) for d in shape):
        return None
    known = tuple(int(d) for d in shape if isinstance(d, int))
    if node.op_type in _RESHAPES:
        return Constant(dtype=data.dtype, shape=known, read=lambda: data.read().reshape(known), decoded=True)
    if node.op_type == "Expand":
        return Constant(
            dtype=data.dtype,
            shape=known,
            read=lambda: np.ascontiguousarray(np.broadcast_to(data.read(), known)),
            decoded=True,
        )
    if node.op_type == "Transpose":
        order = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else None
        return Constant(
            dtype=data.dtype,
            shape=known,
            read=lambda: np.ascontiguousarray(data.read().transpose(order)),
            decoded=True,
        )
    return None

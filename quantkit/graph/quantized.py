"""What a model is quantized by already: its Q/DQ pairs and stored codes, as QAT or another tool left them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from quantkit.errors import SpecError
from quantkit.formats import (
    E8M0,
    FP4_E2M1,
    FP8_E4M3,
    FP8_E5M2,
    INT2,
    INT4,
    INT8,
    INT16,
    UINT2,
    UINT4,
    UINT8,
    UINT16,
    Format,
    QParams,
    QTensor,
    QuantSpec,
    quantize,
    scale_shape,
)
from quantkit.graph.dequantized import LAYOUT_OPS, source_of
from quantkit.graph.load import Graph
from quantkit.graph.sites import LeftAlone

_FORMATS = {
    ir.DataType.from_numpy(f.dtype): f
    for f in (
        *(INT2, UINT2, INT4, UINT4, INT8, UINT8, INT16, UINT16),
        *(FP4_E2M1, FP8_E4M3, FP8_E5M2),
    )
}
# Operators that hold their quantization in themselves.
_INTEGER_OPS = frozenset(
    {"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "DynamicQuantizeLinear"}
)
_CONTRIB_OPS = frozenset(
    {"GatherBlockQuantized", "MatMulNBits", "QAttention", "QGemm", "MatMulIntegerToFloat"}
)

Reader = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """A tensor that the model itself quantizes.

    Attributes:
        name: of the tensor that is quantized: an activation, or the initializer of a weight or bias, be it codes or
            floats (quantization-aware training leaves floats behind Q and DQ).
        role: "activation" for what is computed or fed; "bias" for int32 codes; else "weight".
        spec: its format, axis and blocks; a bias is int32 and has none.
        qparams: scales and zero points as the model holds them, scales in float32.
        shape: of the tensor; None where a dimension is free.
        stored: its codes are stored, so quantizing it again is neither needed nor possible.
        nodes: its QuantizeLinear, if any, and its DequantizeLinear nodes.
        readers: (node, input index) of what reads it dequantized, behind what only changes its layout or type.
    """

    name: str
    role: Literal["activation", "weight", "bias"]
    spec: QuantSpec | None
    qparams: QParams
    shape: tuple[int, ...] | None
    stored: bool
    nodes: tuple[str, ...]
    readers: tuple[Reader, ...]

    def qtensor(self, graph: Graph) -> QTensor:
        """Return the codes of a weight, quantized here where the model stores floats."""
        assert self.role == "weight" and self.spec is not None
        array = graph.array(self.name)
        return (
            QTensor(array, self.qparams, self.spec)
            if self.stored
            else quantize(array, self.qparams, self.spec)
        )


def find_quantized(graph: Graph) -> tuple[list[QuantizedTensor], list[LeftAlone]]:
    """Return the tensors that the model quantizes, in topological order, and the nodes that cannot be read so.

    The second list holds Q/DQ nodes with computed scales or types that no `Format` has, and operators that work on
    codes themselves (QLinearConv, MatMulNBits …), which are quantized and stay as they are.
    """
    found: list[QuantizedTensor] = []
    left: list[LeftAlone] = []
    for node in graph.model.graph:
        if node.op_type in (_INTEGER_OPS if node.domain == "" else _CONTRIB_OPS):
            left.append(_left(node, "works on codes itself; stays as it is"))
        elif node.domain == "" and node.op_type == "QuantizeLinear":
            readers = [user for user, _ in node.outputs[0].uses()]
            others = [u.op_type for u in readers if u.op_type != "DequantizeLinear"]
            if others or not readers:
                left.append(_left(node, f"its codes are read by {', '.join(others) or 'nobody'}"))
            else:
                _enter(found, left, node, readers)
        elif node.domain == "" and node.op_type == "DequantizeLinear":
            source = node.inputs[0]
            producer = None if source is None else source.producer()
            if _reads_scales(node) or (producer is not None and producer.op_type == "QuantizeLinear"):
                continue
            _enter(found, left, node, [node])
    return found, left


def _enter(
    found: list[QuantizedTensor], left: list[LeftAlone], node: ir.Node, dequantizers: list[ir.Node]
) -> None:
    entry = _entry(node, dequantizers)
    if isinstance(entry, str):
        left.append(_left(node, entry))
    else:
        found.append(entry)


def _entry(node: ir.Node, dequantizers: list[ir.Node]) -> QuantizedTensor | str:
    """The tensor that a QuantizeLinear, or a DequantizeLinear of stored codes, stands for; or why it cannot be told."""
    tensor = node.inputs[0]
    assert tensor is not None
    quantizes = node.op_type == "QuantizeLinear"
    source = source_of(tensor) if quantizes else tensor
    constant = source.is_initializer()
    if not quantizes and not constant:
        return "dequantizes codes that are computed or fed"
    # A weight that is transposed on its way is quantized as it arrives.
    if constant and source is not tensor:
        return "quantizes a constant behind an operator that changes its layout"
    dtype = _code_type(node)
    shape = _shape(tensor)
    readers = tuple(reader for d in dequantizers for reader in _readers(d.outputs[0]))
    nodes = tuple(str(n.name) for n in ([node, *dequantizers] if quantizes else dequantizers))
    parameters = _parameters(node)
    if isinstance(parameters, str):
        return parameters
    scale, zero, global_scale, scale_format = parameters
    if any(not _same(node, d) for d in dequantizers):
        return "its DequantizeLinear has another scale or zero point"
    if dtype == ir.DataType.INT32 and constant:
        return QuantizedTensor(
            name=str(source.name),
            role="bias",
            spec=None,
            qparams=QParams(scale),
            shape=shape,
            stored=True,
            nodes=nodes,
            readers=readers,
        )
    fmt = _FORMATS.get(dtype)
    if fmt is None:
        return f"its codes are {dtype.name.lower()}"
    spec = _spec(
        node, fmt, scale, zero, scale_format, rank=None if tensor.shape is None else len(tensor.shape)
    )
    if isinstance(spec, str):
        return spec
    if spec.axis is None and spec.block_size is None:
        scale = scale.reshape(())
    held = None
    if fmt.kind == "integer":
        held = np.zeros(scale.shape, fmt.dtype) if zero is None else zero.reshape(scale.shape)
    if shape is not None and scale_shape(shape, spec) != scale.shape:
        return f"its scales are of shape {scale.shape} for a tensor of {shape}"
    return QuantizedTensor(
        name=str(source.name),
        role="weight" if constant else "activation",
        spec=spec,
        qparams=QParams(scale, held, global_scale),
        shape=shape,
        stored=not quantizes,
        nodes=nodes,
        readers=readers,
    )


def _parameters(
    node: ir.Node,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, Format | None] | str:
    """Scales, zero points, the scale of scales and the type of scales; or why they are not known."""
    scale, global_scale, scale_format = node.inputs[1], None, None
    assert scale is not None
    producer = scale.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        outer, codes = _array(producer.inputs[1]), _array(producer.inputs[0])
        if outer is None or codes is None or outer.size != 1 or codes.dtype != FP8_E4M3.dtype:
            return "its scales are computed"
        array: np.ndarray | None = codes
        global_scale, scale_format = outer.astype(np.float32).reshape(()), FP8_E4M3
    else:
        array = _array(scale)
        if array is not None and array.dtype == E8M0.dtype:
            scale_format = E8M0
    if array is None:
        return "its scales are computed"
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    points = None if zero is None else _array(zero)
    if zero is not None and points is None:
        return "its zero points are computed"
    return array.astype(np.float32), points, global_scale, scale_format


def _spec(
    node: ir.Node,
    fmt: Format,
    scale: np.ndarray,
    zero: np.ndarray | None,
    scale_format: Format | None,
    rank: int | None,
) -> QuantSpec | str:
    middle = fmt.middle if fmt.kind == "integer" else 0
    symmetric = fmt.kind == "float" or bool(np.all((0 if zero is None else zero.astype(np.int32)) == middle))
    size = _int(node, "block_size", 0)
    axis: int | None = None
    if size or scale.size > 1:
        axis = _int(node, "axis", 1)
        axis = axis % rank if rank else axis
    try:
        return QuantSpec(
            format=fmt,
            axis=axis,
            block_size=size or None,
            symmetric=symmetric,
            scale_format=scale_format,
        )
    except SpecError as error:
        return str(error).rstrip(".")


def _code_type(node: ir.Node) -> ir.DataType:
    if node.op_type == "DequantizeLinear":
        codes = node.inputs[0]
        assert codes is not None and codes.dtype is not None
        return codes.dtype
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    named = _int(node, "output_dtype", 0)
    if zero is not None and zero.dtype is not None:
        return zero.dtype
    # ONNX's own default.
    return ir.DataType(named) if named else ir.DataType.UINT8


def _same(node: ir.Node, other: ir.Node) -> bool:
    """Whether two nodes have the same scales, zero points and blocks."""
    if node is other:
        return True
    for index in (1, 2):
        values = [n.inputs[index] if index < len(n.inputs) else None for n in (node, other)]
        if values[0] is values[1]:
            continue
        arrays = [_array(v) for v in values]
        if any(v is not None and a is None for v, a in zip(values, arrays, strict=True)):
            return False
        # A zero point that is left out is 0.
        first, second = (np.zeros(1) if a is None else a.astype(np.float32).reshape(-1) for a in arrays)
        if not (first.size == second.size or 1 in (first.size, second.size)) or np.any(first != second):
            return False
    return _int(node, "block_size", 0) == _int(other, "block_size", 0)


def _readers(value: ir.Value) -> Iterator[Reader]:
    for node, index in value.uses():
        if node.domain == "" and node.op_type in LAYOUT_OPS and index == 0 and node.outputs[0].uses():
            yield from _readers(node.outputs[0])
        else:
            yield str(node.name), index


def _reads_scales(node: ir.Node) -> bool:
    """Whether a DequantizeLinear only makes the scales of others."""
    uses = node.outputs[0].uses()
    return bool(uses) and all(u.op_type == "DequantizeLinear" and i == 1 for u, i in uses)


def _array(value: ir.Value | None) -> np.ndarray | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _shape(value: ir.Value) -> tuple[int, ...] | None:
    if value.shape is None or not all(isinstance(d, int) for d in value.shape):
        return None
    return tuple(d for d in value.shape if isinstance(d, int))


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _left(node: ir.Node, reason: str) -> LeftAlone:
    return LeftAlone(node=str(node.name), op_type=node.op_type, reason=reason)

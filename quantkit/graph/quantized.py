"""What a model is quantized by already: its Q/DQ pairs and stored codes, as QAT or another tool left them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from quantkit.formats import QParams, QTensor, QuantSpec, quantize, scale_shape
from quantkit.graph.dequantized import LAYOUT_OPS, source_of
from quantkit.graph.model import Graph
from quantkit.graph.qdq_parameters import code_type, same_parameters, stored_parameters, stored_scale
from quantkit.graph.sites import LeftAlone

# Operators that hold their quantization in themselves.
_INTEGER_OPS = frozenset(
    {"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "DynamicQuantizeLinear"}
)
_CONTRIB_OPS = frozenset(
    {
        *("GatherBlockQuantized", "MatMulNBits", "QAttention", "QGemm", "MatMulIntegerToFloat", "QLinearAdd"),
        *(
            "QLinearMul",
            "QLinearConcat",
            "QLinearAveragePool",
            "QLinearGlobalAveragePool",
            "QLinearLeakyRelu",
        ),
        "QLinearSigmoid",
    }
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
    if any(not same_parameters(node, d) for d in dequantizers):
        return "its DequantizeLinear has another scale or zero point"
    shape = _shape(tensor)
    spec: QuantSpec | None = None
    if code_type(node) == ir.DataType.INT32 and constant:
        scale = stored_scale(node)
        if scale is None:
            return "its scales are computed"
        qparams = QParams(scale)
    else:
        parameters = stored_parameters(node)
        if isinstance(parameters, str):
            return parameters
        spec, qparams = parameters
        if shape is not None and scale_shape(shape, spec) != qparams.scale.shape:
            return f"its scales are of shape {qparams.scale.shape} for a tensor of {shape}"
    return QuantizedTensor(
        name=str(source.name),
        role="activation" if not constant else "bias" if spec is None else "weight",
        spec=spec,
        qparams=qparams,
        shape=shape,
        stored=not quantizes,
        nodes=tuple(str(n.name) for n in ([node, *dequantizers] if quantizes else dequantizers)),
        readers=tuple(reader for d in dequantizers for reader in _readers(d.outputs[0])),
    )


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


def _shape(value: ir.Value) -> tuple[int, ...] | None:
    if value.shape is None or not all(isinstance(d, int) for d in value.shape):
        return None
    return tuple(d for d in value.shape if isinstance(d, int))


def _left(node: ir.Node, reason: str) -> LeftAlone:
    return LeftAlone(node=str(node.name), op_type=node.op_type, reason=reason)

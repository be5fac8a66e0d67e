"""Every MatMul, Gemm and convolution of a model, float or quantized, and what is none of them with the reason."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantkit.bench.layers import Layer, Window
from quantkit.bench.reading import Operand, constant_of, read_codes, read_operand
from quantkit.errors import ModelError
from quantkit.formats.matmul_nbits import MatMulNBits, from_matmul_nbits
from quantkit.graph import LeftAlone

_CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv", "ConvTranspose")
_PRODUCTS = frozenset(
    {"MatMul", "Gemm", "MatMulInteger", "QLinearMatMul"}
    | {"MatMulNBits", "MatMulIntegerToFloat", "QGemm", "DynamicQuantizeMatMul"}
)
# What multiplies matrices too, among other things: told, so that no sum of times passes for the whole model's.
_COMPOSITE = frozenset(
    {"Einsum", "LSTM", "GRU", "RNN", "DeformConv", "Attention", "FusedMatMul", "FusedGemm", "FusedConv"}
    | {"NhwcFusedConv", "MultiHeadAttention", "GroupQueryAttention", "QAttention", "DynamicQuantizeLSTM"}
    | {"MatMulBnb4", "TransposeMatMul", "GemmFloat8", "MoE", "QMoE", "PackedAttention"}
)


def find_layers(model: ir.Model, name: str = "model") -> tuple[list[Layer], list[LeftAlone]]:
    """Return every product of matrices of a model in its order, and those that are none with the reason.

    Raises:
        ModelError: there is none; `name` is what the model is called then.
    """
    layers: list[Layer] = []
    left: list[LeftAlone] = []
    for node in model.graph:
        if node.op_type in _CONVOLUTIONS or node.op_type in _PRODUCTS:
            layer = _convolution(node) if node.op_type in _CONVOLUTIONS else _product(node)
            reason = _why_not(layer)
            if reason:
                left.append(LeftAlone(node=_name(node), op_type=node.op_type, reason=reason))
            else:
                assert layer is not None
                layers.append(layer)
        elif node.op_type in _COMPOSITE:
            reason = "more than a product of matrices"
            left.append(LeftAlone(node=_name(node), op_type=node.op_type, reason=reason))
        left.extend(_inner(node))
    if not layers:
        reasons = (
            "; ".join(f"{x.op_type} {x.node}: {x.reason}" for x in left[:3]) or "it has no such operator"
        )
        raise ModelError(
            f"{name}: no MatMul, Gemm or convolution to run ({reasons}); "
            "give a model that has one, or --shapes."
        )
    return layers, left


def _why_not(layer: Layer | None) -> str:
    if layer is None:
        return "its weight is computed"
    if not layer.activations.tensor:
        return "both inputs are constant"
    if layer.window is not None:
        shape, groups = layer.weights.shape, layer.window.groups
        if len(shape) < 3:
            return f"its weight of shape {shape} has no kernel"
        if groups < 1 or shape[0] % groups:
            return f"its {shape[0]} channels are not {groups} groups"
    if layer.window is not None and layer.window.groups > 1:
        narrow = shape[1] if layer.op_type == "ConvTranspose" else shape[0] // layer.window.groups
        if narrow == 1:
            return "depthwise: no product of matrices"
    if not layer.format:
        return f"no kernel multiplies {layer.activations.element} by {layer.weights.element}"
    if layer.is_constant and 0 in layer.weights.shape:
        return "its weight is empty"
    if not _finite(layer.weights.codes) or not _finite(layer.weights.scale):
        return "its weight holds NaN or infinity"
    return ""


def _finite(numbers: NDArray[Any] | None) -> bool:
    """Whether floats are finite; codes of whole numbers always are."""
    if numbers is None or numbers.dtype.kind in "iub" or "int" in numbers.dtype.name:
        return True
    return bool(np.isfinite(numbers.astype(np.float32) if numbers.dtype.kind == "V" else numbers).all())


def _convolution(node: ir.Node) -> Layer | None:
    if node.op_type == "QLinearConv":
        x, w = read_codes(*_three(node, 0)), read_codes(*_three(node, 3))
    elif node.op_type == "ConvInteger":
        x, w = _integers(node)
    else:
        x, w = read_operand(_input(node, 0)), read_operand(_input(node, 1))
    if w.codes is None:
        return None
    kernel = tuple(w.shape[2:])
    spatial = len(kernel)
    window = Window(
        kernel=kernel,
        strides=_ints(node, "strides", (1,) * spatial),
        dilations=_ints(node, "dilations", (1,) * spatial),
        pads=_ints(node, "pads", (0,) * (2 * spatial)),
        auto_pad=node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET",
        groups=_int(node, "group", 1),
    )
    index = 2 if node.op_type in ("Conv", "ConvTranspose") else len(node.inputs)
    # A transposed convolution adds its bias after what falls on one place was summed.
    bias = None if node.op_type == "ConvTranspose" else _vector(node, index, w.shape[0])
    if bias is not None:
        bias = bias[: w.shape[0] // window.groups]
    return Layer(
        node=_name(node),
        op_type=node.op_type,
        activations=x,
        weights=w,
        window=window,
        bias=bias,
        relu=_relu(node),
    )


def _product(node: ir.Node) -> Layer | None:
    name, op_type = _name(node), node.op_type
    if op_type == "MatMulNBits":
        return _of_bits(node)
    if op_type == "QLinearMatMul":
        a, b = read_codes(*_three(node, 0)), read_codes(*_three(node, 3), axis=1)
    elif op_type == "MatMulInteger":
        a, b = _integers(node)
    elif op_type == "MatMulIntegerToFloat":
        zeros = [node.inputs[i] if len(node.inputs) > i else None for i in (4, 5)]
        a = read_codes(_input(node, 0), _input(node, 2), zeros[0])
        b = read_codes(_input(node, 1), _input(node, 3), zeros[1], axis=1)
    elif op_type == "QGemm":
        return _of_qgemm(node)
    elif op_type == "DynamicQuantizeMatMul":
        zero = node.inputs[3] if len(node.inputs) > 3 else None
        a = replace(read_operand(_input(node, 0)), element="int8")
        b = read_codes(_input(node, 1), _input(node, 2), zero, axis=1)
    else:
        a, b = read_operand(_input(node, 0)), read_operand(_input(node, 1))
    if op_type == "Gemm":
        transposed = bool(_int(node, "transB", 0))
        n = (b.shape[0] if transposed else b.shape[1]) if b.codes is not None else 0
        if b.codes is None:
            return None
        return Layer(
            node=name, op_type=op_type, activations=a, weights=b, turned=bool(_int(node, "transA", 0)),
            n_first=transposed, bias=_vector(node, 2, n), relu=_relu(node),
        )  # fmt: skip
    if a.codes is not None and b.codes is None:
        return Layer(
            node=name, op_type=op_type, activations=b, weights=a, turned=True, n_first=True, relu=_relu(node)
        )
    index = {"MatMulIntegerToFloat": 6, "DynamicQuantizeMatMul": 4}.get(op_type, len(node.inputs))
    bias = _vector(node, index, b.shape[-1]) if b.codes is not None else None
    return Layer(node=name, op_type=op_type, activations=a, weights=b, bias=bias, relu=_relu(node))


def _of_qgemm(node: ir.Node) -> Layer | None:
    """ONNX Runtime's QGemm: codes with scales beside them, and a bias in the unit of its sums."""
    n_first = bool(_int(node, "transB", 0))
    a, b = read_codes(*_three(node, 0)), read_codes(*_three(node, 3), axis=0 if n_first else 1)
    if b.codes is None:
        return None
    scales, sums = constant_of(_input(node, 1)), node.inputs[6] if len(node.inputs) > 6 else None
    whole = None if sums is None else constant_of(sums)
    bias = None
    if whole is not None and scales is not None and b.scale is not None:
        unit = scales.astype(np.float32).reshape(()) * b.scale.reshape(-1)
        bias = (whole.reshape(-1).astype(np.float32) * unit).astype(np.float32)
    return Layer(
        node=_name(node), op_type=node.op_type, activations=a, weights=b, turned=bool(_int(node, "transA", 0)),
        n_first=n_first, bias=bias, relu=_relu(node),
    )  # fmt: skip


def _of_bits(node: ir.Node) -> Layer | None:
    """ONNX Runtime's MatMulNBits: its blob read as codes [n, k] in blocks along k."""
    stored = [None if v is None else constant_of(v) for v in node.inputs[1:4]]
    codes, scales, zero_points = [*stored, None, None][:3]
    if codes is None or scales is None:
        return None
    bits, size = _int(node, "bits", 4), _int(node, "block_size", 32)
    n, k = _int(node, "N", 0), _int(node, "K", 0)
    weight = from_matmul_nbits(
        MatMulNBits(
            b=codes.reshape(n, -(-k // size), -1),
            scales=scales.astype(np.float32),
            zero_points=None if zero_points is None else zero_points.reshape(n, -1),
            k=k,
            n=n,
            bits=bits,
            block_size=size,
        )
    )
    element = {8: "int8", 4: "int4", 2: "int2"}.get(bits, "")
    params = weight.qparams
    held = Operand(
        codes=weight.qvalue,
        element=element,
        scale=params.scale,
        zero_point=params.zero_point,
        axis=1,
        block_size=size,
    )
    return Layer(
        node=_name(node),
        op_type=node.op_type,
        activations=read_operand(_input(node, 0)),
        weights=held,
        n_first=True,
        relu=_relu(node),
    )


def _integers(node: ir.Node) -> tuple[Operand, Operand]:
    zeros = [node.inputs[i] if len(node.inputs) > i else None for i in (2, 3)]
    return read_codes(_input(node, 0), None, zeros[0]), read_codes(_input(node, 1), None, zeros[1])


def _three(node: ir.Node, first: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    return _input(node, first), _input(node, first + 1), _input(node, first + 2)


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise ModelError(f"{node.op_type} {_name(node)}: lacks input {index}; export the model again.")
    return value


def _vector(node: ir.Node, index: int, size: int) -> NDArray[np.float32] | None:
    """A constant bias, one value an output channel, float or dequantized."""
    value = node.inputs[index] if len(node.inputs) > index else None
    operand = None if value is None else read_operand(value)
    if operand is None or operand.codes is None:
        return None
    if operand.codes.ndim == 1:
        operand = replace(operand, axis=0)
    found = operand.floats().reshape(-1)
    return found if found.size == size else None


def _relu(node: ir.Node) -> bool:
    readers = [user for user, _ in node.outputs[0].uses()]
    return len(readers) == 1 and readers[0].op_type == "Relu" and not node.outputs[0].is_graph_output()


def _inner(node: ir.Node) -> Iterator[LeftAlone]:
    for attribute in node.attributes.values():
        graphs: Iterable[ir.Graph] = ()
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = (attribute.as_graph(),)
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = attribute.as_graphs()
        for inner in (n for graph in graphs for n in graph):
            if inner.op_type in _CONVOLUTIONS or inner.op_type in _PRODUCTS:
                yield LeftAlone(
                    node=_name(inner), op_type=inner.op_type, reason=f"inside {node.op_type} {_name(node)}"
                )
            yield from _inner(inner)


def _name(node: ir.Node) -> str:
    return str(node.name or (node.outputs[0].name if node.outputs else node.op_type))


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _ints(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(node.attributes[name].as_ints()) if name in node.attributes else default

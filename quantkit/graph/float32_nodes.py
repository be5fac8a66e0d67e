"""Which nodes stay in float32 when the rest of a graph is cast to float16 or bfloat16, and why.

Three kinds do. Those that have no such kernel by ONNX's own schemas, or that nothing is known of. Those whose numbers
do not survive it: constants and scales beyond the type's range or lost below it, with what reads them up to the next
Softmax; angles and positions counted in integers, which float16 holds exactly up to 2048 only. And, unless asked for,
the sums and powers of a norm that is spelled out (Pow, ReduceMean, Sqrt …), as TensorRT's documentation advises for
layer norms: a square overflows float16 from 256 on. A norm that is one operator adds up in float32 by itself.
"""

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

FLOAT = ir.DataType.FLOAT
_INTEGERS = frozenset(
    {ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT32, ir.DataType.UINT64, ir.DataType.DOUBLE}
)
_DELICATE = frozenset(
    {
        *("CumSum", "Exp", "Log", "Pow", "Reciprocal", "Sqrt", "ReduceL1", "ReduceL2", "ReduceLogSum"),
        *("ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
    }
)
_ELEMENTWISE = frozenset(
    {
        *(
            "Abs",
            "Add",
            "Ceil",
            "Clip",
            "Cos",
            "Div",
            "Floor",
            "Max",
            "Min",
            "Mod",
            "Mul",
            "Neg",
            "Round",
            "Sin",
        ),
        *("Sub", "Where"),
    }
)
_MOVES = frozenset(
    {
        *("Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze"),
        *("Tile", "Transpose", "Unsqueeze"),
    }
)
# What comes out of these is of modest size, whatever goes in.
_BOUNDING = frozenset({"Softmax", "LogSoftmax", "Sigmoid", "Tanh", "HardSigmoid"})
# Float inputs of these that are cast; their other float inputs are scales of a type of their own.
_KNOWN_INPUTS = {
    ("com.microsoft", "MatMulNBits"): (0, 2, 3, 5),
    ("com.microsoft", "GatherBlockQuantized"): (2,),
    ("trt", "TRT_FP4DynamicQuantize"): (0,),
    ("trt", "TRT_MXFP8DynamicQuantize"): (0,),
    ("trt", "TRT_MXFP8DequantizeLinear"): (),
}
# A scale that is off by more than this moves codes; half a unit of float16's last place is 2^-12 of a normal number.
_SCALE_ERROR = 2.0**-9


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Which inputs and outputs of a node take the narrower type, by index."""

    inputs: frozenset[int]
    outputs: frozenset[int]


def float32_nodes(
    graph: ir.Graph, dtype: ir.DataType, opset: int, *, norms: bool
) -> tuple[dict[ir.Node, str], dict[ir.Node, Slots]]:
    """Return the nodes of the main graph that stay in float32 with the reason, and what the others cast.

    Args:
        graph: every value of it with its element type.
        dtype: float16 or bfloat16.
        opset: its default operator set.
        norms: cast the sums and powers of norms too.
    """
    kept: dict[ir.Node, str] = {}
    slots: dict[ir.Node, Slots] = {}
    wide: set[ir.Value] = set()
    for node in graph:
        found = _slots(node, dtype, opset)
        reason = found if isinstance(found, str) else _lost_numbers(node, dtype)
        if not reason:
            reason = _inherited(node, dtype, kept, wide)
        if not reason and not norms and node.domain == "" and node.op_type in _DELICATE:
            reason = f"sums and powers overflow or lose digits in {dtype.name.lower()}"
        if reason:
            kept[node] = reason
            if _is_wide(node, dtype, wide):
                wide.update(node.outputs)
        elif not isinstance(found, str):
            slots[node] = found
    _add_producers(graph, kept)
    return kept, {node: found for node, found in slots.items() if node not in kept}


def narrowed(array: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    """Return an array in a narrower float type; what is beyond its range becomes infinite."""
    with np.errstate(over="ignore", under="ignore"):
        return array.astype(dtype.numpy())


def _slots(node: ir.Node, dtype: ir.DataType, opset: int) -> Slots | str:
    """What a node casts, or why it cannot."""
    floats = [i for i, v in enumerate(node.inputs) if v is not None and v.dtype == FLOAT]
    outputs = [i for i, v in enumerate(node.outputs) if v.dtype == FLOAT]
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return "its branches or loop body stay in float32"
    known = _KNOWN_INPUTS.get((node.domain, node.op_type))
    if known is not None:
        return Slots(inputs=frozenset(floats) & frozenset(known), outputs=frozenset(outputs))
    if node.domain != "":
        return f"an operator of {node.domain}, whose types are not known"
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return _of_quantization(node, floats, outputs)
    if node.op_type == "Cast":
        return _of_cast(node, outputs)
    if not floats and not (node.op_type == "ConstantOfShape" and outputs):
        # Nothing to cast; what it makes of other types is cast behind it.
        return "makes float32 of other types" if outputs else Slots(inputs=frozenset(), outputs=frozenset())
    return _of_schema(node, dtype, opset, floats, outputs)


def _of_schema(
    node: ir.Node, dtype: ir.DataType, opset: int, floats: list[int], outputs: list[int]
) -> Slots | str:
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    wanted = f"tensor({dtype.name.lower()})"
    inputs: set[int] = set()
    variables: set[str] = set()
    for index in floats:
        # The last input may stand for any number of them.
        variable = schema.inputs[min(index, len(schema.inputs) - 1)].type_str
        if variable not in allowed:
            continue
        if wanted not in allowed[variable]:
            return f"operator set {opset} has no {node.op_type} in {dtype.name.lower()}"
        inputs.add(index)
        variables.add(variable)
    cast = {
        index
        for index in outputs
        if schema.outputs[min(index, len(schema.outputs) - 1)].type_str in variables or not floats
    }
    return Slots(inputs=frozenset(inputs), outputs=frozenset(cast))


def _of_quantization(node: ir.Node, floats: list[int], outputs: list[int]) -> Slots | str:
    """Scales are cast with the data; what computes scales of blocks, or reads computed ones, puts out float32."""
    scale = node.inputs[1]
    if node.op_type == "DequantizeLinear":
        readers = node.outputs[0].uses()
        scales = readers and all(user.op_type == "DequantizeLinear" and i == 1 for user, i in readers)
        if scales or (scale is not None and scale.producer() is not None):
            return Slots(inputs=frozenset(), outputs=frozenset())
    return Slots(inputs=frozenset(floats), outputs=frozenset(outputs))


def _of_cast(node: ir.Node, outputs: list[int]) -> Slots | str:
    source = node.inputs[0]
    if outputs and (source is None or source.dtype is None or source.dtype in _INTEGERS):
        return "casts integers, which float16 holds exactly up to 2048 and bfloat16 up to 256"
    return Slots(inputs=frozenset(), outputs=frozenset(outputs))


def _lost_numbers(node: ir.Node, dtype: ir.DataType) -> str:
    """Why the constants that a node reads forbid it; "" where they do not."""
    for index, value in enumerate(node.inputs):
        if value is None or value.dtype != FLOAT or value.const_value is None:
            continue
        exact = value.const_value.numpy()
        amax = _finite_amax(exact)
        if _overflows(amax, dtype):
            return f"its constant {value.name} reaches {amax:.3g}, beyond {dtype.name.lower()}"
        if exact.size == 1 and exact.item() != 0 and narrowed(exact, dtype).item() == 0:
            return f"its constant {value.name} is {exact.item():.3g}, which is 0 in {dtype.name.lower()}"
        if dtype == ir.DataType.FLOAT16 and _is_scale(node, index):
            held = narrowed(exact, dtype).astype(np.float32)
            error = np.abs(held - exact) > _SCALE_ERROR * np.abs(exact)
            if np.any(error):
                least = np.abs(exact[error]).min()
                return f"its scale {value.name} holds {least:.3g}, too small for the digits of float16"
    return ""


def _is_scale(node: ir.Node, index: int) -> bool:
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return index == 1
    other = node.inputs[1 - index] if node.op_type == "Mul" and len(node.inputs) == 2 else None
    producer = None if other is None else other.producer()
    source = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else None
    return source is not None and source.dtype is not None and source.dtype.bitwidth <= 8


def _inherited(node: ir.Node, dtype: ir.DataType, kept: dict[ir.Node, str], wide: set[ir.Value]) -> str:
    """Why a node stays because of what it reads; "" where it need not."""
    if node.domain != "":
        return ""
    read = [v for v in node.inputs if v is not None and v.dtype == FLOAT and v.const_value is None]
    follows = node.op_type in _ELEMENTWISE or node.op_type in _MOVES
    if (follows or node.op_type in _BOUNDING) and any(v in wide for v in read):
        return f"reads numbers that may be beyond {dtype.name.lower()}"
    if read and (follows or _is_outer_product(node)):
        makers = [v.producer() for v in read]
        if all(m is not None and m in kept for m in makers):
            # Nothing is gained by going back and forth, and an ε or an angle is lost.
            return "reads only what is computed in float32"
    return ""


def _is_wide(node: ir.Node, dtype: ir.DataType, wide: set[ir.Value]) -> bool:
    """Whether what a kept node puts out may be beyond the type's range."""
    if node.domain != "" or (node.op_type not in _ELEMENTWISE and node.op_type not in _MOVES):
        return False
    if any(v in wide for v in node.inputs if v is not None):
        return True
    stored = [v.const_value for v in node.inputs if v is not None and v.dtype == FLOAT]
    return any(t is not None and _overflows(_finite_amax(t.numpy()), dtype) for t in stored)


def _finite_amax(array: np.ndarray) -> float:
    """The largest magnitude among the finite elements, without a copy of a weight where all are."""
    if array.size == 0:
        return 0.0
    ends = float(array.max()), float(array.min())
    if not np.all(np.isfinite(ends)):
        finite = array[np.isfinite(array)]
        ends = float(finite.max(initial=0)), float(finite.min(initial=0))
    return max(abs(end) for end in ends)


def _overflows(amax: float, dtype: ir.DataType) -> bool:
    return bool(np.isinf(narrowed(np.asarray(amax, np.float32), dtype)))


def _is_outer_product(node: ir.Node) -> bool:
    """Whether a MatMul sums over one element only: positions times frequencies, as rotary embeddings are exported."""
    left = node.inputs[0] if node.op_type == "MatMul" else None
    return left is not None and left.shape is not None and len(left.shape) > 0 and left.shape[-1] == 1


def _add_producers(graph: ir.Graph, kept: dict[ir.Node, str]) -> None:
    """Keep a product of a tensor with itself that only a kept sum reads: it is the Pow of another exporter."""
    for node in reversed(graph):
        if node in kept or node.op_type not in ("Mul", "Abs") or node.domain != "":
            continue
        readers = [user for user, _ in node.outputs[0].uses()]
        squares = node.op_type == "Abs" or node.inputs[0] is node.inputs[1]
        if squares and readers and not node.outputs[0].is_graph_output() and all(r in kept for r in readers):
            kept[node] = "reads into what is computed in float32"

"""bfloat16 in float32: every operator computes in float32, and what it computes is rounded to bfloat16.

That is how GPUs add up products of bfloat16. ONNX Runtime's CPU provider has next to no kernels of the type itself.
"""

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from quantkit.decode.capability import graphs_of, nodes_of
from quantkit.decode.constants import Constant
from quantkit.graph.tensors import read_tensor

_FLOAT, _BFLOAT16 = ir.DataType.FLOAT, ir.DataType.BFLOAT16
# What these put out is what went in, so there is nothing to round; those with branches are rounded inside.
_EXACT = frozenset(
    {
        *("Abs", "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Max"),
        *("MaxPool", "Min", "Neg", "Pad", "Relu", "Reshape", "ScatterND", "Slice", "Split", "Squeeze"),
        *("Tile", "Transpose", "Unsqueeze", "Where", "If", "Loop", "Scan", "Constant", "ConstantOfShape"),
    }
)
_TYPE_ATTRIBUTES = ("to", "output_dtype", "dtype", "stash_type", "precision", "softmax_precision")


def emulate_bfloat16(model: ir.Model) -> None:
    """Rewrite a model so that it has no bfloat16 but at its inputs, and rounds as if it had.

    Its outputs are float32: no array of ONNX Runtime's Python interface holds bfloat16.
    """
    nodes = list(nodes_of(model.graph))
    graphs = [model.graph, *(inner for node in nodes for inner in graphs_of(node))]
    if not any(_holds_bfloat16(graph) for graph in graphs):
        return
    # Types are wanted of all that is computed; where inference does not know an operator, its inputs tell.
    passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    rounded = {id(v) for node in nodes for v in node.outputs if _puts_out_bfloat16(node, v)}
    inputs = [v for v in model.graph.inputs if v.dtype == _BFLOAT16]
    for graph in graphs:
        for value in graph.initializers.values():
            if value.dtype == _BFLOAT16:
                _widen(value)
    for graph in graphs[1:]:
        for value in [*graph.inputs, *graph.outputs]:
            if value.dtype == _BFLOAT16:
                value.type = ir.TensorType(_FLOAT)
    for node in nodes:
        _retype(node)
        for value in list(node.outputs):
            if id(value) in rounded:
                value.type = ir.TensorType(_FLOAT)
                if node.op_type not in _EXACT:
                    _round(node, value)
    for value in inputs:
        wide = ir.node("Cast", [value], attributes={"to": int(_FLOAT)}, name=f"{value.name}::float32")
        wide.outputs[0].name, wide.outputs[0].type = wide.name, ir.TensorType(_FLOAT)
        ir.convenience.replace_all_uses_with(value, wide.outputs[0])
        wide.replace_input_with(0, value)
        model.graph.insert_before(model.graph[0], wide)


def _holds_bfloat16(graph: ir.Graph) -> bool:
    values = [*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)]
    return any(v.dtype == _BFLOAT16 for v in values) or any(_names_bfloat16(n) for n in graph)


def _names_bfloat16(node: ir.Node) -> bool:
    return any(
        name in node.attributes and node.attributes[name].as_int() == _BFLOAT16
        for name in ("to", "output_dtype", "dtype")
    )


def _puts_out_bfloat16(node: ir.Node, value: ir.Value) -> bool:
    if value.dtype is not None:
        return value.dtype == _BFLOAT16
    return _names_bfloat16(node) or any(v is not None and v.dtype == _BFLOAT16 for v in node.inputs)


def _widen(value: ir.Value) -> None:
    tensor = value.const_value
    assert tensor is not None
    wide = Constant(
        dtype=_FLOAT, shape=tuple(tensor.shape.numpy()), read=lambda: read_tensor(tensor).astype(np.float32)
    ).tensor()
    wide.name = value.name
    value.const_value = wide
    value.type = ir.TensorType(_FLOAT)


def _retype(node: ir.Node) -> None:
    """Let attributes that name bfloat16 name float32, and tensors that hold it hold float32."""
    for name in _TYPE_ATTRIBUTES:
        if name in node.attributes and node.attributes[name].as_int() == _BFLOAT16:
            node.attributes[name] = ir.AttrInt64(name, int(_FLOAT))
    if node.op_type in ("Constant", "ConstantOfShape") and "value" in node.attributes:
        tensor = node.attributes["value"].as_tensor()
        if tensor.dtype == _BFLOAT16:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype(np.float32)))


def _round(node: ir.Node, value: ir.Value) -> None:
    """Round what a node puts out; the rounded tensor takes over the name."""
    name = value.name
    narrow = ir.node("Cast", [value], attributes={"to": int(_BFLOAT16)}, name=f"{name}::bfloat16")
    wide = ir.node("Cast", [narrow.outputs[0]], attributes={"to": int(_FLOAT)}, name=f"{name}::float32")
    narrow.outputs[0].name = narrow.name
    wide.outputs[0].type, wide.outputs[0].shape = ir.TensorType(_FLOAT), value.shape
    ir.convenience.replace_all_uses_with(value, wide.outputs[0], replace_graph_outputs=True)
    narrow.replace_input_with(0, value)
    value.name, wide.outputs[0].name = f"{name}::exact", name
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_after(node, [narrow, wide])

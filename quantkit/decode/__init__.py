"""Reading low-precision models as floats, for what ONNX Runtime has no kernels for.

decode(model): packed weights become the floats that they stand for, dynamic and FP4 / MX quantization of activations
becomes float operators that round exactly as the formats say, and what ONNX Runtime can run stays as it is.
"""

import onnx_ir as ir
import onnx_ir.passes.common as passes

from quantkit.decode.bfloat16 import emulate_bfloat16
from quantkit.decode.capability import TENSORRT_DOMAIN, beyond_onnxruntime, graphs_of, nodes_of
from quantkit.decode.constants import NO_TYPES, Constant, folded, stored
from quantkit.decode.operators import Rewriter

__all__ = ["beyond_onnxruntime", "decode"]


def decode(model: ir.Model) -> ir.Model:
    """Return a model that means the same and that ONNX Runtime's CPU provider runs.

    - Weights in FP4, FP8, INT4, INT2 or in blocks, behind DequantizeLinear (of two levels too), Cast and Mul,
      TRT_MXFP8DequantizeLinear, MatMulNBits or GatherBlockQuantized: float initializers, equal to
      `quantkit.formats.dequantize`. They are made when they are read and not kept: as lazy tensors.
    - Static Q/DQ of activations in int8, int16, int4 or float8 stays; in FP4 or under E8M0 scales it becomes float
      operators, as do TRT_FP4DynamicQuantize (E4M3 scales, block 16) and TRT_MXFP8DynamicQuantize (E8M0 scales by the
      rule "rceil", block 32). They round bit for bit as `quantkit.formats` does.
    - bfloat16 becomes float32, rounded to bfloat16 behind every operator that computes; inputs stay bfloat16.

    Names of inputs, outputs and of tensors that are computed as before stay. `model` is not changed.

    Raises:
        ModelError: an operator of TensorRT that has no reading here, or scales that do not fit their codes.
    """
    copy = model.clone()
    if copy.functions:
        passes.InlinePass()(copy)
    # Weights of IR version 3 are inputs too; a decoded one has another type than the input says.
    copy.graph.inputs[:] = [v for v in copy.graph.inputs if str(v.name) not in copy.graph.initializers]
    taken = _complete_names(copy)
    _fold(copy)
    rewriter = Rewriter(taken, copy.graph.opset_imports.get("", 1))
    for graph in _graphs(copy):
        for value in graph.initializers.values():
            if value.dtype in NO_TYPES:
                _store(value, stored(value))
                rewriter.holds_values(value)
    for node in list(nodes_of(copy.graph)):
        rewriter.rewrite(node)
    passes.RemoveUnusedNodesPass()(copy)
    copy.graph.opset_imports.pop(TENSORRT_DOMAIN, None)
    emulate_bfloat16(copy)
    return copy


def _fold(model: ir.Model) -> None:
    """Put constants in the place of all that only computes floats of stored codes."""
    constants: dict[ir.Value, Constant] = {}
    gone: dict[int, ir.Node] = {}
    for node in nodes_of(model.graph):
        constant = _small_constant(node) or folded(node, constants)
        if constant is not None:
            constants[node.outputs[0]] = constant
            gone[id(node)] = node
    for value, constant in constants.items():
        producer = value.producer()
        assert producer is not None and isinstance(producer.graph, ir.Graph)
        if value.is_graph_output() or any(id(user) not in gone for user, _ in value.uses()):
            made = ir.Value(name=value.name)
            _store(made, constant)
            value.name = None
            producer.graph.register_initializer(made)
            ir.convenience.replace_all_uses_with(value, made, replace_graph_outputs=True)
    for node in reversed(gone.values()):
        assert isinstance(node.graph, ir.Graph)
        node.graph.remove(node, safe=True)


def _small_constant(node: ir.Node) -> Constant | None:
    """What a Constant node holds, where ONNX Runtime cannot."""
    if node.domain == "" and node.op_type == "Constant":
        tensor = ir.convenience.get_const_tensor(node.outputs[0])
        if tensor is not None and tensor.dtype in NO_TYPES:
            return stored(node.outputs[0])
    return None


def _store(value: ir.Value, constant: Constant | None) -> None:
    """Let an initializer hold a constant."""
    assert constant is not None
    tensor = constant.tensor()
    tensor.name = value.name
    value.const_value, value.shape = tensor, ir.Shape(constant.shape)
    value.type = ir.TensorType(constant.dtype)


def _graphs(model: ir.Model) -> list[ir.Graph]:
    """The main graph, and those of branches and loop bodies."""
    return [model.graph, *(inner for node in nodes_of(model.graph) for inner in graphs_of(node))]


def _complete_names(model: ir.Model) -> set[str]:
    """Give a name to every node without one, and return all names of nodes and tensors."""
    taken = {str(v.name) for graph in _graphs(model) for v in [*graph.inputs, *graph.initializers.values()]}
    nodes = list(nodes_of(model.graph))
    taken |= {str(v.name) for node in nodes for v in node.outputs} | {str(n.name) for n in nodes if n.name}
    for number, node in enumerate(nodes):
        if not node.name:
            node.name = f"{node.op_type}_{number}"
    return taken

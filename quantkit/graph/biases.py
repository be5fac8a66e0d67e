"""Adding to what a linear operator adds to its output: into its bias, or as one where it has none."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantkit.errors import PlanError
from quantkit.graph.linears import find_linears
from quantkit.graph.model import Graph


def add_to_biases(graph: Graph, changes: Mapping[str, NDArray[np.floating]]) -> Graph:
    """Return a graph whose linear operators add more to their outputs; `graph` stays, and shares what did not change.

    A bias that others read too gets a copy. A MatMul gets an Add behind it, which takes over the name of its output.

    Args:
        graph: the cleaned model.
        changes: by node, what is added to each of its output channels: shape (channels,).

    Raises:
        PlanError: a node is no linear operator of this graph, or has another number of output channels.
    """
    if not changes:
        return graph
    linears = find_linears(graph)
    model = graph.model.clone()
    nodes = {str(node.name): node for node in model.graph}
    taken = set(model.graph.initializers) | {str(v.name) for node in model.graph for v in node.outputs}
    for name, change in changes.items():
        if name not in linears or np.shape(change) != (
            graph.shape(linears[name].weight)[linears[name].out_axis],
        ):
            raise PlanError(
                f"{name}: no linear operator with {np.size(change)} output channels; plan it again."
            )
        node = nodes[name]
        weight = node.inputs[linears[name].weight_index]
        dtype = (weight.dtype if weight is not None else None) or ir.DataType.FLOAT
        if node.op_type == "MatMul":
            axis = linears[name].output_axis
            behind = _bias_behind(node) if axis == -1 else None
            if behind is None:
                _add_behind(model, node, change.reshape(-1, *[1] * (-axis - 1)), dtype, taken)
                continue
            node, place = behind
        else:
            place = 2
        old = node.inputs[place] if len(node.inputs) > place else None
        total = np.asarray(change, np.float64)
        if old is not None:
            if old.const_value is None:
                raise PlanError(f"{name}: its bias is computed; leave it out of the correction.")
            total = old.const_value.numpy().astype(np.float64) + total
        alone = old is not None and len(old.uses()) == 1 and not old.is_graph_output()
        if old is not None and alone:
            del model.graph.initializers[str(old.name)]
        new_name = str(old.name) if old is not None and alone else _free(f"{name}::bias", taken)
        if len(node.inputs) <= place:
            node.resize_inputs(place + 1)
        node.replace_input_with(place, _constant(model, new_name, total, dtype))
    return Graph(model, graph.name, graph.path)


def can_add_to_bias(graph: Graph, node_name: str) -> bool:
    """Whether a linear operator's bias is constant, or absent."""
    node = graph.node(node_name)
    if node.op_type == "MatMul" or len(node.inputs) < 3 or node.inputs[2] is None:
        return True
    beta = node.attributes.get("beta")
    return node.inputs[2].const_value is not None and (beta is None or beta.as_float() == 1.0)


def _bias_behind(node: ir.Node) -> tuple[ir.Node, int] | None:
    """The Add that gives a MatMul its bias, one number a column, and which of its inputs that is."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output() or uses[0][0].op_type != "Add":
        return None
    add, index = uses[0]
    other = add.inputs[1 - index]
    if other is None or not other.is_initializer() or other.shape is None or len(other.shape) != 1:
        return None
    return add, 1 - index


def _add_behind(
    model: ir.Model, node: ir.Node, change: NDArray[np.floating], dtype: ir.DataType, taken: set[str]
) -> None:
    output = node.outputs[0]
    name = str(output.name)
    add = ir.node("Add", [output, None], name=_free(f"{node.name}::add_bias", taken))
    model.graph.insert_after(node, add)
    ir.convenience.replace_all_uses_with(output, add.outputs[0], replace_graph_outputs=True)
    add.replace_input_with(0, output)
    add.replace_input_with(1, _constant(model, _free(f"{node.name}::bias", taken), change, dtype))
    add.outputs[0].shape, add.outputs[0].type = output.shape, output.type
    output.name = _free(f"{name}::without_bias", taken)
    add.outputs[0].name = name


def _constant(model: ir.Model, name: str, array: NDArray[np.floating], dtype: ir.DataType) -> ir.Value:
    tensor = ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _free(name: str, taken: set[str]) -> str:
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    taken.add(found)
    return found

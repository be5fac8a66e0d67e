"""Where the values of an attention come from: the linear operator whose outputs they are, moved about and nothing more.

Whoever knows the channels of that output knows those of the values, whatever scale is folded into its weight.
"""

from collections.abc import Mapping

import onnx_ir as ir

from quantkit.graph.linears import Linear, find_linears
from quantkit.graph.model import Graph
from quantkit.graph.sites import find_sites

# What comes out is what went in: elsewhere, in part, or several times.
_MOVES = frozenset(
    {
        "Expand",
        "Flatten",
        "Identity",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)


def value_sources(graph: Graph) -> dict[str, tuple[str, Linear]]:
    """Return {tensor: (the output that its values are of, the linear operator that computes it)}.

    Of the tensors that a product of two activations reads; the output's channels lie along its last axis. A constant
    bias that is added behind a MatMul belongs to the operator.
    """
    linears = find_linears(graph)
    found = {}
    for site in find_sites(graph)[0]:
        if site.role == "input" and site.op_type == "MatMul" and site.axis is None:
            source = _source(graph.values[site.name], linears)
            if source is not None:
                found[site.name] = source
    return found


def _source(value: ir.Value, linears: Mapping[str, Linear]) -> tuple[str, Linear] | None:
    node = value.producer()
    while node is not None and node.domain == "" and node.op_type in _MOVES and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    if node is None:
        return None
    linear = linears.get(str(node.name))
    if linear is None and node.op_type == "Add" and node.domain == "":
        computed = [v for v in node.inputs if v is not None and not v.is_initializer()]
        producer = computed[0].producer() if len(computed) == 1 else None
        linear = None if producer is None else linears.get(str(producer.name))
    if linear is None or linear.window is not None or linear.output_axis != -1:
        return None
    return str(value.name), linear

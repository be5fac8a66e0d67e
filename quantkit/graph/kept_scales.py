"""The scales that a model's own Q/DQ pairs give its tensors, and those that only pass such a tensor's values on."""

import numpy as np
import onnx_ir as ir

from quantkit.formats import QParams, QuantSpec
from quantkit.graph.model import Graph
from quantkit.graph.quantized import find_quantized
from quantkit.graph.sites import PASS_OPS

Scale = tuple[QuantSpec, QParams]
# A Concat's other inputs have ranges of their own.
_PASSING = PASS_OPS - {"Concat"}


def kept_scales(graph: Graph) -> dict[str, Scale]:
    """Return {tensor: its format, scale and zero point} of the activations that the model quantizes itself.

    Beside a tensor that a QuantizeLinear reads, that is what comes out of the DequantizeLinear behind it, and what is
    tied to either by MaxPool, Reshape, Transpose and their like, which do on codes what they do on floats: another
    scale would round what is rounded already. A tensor that the model quantizes in two ways is left out, and so is
    one under several scales.
    """
    found: dict[str, Scale] = {}
    twice: set[str] = set()
    for entry in find_quantized(graph)[0]:
        if entry.role != "activation" or entry.spec is None or entry.spec.axis is not None:
            continue
        dequantized = [
            str(node.outputs[0].name)
            for node in map(graph.node, entry.nodes)
            if node.op_type == "DequantizeLinear"
        ]
        for name in (entry.name, *dequantized):
            known = found.setdefault(name, (entry.spec, entry.qparams))
            if not same_scale(known, (entry.spec, entry.qparams)):
                twice.add(name)
    for name in twice:
        del found[name]
    nodes = [n for n in graph.model.graph if n.domain == "" and n.op_type in _PASSING]
    for node in nodes:
        source, behind = _ends(node)
        if source in found and behind not in twice:
            found.setdefault(behind, found[source])
    for node in reversed(nodes):
        source, behind = _ends(node)
        # What a MaxPool leaves out may lie beyond the range, and others may read it.
        alone = len(graph.values[source].uses()) == 1 and not graph.values[source].is_graph_output()
        if alone and behind in found and source not in twice:
            found.setdefault(source, found[behind])
    return found


def _ends(node: ir.Node) -> tuple[str, str]:
    """What goes in and what comes out."""
    assert node.inputs[0] is not None
    return str(node.inputs[0].name), str(node.outputs[0].name)


def same_scale(first: Scale, second: Scale) -> bool:
    """Tell whether equal codes of both mean equal numbers."""
    (spec, qparams), (other_spec, other) = first, second
    points = [0 if q.zero_point is None else int(q.zero_point) for q in (qparams, other)]
    return spec == other_spec and np.array_equal(qparams.scale, other.scale) and points[0] == points[1]

"""Reading the weights of a written model back, one by one, and holding each against its plan."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from quantkit.decode import decode
from quantkit.errors import ExportError
from quantkit.export.operator_weights import stored_factor, works_on_codes
from quantkit.formats import dequantize
from quantkit.graph import Graph
from quantkit.metrics.outputs import SignalToNoise
from quantkit.planning.plan import Plan, WeightPlan
from quantkit.runtime import Session

# The file may hold scales in float16, or bfloat16, where the plan's are float32: they are equal, and their products
# with codes are rounded to that type.
_LEAST_DB = 45.0
# What may stand between a product and the output of the node that it came from.
_BEHIND = frozenset({"Add", "Cast"})


def verify_weights(path: Path, graph: Graph, plan: Plan) -> tuple[str, float]:
    """Return the weight at which the file and its plan agree least, and how well in dB.

    One weight is held at a time, as the floats that its codes stand for.

    Raises:
        ExportError: a weight of the file is not the plan's.
    """
    written = decode(ir.load(path))
    values = {str(v.name): v for node in written.graph for v in node.outputs}
    nodes = {str(node.name): node for node in written.graph}
    worst, least = "", float("inf")
    for weight in plan.weights:
        node, index = weight.readers[0]
        output = values.get(str(graph.node(node).outputs[0].name))
        if node in nodes and works_on_codes(nodes[node]):
            # What it puts out may have no floats, so it is known by its own name.
            found = stored_factor(nodes[node], index)
        else:
            found = None if output is None else _weight(written, output, index)
        if found is None:
            raise ExportError(f"{path.name}: weight {weight.name} is not where the plan has it; report this.")
        agreement = _agreement(graph, weight, found)
        if agreement < _LEAST_DB:
            raise ExportError(
                f"{path.name}: weight {weight.name} differs from the plan's ({agreement:.1f} dB); "
                "the file was not kept; report this."
            )
        if not worst or agreement < least:
            worst, least = weight.name, agreement
    return worst, least


def _agreement(graph: Graph, weight: WeightPlan, found: np.ndarray) -> float:
    planned = dequantize(weight.quantize(graph.array(weight.name)))
    if planned.shape != found.shape:
        # Operators that take their weights one way round only, as MatMulNBits does.
        found = found.T
    comparison = SignalToNoise()
    comparison.update(planned, found.astype(np.float32))
    return float("inf") if comparison.sqnr_db is None else comparison.sqnr_db


def _weight(model: ir.Model, output: ir.Value, index: int) -> np.ndarray | None:
    """The constant that the node which made `output` multiplies by."""
    node = output.producer()
    while node is not None and node.op_type in _BEHIND and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    value = None if node is None or index >= len(node.inputs) else node.inputs[index]
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    return _computed(model, value)


def _computed(model: ir.Model, value: ir.Value) -> np.ndarray | None:
    """What nodes that need no input compute: codes that ONNX Runtime turns into floats itself."""
    name = str(value.name)
    part = ir.Model(ir.convenience.extract(model.graph, [], [name]), ir_version=model.ir_version)
    part.graph.name = "part"
    found: Mapping[str, np.ndarray] = Session(part, optimize=False, threads=1).run({})
    return found[name]

"""NumPy's reading of a plan: the float model, with every quantized tensor rounded by this package's own formats.

It shares neither the Q/DQ nodes nor the kernels of the files that emitters write, so it can judge them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import numpy as np
import onnx_ir as ir

from quantkit.formats import dequantize
from quantkit.graph import Graph
from quantkit.planning.plan import ActivationPlan, Plan, Reader, WeightPlan
from quantkit.runtime import Session

_QUANTIZED = "::quantized"


def simulate(graph: Graph, plan: Plan, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the model's outputs, by name, when the plan is followed to the letter.

    The graph is cut at every quantized activation. What lies between two cuts runs in float in ONNX Runtime, without
    the optimizations that change values; at a cut NumPy quantizes and dequantizes. Weights and biases are replaced by
    the values that their codes stand for.

    Args:
        graph: the cleaned model that the plan was solved for.
        plan: the plan.
        feeds: input name → array.

    Raises:
        ModelError: ONNX Runtime cannot run a part of the model.
    """
    found = _follow(graph, plan, feeds, {})
    return {name: found[name] if name in found else graph.array(name) for name in graph.outputs}


def simulate_steps(
    graph: Graph, plan: Plan, feeds: Mapping[str, np.ndarray], observed: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return what the plan makes of each tensor in `observed` when those before it have the observed values.

    Over a whole network one value that falls on the other side of a rounding boundary, because floats were summed
    in another order, can end as far away as quantization itself. Over one step it cannot: nothing is rounded between.

    Args:
        graph, plan, feeds: as for `simulate`.
        observed: what a model that follows the plan computed, by tensor name, before quantizing it.
    """
    found = _follow(graph, plan, feeds, observed)
    return {name: found[name] for name in observed}


def _follow(
    graph: Graph, plan: Plan, feeds: Mapping[str, np.ndarray], observed: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Every tensor that a stage computes, by name; the stages behind go on from the observed value if there is one."""
    model = graph.model.clone()
    _replace_constants(graph, model, plan)
    cuts = _cut(model, plan.activations.values())
    known: dict[str, np.ndarray] = {}
    found: dict[str, np.ndarray] = {}

    def enter(name: str, array: np.ndarray) -> None:
        found[name] = array
        # A file in less precision tells of it in less.
        known[name] = observed.get(name, array).astype(array.dtype, copy=False)
        for cut, activation in cuts.get(name, ()):
            known[cut] = activation.apply(known[name]).astype(known[name].dtype)

    for name, array in feeds.items():
        enter(name, array)
    owners = _owners(model)
    for stage in _stages(model):
        outputs = _needed_later(stage, owners, cuts)
        inputs = sorted({str(v.name) for n in stage for v in _reads(n) if str(v.name) in known})
        part = ir.Model(ir.convenience.extract(model.graph, inputs, outputs), ir_version=model.ir_version)
        part.graph.name = "part"
        # One thread: floats are summed in one order on every machine, and no stage starts a pool of its own.
        session = Session(part, optimize=False, threads=1)
        for name, array in session.run({n: known[n] for n in inputs}).items():
            enter(name, array)
    return found


def _replace_constants(graph: Graph, model: ir.Model, plan: Plan) -> None:
    """Let readers read what the codes stand for, made anew for the part of the graph that is run: one at a time."""
    nodes = {str(n.name): n for n in model.graph}
    read: list[tuple[str, Callable[[], np.ndarray], tuple[Reader, ...]]] = [
        (w.name, partial(_decoded, graph, w), w.readers) for w in plan.weights
    ]
    read += [(b.name, partial(np.multiply, b.qvalue, b.scale), (b.reader,)) for b in plan.biases]
    for number, (name, values, readers) in enumerate(read):
        old = model.graph.initializers[name]
        dtype = old.dtype or ir.DataType.FLOAT
        tensor = ir.LazyTensor(
            partial(_as_tensor, values, dtype), dtype, ir.Shape(old.shape or ()), name=f"{name}::{number}"
        )
        value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)
        model.graph.register_initializer(value)
        for node, index in readers:
            nodes[node].replace_input_with(index, value)


def _decoded(graph: Graph, weight: WeightPlan) -> np.ndarray:
    return dequantize(weight.quantize(graph.array(weight.name)))


def _as_tensor(values: Callable[[], np.ndarray], dtype: ir.DataType) -> ir.TensorProtocol:
    return ir.tensor(values().astype(dtype.numpy(), copy=False), dtype=dtype)


def _cut(
    model: ir.Model, activations: Iterable[ActivationPlan]
) -> dict[str, list[tuple[str, ActivationPlan]]]:
    """Give every quantized tensor graph inputs of its own that its readers read instead; return them by tensor."""
    values = {str(v.name): v for n in model.graph for v in n.outputs} | {
        str(v.name): v for v in model.graph.inputs
    }
    cuts: dict[str, list[tuple[str, ActivationPlan]]] = {}
    for plan in activations:
        value, known = values[plan.name], cuts.setdefault(plan.name, [])
        cut = ir.Value(name=f"{plan.name}{_QUANTIZED}{len(known)}", shape=value.shape, type=value.type)
        known.append((str(cut.name), plan))
        model.graph.inputs.append(cut)
        for node, index in list(value.uses()):
            if not plan.readers or (str(node.name), index) in plan.readers:
                node.replace_input_with(index, cut)
    return cuts


def _stages(model: ir.Model) -> Iterator[list[ir.Node]]:
    """Yield the nodes between one cut and the next, in an order in which each stage needs only earlier ones."""
    depth: dict[str, int] = {}
    stages: dict[int, list[ir.Node]] = {}
    for node in model.graph:
        deepest = 0
        for value in _reads(node):
            name = str(value.name)
            if _QUANTIZED in name:
                deepest = max(deepest, depth.get(name.rpartition(_QUANTIZED)[0], -1) + 1)
            else:
                deepest = max(deepest, depth.get(name, 0))
        for output in node.outputs:
            depth[str(output.name)] = deepest
        stages.setdefault(deepest, []).append(node)
    for _, stage in sorted(stages.items()):
        yield stage


def _needed_later(stage: list[ir.Node], owners: Mapping[int, int], cuts: Mapping[str, object]) -> list[str]:
    inside = {id(n) for n in stage}
    return [
        str(value.name)
        for node in stage
        for value in node.outputs
        if value.name
        and (
            value.is_graph_output()
            or str(value.name) in cuts
            or any(owners[id(user)] not in inside for user, _ in value.uses())
        )
    ]


def _owners(model: ir.Model) -> dict[int, int]:
    """For every node, those of branches and loop bodies included, the node of the main graph that holds it."""
    owners: dict[int, int] = {}

    def enter(node: ir.Node, owner: int) -> None:
        owners[id(node)] = owner
        for graph in _bodies(node):
            for inner in graph:
                enter(inner, owner)

    for node in model.graph:
        enter(node, id(node))
    return owners


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, its branches and loop bodies included."""
    for value in node.inputs:
        if value is not None:
            yield value
    for graph in _bodies(node):
        for inner in graph:
            yield from _reads(inner)


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()

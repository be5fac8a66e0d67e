"""The layers of an ONNX graph as a framework has them: modules with a weight [out, in] and a bias, and the rest.

What ONNX knows are nodes; what a checkpoint holds are parameters. A node that multiplies by a constant matrix is a
linear layer, whichever way round the matrix is stored and whether its bias is an input of its own or of an Add.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from quantkit.errors import PlanError, SpecError
from quantkit.export.module_names import NameMap, Names, module_path
from quantkit.graph import Graph
from quantkit.planning.plan import WeightPlan

_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
_Use = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A module with a weight.

    Attributes:
        path: its dotted path.
        nodes: the nodes that it is in the graph, several where the model calls it several times.
        weight: the initializer that holds its weight.
        linear: whether it multiplies by a matrix; a convolution does not.
        transposed: whether the graph has its weight as [in, out].
        plan: how its weight is quantized; None where it stays in float.
        bias: the initializer that holds its bias, "" without one.
        bias_name: what the bias is called in the folder.
        tied: its weight, in float, is stored as somebody else's too, under that name.
    """

    path: str
    nodes: tuple[str, ...]
    weight: str
    linear: bool
    transposed: bool
    plan: WeightPlan | None
    bias: str = ""
    bias_name: str = ""
    tied: bool = False


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """All that a graph holds.

    Attributes:
        layers: the modules with weights, in the graph's order.
        others: every other initializer of floats → what it is called in the folder.
        left_out: those that the name map leaves out.
    """

    layers: tuple[Layer, ...]
    others: Mapping[str, str]
    left_out: tuple[str, ...] = ()

    def name_map(self) -> dict[str, str | None]:
        """Return the name map that gives all of it these names."""
        found: dict[str, str | None] = {}
        for layer in self.layers:
            found |= dict.fromkeys(layer.nodes, layer.path)
            if layer.bias_name and layer.bias_name != f"{layer.path}.bias":
                found[layer.bias] = layer.bias_name
        return found | dict(self.others) | dict.fromkeys(self.left_out)


def find_parameters(
    graph: Graph, weights: Iterable[WeightPlan] = (), name_map: NameMap | None = None
) -> Parameters:
    """Return every parameter of a graph under the name that it has in the framework.

    Args:
        graph: the cleaned model.
        weights: what becomes of weights; those of all other layers stay in float.
        name_map: names other than those that the exporter kept.

    Raises:
        PlanError: the plan quantizes what is no linear layer, or the graph is quantized already.
        SpecError: the name map names what there is not, or gives two things one name.
    """
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in graph.model.graph):
        raise PlanError(
            f"{graph.name}: it holds QuantizeLinear or DequantizeLinear; give the float model it was made from."
        )
    plans = {reader: weight for weight in weights for reader in weight.readers}
    claimed: set[_Use] = set()
    found: dict[tuple[str, int, str], Layer] = {}
    for node in graph.model.graph:
        layer = _layer(node, plans, claimed)
        if layer is None:
            continue
        # A module that is called twice is one; a weight that two modules share is written for each.
        named = (name_map or {}).get(layer.nodes[0])
        key = layer.weight, id(layer.plan), named or layer.path
        same = found.get(key)
        found[key] = layer if same is None else replace(same, nodes=same.nodes + layer.nodes)
    stray = [
        str(reader) for (reader, _) in plans if not any(reader in layer.nodes for layer in found.values())
    ]
    if stray:
        raise PlanError(
            f"{stray[0]}: is no linear layer with a matrix of its own; leave it in float with --exclude."
        )
    names = Names(name_map)
    layers = _named(graph, list(found.values()), names)
    moved = _others(graph, claimed, names)
    others = {source: name for source, name in moved.items() if name is not None}
    left_out = tuple(source for source, name in moved.items() if name is None)
    _check_known(graph, others)
    names.check_used()
    layers = [replace(x, tied=x.plan is None and x.weight in others) for x in layers]
    _check_names(layers, others)
    return Parameters(layers=tuple(layers), others=others, left_out=left_out)


def _layer(node: ir.Node, plans: Mapping[_Use, WeightPlan], claimed: set[_Use]) -> Layer | None:
    """The layer that a node is, before it has its final name; its inputs are claimed."""
    if node.domain != "":
        return None
    name, index = str(node.name), 1
    linear = node.op_type in ("MatMul", "Gemm")
    if linear:
        constant = [i for i in (0, 1) if _is_stored(node.inputs[i], 2)]
        # Two constants are folded, and a Gemm's first input is its data.
        if len(constant) != 1 or (node.op_type == "Gemm" and constant != [1]):
            return None
        index = constant[0]
    elif node.op_type not in _CONVOLUTIONS or not _is_stored(node.inputs[1]):
        return None
    weight = node.inputs[index]
    assert weight is not None
    transposed = linear and index == 1
    if node.op_type == "Gemm":
        attribute = node.attributes.get("transB")
        transposed = attribute is None or not attribute.as_int()
    elsewhere = {user.op_type for user, _ in weight.uses()} - {"MatMul", "Gemm", *_CONVOLUTIONS}
    claimed.add((name, index))
    bias = _bias(node, weight, -1 if transposed else 0, claimed)
    return Layer(
        path=module_path(node, str(weight.name), named_by_weight=not elsewhere),
        nodes=(name,),
        weight=str(weight.name),
        linear=linear,
        transposed=transposed,
        plan=plans.get((name, index)),
        bias=bias,
    )


def _bias(node: ir.Node, weight: ir.Value, out_axis: int, claimed: set[_Use]) -> str:
    """The name of the constant vector that is added to a layer's output, by itself or by an Add behind it."""
    place, index, output = node, 2, node.outputs[0]
    if node.op_type == "MatMul":
        users = list(output.uses())
        if len(users) != 1 or users[0][0].op_type != "Add" or output.is_graph_output() or out_axis != -1:
            return ""
        place, index = users[0][0], 1 - users[0][1]
    bias = place.inputs[index] if len(place.inputs) > index else None
    if bias is None or not _is_stored(bias, 1):
        return ""
    assert bias.shape is not None and weight.shape is not None
    if node.op_type not in _CONVOLUTIONS and bias.shape[0] != weight.shape[out_axis]:
        # One number for all channels, say.
        return ""
    claimed.add((str(place.name), index))
    return str(bias.name)


def _is_stored(value: ir.Value | None, rank: int | None = None) -> bool:
    """Whether a tensor is an initializer of floats, of that rank."""
    if value is None or not value.is_initializer() or value.dtype is None or value.shape is None:
        return False
    return value.dtype.is_floating_point() and rank in (None, len(value.shape))


def _named(graph: Graph, layers: list[Layer], names: Names) -> list[Layer]:
    """The layers under their final paths; those that would share one get their node's name behind it."""
    shared = {path for path, count in Counter(layer.path for layer in layers).items() if count > 1}
    named = []
    for layer in layers:
        derived = layer.path
        if derived in shared:
            derived = f"{derived}.{layer.nodes[0].strip('/').replace('/', '.')}"
        path = names.layer((*layer.nodes, layer.weight), derived)
        bias_name = f"{path}.bias"
        if layer.bias and layer.bias in names:
            bias_name = names.tensor(layer.bias) or ""
        named.append(replace(layer, path=path, bias_name=bias_name if layer.bias else ""))
    return named


def _others(graph: Graph, claimed: set[_Use], names: Names) -> dict[str, str | None]:
    """Initializers of floats that are not in layers alone → their names in the folder, None where they are left out."""
    found: dict[str, str | None] = {}
    for name, value in graph.model.graph.initializers.items():
        uses = [(str(user.name), index) for user, index in value.uses()]
        if not _is_stored(value) or (uses and all(use in claimed for use in uses)):
            continue
        found[name] = names.tensor(name)
    return found


def _check_known(graph: Graph, others: Iterable[str]) -> None:
    """Refuse tensors that a rescaling made beside the model's own: the framework has no place for them."""
    nodes = {str(node.name) for node in graph.model.graph}
    for name in others:
        tensor, _, node = name.rpartition("::")
        if tensor and (node in nodes or f"{tensor}::rescale" in nodes):
            raise PlanError(
                f"{tensor}: its rescaling is a tensor of its own, which the framework's model lacks; let scales fold "
                "into norms and weights alone, or choose a method without."
            )


def _check_names(layers: list[Layer], others: Mapping[str, str]) -> None:
    holders: dict[str, str] = {}
    claims = [(f"{x.path}.weight", x.nodes[0]) for x in layers if not x.tied]
    claims += [(x.bias_name, x.nodes[0]) for x in layers if x.bias_name]
    claims += [(name, source) for source, name in others.items()]
    for name, holder in claims:
        if name in holders:
            raise SpecError(
                f"{name}: is the name of two parameters, of {holders[name]} and of {holder}; give them names of their "
                "own with --name-map."
            )
        holders[name] = holder

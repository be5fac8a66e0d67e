"""Where a graph can be quantized: the tensors that Conv, ConvTranspose, MatMul and Gemm read, and those around them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from quantkit.graph.dequantized import is_dequantized, is_stored
from quantkit.graph.model import Graph

LINEAR_OPS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
# An operator that a convolution's kernel absorbs: the tensor worth quantizing is the one behind it.
_FUSED_ACTIVATIONS = frozenset({"Relu", "Clip"})
# These only pass values on, so what goes in and what comes out have one scale.
PASS_OPS = frozenset({"Concat", "Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
QUANTIZED_ALREADY = "already quantized in the model"
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

Role = Literal["input", "weight", "skip", "operand", "output", "embedding"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place in the graph that can be quantized: one tensor as one node sees it.

    Attributes:
        name: the tensor.
        role: "input" and "weight" of a linear operator; "embedding": the table of a Gather; "skip": the branch of a
            residual Add that the convolution does not compute; "operand" of an Add behind a convolution; "output" of
            a convolution or such an Add, read behind the Relu or Clip that is fused into it.
        node: the name of the node that reads it, or for "output" that computes it.
        op_type: that node's operator.
        index: which input (or output) of the node it is.
        shape: the tensor's shape, None or a name where a dimension is free.
        axis: for a weight the axis of its output channels, for an input with a constant weight the axis that the
            operator contracts (−1 where the rank is not known); None where there is none.
        contraction: for the weight of a MatMul or Gemm the axis that is contracted, which blocks lie along.
    """

    name: str
    role: Role
    node: str
    op_type: str
    index: int
    shape: tuple[int | str | None, ...]
    axis: int | None = None
    contraction: int | None = None


@dataclass(frozen=True, kw_only=True)
class LeftAlone:
    """A node that is not quantized, and why."""

    node: str
    op_type: str
    reason: str


def find_sites(graph: Graph) -> tuple[list[Site], list[LeftAlone]]:
    """Return every site of the graph in topological order, and the linear nodes that have none with the reason."""
    sites: list[Site] = []
    left: list[LeftAlone] = []
    for node in graph.model.graph:
        if node.domain != "":
            continue
        if node.op_type in LINEAR_OPS:
            reason = _why_not(node)
            if reason:
                left.append(_leave(node, reason))
            else:
                sites.extend(s for s in _linear_sites(node) if not _quantized_already(node, s))
        elif node.op_type == "Add":
            sites.extend(s for s in _add_sites(node) if not _quantized_already(node, s))
        elif node.op_type == "Gather":
            sites.extend(_embedding_sites(node))
        left.extend(_inner_nodes(node))
    return sites, left


def sharing_groups(graph: Graph) -> list[frozenset[str]]:
    """Return the sets of tensors that MaxPool, Reshape, Transpose, Concat and their like tie to one scale."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for node in graph.model.graph:
        if node.domain == "" and node.op_type in PASS_OPS:
            inputs = node.inputs if node.op_type == "Concat" else node.inputs[:1]
            for value in inputs:
                if value is not None and value.dtype in _FLOATS and value.const_value is None:
                    parent[root(str(value.name))] = root(str(node.outputs[0].name))
    groups: dict[str, set[str]] = {}
    for name in parent:
        groups.setdefault(root(name), set()).add(name)
    return sorted((frozenset(g) for g in groups.values() if len(g) > 1), key=min)


def is_plain_product(node: ir.Node) -> bool:
    """Whether a MatMul or Gemm is x @ W, and at most a bias of one value an output channel added."""
    if node.op_type == "MatMul":
        return True
    if node.op_type != "Gemm":
        return False
    ones = all(node.attributes[a].as_float() == 1 for a in ("alpha", "beta") if a in node.attributes)
    straight = "transA" not in node.attributes or node.attributes["transA"].as_int() == 0
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    # Gemm broadcasts biases of other shapes too.
    weight = node.inputs[1]
    if bias is None:
        return ones and straight
    if bias.shape is None or weight is None or weight.shape is None:
        return False
    transposed = "transB" in node.attributes and node.attributes["transB"].as_int() != 0
    return ones and straight and tuple(bias.shape) == (weight.shape[0 if transposed else 1],)


def is_depthwise_or_narrow(node: ir.Node, channels: int = 16) -> bool:
    """Tell whether a convolution is depthwise or has at most `channels` channels in or out of a group."""
    weight = node.inputs[1]
    if node.op_type not in ("Conv", "ConvTranspose") or weight is None or weight.shape is None:
        return False
    group = _int(node, "group", 1)
    first, second = weight.shape[0], weight.shape[1]
    assert isinstance(first, int) and isinstance(second, int)
    # Conv weights are [out, in / group, …], ConvTranspose weights [in, out / group, …].
    return min(first // group, second) <= channels


def fused_output(node: ir.Node) -> ir.Value:
    """Return the tensor behind the Relu or Clip that is this node's only reader, else the node's own output."""
    value = node.outputs[0]
    readers = [user for user, _ in value.uses()]
    if len(readers) == 1 and not value.is_graph_output() and readers[0].op_type in _FUSED_ACTIVATIONS:
        reader = readers[0]
        if reader.domain == "" and all(v is None or v.const_value is not None for v in reader.inputs[1:]):
            return reader.outputs[0]
    return value


# --- linear operators ----------------------------------------------------------------------------------------------


def _why_not(node: ir.Node) -> str:
    """Why a linear node has no site; "" when it has."""
    for value in node.inputs[:2]:
        if value is None or value.dtype is None:
            return "an input's type is unknown"
        if value.dtype not in _FLOATS:
            return f"its inputs are {value.dtype.name.lower()}"
    left, right = node.inputs[0], node.inputs[1]
    assert left is not None and right is not None
    if is_dequantized(left) and is_dequantized(right):
        return QUANTIZED_ALREADY
    if node.op_type in ("Conv", "ConvTranspose"):
        return "" if is_stored(right) else "its weight is computed, not constant"
    if is_stored(left) and is_stored(right):
        return "both inputs are constant"
    if node.op_type == "Gemm" and not is_stored(right):
        return "its weight is computed, not constant"
    if left.shape is None and is_stored(right) and right.shape is not None and len(right.shape) > 1:
        # Behind an operator that shape inference does not know. The last axis is the last, whatever the rank.
        return "GEMV-shaped (N = 1): memory-bound, nothing to gain" if right.shape[-1] == 1 else ""
    if left.shape is None or right.shape is None:
        return "an input's rank is unknown"
    if len(left.shape) < 2 or len(right.shape) < 2:
        return "a vector product: memory-bound, nothing to gain"
    rows, columns = left.shape[-2], right.shape[-1]
    if node.op_type == "Gemm":
        rows = left.shape[1] if _int(node, "transA", 0) else left.shape[0]
        columns = right.shape[0] if _int(node, "transB", 0) else right.shape[1]
    if columns == 1:
        return "GEMV-shaped (N = 1): memory-bound, nothing to gain"
    if rows == 1 and not is_stored(right):
        return "GEMV-shaped (M = 1): memory-bound, nothing to gain"
    return ""


def _linear_sites(node: ir.Node) -> Iterator[Site]:
    left, right = node.inputs[0], node.inputs[1]
    assert left is not None and right is not None
    # With the rank unknown, the last axis is −1.
    rank = len(left.shape) if left.shape is not None else 0
    if node.op_type == "MatMul":
        if is_stored(right):
            yield _site(node, 0, "input", rank - 1)
            yield _site(node, 1, "weight", len(_shape(right)) - 1, len(_shape(right)) - 2)
        elif is_stored(left):
            yield _site(node, 0, "weight", rank - 2, rank - 1)
            yield _site(node, 1, "input", len(_shape(right)) - 2)
        else:
            yield _site(node, 0, "input", None)
            yield _site(node, 1, "input", None)
        return
    if node.op_type == "Gemm":
        yield _site(node, 0, "input", 0 if _int(node, "transA", 0) else 1)
        transposed = bool(_int(node, "transB", 0))
        yield _site(node, 1, "weight", 0 if transposed else 1, 1 if transposed else 0)
        return
    yield _site(node, 0, "input", 1)
    # A ConvTranspose weight is [in, out / group, …]: its output channels lie on axis 1.
    yield _site(node, 1, "weight", 1 if node.op_type == "ConvTranspose" else 0)
    yield _output_site(node)


def _add_sites(node: ir.Node) -> Iterator[Site]:
    """Sites of a residual Add: at least one operand comes straight from a convolution, both are activations."""
    operands = [v for v in node.inputs if v is not None]
    if len(operands) != 2 or any(v.const_value is not None or v.dtype not in _FLOATS for v in operands):
        return
    from_conv = [_is_convolution(v.producer()) and len(v.uses()) == 1 for v in operands]
    if operands[0] is operands[1] or not any(_is_convolution(_behind_activation(v)) for v in operands):
        return
    for index in (0, 1):
        yield _site(node, index, "operand", None)
    if any(from_conv):
        # Where both branches end in a convolution, the sum is fused into the later one and the other is the skip.
        fused = from_conv.index(True) if not all(from_conv) else _later(operands)
        yield _site(node, 1 - fused, "skip", None)
    yield _output_site(node)


def _embedding_sites(node: ir.Node) -> Iterator[Site]:
    """The table of a Gather that takes whole rows of a constant matrix; its rows are what blocks lie along."""
    table = node.inputs[0]
    if (
        table is None
        or not table.is_initializer()
        or table.dtype not in _FLOATS
        or _int(node, "axis", 0) != 0
    ):
        return
    if len(_shape(table)) == 2:
        yield _site(node, 0, "embedding", 0, 1)


def _later(operands: list[ir.Value]) -> int:
    graph_order = {id(n): i for i, n in enumerate(operands[0].producer().graph)}  # type: ignore[union-attr,arg-type]
    return 1 if graph_order[id(operands[1].producer())] > graph_order[id(operands[0].producer())] else 0


def _behind_activation(value: ir.Value) -> ir.Node | None:
    producer = value.producer()
    if producer is not None and producer.op_type in _FUSED_ACTIVATIONS and producer.inputs[0] is not None:
        return producer.inputs[0].producer()
    return producer


def _is_convolution(node: ir.Node | None) -> bool:
    return node is not None and node.domain == "" and node.op_type in ("Conv", "ConvTranspose")


def _quantized_already(node: ir.Node, site: Site) -> bool:
    """Whether the model itself quantizes what a site stands for."""
    if site.role == "output":
        return any(user.op_type == "QuantizeLinear" for user, _ in fused_output(node).uses())
    value = node.inputs[site.index]
    return value is not None and is_dequantized(value)


def _site(node: ir.Node, index: int, role: Role, axis: int | None, contraction: int | None = None) -> Site:
    value = node.inputs[index]
    assert value is not None
    return Site(
        name=str(value.name),
        role=role,
        node=str(node.name),
        op_type=node.op_type,
        index=index,
        shape=_shape(value),
        axis=axis,
        contraction=contraction,
    )


def _output_site(node: ir.Node) -> Site:
    value = fused_output(node)
    return Site(
        name=str(value.name),
        role="output",
        node=str(node.name),
        op_type=node.op_type,
        index=0,
        shape=_shape(value),
    )


def _inner_nodes(node: ir.Node) -> Iterator[LeftAlone]:
    for attribute in node.attributes.values():
        graphs: Iterable[ir.Graph] = ()
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = (attribute.as_graph(),)
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = attribute.as_graphs()
        for inner_graph in graphs:
            for inner in inner_graph:
                if inner.domain == "" and inner.op_type in LINEAR_OPS:
                    yield _leave(inner, f"inside {node.op_type} {node.name}")
                yield from _inner_nodes(inner)


def _leave(node: ir.Node, reason: str) -> LeftAlone:
    return LeftAlone(node=str(node.name), op_type=node.op_type, reason=reason)


def _shape(value: ir.Value) -> tuple[int | str | None, ...]:
    return tuple(d if isinstance(d, int) else d.value for d in value.shape) if value.shape is not None else ()


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()

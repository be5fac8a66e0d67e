"""From a tensor up to the constants that make its channels as large as they are: where a per-channel scale folds.

The walk goes against the arrows. It carries, for the axes of the present tensor that hold the channels, which channel
each index is (−1 where it is none of them), through everything that passes a positive factor on: layouts, Relu,
pooling, a product with another activation, attention's sum over values. It ends at a norm's gain, a product with a
constant, or a linear operator's weight, and gives up at everything else, saying why.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from quantkit.graph.channel_labels import (
    Labels,
    UntraceableError,
    dims_of,
    first_of,
    laid_out,
    of_operand,
    of_parts,
    of_whole,
    rank_of,
    reduced,
    refuse,
    repeated,
    transposed,
)
from quantkit.graph.linears import Linear
from quantkit.graph.model import Graph

# Norms by operator: the inputs that are their gain and shift, and the axis those lie along, −1 or 1.
_NORMS = {
    ("", "LayerNormalization"): (1, 2, -1),
    ("", "RMSNormalization"): (1, None, -1),
    ("", "SimplifiedLayerNormalization"): (1, None, -1),
    ("com.microsoft", "SkipLayerNormalization"): (2, 3, -1),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): (2, None, -1),
    ("", "BatchNormalization"): (1, 2, 1),
    ("", "InstanceNormalization"): (1, 2, 1),
}
# f(x / s) = f(x) / s for every s > 0, element by element.
_HOMOGENEOUS = frozenset({"Abs", "Dropout", "Identity", "LeakyRelu", "Neg", "PRelu", "Relu"})
_POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "MaxPool"})
_LAYOUTS = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})
_REDUCTIONS = frozenset({"ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"})


@dataclass(frozen=True, kw_only=True)
class Factor:
    """A constant that a tensor's channels are proportional to.

    Attributes:
        node, index: the node, and which of its inputs the constant is.
        axis: the constant's axis (may be negative) that holds the channels; a constant without one is spread first.
        channels: for every index along `axis`, the channel of the tensor that is traced; −1 for none.
        kind: "norm" for a norm's gain or shift and for products and sums with constants, "linear" for the weight and
            bias of a linear operator.
    """

    node: str
    index: int
    axis: int
    channels: tuple[int, ...]
    kind: str


@dataclass(frozen=True, kw_only=True)
class Traced:
    """Where the scale of a tensor's channels folds.

    Attributes:
        factors: the constants to divide.
        ties: for every channel the first channel that must have the same scale (heads that share their values).
        passed: tensors between the constants and the traced one; they are divided too.
        lifted: nodes and inputs of Clips whose upper limit goes, because they were seen never to reach it.
    """

    factors: tuple[Factor, ...]
    ties: tuple[int, ...]
    passed: tuple[str, ...]
    lifted: tuple[tuple[str, int], ...]


@dataclass
class _Walk:
    """What a walk has found so far."""

    linears: dict[str, Linear]
    unclipped: Collection[str]
    factors: list[Factor] = field(default_factory=list)
    ties: list[tuple[int, int]] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    lifted: list[tuple[str, int]] = field(default_factory=list)

    def copy(self) -> "_Walk":
        return _Walk(
            self.linears,
            self.unclipped,
            list(self.factors),
            list(self.ties),
            list(self.passed),
            list(self.lifted),
        )

    def take(self, other: "_Walk") -> None:
        self.factors, self.ties = other.factors, other.ties
        self.passed, self.lifted = other.passed, other.lifted


def trace(
    graph: Graph,
    tensor: str,
    *,
    axis: int,
    channels: int,
    readers: Collection[tuple[str, int]],
    linears: dict[str, Linear],
    unclipped: Collection[str] = (),
) -> Traced:
    """Return the constants into which a scale of `tensor`'s channels folds.

    Args:
        graph: the cleaned model.
        tensor: the tensor whose channels are to be divided.
        axis: its channel axis; negative.
        channels: how many there are.
        readers: the (node, input index) pairs that make up for it; nobody else may read the tensor.
        linears: `find_linears` of the graph.
        unclipped: outputs of Clips that were seen never to reach their upper limit.

    Raises:
        UntraceableError: there are none.
    """
    value = graph.values[tensor]
    for node, index in value.uses():
        if (str(node.name), index) not in readers:
            raise UntraceableError(f"{tensor} is also read by {node.op_type} {node.name}")
    walk = _Walk(linears, unclipped)
    _climb(walk, value, Labels((axis,), np.arange(channels)))
    return Traced(
        factors=tuple(walk.factors),
        ties=first_of(channels, walk.ties),
        passed=tuple(walk.passed),
        lifted=tuple(walk.lifted),
    )


def _climb(walk: _Walk, value: ir.Value, labels: Labels) -> None:
    """Go on from a tensor that is to be divided, whose readers are all known to expect it."""
    node = value.producer()
    if value.is_graph_output():
        raise UntraceableError(f"{value.name} is an output of the model")
    if node is None:
        raise UntraceableError(
            f"{value.name} is an input of the model" if value.is_graph_input() else "constant"
        )
    what = f"{node.op_type} {node.name}"
    if str(node.name) in walk.linears:
        _end_at_linear(walk, node, walk.linears[str(node.name)], labels, what)
    elif (node.domain, node.op_type) in _NORMS:
        _end_at_norm(walk, node, value, labels, what)
    elif node.domain != "":
        raise UntraceableError(f"{what} computes it")
    elif node.op_type in _HOMOGENEOUS and value is node.outputs[0]:
        _through(walk, node, 0, labels)
    elif node.op_type == "Clip":
        _pass_clip(walk, node, value, labels, what)
    elif node.op_type in ("Mul", "Div"):
        _pass_product(walk, node, labels, what)
    elif node.op_type in ("Add", "Sub"):
        _pass_sum(walk, node, labels, what)
    elif node.op_type in _POOLS and value is node.outputs[0]:
        if labels.axes != (1 - rank_of(node.inputs[0], what),):
            refuse(what)
        _through(walk, node, 0, labels)
    elif node.op_type in _REDUCTIONS:
        _through(walk, node, 0, reduced(node, labels))
    elif node.op_type == "Transpose":
        _through(walk, node, 0, transposed(node, labels))
    elif node.op_type in _LAYOUTS:
        _through(walk, node, 0, laid_out(node, labels))
    elif node.op_type in ("Expand", "Tile"):
        _through(walk, node, 0, repeated(node, labels, walk.ties))
    elif node.op_type == "Split":
        _through(walk, node, 0, of_whole(node, value, labels))
    elif node.op_type == "Concat":
        for index, part in enumerate(of_parts(node, labels)):
            _through(walk, node, index, part)
    elif node.op_type == "MatMul":
        # Probabilities @ values: the values' last axis and the axes before the matrices are those of the result.
        if -2 in labels.axes:
            refuse(what)
        _through(walk, node, 1, of_operand(node, 1, labels, walk.ties))
    else:
        raise UntraceableError(f"{what} computes it")


def _through(walk: _Walk, node: ir.Node, index: int, labels: Labels) -> None:
    """Go on to an input that `node` alone reads, and once."""
    value = node.inputs[index]
    assert value is not None
    if value.const_value is not None:
        raise UntraceableError(f"{node.op_type} {node.name} reads a constant")
    others = [f"{user.op_type} {user.name}" for user, at in value.uses() if (user, at) != (node, index)]
    if others:
        raise UntraceableError(f"{value.name} is also read by {others[0]}")
    walk.passed.append(str(value.name))
    _climb(walk, value, labels)


# --- where a walk ends ---------------------------------------------------------------------------------------------


def _end_at_linear(walk: _Walk, node: ir.Node, linear: Linear, labels: Labels, what: str) -> None:
    if labels.axes != (linear.output_axis,):
        refuse(what)
    weight = node.inputs[linear.weight_index]
    assert weight is not None
    sharing = [user for user, _ in weight.uses() if str(user.name) in walk.linears and user is not node]
    if sharing:
        raise UntraceableError(f"{weight.name}, the weight of {what}, is shared with {sharing[0].name}")
    channels = labels.line()
    found = [
        Factor(
            node=str(node.name),
            index=linear.weight_index,
            axis=linear.out_axis,
            channels=channels,
            kind="linear",
        )
    ]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        _check_constant(node, 2, what)
        found.append(Factor(node=str(node.name), index=2, axis=-1, channels=channels, kind="linear"))
    walk.factors.extend(found)


def _end_at_norm(walk: _Walk, node: ir.Node, value: ir.Value, labels: Labels, what: str) -> None:
    gain, shift, axis = _NORMS[(node.domain, node.op_type)]
    if axis == 1:
        axis = 1 - rank_of(value, what)
    else:
        attribute = node.attributes.get("axis")
        given = -1 if attribute is None else attribute.as_int()
        if given not in (-1, len(value.shape) - 1 if value.shape is not None else -1):
            raise UntraceableError(f"{what} normalizes more than the last axis")
    if labels.axes != (axis,) or value is not node.outputs[0]:
        refuse(what)
    indices = [gain]
    if shift is not None and len(node.inputs) > shift and node.inputs[shift] is not None:
        indices.append(shift)
    for index in indices:
        _check_constant(node, index, what)
        walk.factors.append(
            Factor(node=str(node.name), index=index, axis=-1, channels=labels.line(), kind="norm")
        )


def _check_constant(node: ir.Node, index: int, what: str) -> None:
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is None or not value.is_initializer():
        raise UntraceableError(f"{what} has a computed {'bias' if index == 2 else 'gain'}")


def _factor_of_constant(node: ir.Node, index: int, labels: Labels, what: str) -> Factor:
    """The constant operand of an elementwise operator, which may have no channel axis of its own yet."""
    constant = node.inputs[index]
    other = node.inputs[1 - index]
    assert constant is not None and constant.shape is not None and other is not None
    if len(labels.axes) != 1:
        raise UntraceableError(f"{what} has a constant of another shape")
    (axis,) = labels.axes
    # It may widen the other operand, whose channels would then not be these.
    if other.shape is not None and len(constant.shape) > len(other.shape):
        raise UntraceableError(f"{what} has a constant of another shape")
    if len(constant.shape) >= -axis and constant.shape[axis] not in (1, labels.names.size):
        raise UntraceableError(f"{what} has a constant of another shape")
    return Factor(node=str(node.name), index=index, axis=axis, channels=labels.line(), kind="norm")


# --- what passes a scale on ----------------------------------------------------------------------------------------


def _pass_clip(walk: _Walk, node: ir.Node, value: ir.Value, labels: Labels, what: str) -> None:
    ends = [node.inputs[i] if len(node.inputs) > i else None for i in (1, 2)]
    if any(end is not None and end.const_value is None for end in ends):
        raise UntraceableError(f"{what} has computed limits")
    lo, hi = (None if end is None else float(end.const_value.numpy()) for end in ends)  # type: ignore[union-attr]
    if lo is not None and lo != 0 and lo > np.finfo(np.float32).min:
        raise UntraceableError(f"{what} clips at {lo:g}")
    if hi is not None and hi < np.finfo(np.float32).max:
        if value.name not in walk.unclipped:
            raise UntraceableError(f"{what} clips at {hi:g}")
        walk.lifted.append((str(node.name), 2))
    _through(walk, node, 0, labels)


def _pass_product(walk: _Walk, node: ir.Node, labels: Labels, what: str) -> None:
    constants = [i for i in (0, 1) if node.inputs[i] is not None and node.inputs[i].is_initializer()]  # type: ignore[union-attr]
    if node.op_type == "Div":
        _through(walk, node, 0, of_operand(node, 0, labels, walk.ties))
        return
    reasons = []
    for index in (0, 1):
        if index in constants:
            continue
        if constants and math.prod(dims_of(node.inputs[constants[0]], what)) != 1:
            # A norm's gain.
            break
        attempt = walk.copy()
        try:
            _through(attempt, node, index, of_operand(node, index, labels, attempt.ties))
        except UntraceableError as reason:
            reasons.append(str(reason))
        else:
            walk.take(attempt)
            return
    if constants:
        walk.factors.append(_factor_of_constant(node, constants[0], labels, what))
        return
    raise UntraceableError(f"neither side of {what} takes a scale: {'; '.join(reasons)}")


def _pass_sum(walk: _Walk, node: ir.Node, labels: Labels, what: str) -> None:
    constants = [i for i in (0, 1) if node.inputs[i] is not None and node.inputs[i].is_initializer()]  # type: ignore[union-attr]
    if not constants:
        raise UntraceableError(f"{what} adds two branches")
    walk.factors.append(_factor_of_constant(node, constants[0], labels, what))
    _through(walk, node, 1 - constants[0], labels)

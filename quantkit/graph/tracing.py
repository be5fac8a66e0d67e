"""From a tensor up to the constants that make its channels as large as they are: where a per-channel scale folds.

The walk goes against the arrows. It carries, for the axes of the present tensor that hold the channels, which channel
each index is (−1 where it is none of them), through everything that passes a positive factor on: layouts, Relu,
pooling, a product with another activation, attention's sum over values. It ends at a norm's gain, a product with a
constant, or a linear operator's weight, and gives up at everything else, saying why.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

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


class UntraceableError(Exception):
    """What forbids a fold, in words."""


@dataclass(frozen=True)
class _Labels:
    """Which channel is where: `names` has an axis for each of `axes`, negative and ascending, of the tensor."""

    axes: tuple[int, ...]
    names: NDArray[np.int64]


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
    _climb(walk, value, _Labels((axis,), np.arange(channels)))
    return Traced(
        factors=tuple(walk.factors),
        ties=_first_of(channels, walk.ties),
        passed=tuple(walk.passed),
        lifted=tuple(walk.lifted),
    )


def _climb(walk: _Walk, value: ir.Value, labels: _Labels) -> None:
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
        rank = _rank(node.inputs[0], what)
        _through(walk, node, 0, labels if labels.axes == (1 - rank,) else _refuse(what))
    elif node.op_type in _REDUCTIONS:
        _pass_reduction(walk, node, labels, what)
    elif node.op_type == "Transpose":
        _pass_transpose(walk, node, labels)
    elif node.op_type in _LAYOUTS:
        _pass_layout(walk, node, labels, what)
    elif node.op_type in ("Expand", "Tile"):
        _pass_repeat(walk, node, labels, what)
    elif node.op_type == "Split":
        _pass_split(walk, node, value, labels, what)
    elif node.op_type == "Concat":
        _pass_concat(walk, node, labels, what)
    elif node.op_type == "MatMul":
        _pass_attention(walk, node, labels, what)
    else:
        raise UntraceableError(f"{what} computes it")


def _through(walk: _Walk, node: ir.Node, index: int, labels: _Labels) -> None:
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


def _refuse(what: str) -> _Labels:
    raise UntraceableError(f"{what} mixes its channels with others")


# --- where a walk ends ---------------------------------------------------------------------------------------------


def _end_at_linear(walk: _Walk, node: ir.Node, linear: Linear, labels: _Labels, what: str) -> None:
    if labels.axes != (linear.output_axis,):
        _refuse(what)
    weight = node.inputs[linear.weight_index]
    assert weight is not None
    sharing = [user for user, _ in weight.uses() if str(user.name) in walk.linears and user is not node]
    if sharing:
        raise UntraceableError(f"{weight.name}, the weight of {what}, is shared with {sharing[0].name}")
    channels = _line(labels)
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


def _end_at_norm(walk: _Walk, node: ir.Node, value: ir.Value, labels: _Labels, what: str) -> None:
    gain, shift, axis = _NORMS[(node.domain, node.op_type)]
    if axis == 1:
        axis = 1 - _rank(value, what)
    else:
        attribute = node.attributes.get("axis")
        given = -1 if attribute is None else attribute.as_int()
        if given not in (-1, len(value.shape) - 1 if value.shape is not None else -1):
            raise UntraceableError(f"{what} normalizes more than the last axis")
    if labels.axes != (axis,) or value is not node.outputs[0]:
        _refuse(what)
    indices = [gain]
    if shift is not None and len(node.inputs) > shift and node.inputs[shift] is not None:
        indices.append(shift)
    for index in indices:
        _check_constant(node, index, what)
        walk.factors.append(
            Factor(node=str(node.name), index=index, axis=-1, channels=_line(labels), kind="norm")
        )


def _check_constant(node: ir.Node, index: int, what: str) -> None:
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is None or not value.is_initializer():
        raise UntraceableError(f"{what} has a computed {'bias' if index == 2 else 'gain'}")


def _factor_of_constant(node: ir.Node, index: int, labels: _Labels, what: str) -> Factor:
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
    return Factor(node=str(node.name), index=index, axis=axis, channels=_line(labels), kind="norm")


def _line(labels: _Labels) -> tuple[int, ...]:
    return tuple(int(name) for name in labels.names)


# --- what passes a scale on ----------------------------------------------------------------------------------------


def _pass_clip(walk: _Walk, node: ir.Node, value: ir.Value, labels: _Labels, what: str) -> None:
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


def _pass_product(walk: _Walk, node: ir.Node, labels: _Labels, what: str) -> None:
    constants = [i for i in (0, 1) if node.inputs[i] is not None and node.inputs[i].is_initializer()]  # type: ignore[union-attr]
    if node.op_type == "Div":
        _through(walk, node, 0, _unbroadcast(walk, node, 0, labels, what))
        return
    reasons = []
    for index in (0, 1):
        if index in constants:
            continue
        if constants and math.prod(_dims(node.inputs[constants[0]], what)) != 1:
            # A norm's gain.
            break
        attempt = walk.copy()
        try:
            _through(attempt, node, index, _unbroadcast(attempt, node, index, labels, what))
        except UntraceableError as reason:
            reasons.append(str(reason))
        else:
            walk.take(attempt)
            return
    if constants:
        walk.factors.append(_factor_of_constant(node, constants[0], labels, what))
        return
    raise UntraceableError(f"neither side of {what} takes a scale: {'; '.join(reasons)}")


def _pass_sum(walk: _Walk, node: ir.Node, labels: _Labels, what: str) -> None:
    constants = [i for i in (0, 1) if node.inputs[i] is not None and node.inputs[i].is_initializer()]  # type: ignore[union-attr]
    if not constants:
        raise UntraceableError(f"{what} adds two branches")
    walk.factors.append(_factor_of_constant(node, constants[0], labels, what))
    _through(walk, node, 1 - constants[0], labels)


def _unbroadcast(walk: _Walk, node: ir.Node, index: int, labels: _Labels, what: str) -> _Labels:
    """The labels of an operand: where it is broadcast, its one element stands for several channels."""
    value = node.inputs[index]
    assert value is not None
    if value.shape is None:
        if node.inputs[1 - index] is not None and node.inputs[1 - index].is_initializer():  # type: ignore[union-attr]
            return labels
        raise UntraceableError(f"{value.name} has no known shape")
    for axis in labels.axes:
        if -axis > len(value.shape):
            raise UntraceableError(f"{what} broadcasts {value.name}")
    return _collapsed(walk, labels, [a for a in labels.axes if value.shape[a] == 1], what)


def _collapsed(walk: _Walk, labels: _Labels, axes: Iterable[int], what: str) -> _Labels:
    """Keep one index of these axes; the channels that it stands for must have one scale."""
    names = labels.names
    for axis in axes:
        at = labels.axes.index(axis)
        lines = np.moveaxis(names, at, 0).reshape(names.shape[at], -1)
        for line in lines[1:]:
            for a, b in zip(lines[0], line, strict=True):
                if (a < 0) != (b < 0):
                    raise UntraceableError(f"{what} repeats channels of which only some are scaled")
                if a >= 0:
                    walk.ties.append((int(a), int(b)))
        names = np.take(names, [0], axis=at)
    return _Labels(labels.axes, names)


def _pass_reduction(walk: _Walk, node: ir.Node, labels: _Labels, what: str) -> None:
    rank = _rank(node.inputs[0], what)
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is not None and given.const_value is not None:
        axes = [int(a) for a in given.const_value.numpy().reshape(-1)]
    elif "axes" in node.attributes and given is None:
        axes = list(node.attributes["axes"].as_ints())
    else:
        raise UntraceableError(f"{what} reduces axes that are not known")
    gone = {axis % rank - rank for axis in axes}
    keepdims = node.attributes.get("keepdims")
    if keepdims is None or keepdims.as_int():
        kept = {axis: axis for axis in range(-rank, 0)}
    else:
        left = [axis for axis in range(-rank, 0) if axis not in gone]
        kept = {axis - len(left): left[axis] for axis in range(len(left))}
    if any(kept.get(axis, 0) in gone or axis not in kept for axis in labels.axes):
        raise UntraceableError(f"{what} mixes its channels with others")
    _through(walk, node, 0, _Labels(tuple(kept[axis] for axis in labels.axes), labels.names))


def _pass_transpose(walk: _Walk, node: ir.Node, labels: _Labels) -> None:
    attribute = node.attributes.get("perm")
    if attribute is None:
        rank = _rank(node.inputs[0], f"Transpose {node.name}")
        perm = tuple(range(rank))[::-1]
    else:
        perm = tuple(attribute.as_ints())
    rank = len(perm)
    moved = {perm[axis + rank] - rank: axis for axis in labels.axes}
    axes = tuple(sorted(moved))
    order = [labels.axes.index(moved[axis]) for axis in axes]
    _through(walk, node, 0, _Labels(axes, labels.names.transpose(order)))


def _pass_layout(walk: _Walk, node: ir.Node, labels: _Labels, what: str) -> None:
    """Find, from the last axis on, which axes of the input and of the output hold the same elements."""
    before, after = node.inputs[0], node.outputs[0]
    assert before is not None
    old, new = _dims(before, what), _dims(after, what)
    labels = _without_ones(labels)
    i, j = len(old), len(new)
    left = list(labels.axes)
    axes: list[int] = []
    while left and i > 0 and j > 0:
        a, b = (i - 1, j - 1) if old[i - 1] == new[j - 1] else _segment(old, new, i, j)
        inside = [axis for axis in range(b - len(new), j - len(new)) if axis in left]
        # Axes of length 1 hold nothing, labelled or not.
        if inside and any(new[axis] != 1 for axis in range(b - len(new), j - len(new)) if axis not in inside):
            _refuse(what)
        if inside:
            axes[:0] = range(a - len(old), i - len(old))
        left = [axis for axis in left if axis not in inside]
        i, j = a, b
    shape = [old[axis] for axis in axes]
    if left or not all(isinstance(d, int) for d in shape):
        raise UntraceableError(f"{what} has shapes that are not known")
    _through(walk, node, 0, _Labels(tuple(axes), labels.names.reshape([int(d) for d in shape])))


def _without_ones(labels: _Labels) -> _Labels:
    """Drop axes of length 1, which tell no channels apart; the last stays where there is no other."""
    kept = [i for i, length in enumerate(labels.names.shape) if length > 1] or [labels.names.ndim - 1]
    shape = [labels.names.shape[i] for i in kept]
    return _Labels(tuple(labels.axes[i] for i in kept), labels.names.reshape(shape))


def _segment(old: list[int | str], new: list[int | str], i: int, j: int) -> tuple[int, int]:
    """The least number of axes before i and j of one product."""
    a, b, left, right = i, j, 1, 1
    while True:
        if left <= right and a > 0 and isinstance(old[a - 1], int):
            a -= 1
            left *= int(old[a])
        elif right < left and b > 0 and isinstance(new[b - 1], int):
            b -= 1
            right *= int(new[b])
        else:
            raise UntraceableError("a layout whose shapes are not known")
        if left == right and a < i and b < j:
            return a, b


def _pass_repeat(walk: _Walk, node: ir.Node, labels: _Labels, what: str) -> None:
    before, after = node.inputs[0], node.outputs[0]
    assert before is not None
    old, new = _dims(before, what), _dims(after, what)
    missing = len(new) - len(old)
    if any(axis + len(new) < missing for axis in labels.axes):
        raise UntraceableError(f"{what} repeats along new axes")
    repeated = [axis for axis in labels.axes if old[axis] != new[axis]]
    if any(old[axis] != 1 for axis in repeated):
        raise UntraceableError(f"{what} repeats its channels")
    _through(walk, node, 0, _collapsed(walk, labels, repeated, what))


def _pass_split(walk: _Walk, node: ir.Node, value: ir.Value, labels: _Labels, what: str) -> None:
    rank = _rank(value, what)
    attribute = node.attributes.get("axis")
    axis = 0 if attribute is None else attribute.as_int()
    axis = axis - rank if axis >= 0 else axis
    if axis not in labels.axes:
        raise UntraceableError(f"{what} cuts across its channels")
    at = labels.axes.index(axis)
    parts = []
    for output in node.outputs:
        length = None if output.shape is None else output.shape[axis]
        if not isinstance(length, int):
            raise UntraceableError(f"{what} has shapes that are not known")
        shape = (*labels.names.shape[:at], length, *labels.names.shape[at + 1 :])
        parts.append(labels.names if output is value else np.full(shape, -1))
    _through(walk, node, 0, _Labels(labels.axes, np.concatenate(parts, axis=at)))


def _pass_concat(walk: _Walk, node: ir.Node, labels: _Labels, what: str) -> None:
    rank = _rank(node.outputs[0], what)
    axis = node.attributes["axis"].as_int()
    axis = axis - rank if axis >= 0 else axis
    start = 0
    for index, value in enumerate(node.inputs):
        part = labels
        if axis in labels.axes:
            length = None if value is None or value.shape is None else value.shape[axis]
            if not isinstance(length, int):
                raise UntraceableError(f"{what} has shapes that are not known")
            at = labels.axes.index(axis)
            part = _Labels(labels.axes, labels.names.take(np.arange(start, start + length), axis=at))
            start += length
        _through(walk, node, index, part)


def _pass_attention(walk: _Walk, node: ir.Node, labels: _Labels, what: str) -> None:
    """probabilities @ values: the values' last axis and the axes before the matrices are those of the result."""
    if -2 in labels.axes:
        _refuse(what)
    _through(walk, node, 1, _unbroadcast(walk, node, 1, labels, what))


def _rank(value: ir.Value | None, what: str) -> int:
    if value is None or value.shape is None:
        raise UntraceableError(f"{what} has shapes that are not known")
    return len(value.shape)


def _dims(value: ir.Value | None, what: str) -> list[int | str]:
    """The dimensions; one that is not known is like no other."""
    rank = _rank(value, what)
    assert value is not None and value.shape is not None
    return [
        d if isinstance(d, int) else d.value or f"{value.name}:{i}"
        for i, d in zip(range(rank), value.shape, strict=True)
    ]


def _first_of(channels: int, ties: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """The least channel that every channel is tied to, itself where it is free."""
    first = list(range(channels))

    def root(c: int) -> int:
        while first[c] != c:
            c = first[c]
        return c

    for a, b in ties:
        least, other = sorted((root(a), root(b)))
        first[other] = least
    return tuple(root(c) for c in range(channels))

"""Which channel is where in a tensor, and how an operator's input holds what its output does."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

# Pairs of channels that must have the same scale.
Ties = list[tuple[int, int]]


class UntraceableError(Exception):
    """What forbids a fold, in words."""


@dataclass(frozen=True)
class Labels:
    """Which channel is where: `names` has an axis for each of `axes`, negative and ascending, of the tensor."""

    axes: tuple[int, ...]
    names: NDArray[np.int64]

    def line(self) -> tuple[int, ...]:
        """Return the channels along the one axis that holds them."""
        return tuple(int(name) for name in self.names.reshape(-1))


def refuse(what: str) -> NoReturn:
    """Raise that an operator mixes labelled channels with others."""
    raise UntraceableError(f"{what} mixes its channels with others")


def of_operand(node: ir.Node, index: int, labels: Labels, ties: Ties) -> Labels:
    """Return the labels of an operand; where it is broadcast, its one element stands for several channels."""
    what = f"{node.op_type} {node.name}"
    value = node.inputs[index]
    assert value is not None
    if value.shape is None:
        if node.inputs[1 - index] is not None and node.inputs[1 - index].is_initializer():  # type: ignore[union-attr]
            return labels
        raise UntraceableError(f"{value.name} has no known shape")
    for axis in labels.axes:
        if -axis > len(value.shape):
            raise UntraceableError(f"{what} broadcasts {value.name}")
    return _collapsed(labels, [a for a in labels.axes if value.shape[a] == 1], ties, what)


def _collapsed(labels: Labels, axes: Iterable[int], ties: Ties, what: str) -> Labels:
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
                    ties.append((int(a), int(b)))
        names = np.take(names, [0], axis=at)
    return Labels(labels.axes, names)


def reduced(node: ir.Node, labels: Labels) -> Labels:
    """Return the labels of what a reduction over other axes reads."""
    what = f"{node.op_type} {node.name}"
    rank = rank_of(node.inputs[0], what)
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is not None and given.const_value is not None:
        axes = [int(a) for a in given.const_value.numpy().reshape(-1)]
    elif "axes" in node.attributes and given is None:
        axes = list(node.attributes["axes"].as_ints())
    else:
        raise UntraceableError(f"{what} reduces axes that are not known")
    if not axes:
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
    return Labels(tuple(kept[axis] for axis in labels.axes), labels.names)


def transposed(node: ir.Node, labels: Labels) -> Labels:
    """Return the labels of what a Transpose reads."""
    attribute = node.attributes.get("perm")
    if attribute is None:
        rank = rank_of(node.inputs[0], f"Transpose {node.name}")
        perm = tuple(range(rank))[::-1]
    else:
        perm = tuple(attribute.as_ints())
    rank = len(perm)
    moved = {perm[axis + rank] - rank: axis for axis in labels.axes}
    axes = tuple(sorted(moved))
    order = [labels.axes.index(moved[axis]) for axis in axes]
    return Labels(axes, labels.names.transpose(order))


def laid_out(node: ir.Node, labels: Labels) -> Labels:
    """Return the labels of what a Reshape or its like reads.

    From the last axis on it is found which axes of the input and of the output hold the same elements.
    """
    what = f"{node.op_type} {node.name}"
    before, after = node.inputs[0], node.outputs[0]
    assert before is not None
    old, new = dims_of(before, what), dims_of(after, what)
    labels = _without_ones(labels)
    i, j = len(old), len(new)
    left = list(labels.axes)
    axes: list[int] = []
    while left and i > 0 and j > 0:
        a, b = (i - 1, j - 1) if old[i - 1] == new[j - 1] else _segment(old, new, i, j)
        inside = [axis for axis in range(b - len(new), j - len(new)) if axis in left]
        # Axes of length 1 hold nothing, labelled or not.
        if inside and any(new[axis] != 1 for axis in range(b - len(new), j - len(new)) if axis not in inside):
            refuse(what)
        if inside:
            axes[:0] = range(a - len(old), i - len(old))
        left = [axis for axis in left if axis not in inside]
        i, j = a, b
    shape = [old[axis] for axis in axes]
    if left or not all(isinstance(d, int) for d in shape):
        raise UntraceableError(f"{what} has shapes that are not known")
    return Labels(tuple(axes), labels.names.reshape([int(d) for d in shape]))


def _without_ones(labels: Labels) -> Labels:
    """Drop axes of length 1, which tell no channels apart; the last stays where there is no other."""
    kept = [i for i, length in enumerate(labels.names.shape) if length > 1] or [labels.names.ndim - 1]
    shape = [labels.names.shape[i] for i in kept]
    return Labels(tuple(labels.axes[i] for i in kept), labels.names.reshape(shape))


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


def repeated(node: ir.Node, labels: Labels, ties: Ties) -> Labels:
    """Return the labels of what an Expand or Tile reads: copies must have one scale."""
    what = f"{node.op_type} {node.name}"
    before, after = node.inputs[0], node.outputs[0]
    assert before is not None
    old, new = dims_of(before, what), dims_of(after, what)
    missing = len(new) - len(old)
    if any(axis + len(new) < missing for axis in labels.axes):
        raise UntraceableError(f"{what} repeats along new axes")
    more = [axis for axis in labels.axes if old[axis] != new[axis]]
    if any(old[axis] != 1 for axis in more):
        raise UntraceableError(f"{what} repeats its channels")
    return _collapsed(labels, more, ties, what)


def of_whole(node: ir.Node, value: ir.Value, labels: Labels) -> Labels:
    """Return the labels of what a Split reads, of which one output is labelled; the others have none."""
    what = f"{node.op_type} {node.name}"
    rank = rank_of(value, what)
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
    return Labels(labels.axes, np.concatenate(parts, axis=at))


def of_parts(node: ir.Node, labels: Labels) -> Iterator[Labels]:
    """Yield the labels of every input of a Concat."""
    what = f"{node.op_type} {node.name}"
    rank = rank_of(node.outputs[0], what)
    axis = node.attributes["axis"].as_int()
    axis = axis - rank if axis >= 0 else axis
    start = 0
    for value in node.inputs:
        if axis not in labels.axes:
            yield labels
            continue
        length = None if value is None or value.shape is None else value.shape[axis]
        if not isinstance(length, int):
            raise UntraceableError(f"{what} has shapes that are not known")
        part = np.arange(start, start + length)
        yield Labels(labels.axes, labels.names.take(part, axis=labels.axes.index(axis)))
        start += length


def rank_of(value: ir.Value | None, what: str) -> int:
    """Return the rank of a tensor."""
    if value is None or value.shape is None:
        raise UntraceableError(f"{what} has shapes that are not known")
    return len(value.shape)


def dims_of(value: ir.Value | None, what: str) -> list[int | str]:
    """Return the dimensions; one that is not known is like no other."""
    rank = rank_of(value, what)
    assert value is not None and value.shape is not None
    return [
        d if isinstance(d, int) else d.value or f"{value.name}:{i}"
        for i, d in zip(range(rank), value.shape, strict=True)
    ]


def first_of(channels: int, ties: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """Return the least channel that every channel is tied to, itself where it is free."""
    first = list(range(channels))

    def root(c: int) -> int:
        while first[c] != c:
            c = first[c]
        return c

    for a, b in ties:
        least, other = sorted((root(a), root(b)))
        first[other] = least
    return tuple(root(c) for c in range(channels))

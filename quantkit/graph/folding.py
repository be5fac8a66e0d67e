"""Dividing a tensor's channels and multiplying the weights that read them: another model of the same function."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantkit.errors import PlanError
from quantkit.graph.groups import LinearGroup
from quantkit.graph.model import Graph

# (node name, input index)
Place = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Edits:
    """What becomes of a graph's constants; made by `folded`, carried out by `apply_edits`.

    Attributes:
        constants: by place, float64: rounded to the graph's type once, however many scales fold into one constant.
        inserted: the groups before which a Mul divides the tensor, with the scale.
    """

    constants: Mapping[Place, NDArray[np.float64]] = field(default_factory=dict)
    inserted: tuple[tuple[LinearGroup, NDArray[np.float64]], ...] = ()

    def array(self, graph: Graph, node: str, index: int) -> NDArray[np.float64]:
        """Return the constant that a node reads, as it is after these edits."""
        if (node, index) in self.constants:
            return self.constants[node, index]
        value = graph.node(node).inputs[index]
        assert value is not None
        return graph.array(str(value.name)).astype(np.float64)


def folded(
    graph: Graph, edits: Edits, group: LinearGroup, scale: NDArray[np.floating], *, insert: bool = False
) -> Edits:
    """Return `edits` and those that divide a group's tensor by `scale`, channel by channel.

    Every linear operator of the group gets W · diag(scale); what computes the tensor gets 1 / scale.

    Args:
        graph: the cleaned model.
        edits: of it, so far.
        group: of it.
        scale: > 0, shape (channels,), equal where channels are tied.
        insert: divide by a Mul of its own instead of folding.

    Raises:
        PlanError: the scale does not fit the group, or there is nothing to fold it into.
    """
    values = np.asarray(scale, np.float64)
    _check(group, values, insert)
    constants = dict(edits.constants)
    after = edits
    if not insert:
        assert group.fold is not None
        for factor in group.fold.factors:
            after = Edits(constants=constants, inserted=edits.inserted)
            channels = np.array(factor.channels)
            divisor = np.where(channels < 0, 1.0, values[channels])
            old = after.array(graph, factor.node, factor.index)
            constants[factor.node, factor.index] = _divided(old, factor.axis, divisor)
        for node, index in group.fold.lifted:
            constants[node, index] = np.asarray(float(np.finfo(np.float32).max))
    for linear in group.linears:
        after = Edits(constants=constants, inserted=edits.inserted)
        old = after.array(graph, linear.node, linear.weight_index)
        if linear.groups > 1:
            # [out, in / groups, …]: the output channels of a group read input channels of their own.
            per_group = old.shape[1]
            rows = np.repeat(values.reshape(linear.groups, per_group), old.shape[0] // linear.groups, axis=0)
            factor_of = rows.reshape(*rows.shape, *[1] * (old.ndim - 2))
        else:
            factor_of = _along(values, linear.in_axis, old.ndim)
        constants[linear.node, linear.weight_index] = old * factor_of
    inserted = edits.inserted
    if insert:
        before = [scale for other, scale in inserted if other == group]
        others = tuple(pair for pair in inserted if pair[0] != group)
        inserted = (*others, (group, values * before[0] if before else values))
    return Edits(constants=constants, inserted=inserted)


def inserted_name(group: LinearGroup) -> str:
    """Return the name of what a group's operators read once a Mul is inserted before them."""
    return rescaled_name(group.tensor)


def rescaled_name(tensor: str) -> str:
    """Return the name of a tensor behind a Mul that divides it."""
    return f"{tensor}::rescaled"


def apply_edits(graph: Graph, edits: Edits) -> Graph:
    """Return a graph with the edits carried out; `graph` stays, and shares what did not change.

    A constant that only edited places read keeps its name; others get a copy with a name of its own.
    """
    model = graph.model.clone()
    nodes = {str(node.name): node for node in model.graph}
    taken = set(model.graph.initializers) | {str(v.name) for node in model.graph for v in node.outputs}
    for (name, index), array in edits.constants.items():
        old = nodes[name].inputs[index]
        assert old is not None
        dtype = old.dtype or ir.DataType.FLOAT
        alone = len(old.uses()) == 1 and not old.is_graph_output()
        new_name = str(old.name) if alone else _free(f"{old.name}::{name}", taken)
        tensor = ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=new_name)
        value = ir.Value(
            name=new_name, shape=ir.Shape(array.shape), type=ir.TensorType(dtype), const_value=tensor
        )
        nodes[name].replace_input_with(index, value)
        if alone:
            del model.graph.initializers[str(old.name)]
        model.graph.register_initializer(value)
    for group, scale in edits.inserted:
        _insert(model, nodes, group, scale, taken)
    return Graph(model, graph.name, graph.path)


def _check(group: LinearGroup, scale: NDArray[np.float64], insert: bool) -> None:
    if scale.shape != (group.channels,) or not (np.isfinite(scale).all() and (scale > 0).all()):
        raise PlanError(
            f"{group.tensor}: a scale of shape {scale.shape}, or not all above zero; "
            f"give {group.channels} positive numbers."
        )
    if insert:
        return
    if group.fold is None:
        raise PlanError(
            f"{group.tensor}: its scale folds into nothing ({group.reason}); insert a Mul for it."
        )
    if not np.array_equal(scale, scale[np.array(group.fold.ties)]):
        raise PlanError(f"{group.tensor}: tied channels with different scales; give them one.")


def _divided(old: NDArray[np.float64], axis: int, divisor: NDArray[np.float64]) -> NDArray[np.float64]:
    """`old` / `divisor` along an axis, which it gets where it has none or a single element there."""
    rank = max(old.ndim, -axis if axis < 0 else axis + 1)
    return old / _along(divisor, axis, rank)


def _along(values: NDArray[np.float64], axis: int, rank: int) -> NDArray[np.float64]:
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def _insert(
    model: ir.Model,
    nodes: dict[str, ir.Node],
    group: LinearGroup,
    scale: NDArray[np.float64],
    taken: set[str],
) -> None:
    first = nodes[group.linears[0].node]
    source = first.inputs[group.linears[0].input_index]
    assert source is not None
    dtype = source.dtype or ir.DataType.FLOAT
    inverse = (1 / scale).reshape(-1, *[1] * (-group.axis - 1)).astype(dtype.numpy())
    name = _free(f"{group.tensor}::scale", taken)
    tensor = ir.tensor(inverse, dtype=dtype, name=name)
    factor = ir.Value(name=name, shape=ir.Shape(inverse.shape), type=ir.TensorType(dtype), const_value=tensor)
    model.graph.register_initializer(factor)
    mul = ir.node("Mul", [source, factor], name=_free(f"{group.tensor}::rescale", taken))
    mul.outputs[0].name = inserted_name(group)
    mul.outputs[0].shape, mul.outputs[0].type = source.shape, ir.TensorType(dtype)
    position = {id(node): i for i, node in enumerate(model.graph)}
    earliest = min((nodes[linear.node] for linear in group.linears), key=lambda node: position[id(node)])
    model.graph.insert_before(earliest, mul)
    for linear in group.linears:
        nodes[linear.node].replace_input_with(linear.input_index, mul.outputs[0])


def _free(name: str, taken: set[str]) -> str:
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    taken.add(found)
    return found

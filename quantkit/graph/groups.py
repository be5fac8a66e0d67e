"""Linear operators that read one tensor, and where a scale of its channels folds."""

from collections.abc import Collection
from dataclasses import dataclass

from quantkit.graph.channel_labels import UntraceableError
from quantkit.graph.linears import Linear, find_linears
from quantkit.graph.model import Graph
from quantkit.graph.tracing import Traced, trace


@dataclass(frozen=True, kw_only=True)
class LinearGroup:
    """Linear operators that read one tensor, so one scale of its channels is made up for by all of their weights.

    Attributes:
        tensor: what they read.
        axis: its channel axis, negative.
        channels: how many there are.
        linears: q, k and v; gate and up; or one alone.
        fold: the constants that can be divided instead of the tensor; None where there are none.
        reason: why there are none; "" where there are.
    """

    tensor: str
    axis: int
    channels: int
    linears: tuple[Linear, ...]
    fold: Traced | None
    reason: str

    @property
    def folds_into_norm(self) -> bool:
        """Whether the scale folds into a norm's gain (or another constant), and touches no weight but the group's."""
        return self.fold is not None and all(factor.kind == "norm" for factor in self.fold.factors)


def find_groups(graph: Graph, *, unclipped: Collection[str] = ()) -> list[LinearGroup]:
    """Return every group of linear operators, in graph order.

    A weight that a linear operator of another group reads too cannot be scaled for one of them: such operators are
    left out, and those that read the same tensor as they do get no scale either.

    Args:
        graph: the cleaned model.
        unclipped: outputs of Clips that were seen never to reach their upper limit: there a Clip is a Relu.
    """
    linears = find_linears(graph)
    readers: dict[tuple[str, int, int], list[Linear]] = {}
    for linear in linears.values():
        axis = linear.input_axis if linear.window is None else linear.output_axis
        readers.setdefault((linear.tensor, axis, linear.channels), []).append(linear)
    groups = []
    for (tensor, axis, channels), members in readers.items():
        fold, reason = None, ""
        try:
            _check_shared(graph, members, linears)
            fold = trace(
                graph,
                tensor,
                axis=axis,
                channels=channels,
                readers={(member.node, member.input_index) for member in members},
                linears=linears,
                unclipped=unclipped,
            )
        except UntraceableError as why:
            reason = str(why)
        groups.append(
            LinearGroup(
                tensor=tensor,
                axis=axis,
                channels=channels,
                linears=tuple(members),
                fold=fold,
                reason=reason,
            )
        )
    return groups


def can_insert(graph: Graph, group: LinearGroup) -> bool:
    """Whether a Mul before the group's operators could divide the tensor.

    Not where another linear operator shares their weights, or reads the tensor along another axis.
    """
    linears = find_linears(graph)
    if sum(linear.tensor == group.tensor for linear in linears.values()) != len(group.linears):
        return False
    try:
        _check_shared(graph, group.linears, linears)
    except UntraceableError:
        return False
    return True


def _check_shared(graph: Graph, members: Collection[Linear], linears: dict[str, Linear]) -> None:
    for member in members:
        for user, _ in graph.values[member.weight].uses():
            if str(user.name) in linears and str(user.name) != member.node:
                raise UntraceableError(
                    f"{member.weight}, the weight of {member.node}, is shared with {user.name}"
                )

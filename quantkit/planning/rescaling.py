"""Scales of channels, found by the calibrators and folded into a graph: equalize, smooth, AWQ.

Each step takes what the steps before have made of the float model and adds its own; the function of the model stays.
Rounding comes after: on `apply_edits(graph, rescaled.edits)`, with statistics divided by `rescaled.scales`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quantkit.blas import threads_for
from quantkit.calibrators.awq import awq_scale
from quantkit.calibrators.equalize import equalizing_scale
from quantkit.calibrators.layer import Layer, tied, weight_amax
from quantkit.calibrators.smoothquant import best_smooth_scale, smooth_scale
from quantkit.calibrators.weight_layout import WeightLayout
from quantkit.errors import CacheError
from quantkit.formats import INT8, QuantSpec
from quantkit.graph import Graph
from quantkit.graph.folding import Edits, folded, inserted_name
from quantkit.graph.groups import LinearGroup, can_insert
from quantkit.graph.linears import Linear
from quantkit.statistics import ChannelStats, GramMatrix

# Where a scale may go: into norms alone, into any constant that it folds into exactly, or into a Mul of its own too.
Folds = Literal["norms", "all", "insert"]
# Equalizing one pair of layers disturbs the next; after so many rounds nothing moves any more.
_ROUNDS = 20
_ANY = QuantSpec(format=INT8)


@dataclass(frozen=True, kw_only=True)
class Rescaled:
    """A float model whose channels have other sizes, and is the same function.

    Attributes:
        edits: of its graph.
        scales: by tensor, what the channels that linear operators multiply are divided by, float64 of (channels,). It
            is the tensor itself that is divided, unless it is among `reads`.
        reads: by tensor that stays as it is, the name of the divided one that linear operators read in its place.
        touched: tensors on the way of a fold: they are divided too, but not all of them along one axis.
        notes: by tensor, what was found for the linear operators that read it, or why nothing was.
    """

    edits: Edits = field(default_factory=Edits)
    scales: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    reads: Mapping[str, str] = field(default_factory=dict)
    touched: frozenset[str] = frozenset()
    notes: Mapping[str, str] = field(default_factory=dict)

    def gram(self, linear: Linear, grams: Mapping[str, GramMatrix]) -> GramMatrix:
        """Return the Gram matrix of a linear operator's input as it is now.

        Raises:
            CacheError: there is none.
        """
        if linear.view not in grams:
            raise CacheError(
                f"{linear.node}: no Gram matrix of {linear.tensor} in the cache; "
                "calibrate again with `--collect gram`."
            )
        gram = grams[linear.view]
        scale = self.scales.get(linear.tensor)
        return gram if scale is None else gram.divided(_spread(scale, linear))


def layout_of(linear: Linear) -> WeightLayout:
    """Return how a linear operator's weight lies."""
    return WeightLayout(out_axis=linear.out_axis, groups=linear.groups)


def layer_of(
    graph: Graph,
    rescaled: Rescaled,
    linear: Linear,
    spec: QuantSpec,
    grams: Mapping[str, GramMatrix] | None = None,
    *,
    others: Sequence[Linear] = (),
) -> Layer:
    """Return a linear operator as the calibrators see it, after what was rescaled so far.

    Args:
        graph: the cleaned model.
        rescaled: of it.
        linear: of `find_linears` of it.
        spec: how the weight will be quantized.
        grams: Gram matrices by view; None to leave it out.
        others: operators that read the same weight: what any of them multiplies counts.

    Raises:
        CacheError: `grams` are given, and its own is not among them.
    """
    gram = None
    if grams is not None:
        gram = rescaled.gram(linear, grams)
        for other in others:
            gram = gram.merge(rescaled.gram(other, grams))
    return Layer(
        w=rescaled.edits.array(graph, linear.node, linear.weight_index).astype(np.float32),
        layout=layout_of(linear),
        spec=spec,
        gram=gram,
        name=linear.weight,
    )


def equalize(
    graph: Graph,
    groups: Sequence[LinearGroup],
    rescaled: Rescaled | None = None,
    *,
    keep: Collection[str] = (),
) -> Rescaled:
    """Equalize the ranges of the channels between every two linear operators; see `equalizing_scale`.

    Groups whose tensor is not computed by linear operators alone are left as they are, and those whose scale would
    divide a tensor of `keep` on its way (see `smooth`).
    """
    found = rescaled or Rescaled()
    able = [
        g
        for g in groups
        if g.fold is not None
        and any(f.kind == "linear" for f in g.fold.factors)
        and not set(keep).intersection(g.fold.passed)
    ]
    for _ in range(_ROUNDS):
        most = 0.0
        for group in able:
            scale = _equalizing(graph, found, group)
            most = max(most, float(np.abs(np.log(scale)).max()))
            found = _with(graph, found, group, scale, "equalized", insert=False)
        if most < 1e-3:
            break
    return found


def smooth(
    graph: Graph,
    groups: Sequence[LinearGroup],
    specs: Mapping[str, QuantSpec],
    channels: Mapping[str, ChannelStats],
    *,
    activation: QuantSpec,
    alpha: float | Literal["auto"] = 0.5,
    grams: Mapping[str, GramMatrix] | None = None,
    folds: Folds = "all",
    keep: Collection[str] = (),
    rescaled: Rescaled | None = None,
) -> Rescaled:
    """Smooth the tensors that quantized linear operators read (SmoothQuant).

    Args:
        graph: the cleaned model.
        groups: `find_groups` of it.
        specs: how weights are quantized, by node; a group of none of these nodes is left as it is.
        channels: the tensors' statistics, as calibration found them.
        activation: how the tensors are quantized.
        alpha: see `smooth_scale`; "auto" finds each group its own, from `grams`.
        grams: Gram matrices by view; needed for "auto".
        folds: where scales may go.
        keep: tensors that no fold may divide on its way, because they are quantized too and nothing is known of their
            channels (the values of an attention, say); without them, observe the rescaled model again.
        rescaled: what was rescaled before.

    Raises:
        CacheError: statistics are missing.
        SpecError: alpha is out of range, or statistics are not finite.
    """
    found = rescaled or Rescaled()
    for group in groups:
        layers = _layers(graph, found, group, specs, grams if alpha == "auto" else None)
        if not layers:
            continue
        way = _way(graph, group, folds, keep)
        if not isinstance(way, bool):
            found = replace(found, notes={**found.notes, group.tensor: way})
            continue
        if group.tensor not in channels:
            raise CacheError(f"{group.tensor}: no statistics of its channels in the cache; calibrate again.")
        stats = _divided(channels[group.tensor], found.scales.get(group.tensor))
        ties = None if group.fold is None or way else group.fold.ties
        if alpha == "auto":
            with threads_for(max(linear.size for linear in group.linears)):
                scale, chosen = best_smooth_scale(stats, layers, activation, ties=ties)
        else:
            scale, chosen = smooth_scale(stats, layers, alpha, ties=ties), alpha
        found = _with(graph, found, group, scale, f"smoothed, alpha {chosen:g}", insert=way)
    return found


def scale_for_awq(
    graph: Graph,
    groups: Sequence[LinearGroup],
    specs: Mapping[str, QuantSpec],
    grams: Mapping[str, GramMatrix],
    *,
    folds: Folds = "all",
    least_gain: float = 0.0,
    keep: Collection[str] = (),
    rescaled: Rescaled | None = None,
    xp: ModuleType = np,
) -> Rescaled:
    """Scale the channels of inputs so that weights round with the least error of the outputs (AWQ).

    Args:
        graph, groups, specs, grams, folds, keep, rescaled: as for `smooth`.
        least_gain: the part of a group's error that must go for it to be scaled. Before GPTQ, which makes up for most
            of the error itself, less than 1/4 is not worth it.
        xp: NumPy, or CuPy to work on a GPU.

    Raises:
        CacheError: a Gram matrix is missing.
        SpecError: something is not finite.
    """
    found = rescaled or Rescaled()
    for group in groups:
        layers = _layers(graph, found, group, specs, grams)
        if not layers:
            continue
        way = _way(graph, group, folds, keep)
        if not isinstance(way, bool):
            found = replace(found, notes={**found.notes, group.tensor: way})
            continue
        ties = None if group.fold is None or way else group.fold.ties
        with threads_for(max(linear.size for linear in group.linears)):
            best = awq_scale(layers, group.channels, ties=ties, xp=xp)
        if best.ratio == 0 or best.error > (1 - least_gain) * best.error_unscaled:
            note = (
                f"no scale is enough better than none (error {best.error_unscaled:.3g} to {best.error:.3g})"
            )
            found = replace(found, notes={**found.notes, group.tensor: note})
            continue
        note = f"error {best.error_unscaled:.3g} to {best.error:.3g}, x to the {best.ratio:g}"
        found = _with(graph, found, group, best.scale, note, insert=way)
    return found


def _layers(
    graph: Graph,
    rescaled: Rescaled,
    group: LinearGroup,
    specs: Mapping[str, QuantSpec],
    grams: Mapping[str, GramMatrix] | None,
) -> list[Layer]:
    return [
        layer_of(graph, rescaled, linear, specs[linear.node], grams)
        for linear in group.linears
        if linear.node in specs
    ]


def _way(graph: Graph, group: LinearGroup, folds: Folds, keep: Collection[str] = ()) -> bool | str:
    """Whether to insert a Mul, or why a group gets no scale at all."""
    kept = sorted(set(keep).intersection(group.fold.passed)) if group.fold is not None else []
    if not kept and (group.folds_into_norm or (group.fold is not None and folds != "norms")):
        return False
    if folds == "insert" and can_insert(graph, group):
        return True
    if kept:
        return f"its fold would divide {kept[0]}, whose channels were not observed"
    return group.reason or "folds into a weight, and norms alone are asked for"


def _with(
    graph: Graph,
    rescaled: Rescaled,
    group: LinearGroup,
    scale: NDArray[np.float64],
    note: str,
    *,
    insert: bool,
) -> Rescaled:
    before = rescaled.scales.get(group.tensor)
    passed = () if insert or group.fold is None else group.fold.passed
    return Rescaled(
        edits=folded(graph, rescaled.edits, group, scale, insert=insert),
        scales={**rescaled.scales, group.tensor: scale if before is None else before * scale},
        reads={**rescaled.reads, group.tensor: inserted_name(group)} if insert else rescaled.reads,
        touched=rescaled.touched | set(passed),
        notes={**rescaled.notes, group.tensor: note},
    )


def _equalizing(graph: Graph, rescaled: Rescaled, group: LinearGroup) -> NDArray[np.float64]:
    assert group.fold is not None
    producer = np.zeros(group.channels)
    for factor in group.fold.factors:
        old = rescaled.edits.array(graph, factor.node, factor.index)
        if factor.kind != "linear" or old.ndim < 2:
            continue
        size = np.abs(np.moveaxis(old, factor.axis, 0)).reshape(len(factor.channels), -1).max(axis=1)
        channels = np.array(factor.channels)
        np.maximum.at(producer, channels[channels >= 0], size[channels >= 0])
    # Nothing is rounded: the format does not matter here.
    layers = [
        Layer(
            w=rescaled.edits.array(graph, linear.node, linear.weight_index),
            layout=layout_of(linear),
            spec=_ANY,
        )
        for linear in group.linears
    ]
    ties = group.fold.ties
    return equalizing_scale(tied(producer, ties), tied(weight_amax(layers, group.channels), ties))


def _divided(stats: ChannelStats, scale: NDArray[np.float64] | None) -> ChannelStats:
    """Statistics of x / scale."""
    if scale is None:
        return stats
    made = ChannelStats(stats.axis)
    made.count = stats.count
    made.min, made.max = (stats.min / scale).astype(np.float32), (stats.max / scale).astype(np.float32)
    made.sum, made.abs_sum = stats.sum / scale, stats.abs_sum / scale
    return made


def _spread(scale: NDArray[np.float64], linear: Linear) -> NDArray[np.float64]:
    """A scale of channels as one of the elements of vectors, (groups, K)."""
    return np.repeat(scale.reshape(linear.groups, -1), linear.size * linear.groups // linear.channels, axis=1)

"""What is made of a float model before it is quantized: channels rescaled, with what then is known of its tensors.

The edits are kept as names and one number a channel, so that a plan can carry them to another copy of the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quantkit.calibrators.smoothquant import smoothed_range
from quantkit.errors import CacheError, PlanError
from quantkit.formats import QuantSpec, Range
from quantkit.graph import Graph
from quantkit.graph.biases import add_to_biases
from quantkit.graph.folding import Edits, apply_edits, folded
from quantkit.graph.groups import LinearGroup, find_groups
from quantkit.graph.linears import Linear, find_linears
from quantkit.graph.value_sources import value_sources
from quantkit.planning.placement import Placement
from quantkit.planning.plan import ModelEdits
from quantkit.planning.rescaling import Folds, Rescaled, equalize, scale_for_awq, smooth
from quantkit.statistics import ChannelStats, FloatHistogram, GramMatrix

# Where most of the gain is, without a search: see `ALPHAS` of calibrators/smoothquant.py.
DEFAULT_ALPHA = 0.7
# Before GPTQ, which makes up for most of the error itself, a scale must be worth this part of it.
_GPTQ_LEAST_GAIN = 0.25


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What calibration found beside histograms.

    Attributes:
        channels: statistics of channels by tensor.
        grams: Gram matrices by view; None where none were collected.
        missing: what to say where they are needed and were not collected.
        unclipped: outputs of Clips that never reached their upper limit.
        xp: NumPy, or CuPy: what searches over Gram matrices work with.
    """

    channels: Mapping[str, ChannelStats] = field(default_factory=dict)
    grams: Mapping[str, GramMatrix] | None = None
    missing: str = "no Gram matrices were given; collect them with `quantkit calibrate --collect gram`."
    unclipped: tuple[str, ...] = ()
    xp: ModuleType = np

    def needed_grams(self, what: str) -> Mapping[str, GramMatrix]:
        """Return the Gram matrices.

        Raises:
            CacheError: there are none.
        """
        if self.grams is None:
            raise CacheError(f"{what}: {self.missing}")
        return self.grams

    def tells(self, linear: Linear) -> bool:
        """Whether a linear operator's Gram matrix says something: inputs were seen, and all of them finite.

        One that is missing says so when it is used.
        """
        if self.grams is None or linear.view not in self.grams:
            return True
        gram = self.grams[linear.view]
        return gram.count > 0 and gram.is_finite


@dataclass(frozen=True, kw_only=True)
class Protected:
    """A float model that is easier to quantize, and the same function.

    Attributes:
        graph: the model.
        edits: what was made of it; None where it stayed as it was.
        rescaled: the same, in the terms of the model before.
        linears: of the model before, by node.
        evidence: of the model before.
        ranges: by tensor of `graph`, what it holds now, where that is no longer what was observed.
    """

    graph: Graph
    edits: ModelEdits | None
    rescaled: Rescaled
    linears: Mapping[str, Linear]
    evidence: Evidence
    ranges: Mapping[str, Range] = field(default_factory=dict)

    def untold(self) -> list[str]:
        """Return the linear operators whose Gram matrices say nothing."""
        return [node for node, linear in self.linears.items() if not self.evidence.tells(linear)]

    def mean(self, linear: Linear) -> NDArray[np.float64] | None:
        """Return E[x] of a linear operator's input as it is now, by vector element or by channel; None if unknown."""
        grams = self.evidence.grams
        if grams is not None and linear.view in grams and self.evidence.tells(linear):
            return self.rescaled.gram(linear, grams).mean
        stats = self.evidence.channels.get(linear.tensor)
        if stats is None or stats.count == 0 or not np.isfinite(stats.mean).all():
            return None
        scale = self.rescaled.scales.get(linear.tensor)
        return stats.mean if scale is None else stats.mean / scale


def protect(
    graph: Graph,
    placement: Placement,
    evidence: Evidence,
    *,
    alpha: float | Literal["auto"] | None = None,
    folds: Folds = "all",
) -> Protected:
    """Equalize, smooth and scale as the settings of the placed nodes say, in this order.

    Args:
        graph: the cleaned model.
        placement: what of it is to be quantized, and how.
        evidence: what calibration found.
        alpha: of SmoothQuant; None for 0.7.
        folds: where scales may go. Tensors that are quantized and whose channels were not observed are never divided
            on the way of a fold.

    Raises:
        CacheError: statistics or Gram matrices are missing.
        SpecError: alpha is out of range, or statistics are not finite.
    """
    linears = find_linears(graph)
    rescaled = Rescaled()
    settings = placement.settings
    if any(s.equalize or s.scaling for s in settings.values()):
        groups = find_groups(graph, unclipped=evidence.unclipped)
        specs = {p.site.node: p.spec for p in placement.weights if p.site.node in linears}
        sources = {
            tensor: source
            for tensor, source in value_sources(graph).items()
            if source[0] in evidence.channels and evidence.channels[source[0]].count
        }
        keep = {a.name for a in placement.activations if _depends_on_data(a.spec)} - sources.keys()
        to_equalize = [
            g for g in groups if any(n.node in specs and settings[n.node].equalize for n in g.linears)
        ]
        rescaled = equalize(graph, to_equalize, rescaled, keep=keep)
        for activation in dict.fromkeys(
            s.activations for s in settings.values() if s.scaling == "smoothquant"
        ):
            if activation is None:
                continue
            rescaled = smooth(
                graph,
                groups,
                {
                    node: spec
                    for node, spec in specs.items()
                    if settings[node].scaling == "smoothquant" and settings[node].activations == activation
                },
                evidence.channels,
                activation=activation,
                alpha=DEFAULT_ALPHA if alpha is None else alpha,
                grams=evidence.needed_grams("smoothquant with alpha auto") if alpha == "auto" else None,
                folds=folds,
                keep=keep,
                rescaled=rescaled,
            )
        for before_gptq in (False, True):
            chosen = {
                node: spec
                for node, spec in specs.items()
                if settings[node].scaling == "awq" and (settings[node].weight_method == "gptq") == before_gptq
            }
            if chosen:
                grams = evidence.needed_grams("awq")
                rescaled = scale_for_awq(
                    graph,
                    groups,
                    {node: spec for node, spec in chosen.items() if evidence.tells(linears[node])},
                    grams,
                    folds=folds,
                    least_gain=_GPTQ_LEAST_GAIN if before_gptq else 0.0,
                    keep=keep,
                    rescaled=rescaled,
                    xp=evidence.xp,
                )
    if not rescaled.scales:
        return Protected(graph=graph, edits=None, rescaled=rescaled, linears=linears, evidence=evidence)
    edits = ModelEdits(
        fingerprint=graph.fingerprint,
        scales=dict(rescaled.scales),
        inserted=tuple(rescaled.reads),
        unclipped=evidence.unclipped,
    )
    # All scales of a tensor at once, as whoever reads the plan will fold them: to the same bits.
    rescaled = replace(rescaled, edits=_folded(graph, groups, edits))
    return Protected(
        graph=apply_edits(graph, rescaled.edits),
        edits=edits,
        rescaled=rescaled,
        linears=linears,
        evidence=evidence,
        ranges=_ranges(rescaled, evidence.channels)
        | _ranges_of_values(groups, edits, sources, evidence.channels),
    )


def edited(graph: Graph, edits: ModelEdits, *, biases: bool = True) -> Graph:
    """Return the graph after a plan's edits.

    Args:
        graph: the cleaned model that they are for.
        edits: of the plan.
        biases: also what was added to biases, which is no longer the same function.

    Raises:
        PlanError: they are for another model.
    """
    if edits.fingerprint != graph.fingerprint:
        raise PlanError(
            f"plan: its edits are for a model of fingerprint {edits.fingerprint[:12]}, and {graph.name} has "
            f"{graph.fingerprint[:12]}; give the model it was solved for."
        )
    groups = find_groups(graph, unclipped=edits.unclipped) if edits.scales else []
    found = apply_edits(graph, _folded(graph, groups, edits)) if edits.scales else graph
    return add_to_biases(found, edits.biases) if biases else found


def never_clipped(graph: Graph, histograms: Mapping[str, FloatHistogram]) -> tuple[str, ...]:
    """Return the outputs of Clips that were seen to stay below their upper limit."""
    found = []
    for node in graph.model.graph:
        if node.op_type != "Clip" or node.domain != "" or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        limit, histogram = node.inputs[2].const_value, histograms.get(str(node.outputs[0].name))
        if limit is None or histogram is None or not histogram.finite_count == histogram.count > 0:
            continue
        if histogram.max < float(limit.numpy()):
            found.append(str(node.outputs[0].name))
    return tuple(found)


def _folded(graph: Graph, groups: list[LinearGroup], edits: ModelEdits) -> Edits:
    found = Edits()
    for tensor, scale in edits.scales.items():
        insert = tensor in edits.inserted
        group = next(
            (
                g
                for g in groups
                if g.tensor == tensor and g.channels == scale.size and (insert or g.fold is not None)
            ),
            None,
        )
        if group is None:
            raise PlanError(
                f"plan: {tensor} has no {scale.size} channels that a scale folds into; solve it again."
            )
        found = folded(graph, found, group, scale, insert=insert)
    return found


def _ranges(rescaled: Rescaled, channels: Mapping[str, ChannelStats]) -> dict[str, Range]:
    """What the divided tensors hold: all that statistics of channels tell of them."""
    return {
        rescaled.reads.get(tensor, tensor): smoothed_range(channels[tensor], scale)
        for tensor, scale in rescaled.scales.items()
        if tensor in channels and channels[tensor].count
    }


def _ranges_of_values(
    groups: list[LinearGroup],
    edits: ModelEdits,
    sources: Mapping[str, tuple[str, Linear]],
    channels: Mapping[str, ChannelStats],
) -> dict[str, Range]:
    """What quantized values of attentions hold, once a scale is folded into the operator that computes them."""
    found = {}
    for group in groups:
        scale = edits.scales.get(group.tensor)
        if scale is None or group.fold is None or group.tensor in edits.inserted:
            continue
        for tensor in group.fold.passed:
            if tensor not in sources:
                continue
            source, linear = sources[tensor]
            divided = next(
                f.channels
                for f in group.fold.factors
                if (f.node, f.index) == (linear.node, linear.weight_index)
            )
            index = np.array(divided)
            found[tensor] = smoothed_range(channels[source], np.where(index < 0, 1.0, scale[index]))
    return found


def _depends_on_data(spec: QuantSpec) -> bool:
    return spec.dynamic is None or spec.has_global_scale

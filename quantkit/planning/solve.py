"""Statistics and a placement become a plan. No data is needed, and nothing of the model is run."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

import numpy as np

from quantkit.cache import IMPORTED, CalibrationCache
from quantkit.calibrators import Calibrator, WeightMethod, get_calibrator, solve_range
from quantkit.errors import CacheError, PlanError, SpecError, UnknownNameError
from quantkit.formats import QuantSpec, Range, qparams_from_range
from quantkit.formats.scales import SMALLEST_SCALE, global_scale_of
from quantkit.graph import Graph, LeftAlone, find_sites, sharing_groups
from quantkit.graph.kept_scales import kept_scales
from quantkit.graph.sites import LINEAR_OPS, QUANTIZED_ALREADY
from quantkit.planning.keeping import with_kept_scales
from quantkit.planning.methods import FROM_GRAM, parse_methods
from quantkit.planning.placement import PlacedActivation, Placement, place_nodes
from quantkit.planning.plan import ActivationPlan, ModelEdits, Plan, WeightPlan
from quantkit.planning.presets import Preset, Target, is_observed
from quantkit.planning.protecting import Evidence, protect
from quantkit.planning.rescaling import Folds
from quantkit.planning.settings import Assignment, node_settings
from quantkit.planning.weights import float_dtype, solve_weights
from quantkit.statistics import FloatHistogram

# Of the activations of a method that names no calibrator, where the cache names none either.
_RANGES = "entropy"


def calibrator_of(
    cache: CalibrationCache, method: str | None = None, options: Mapping[str, Any] | None = None
) -> Calibrator | None:
    """Return the calibrator to solve a cache with; None where its ranges are fixed, so that there is nothing to solve.

    Args:
        cache: the calibration cache.
        method: the method asked for; None for the one the cache records, with its options.
        options: the method's options.

    Raises:
        CacheError: the ranges are fixed, and another method or an option is asked for.
        UnknownNameError, SpecError: the method or its options are unknown.
    """
    if cache.ranges:
        if method not in (None, IMPORTED) or options:
            raise CacheError(
                f"method {method or cache.method}: the cache holds fixed ranges, imported from "
                f"{cache.data.get('file', 'a file')}, that no method can change; leave --method out, or measure with "
                "`quantkit calibrate`."
            )
        return None
    if method is None:
        try:
            named = parse_methods(cache.method).ranges_beside
            return get_calibrator(named or _RANGES, **{**cache.method_options, **(options or {})})
        except UnknownNameError as error:
            raise UnknownNameError(
                f"{str(error).rstrip('.?')}; the name comes from the cache: install that method again, or give "
                "another one with --method."
            ) from error
    return get_calibrator(method, **(options or {}))


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A plan, and the model that it is for: the given one, unless a method changes it first.

    Attributes:
        graph, plan: those.
        alone: the nodes whose weights were rounded by themselves, though their outputs were to count: nothing that is
            finite reached them.
        unseen: likewise, for they are no linear operators with one weight, and so have no Gram matrix.
        rescaled: the tensors whose histograms no longer say what they hold.
    """

    graph: Graph
    plan: Plan
    alone: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    rescaled: frozenset[str] = frozenset()


def solve(
    graph: Graph,
    histograms: Mapping[str, FloatHistogram],
    *,
    preset: Preset,
    target: Target,
    calibrator: Calibrator | None,
    everything: bool = False,
    ranges: Mapping[str, Range] | None = None,
    weight_method: WeightMethod | None = None,
) -> Plan:
    """Return the plan of one preset for all of a model; see `solve_nodes`.

    Args:
        graph, histograms, target, everything, ranges: as there.
        preset: formats and what stays in float by default.
        calibrator: the method for activations. None where the ranges are fixed.
        weight_method: how weights are solved; None for the preset's own way (`weight_method_of`).
    """
    default = node_settings(preset, target, calibrator=calibrator, weight_method=weight_method)
    nodes = {s.node: default for s in find_sites(graph)[0] if s.role in ("input", "weight")}
    assignment = Assignment(nodes=nodes, kept={})
    return solve_nodes(
        graph, histograms, assignment, preset.name, target, everything=everything, ranges=ranges
    ).plan


def solve_nodes(
    graph: Graph,
    histograms: Mapping[str, FloatHistogram],
    assignment: Assignment,
    name: str,
    target: Target,
    *,
    everything: bool = False,
    ranges: Mapping[str, Range] | None = None,
    scale_dtype: np.dtype | None = None,
    evidence: Evidence | None = None,
    alpha: float | Literal["auto"] | None = None,
    folds: Folds = "all",
) -> Solved:
    """Return the plan that gives every node what it is to become, and the model that it is for.

    In this order: channels are equalized, smoothed or scaled; activations get ranges, weights are rounded, and biases
    take up the mean of the error.

    Tensors that MaxPool, Concat and their like tie together are solved from their merged histogram, so they get one
    scale. A tensor whose statistics hold no finite value, or NaN or infinities (an attention mask's −inf, say), and
    a weight that is not finite, stay in float and are listed.

    Args:
        graph: the cleaned model.
        histograms: statistics by tensor name, as calibration gathered them.
        assignment: what every node is to become.
        name: what the plan's preset is called.
        target: what will run the model.
        everything: quantize also what presets leave in float.
        ranges: fixed ranges by tensor name, in place of histograms. They are taken as they are: tensors that are
            tied together keep each its own.
        scale_dtype: the float type that the file's scales will have, where it is not the tensors' own.
        evidence: what methods need beside histograms.
        alpha, folds: see `protect`.

    Raises:
        PlanError: there is nothing that can be quantized so.
        SpecError: a plug-in's calibrator does not give a range, or a weight cannot be cut into whole blocks.
        CacheError: a method lacks a statistic.
    """
    ranges = ranges or {}
    unfit = _unfit(graph, assignment, histograms, ranges, {})
    placement = place_nodes(
        graph, assignment.nodes, target, kept=assignment.kept, everything=everything, unfit=unfit
    )
    protected = protect(graph, placement, evidence or Evidence(), alpha=alpha, folds=folds)
    known = protected.ranges
    unfit = _unfit(protected.graph, assignment, histograms, ranges, known)
    while True:
        placement = place_nodes(
            protected.graph,
            assignment.nodes,
            target,
            kept=assignment.kept,
            everything=everything,
            unfit=unfit,
        )
        activations, misfits = _solve_activations(
            protected.graph, histograms, placement, ranges, known, scale_dtype
        )
        if not misfits:
            break
        # Without them the placement is another one; each round takes at least one tensor out.
        unfit |= misfits
    if not placement.nodes:
        raise PlanError(_nothing_left(graph, name, placement.left))
    kept = kept_scales(protected.graph)
    activations = with_kept_scales(activations, kept, but=known)
    solved = solve_weights(protected.graph, placement, activations, target, scale_dtype, protected, kept=kept)
    edits = protected.edits
    if solved.corrections:
        edits = replace(edits or ModelEdits(fingerprint=graph.fingerprint), biases=solved.corrections)
    plan = Plan(
        model=graph.name,
        fingerprint=solved.graph.fingerprint,
        preset=name,
        target=target.name,
        method=_method_name(placement),
        activations=activations,
        weights=solved.weights,
        biases=solved.biases,
        nodes=placement.nodes,
        left=placement.left,
        formats=_formats(placement, solved.weights, activations),
        edits=edits,
    )
    looked = [p.site.node for p in placement.weights if p.settings.weight_method in FROM_GRAM]
    untold = set(protected.untold()) if looked else set()
    tied = [] if ranges else sharing_groups(protected.graph)
    return Solved(
        graph=solved.graph,
        plan=plan,
        alone=tuple(node for node in looked if node in untold),
        unseen=tuple(node for node in looked if node not in protected.linears),
        rescaled=frozenset(known).union(*(group for group in tied if not known.keys().isdisjoint(group))),
    )


def _method_name(placement: Placement) -> str:
    """What was done, in the order in which it was; how weights were rounded where that says more than the ranges."""
    static = [a for a in placement.activations if a.spec.dynamic is None]
    settings = placement.settings.values()
    rounding = {
        p.settings.weight_method
        for p in placement.weights
        if not static or p.settings.weight_method not in ("amax", "mse")
    }
    if any(s.scaling == "awq" for s in settings):
        # What comes with it.
        rounding.discard("output")
    parts = (
        {"equalize" for s in settings if s.equalize},
        {s.scaling for s in settings if s.scaling},
        rounding,
        {IMPORTED if a.calibrator is None else a.calibrator.name for a in static},
        {"bias" for s in settings if s.correct_bias},
    )
    return "+".join(name for part in parts for name in sorted(part)) or "none"


def _formats(
    placement: Placement, weights: Iterable[WeightPlan], activations: Mapping[str, ActivationPlan]
) -> dict[str, str]:
    """Node → its weight's and its activations' formats in words."""
    held = {node: str(w.spec) for w in weights for node, _ in w.readers}
    found = {}
    for node in placement.nodes:
        inputs = placement.settings[node].activations
        words = [held[node]] if node in held else []
        found[node] = " × ".join([*words, str(inputs) if inputs is not None else "float"])
    return found


def _unfit(
    graph: Graph,
    assignment: Assignment,
    histograms: Mapping[str, FloatHistogram],
    ranges: Mapping[str, Range],
    divided: Mapping[str, Range],
) -> dict[str, str]:
    unfit: dict[str, str] = {}
    faults: dict[str, str] = {}
    # Nothing has to be known of tensors that are not quantized, or by scales that the runtime finds.
    known = any(is_observed(s.activations) for s in assignment.nodes.values())
    for site in find_sites(graph)[0]:
        if site.role in ("weight", "embedding"):
            if 0 in site.shape:
                unfit[site.name] = f"weight {site.name} is empty"
            elif site.node in assignment.nodes:
                if site.name not in faults:
                    faults[site.name] = _fault(graph.array(site.name))
                if faults[site.name]:
                    unfit[site.name] = f"weight {site.name} holds {faults[site.name]}"
            continue
        if not known or (
            site.role == "input"
            and (
                site.node not in assignment.nodes or not is_observed(assignment.nodes[site.node].activations)
            )
        ):
            continue
        if site.name in divided:
            continue
        if ranges:
            if site.name not in ranges:
                unfit[site.name] = f"tensor {site.name} has no range in the imported file"
            continue
        histogram = histograms.get(site.name)
        if histogram is None:
            unfit[site.name] = f"tensor {site.name} was never computed during calibration"
        elif histogram.count == 0:
            unfit[site.name] = f"tensor {site.name} is empty"
        elif histogram.nan_count or histogram.inf_count:
            unfit[site.name] = (
                f"tensor {site.name} had {histogram.nan_count} NaN and {histogram.inf_count} infinite values"
            )
    for node in graph.model.graph:
        for value in node.inputs[2:3]:
            if node.op_type in LINEAR_OPS and value is not None and value.is_initializer():
                bias = graph.array(str(value.name))
                if not _is_finite(bias):
                    unfit[str(value.name)] = f"bias {value.name} holds NaN or infinity"
    return unfit


def _fault(w: np.ndarray) -> str:
    """What keeps a weight from being quantized; "" where nothing does."""
    if not _is_finite(w):
        return "NaN or infinity"
    amax = max(-float(w.min()), float(w.max()))
    # Its scale would be a subnormal float, which keeps few bits of it, and which GPUs flush to zero.
    return "nothing of 10⁻³⁶ or more" if 0 < amax < 128 * SMALLEST_SCALE else ""


def _is_finite(w: np.ndarray) -> bool:
    # NaN is neither least nor greatest without showing, and no copy of the weight is made.
    ends = (w.min(), w.max()) if w.size else ()
    return all(bool(np.isfinite(np.float32(end))) for end in ends)


def _nothing_left(graph: Graph, preset: str, left: list[LeftAlone]) -> str:
    if not left:
        return f"{graph.name}: it has no Conv, MatMul or Gemm; give a model that has some."
    reasons = Counter(node.reason for node in left)
    shown = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
    return f"{graph.name}: {preset} leaves every Conv, MatMul and Gemm in float ({shown}); {_mend(reasons)}."


def _mend(reasons: Iterable[str]) -> str:
    """What to do where every linear node stays in float for these reasons."""
    if any("--all" in reason for reason in reasons):
        return "export with --all, or another preset"
    if QUANTIZED_ALREADY in reasons:
        return "give the float model it was made from"
    if any(word in reason for reason in reasons for word in ("recipe", "as asked", "--include", "--exclude")):
        return "let a rule, or --include, name some, and no --exclude"
    if any(reason.startswith("its inputs are ") for reason in reasons):
        return "give a model of float32, float16 or bfloat16"
    if any(" has no " in reason for reason in reasons):
        return "choose another preset or another --target"
    if any(reason.startswith(("tensor ", "weight ", "bias ")) for reason in reasons):
        return "mend the model or the calibration data"
    if any(" in plain products" in reason or " in groups of " in reason for reason in reasons):
        return "choose another preset, --group or --target"
    if any(
        word in reason for reason in reasons for word in ("weights alone", "lie in blocks", "has tiles of")
    ):
        return "choose another preset, int8 or fp8"
    return "give a float model whose layers have constant weights"


def _solve_activations(
    graph: Graph,
    histograms: Mapping[str, FloatHistogram],
    placement: Placement,
    ranges: Mapping[str, Range],
    known: Mapping[str, Range],
    scale_dtype: np.dtype | None,
) -> tuple[dict[str, ActivationPlan], dict[str, str]]:
    """Return the plans, and the tensors that cannot have one with the reason.

    `known` are ranges of tensors whose histograms say no longer what they hold.
    """
    plans: dict[tuple[str, QuantSpec], ActivationPlan] = {}
    misfits: dict[str, str] = {}
    tied = [] if ranges else sharing_groups(graph)
    root = {name: min(group) for group in tied for name in group}
    groups: dict[tuple[str, QuantSpec, str], list[PlacedActivation]] = {}
    for placed in placement.activations:
        key = root.get(placed.name, placed.name), placed.spec, repr(placed.calibrator)
        groups.setdefault(key, []).append(placed)
    for (_, spec, _), members in groups.items():
        calibrator = members[0].calibrator
        if not is_observed(spec):
            for member in members:
                plans[member.name, spec] = ActivationPlan(
                    name=member.name, spec=spec, range=None, qparams=None, readers=member.readers
                )
            continue
        first = members[0].name
        rescaled = [known[m.name] for m in members if m.name in known]
        if rescaled:
            # What are tied to them hold no more than was observed.
            others = [histograms[m.name] for m in members if m.name not in known]
            found = Range(
                min(float(r.lo) for r in (*rescaled, *(Range(h.min, h.max) for h in others))),
                max(float(r.hi) for r in (*rescaled, *(Range(h.min, h.max) for h in others))),
            )
        elif calibrator is None and ranges:
            found = ranges[first]
        else:
            merged = reduce(FloatHistogram.merge, (histograms[member.name] for member in members))
            # Dynamic blocks have scales of their own: what all of them share must hold the largest value.
            found = (
                Range(merged.min, merged.max)
                if spec.dynamic is not None or calibrator is None
                else solve_range(calibrator, merged, spec, tensor=first)
            )
        for member in members:
            plan = _activation_plan(graph, member, found, misfits, scale_dtype)
            if plan is not None:
                plans[member.name, spec] = plan
    return _by_name(plans), misfits


def _activation_plan(
    graph: Graph,
    placed: PlacedActivation,
    found: Range,
    misfits: dict[str, str],
    scale_dtype: np.dtype | None,
) -> ActivationPlan | None:
    name, spec = placed.name, placed.spec
    if spec.dynamic is not None:
        shared = global_scale_of(found.amax, spec)
        return ActivationPlan(
            name=name, spec=spec, range=found, qparams=None, readers=placed.readers, global_scale=shared
        )
    try:
        qparams = qparams_from_range(found, spec, scale_dtype=float_dtype(graph, name, scale_dtype))
    except SpecError as error:
        misfits[name] = f"tensor {name}: {error}"
        return None
    if found.amax > 0 and qparams.scale <= SMALLEST_SCALE:
        # GPUs take subnormal numbers for zero: with a scale that is none, the codes would all be zero.
        misfits[name] = f"tensor {name} is at most {float(found.amax):.2g}, too small for a float32 scale"
        return None
    return ActivationPlan(name=name, spec=spec, range=found, qparams=qparams, readers=placed.readers)


def _by_name(plans: Mapping[tuple[str, QuantSpec], ActivationPlan]) -> dict[str, ActivationPlan]:
    found: dict[str, ActivationPlan] = {}
    for (name, spec), plan in sorted(plans.items(), key=lambda item: (item[0][0], str(item[0][1]))):
        found[name if name not in found else f"{name}, {spec}"] = plan
    return found

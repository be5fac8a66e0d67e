"""What was asked for, with a model and a cache, becomes a plan; nothing is written yet."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from quantkit.cache import IMPORTED, CalibrationCache
from quantkit.cache.gram_command import how_to_collect
from quantkit.cache.gram_file import SUFFIX, GramFile
from quantkit.errors import CacheError, PlanError, SpecError
from quantkit.formats import E8M0
from quantkit.formats.spec import ScaleRule
from quantkit.graph import Graph
from quantkit.observing.devices import array_module
from quantkit.planning.diagnose import clipping_warnings
from quantkit.planning.methods import Methods, parse_methods
from quantkit.planning.plan import Plan
from quantkit.planning.presets import Preset, Target, get_preset, is_observed, kind_of
from quantkit.planning.protecting import Evidence, edited, never_clipped
from quantkit.planning.recipe import Recipe
from quantkit.planning.rescaling import Folds
from quantkit.planning.settings import Assignment, assign, node_settings, unmatched_warning, with_methods
from quantkit.planning.solve import calibrator_of, solve_nodes
from quantkit.statistics import ChannelStats, GramMatrix


@dataclass(frozen=True, kw_only=True)
class Request:
    """What an export is to do, whatever the model and the cache.

    Attributes:
        preset: a preset's name; None where a recipe alone says what is quantized.
        group: weights that share a scale, or "channel", for presets in groups; None for the preset's own.
        symmetric: False for integer weights with zero points.
        per_tensor: one scale for each weight, for presets without blocks.
        scale_rule: which power of two the scales of MX formats are; asked for, it holds to the letter (largest
            magnitude), where the default searches for the scale of least error.
        activations: False leaves them in float, True quantizes them where a preset does so only when asked.
        method: the methods, as `parse_methods` reads them; None for the cache's. Where weights alone are quantized,
            of the cache's those that are for weights.
        method_options: the options of the calibrator among them.
        alpha: of SmoothQuant: from 0 to 1, or "auto" for each group's own, which needs Gram matrices; None for 0.7.
        folds: where scales of channels may go: into norms, into anything that they fold into exactly ("all"), or also
            into a Mul of their own ("insert").
        everything: quantize also what the preset leaves in float for speed or accuracy.
        recipe: rules over the preset.
        include, exclude: patterns of node names: only these, and not these.
        embeddings: quantize look-up tables too, where the target can.
        head: quantize the last linear layer too.
        scale_dtype: the float type of the file's scales, where floats are cast.
        device: "cuda" has awq, gptq and output search on a GPU.
    """

    preset: str | None = "int8"
    group: int | Literal["channel"] | None = None
    symmetric: bool = True
    per_tensor: bool = False
    scale_rule: ScaleRule | None = None
    activations: bool | None = None
    method: str | None = None
    method_options: Mapping[str, Any] | None = None
    alpha: float | Literal["auto"] | None = None
    folds: Folds = "all"
    everything: bool = False
    recipe: Recipe = field(default_factory=Recipe)
    include: Iterable[str] = ()
    exclude: Iterable[str] = ()
    embeddings: bool = False
    head: bool = True
    scale_dtype: np.dtype | None = None
    device: str = "cpu"

    def resolved(self) -> Preset | None:
        """Return the preset with its options.

        Raises:
            UnknownNameError, SpecError: there is none, or it does not have what is asked for.
        """
        if self.preset is None:
            options = {
                "--group": self.group is not None,
                "--zero-points": not self.symmetric,
                "--per-tensor": self.per_tensor,
                "--scale-rule": self.scale_rule is not None,
                "--activations": self.activations is not None,
            }
            given = [name for name, there in options.items() if there]
            if given:
                raise SpecError(
                    f"{' and '.join(given)}: belongs to a preset; give one, such as --int8 or --int4."
                )
            return None
        return get_preset(
            self.preset,
            block_size=self.group,
            symmetric=self.symmetric,
            scale_rule=self.scale_rule,
            per_tensor=self.per_tensor,
            activations=self.activations,
        )


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan, the graph that it is for, and what should be known before trusting it.

    Attributes:
        graph: the float model that the plan quantizes: the given one, or what `plan.edits` made of it.
        plan: the plan.
        original: the given model.
        warnings: what the user should know, a line each.
    """

    graph: Graph
    plan: Plan
    original: Graph
    warnings: tuple[str, ...] = ()


def obey(graph: Graph, plan: Plan) -> Planned:
    """Return a plan that was solved before, with the model that it is for.

    Raises:
        PlanError: it was solved for another one, or what it says of nodes is not true of it.
    """
    found = graph if plan.edits is None else edited(graph, plan.edits)
    if found.fingerprint == plan.fingerprint:
        # Of another model the emitter speaks.
        _check_nodes(found, plan)
    return Planned(graph=found, plan=plan, original=graph)


def _check_nodes(graph: Graph, plan: Plan) -> None:
    """Refuse a plan that somebody changed so that its nodes are not those that run quantized."""
    everywhere = {a.name for a in plan.activations.values() if not a.readers}
    weighted = {node for weight in plan.weights for node, _ in weight.readers}
    reading = weighted | {node for a in plan.activations.values() for node, _ in a.readers}
    nodes = {str(node.name): node for node in graph.model.graph}
    for name, op_type in plan.nodes.items():
        node = nodes.get(name)
        if node is None or node.op_type != op_type:
            raise PlanError(
                f"plan: nodes: {graph.name} has no {op_type} {name}; mend it, or solve the plan again."
            )
        if name not in reading and not any(v is not None and v.name in everywhere for v in node.inputs):
            raise PlanError(
                f"plan: nodes: {name} reads nothing quantized, neither a weight nor an activation; take it out of "
                "nodes and formats, or solve the plan again."
            )
    for name in (*sorted(weighted), *plan.formats):
        if name not in plan.nodes:
            raise PlanError(f"plan: {name} is not among nodes; add it there, or solve the plan again.")


def _undocumented(plan: Plan, target: Target) -> list[str]:
    """The line that says that a target's documentation does not speak of such blocks."""
    sizes = {
        w.spec.block_size
        for w in plan.weights
        if kind_of(w.spec) == "int4 block" and w.spec.block_size not in target.documented_int4_blocks
    }
    if not target.documented_int4_blocks or not sizes:
        return []
    known = " and ".join(map(str, sorted(target.documented_int4_blocks)))
    return [
        f"{target.name}'s documentation has int4 weights in groups of {known}, not of "
        f"{', '.join(map(str, sorted(s for s in sizes if s)))}: build the engine before relying on it"
    ]


def plan_model(
    graph: Graph,
    held: CalibrationCache | None,
    request: Request,
    target: Target,
    *,
    grams: Mapping[str, GramMatrix] | str | os.PathLike[str] | None = None,
) -> Planned:
    """Solve a plan; the model is not run.

    Args:
        graph: the cleaned model.
        held: its calibration cache; None where activations stay in float or have scales of their own.
        request: what is asked for.
        target: what will run the model.
        grams: Gram matrices by view, for methods that need them, or the path of a file of them; None for the one
            beside the cache's file.

    Raises:
        CacheError: the request needs a cache, or the cache's ranges are fixed and another method is asked for.
        RecipeError, SpecError, UnknownNameError, PlanError: what is asked for does not exist, does not go together,
            or cannot be done with this model.
    """
    preset = request.resolved()
    recipe = request.recipe.with_patterns(include=request.include, exclude=request.exclude)
    settled = _assign(graph, held, request, preset, recipe, target)
    if held is None and any(is_observed(s.activations) for s in settled.nodes.values()):
        raise CacheError(
            f"export: {request.preset or 'the recipe'} needs a calibration cache; give one, or run "
            "`quantkit calibrate` first."
        )
    if held is None and grams is None and any(s.correct_bias for s in settled.nodes.values()):
        raise CacheError(
            "export: bias needs the means of a calibration cache; give one, or run `quantkit calibrate` first."
        )
    _check_used(request, settled)
    looks = request.alpha == "auto" or any(s.looks_at_outputs for s in settled.nodes.values())
    # What is beside a cache and not needed may be old, or damaged: that is no matter here.
    opened = _open_grams(grams, held, graph) if looks else None
    histograms = {} if held is None else {name: s.histogram for name, s in held.statistics.items()}
    ranges = {} if held is None else held.ranges
    evidence = Evidence(
        channels={} if held is None else _channels(held),
        grams=opened,
        missing=f"it needs Gram matrices, and there are none; {how_to_collect(held, graph)} first.",
        unclipped=never_clipped(graph, histograms),
        xp=array_module(request.device),
    )
    solved = solve_nodes(
        graph,
        histograms,
        settled,
        request.preset or "recipe",
        target,
        everything=request.everything,
        ranges=ranges,
        scale_dtype=request.scale_dtype,
        evidence=evidence,
        alpha=request.alpha,
        folds=request.folds,
    )
    plan = solved.plan
    warnings = [
        *unmatched_warning(settled.unmatched),
        *_unheld(preset, target),
        *_undocumented(plan, target),
    ]
    if grams is None and isinstance(opened, GramFile):
        warnings += _of_other_data(opened, held)
    warnings += _uncorrected(plan, settled)
    if solved.alone:
        warnings.append(
            f"{', '.join(solved.alone)}: no data reached it, or NaN or infinity did; its weight was rounded by itself"
        )
    if solved.unseen:
        warnings.append(
            f"{', '.join(solved.unseen)}: of a ConvTranspose, a Gemm whose alpha is not 1, a stack of weights or a "
            "look-up table there is no Gram matrix; its weight was rounded by itself"
        )
    if not ranges:
        warnings += clipping_warnings(plan, {n: h for n, h in histograms.items() if n not in solved.rescaled})
        warnings += _from_extremes(plan, solved.rescaled)
    elif any((a.spec.format.kind, a.spec.format.bits) != ("integer", 8) for a in plan.activations.values()):
        warnings.append(
            f"the imported ranges were chosen for 8-bit integers, and {plan.preset} clips at them too; "
            "ranges of its own need `quantkit calibrate`"
        )
    return Planned(graph=solved.graph, plan=plan, original=graph, warnings=tuple(warnings))


def _check_used(request: Request, settled: Assignment) -> None:
    """Refuse options of methods that nothing is done by."""
    scalings = {s.scaling for s in settled.nodes.values()}
    if request.alpha is not None and "smoothquant" not in scalings:
        raise SpecError(
            f"--alpha {request.alpha}: no layer is smoothed; add --method smoothquant, or leave it out."
        )
    if request.folds != "all" and not scalings - {None}:
        raise SpecError(
            f"--folds {request.folds}: no channels are scaled; add --method smoothquant or awq, or leave it out."
        )


def _of_other_data(grams: GramFile, held: CalibrationCache | None) -> list[str]:
    """The line that says that the Gram matrices beside a cache are of other data."""
    said = grams.text.get("data")
    if held is None or not isinstance(said, dict) or said == held.data:
        return []
    return [
        f"{grams.path} is of {said.get('path', 'other data')}, the cache of {held.data.get('path', 'other data')}, or "
        "their samples were prepared otherwise; collect both at once"
    ]


def _uncorrected(plan: Plan, settled: Assignment) -> list[str]:
    """The line that says which biases were to take up the mean of the error, and do not."""
    corrected = set() if plan.edits is None else set(plan.edits.biases)
    left = [
        node
        for weight in plan.weights
        for node, _ in weight.readers
        if settled.nodes[node].correct_bias and node not in corrected
    ]
    if not left:
        return []
    return [
        f"{', '.join(left)}: the bias stays as it is, for the mean of the input is not known, or the bias is computed"
    ]


def _from_extremes(plan: Plan, rescaled: frozenset[str]) -> list[str]:
    """The line that says which ranges are not of the method that was asked for."""
    if plan.edits is None or "minmax" in plan.method.split("+"):
        return []
    count = sum(a.spec.dynamic is None and a.name in rescaled for a in plan.activations.values())
    if not count:
        return []
    return [
        f"{count} rescaled tensor{'s have' if count > 1 else ' has'} the range from least to greatest value: of what "
        "is divided channel by channel histograms say nothing more, whatever the method"
    ]


def _channels(held: CalibrationCache) -> dict[str, ChannelStats]:
    return {name: s.channels for name, s in held.statistics.items() if s.channels is not None}


def _assign(
    graph: Graph,
    held: CalibrationCache | None,
    request: Request,
    preset: Preset | None,
    recipe: Recipe,
    target: Target,
) -> Assignment:
    alone = preset is not None and preset.activations is None
    methods = methods_of(request.method, held, weights_alone=alone)
    calibrator = None
    if held is not None:
        options = request.method_options
        named = methods.ranges if held.ranges else methods.ranges_beside
        calibrator = calibrator_of(held, named if request.method is not None else None, options)
    default = None
    if preset is not None:
        default = node_settings(preset, target, calibrator=calibrator)
        default = with_methods(default, replace(methods, ranges=None))
        if request.scale_rule is not None and request.method is None:
            assert preset.weights.scale_format == E8M0
            default = replace(default, weight_method="amax")
    return assign(
        graph,
        target,
        default,
        recipe,
        calibrator=calibrator,
        methods=methods,
        embeddings=request.embeddings,
        head=request.head,
    )


def methods_of(method: str | None, held: CalibrationCache | None, *, weights_alone: bool) -> Methods:
    """Return the methods asked for; those that the cache records where none are.

    Args:
        method: as it was asked for.
        held: the cache.
        weights_alone: activations stay in float: what the cache records for them is left out.

    Raises:
        UnknownNameError: a part that there is not.
    """
    if method is not None and not (method == IMPORTED and held is not None and held.ranges):
        return parse_methods(method, weights_alone=weights_alone)
    if held is None or held.ranges:
        return Methods()
    recorded = parse_methods(held.method)
    if not weights_alone:
        return recorded
    scaling = None if recorded.scaling == "smoothquant" else recorded.scaling
    return replace(recorded, ranges=None, scaling=scaling)


def _unheld(preset: Preset | None, target: Target) -> list[str]:
    """The line that says that a target has no such activations, where the preset does without them."""
    if preset is None or preset.activations is None or target.activation_spec(preset) is not None:
        return []
    return [
        f"{target.name} has no {kind_of(preset.activations).replace(' block', ' block-wise')} activations computed "
        "as the model runs: they stay in float, and weights alone are quantized"
    ]


def _open_grams(
    given: Mapping[str, GramMatrix] | str | os.PathLike[str] | None,
    cache: CalibrationCache | None,
    graph: Graph,
) -> Mapping[str, GramMatrix] | None:
    """The Gram matrices that were given, or those beside the cache."""
    path = given
    if path is None and cache is not None and cache.path is not None:
        beside = cache.path.with_suffix(SUFFIX)
        path = beside if beside.exists() else None
    if not isinstance(path, str | os.PathLike):
        return path
    held = GramFile(path)
    if held.text.get("fingerprint") != graph.fingerprint:
        raise CacheError(
            f"{path}: the Gram matrices of another model; collect those of {graph.path or graph.name} with "
            "`quantkit calibrate --collect gram`."
        )
    return held

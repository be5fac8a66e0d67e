"""What was asked for, with a model and a cache, becomes a plan; nothing is written yet."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from quantkit.cache import CalibrationCache
from quantkit.diagnose import clipping_warnings
from quantkit.errors import CacheError, SpecError
from quantkit.formats import E8M0
from quantkit.formats.spec import ScaleRule
from quantkit.graph import Graph
from quantkit.plan import Plan
from quantkit.presets import Preset, Target, get_preset, kind_of
from quantkit.recipe import Recipe
from quantkit.settings import Assignment, assign, node_settings, unmatched_warning, weight_method_of
from quantkit.solve import calibrator_of, is_observed, solve_nodes


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
        method: the calibration method; None for the cache's. For weights alone, how they are solved.
        method_options: its options.
        everything: quantize also what the preset leaves in float for speed or accuracy.
        recipe: rules over the preset.
        include, exclude: patterns of node names: only these, and not these.
        embeddings: quantize look-up tables too, where the target can.
        head: quantize the last linear layer too.
        scale_dtype: the float type of the file's scales, where floats are cast.
    """

    preset: str | None = "int8"
    group: int | Literal["channel"] | None = None
    symmetric: bool = True
    per_tensor: bool = False
    scale_rule: ScaleRule | None = None
    activations: bool | None = None
    method: str | None = None
    method_options: Mapping[str, Any] | None = None
    everything: bool = False
    recipe: Recipe = field(default_factory=Recipe)
    include: Iterable[str] = ()
    exclude: Iterable[str] = ()
    embeddings: bool = False
    head: bool = True
    scale_dtype: np.dtype | None = None

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
    """A plan, the graph that it is for, and what should be known before trusting it."""

    graph: Graph
    plan: Plan
    warnings: tuple[str, ...] = ()


def plan_model(graph: Graph, held: CalibrationCache | None, request: Request, target: Target) -> Planned:
    """Solve a plan; the model is not run.

    Args:
        graph: the cleaned model.
        held: its calibration cache; None where activations stay in float or have scales of their own.
        request: what is asked for.
        target: what will run the model.

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
    histograms = {} if held is None else {name: s.histogram for name, s in held.statistics.items()}
    ranges = {} if held is None else held.ranges
    plan = solve_nodes(
        graph,
        histograms,
        settled,
        request.preset or "recipe",
        target,
        everything=request.everything,
        ranges=ranges,
        scale_dtype=request.scale_dtype,
    )
    warnings = [*unmatched_warning(settled.unmatched), *_unheld(preset, target)]
    if not ranges:
        warnings += clipping_warnings(plan, histograms)
    elif any((a.spec.format.kind, a.spec.format.bits) != ("integer", 8) for a in plan.activations.values()):
        warnings.append(
            f"the imported ranges were chosen for 8-bit integers, and {plan.preset} clips at them too; "
            "ranges of its own need `quantkit calibrate`"
        )
    return Planned(graph=graph, plan=plan, warnings=tuple(warnings))


def _assign(
    graph: Graph,
    held: CalibrationCache | None,
    request: Request,
    preset: Preset | None,
    recipe: Recipe,
    target: Target,
) -> Assignment:
    method, weight_method = request.method, None
    if preset is not None and preset.activations is None:
        # With weights alone the method is theirs.
        weight_method = weight_method_of(preset, method)
        method = None
    if preset is not None and request.scale_rule is not None and request.method is None:
        assert preset.weights.scale_format == E8M0
        weight_method = "amax"
    calibrator = None if held is None else calibrator_of(held, method, request.method_options)
    default = (
        None
        if preset is None
        else node_settings(preset, target, calibrator=calibrator, weight_method=weight_method)
    )
    return assign(
        graph,
        target,
        default,
        recipe,
        calibrator=calibrator,
        embeddings=request.embeddings,
        head=request.head,
    )


def _unheld(preset: Preset | None, target: Target) -> list[str]:
    """The line that says that a target has no such activations, where the preset does without them."""
    if preset is None or preset.activations is None or target.activation_spec(preset) is not None:
        return []
    return [
        f"{target.name} has no {kind_of(preset.activations).replace(' block', ' block-wise')} activations computed "
        "as the model runs: they stay in float, and weights alone are quantized"
    ]

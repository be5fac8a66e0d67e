"""Statistics and a placement become a plan. No data is needed, and nothing of the model is run."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir

from quantkit.cache import IMPORTED, CalibrationCache
from quantkit.calibrators import (
    Calibrator,
    WeightMethod,
    get_calibrator,
    solve_range,
    weight_qparams,
    weight_range,
)
from quantkit.errors import CacheError, PlanError, SpecError, UnknownNameError
from quantkit.formats import QParams, QuantSpec, Range, qparams_from_range
from quantkit.formats.scales import SMALLEST_SCALE, global_scale_of
from quantkit.graph import Graph, LeftAlone, Site, find_sites, sharing_groups
from quantkit.graph.sites import LINEAR_OPS, QUANTIZED_ALREADY
from quantkit.placement import PlacedActivation, PlacedWeight, Placement, place_nodes
from quantkit.plan import ActivationPlan, BiasPlan, Plan, WeightPlan
from quantkit.presets import Preset, Target
from quantkit.settings import Assignment, node_settings
from quantkit.statistics import FloatHistogram

_INT32_MAX = 2**31 - 1
# Block sizes that kernels take; those that divide a weight are named where the size asked for does not.
_SIZES = (16, 32, 64, 128, 256)


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
            return get_calibrator(cache.method, **{**cache.method_options, **(options or {})})
        except UnknownNameError as error:
            raise UnknownNameError(
                f"{str(error).rstrip('.?')}; the name comes from the cache: install that method again, or give "
                "another one with --method."
            ) from error
    return get_calibrator(method, **(options or {}))


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
    )


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
) -> Plan:
    """Return the plan that gives every node what it is to become.

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

    Raises:
        PlanError: there is nothing that can be quantized so.
        SpecError: a plug-in's calibrator does not give a range, or a weight cannot be cut into whole blocks.
    """
    ranges = ranges or {}
    unfit = _unfit(graph, assignment, histograms, ranges)
    while True:
        placement = place_nodes(
            graph, assignment.nodes, target, kept=assignment.kept, everything=everything, unfit=unfit
        )
        activations, misfits = _solve_activations(graph, histograms, placement, ranges, scale_dtype)
        if not misfits:
            break
        # Without them the placement is another one; each round takes at least one tensor out.
        unfit |= misfits
    if not placement.nodes:
        raise PlanError(_nothing_left(graph, name, placement.left))
    weights, biases = _solve_weights(graph, placement, activations, target, scale_dtype)
    return Plan(
        model=graph.name,
        fingerprint=graph.fingerprint,
        preset=name,
        target=target.name,
        method=_method_name(placement),
        activations=activations,
        weights=weights,
        biases=biases,
        nodes=placement.nodes,
        left=placement.left,
        formats=_formats(placement, weights, activations),
    )


def _method_name(placement: Placement) -> str:
    """The methods of the activations that have one, or else of the weights."""
    static = [a for a in placement.activations if a.spec.dynamic is None]
    if not static:
        return "+".join(sorted({w.settings.weight_method for w in placement.weights})) or "none"
    return "+".join(sorted({IMPORTED if a.calibrator is None else a.calibrator.name for a in static}))


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
) -> dict[str, str]:
    unfit: dict[str, str] = {}
    finite: dict[str, bool] = {}
    # Nothing has to be known of tensors that are not quantized, or by scales that the runtime finds.
    known = any(is_observed(s.activations) for s in assignment.nodes.values())
    for site in find_sites(graph)[0]:
        if site.role in ("weight", "embedding"):
            if 0 in site.shape:
                unfit[site.name] = f"weight {site.name} is empty"
            elif site.node in assignment.nodes:
                if site.name not in finite:
                    finite[site.name] = _is_finite(graph.array(site.name))
                if not finite[site.name]:
                    unfit[site.name] = f"weight {site.name} holds NaN or infinity"
            continue
        if not known or (
            site.role == "input"
            and (
                site.node not in assignment.nodes or not is_observed(assignment.nodes[site.node].activations)
            )
        ):
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
                if bias.dtype.kind in "fV" and not np.all(np.isfinite(bias.astype(np.float32))):
                    unfit[str(value.name)] = f"bias {value.name} holds NaN or infinity"
    return unfit


def is_observed(spec: QuantSpec | None) -> bool:
    """Whether what was observed of a tensor bears on how it is quantized."""
    return spec is not None and (spec.dynamic is None or spec.has_global_scale)


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
    if any(reason.startswith(("tensor", "weight", "bias")) for reason in reasons):
        return "mend the model or the calibration data"
    if any("recipe" in reason or "as asked" in reason for reason in reasons):
        return "let a rule, or --include, name some"
    if any(" has no " in reason for reason in reasons):
        return "choose another preset or another --target"
    if any("weights alone" in reason or "lie in blocks" in reason for reason in reasons):
        return "choose another preset, int8 or fp8"
    return "give a float model whose layers have constant weights"


def _solve_activations(
    graph: Graph,
    histograms: Mapping[str, FloatHistogram],
    placement: Placement,
    ranges: Mapping[str, Range],
    scale_dtype: np.dtype | None,
) -> tuple[dict[str, ActivationPlan], dict[str, str]]:
    """Return the plans, and the tensors that cannot have one with the reason."""
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
        if calibrator is None and ranges:
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
        qparams = qparams_from_range(found, spec, scale_dtype=_float_dtype(graph, name, scale_dtype))
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


def _solve_weights(
    graph: Graph,
    placement: Placement,
    activations: Mapping[str, ActivationPlan],
    target: Target,
    scale_dtype: np.dtype | None,
) -> tuple[list[WeightPlan], list[BiasPlan]]:
    readers: dict[tuple[str, QuantSpec, WeightMethod], list[PlacedWeight]] = {}
    for placed in placement.weights:
        key = placed.site.name, placed.spec, placed.settings.weight_method
        readers.setdefault(key, []).append(placed)
    scales = {reader: a for a in activations.values() for reader in a.readers}
    everywhere = {a.name: a for a in activations.values() if not a.readers}
    weights: list[WeightPlan] = []
    biases: list[BiasPlan] = []
    # s_x · s_w is often less than float16 can hold.
    with_biases = target.integer_bias and scale_dtype in (None, np.float32)
    for (name, spec, method), placed_here in readers.items():
        w = graph.array(name)
        if target.whole_blocks:
            _check_blocks(name, w.shape, spec)
        qparams = _weight_qparams(name, w, spec, _float_dtype(graph, name, scale_dtype), method)
        with_bias: list[tuple[Site, np.float32]] = []
        for placed in placed_here if with_biases and _can_add_bias(spec) else ():
            site = placed.site
            if placed.settings.integer_activations and _bias(graph.node(site.node)) is not None:
                other = graph.node(site.node).inputs[1 - site.index]
                assert other is not None
                # An input that the model itself quantizes is in no plan; its node keeps a float bias.
                held = scales.get((site.node, 1 - site.index)) or everywhere.get(str(other.name))
                if held is not None and held.spec.format.bits == 8:
                    with_bias.append((site, np.float32(held.static.scale)))
        for site, input_scale in with_bias:
            qparams = _wide_enough(graph, site, qparams, input_scale)
        weights.append(
            WeightPlan(
                name=name,
                spec=spec,
                qparams=qparams,
                readers=tuple((p.site.node, p.site.index) for p in placed_here),
            )
        )
        for site, input_scale in with_bias:
            biases.append(_solve_bias(graph, site, qparams, input_scale))
    return weights, biases


def _can_add_bias(spec: QuantSpec) -> bool:
    """Whether an integer kernel multiplies by such weights, so that the bias can be added to its sums."""
    return spec.format.kind == "integer" and spec.format.bits == 8 and spec.block_size is None


def _check_blocks(name: str, shape: tuple[int, ...], spec: QuantSpec) -> None:
    if spec.axis is None or spec.block_size is None or shape[spec.axis] % spec.block_size == 0:
        return
    size = shape[spec.axis]
    divisors = [d for d in _SIZES if size % d == 0] or [
        d for d in range(1, size + 1) if size % d == 0 and 8 <= d <= 256
    ]
    fixed = spec.scale_format is not None
    mend = (
        "leave it in float with --exclude"
        if fixed or not divisors
        else f"choose --group {' or '.join(map(str, divisors))}, or leave it in float with --exclude"
    )
    raise SpecError(
        f"{name}: its axis {spec.axis} has {size} elements, not a multiple of the group size {spec.block_size}, as "
        f"this target needs; {mend}."
    )


def _weight_qparams(
    name: str, w: np.ndarray, spec: QuantSpec, dtype: np.dtype, method: WeightMethod
) -> QParams:
    if spec.block_size is not None or spec.block_shape is not None or spec.format.bits < 8:
        return weight_qparams(w, spec, method=method, scale_dtype=dtype, name=name)
    range_ = weight_range(w.astype(np.float32), spec, method=method, name=name)
    return qparams_from_range(_holdable(range_, spec, dtype), spec, scale_dtype=dtype)


def _holdable(range_: Range, spec: QuantSpec, dtype: np.dtype) -> Range:
    """Widen the ranges of channels so small that their scale would be zero in float16."""
    if dtype != np.float16:
        return range_
    least = float(np.finfo(np.float16).smallest_subnormal) * spec.format.symmetric_max
    widened = np.where(range_.amax > 0, np.maximum(range_.amax, least), 0.0)
    return Range(np.where(widened > range_.amax, -widened, range_.lo), np.maximum(range_.hi, widened))


def _bias(node: ir.Node) -> ir.Value | None:
    """The constant bias of a Conv, ConvTranspose or Gemm that an integer kernel can add; None without one."""
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or len(node.inputs) < 3:
        return None
    bias = node.inputs[2]
    if bias is None or not bias.is_initializer() or bias.shape is None or len(bias.shape) != 1:
        return None
    if bias.dtype != ir.DataType.FLOAT:
        # No integer kernel puts out float16, and s_x · s_w is often less than float16 can hold.
        return None
    if node.op_type == "ConvTranspose":
        # ONNX Runtime has no integer ConvTranspose.
        return None
    if node.op_type == "Gemm":
        for factor in ("alpha", "beta"):
            attribute = node.attributes.get(factor)
            if attribute is not None and attribute.as_float() != 1.0:
                return None
        weight = node.inputs[1]
        transposed = node.attributes.get("transB")
        axis = 0 if transposed is not None and transposed.as_int() else 1
        if weight is None or weight.shape is None or weight.shape[axis] != bias.shape[0]:
            return None
    return bias


def _wide_enough(graph: Graph, site: Site, qparams: QParams, input_scale: np.float32) -> QParams:
    """Enlarge the weight scales of channels so small that their bias would overflow int32."""
    bias = graph.array(_bias_name(graph, site)).astype(np.float64)
    least = np.abs(bias) / (float(input_scale) * _INT32_MAX)
    # Twice, so that rounding the product of the scales cannot overflow again.
    return replace(qparams, scale=np.maximum(qparams.scale, (2 * least).astype(np.float32)))


def _solve_bias(graph: Graph, site: Site, qparams: QParams, input_scale: np.float32) -> BiasPlan:
    name = _bias_name(graph, site)
    scale = input_scale * qparams.scale
    codes = np.rint(graph.array(name).astype(np.float64) / scale.astype(np.float64))
    return BiasPlan(name=name, qvalue=codes.astype(np.int32), scale=scale, reader=(site.node, 2))


def _bias_name(graph: Graph, site: Site) -> str:
    bias = _bias(graph.node(site.node))
    if bias is None:
        raise SpecError(f"{site.node}: has no constant bias; leave it in float.")
    return str(bias.name)


def _float_dtype(graph: Graph, name: str, scale_dtype: np.dtype | None) -> np.dtype:
    """The float type in which the scale of a tensor is stored: its own, unless float32 is cast to another one."""
    dtype = graph.values[name].dtype
    own = np.dtype(np.float32) if dtype is None else np.dtype(dtype.numpy())
    return scale_dtype if scale_dtype is not None and own == np.float32 else own

"""Statistics and a placement become a plan. No data is needed, and nothing of the model is run."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any, cast, get_args

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
from quantkit.formats import QParams, QuantSpec, Range, qparams_from_range, quantize
from quantkit.formats.scales import SMALLEST_SCALE
from quantkit.graph import Graph, LeftAlone, Site, find_sites, sharing_groups
from quantkit.graph.sites import LINEAR_OPS, QUANTIZED_ALREADY
from quantkit.placement import Placement, place
from quantkit.plan import ActivationPlan, BiasPlan, Plan, WeightPlan
from quantkit.presets import Preset, Target
from quantkit.statistics import FloatHistogram

_INT32_MAX = 2**31 - 1
# Of weights in few bits and blocks the scale of least squared error; of the others the largest magnitude, which keeps
# as much and is what TensorRT does.
_WEIGHT_METHOD: Mapping[bool, WeightMethod] = {True: "mse", False: "amax"}


def weight_method_of(preset: Preset, method: str | None = None) -> WeightMethod:
    """Return how weights are solved: of presets that quantize nothing else `method` says so, else it is fixed.

    Raises:
        UnknownNameError: `method` is none for weights.
    """
    if preset.activations is not None or method is None:
        return _WEIGHT_METHOD[preset.in_blocks]
    for known in get_args(WeightMethod):
        if method == known:
            return cast(WeightMethod, known)
    raise UnknownNameError(
        f"method {method}: {preset.name} quantizes weights alone, whose methods are "
        f"{' and '.join(get_args(WeightMethod))}; choose one of them, or leave --method out."
    )


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
    """Return the plan that `calibrator` finds.

    Tensors that MaxPool, Concat and their like tie together are solved from their merged histogram, so they get one
    scale. A tensor whose statistics hold no finite value, or NaN or infinities (an attention mask's −inf, say), and
    a weight that is not finite, stay in float and are listed.

    Args:
        graph: the cleaned model.
        histograms: statistics by tensor name, as calibration gathered them.
        preset: formats and what stays in float by default.
        target: what will run the model.
        calibrator: the method for activations. Weights are known whole: theirs is their largest magnitude.
            None where the ranges are fixed.
        everything: quantize also what the preset leaves in float.
        ranges: fixed ranges by tensor name, in place of histograms. They are taken as they are: tensors that are
            tied together keep each its own.
        weight_method: how weights are solved; None for the preset's own way (`weight_method_of`).

    Raises:
        PlanError: there is nothing that can be quantized so.
        SpecError: a plug-in's calibrator does not give a range.
    """
    ranges = ranges or {}
    unfit = _unfit(graph, preset, histograms, ranges)
    while True:
        placement = place(graph, preset, target, everything=everything, unfit=unfit)
        activations, misfits = _solve_activations(graph, histograms, placement, calibrator, ranges)
        if not misfits:
            break
        # Without them the placement is another one; each round takes at least one tensor out.
        unfit |= misfits
    if not placement.nodes:
        raise PlanError(_nothing_left(graph, preset, placement.left))
    integer_bias = target.integer_bias and preset.integer_activations
    weight_method = weight_method or weight_method_of(preset)
    weights, biases = _solve_weights(
        graph,
        placement,
        preset,
        activations,
        method=weight_method,
        integer_bias=integer_bias,
        whole_blocks=target.whole_blocks,
    )
    return Plan(
        model=graph.name,
        fingerprint=graph.fingerprint,
        preset=preset.name,
        target=target.name,
        method=_method_name(preset, calibrator, weight_method),
        activations=activations,
        weights=weights,
        biases=biases,
        nodes=placement.nodes,
        left=placement.left,
    )


def _method_name(preset: Preset, calibrator: Calibrator | None, weight_method: WeightMethod) -> str:
    if preset.activations is None:
        return weight_method
    return IMPORTED if calibrator is None else calibrator.name


def _unfit(
    graph: Graph, preset: Preset, histograms: Mapping[str, FloatHistogram], ranges: Mapping[str, Range]
) -> dict[str, str]:
    unfit: dict[str, str] = {}
    for site in find_sites(graph)[0]:
        if site.role == "weight":
            if 0 in site.shape:
                unfit[site.name] = f"weight {site.name} is empty"
            elif site.name not in unfit and not np.all(
                np.isfinite(graph.array(site.name).astype(np.float32))
            ):
                unfit[site.name] = f"weight {site.name} holds NaN or infinity"
            continue
        if preset.activations is None:
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


def _nothing_left(graph: Graph, preset: Preset, left: list[LeftAlone]) -> str:
    if not left:
        return f"{graph.name}: it has no Conv, MatMul or Gemm; give a model that has some."
    reasons = Counter(node.reason for node in left)
    shown = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
    return f"{graph.name}: {preset.name} leaves every Conv, MatMul and Gemm in float ({shown}); {_mend(reasons)}."


def _mend(reasons: Iterable[str]) -> str:
    """What to do where every linear node stays in float for these reasons."""
    if any("--all" in reason for reason in reasons):
        return "export with --all, or another preset"
    if QUANTIZED_ALREADY in reasons:
        return "give the float model it was made from"
    if any(reason.startswith(("tensor", "weight", "bias")) for reason in reasons):
        return "mend the model or the calibration data"
    if any("weights alone" in reason or "lie in blocks" in reason for reason in reasons):
        return "choose another preset, int8 or fp8"
    return "give a float model whose layers have constant weights"


def _solve_activations(
    graph: Graph,
    histograms: Mapping[str, FloatHistogram],
    placement: Placement,
    calibrator: Calibrator | None,
    ranges: Mapping[str, Range],
) -> tuple[dict[str, ActivationPlan], dict[str, str]]:
    """Return the plans, and the tensors that cannot have one with the reason."""
    plans: dict[str, ActivationPlan] = {}
    misfits: dict[str, str] = {}
    if placement.spec is None:
        return plans, misfits
    solved: set[str] = set()
    tied = [] if ranges else sharing_groups(graph)
    for group in [*tied, *({name} for name in placement.activations)]:
        members = sorted((group & placement.activations.keys()) - solved)
        if not members:
            continue
        solved.update(members)
        if calibrator is None:
            found = ranges[members[0]]
        else:
            merged = reduce(FloatHistogram.merge, (histograms[name] for name in members))
            found = solve_range(calibrator, merged, placement.spec, tensor=members[0])
        for name in members:
            try:
                qparams = qparams_from_range(found, placement.spec, scale_dtype=_float_dtype(graph, name))
            except SpecError as error:
                misfits[name] = f"tensor {name}: {error}"
                continue
            if found.amax > 0 and qparams.scale <= SMALLEST_SCALE:
                # GPUs take subnormal numbers for zero: with a scale that is none, the codes would all be zero.
                misfits[name] = (
                    f"tensor {name} is at most {float(found.amax):.2g}, too small for a float32 scale"
                )
                continue
            plans[name] = ActivationPlan(
                name=name,
                spec=placement.spec,
                range=found,
                qparams=qparams,
                readers=placement.activations[name],
            )
    return dict(sorted(plans.items())), misfits


def _solve_weights(
    graph: Graph,
    placement: Placement,
    preset: Preset,
    activations: Mapping[str, ActivationPlan],
    *,
    method: WeightMethod,
    integer_bias: bool,
    whole_blocks: bool,
) -> tuple[list[WeightPlan], list[BiasPlan]]:
    sites: dict[tuple[str, int | None], list[Site]] = {}
    for site in placement.weights:
        axis = site.contraction if preset.in_blocks else site.axis
        sites.setdefault((site.name, axis), []).append(site)
    weights: list[WeightPlan] = []
    biases: list[BiasPlan] = []
    for (name, axis), readers in sites.items():
        w = graph.array(name)
        spec = replace(preset.weights, axis=axis)
        if whole_blocks:
            _check_blocks(name, w.shape, spec)
        dtype = _float_dtype(graph, name)
        qparams = _weight_qparams(name, w, spec, dtype, method)
        with_bias = [s for s in readers if integer_bias and _bias(graph.node(s.node)) is not None]
        for site in with_bias:
            qparams = _wide_enough(graph, site, qparams, _input_scale(graph, site, activations))
        weights.append(
            WeightPlan(
                name=name,
                qtensor=quantize(w, qparams, spec),
                readers=tuple((s.node, s.index) for s in readers),
            )
        )
        for site in with_bias:
            biases.append(_solve_bias(graph, site, qparams, _input_scale(graph, site, activations)))
    return weights, biases


def _check_blocks(name: str, shape: tuple[int, ...], spec: QuantSpec) -> None:
    if spec.axis is None or spec.block_size is None or shape[spec.axis] % spec.block_size == 0:
        return
    size = shape[spec.axis]
    divisors = [d for d in range(1, size + 1) if size % d == 0 and 8 <= d <= 256] or [size]
    raise SpecError(
        f"{name}: its axis {spec.axis} has {size} elements, not a multiple of the group size {spec.block_size}, as "
        f"this target needs; choose --group {' or '.join(map(str, divisors))}, or keep the layer in float."
    )


def _weight_qparams(
    name: str, w: np.ndarray, spec: QuantSpec, dtype: np.dtype, method: WeightMethod
) -> QParams:
    if spec.block_size is not None:
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


def _input_scale(graph: Graph, site: Site, activations: Mapping[str, ActivationPlan]) -> np.float32:
    other = graph.node(site.node).inputs[1 - site.index]
    assert other is not None
    return np.float32(activations[str(other.name)].qparams.scale)


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


def _float_dtype(graph: Graph, name: str) -> np.dtype:
    """The float type of a tensor, in which its scale is stored."""
    dtype = graph.values[name].dtype
    return np.dtype(np.float32) if dtype is None else np.dtype(dtype.numpy())

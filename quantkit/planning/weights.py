"""A placement's weights become codes and scales, and the biases that integer kernels add become integers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantkit.calibrators import WeightMethod, weight_qparams, weight_range
from quantkit.calibrators.bias_correction import bias_correction
from quantkit.calibrators.weight_rounding import Rounding, round_weight
from quantkit.errors import SpecError
from quantkit.formats import QParams, QuantSpec, Range, dequantize, qparams_from_range, quantize
from quantkit.graph import Graph, Site
from quantkit.graph.biases import add_to_biases, can_add_to_bias
from quantkit.graph.kept_scales import Scale
from quantkit.graph.linears import Linear
from quantkit.planning.placement import PlacedWeight, Placement
from quantkit.planning.plan import ActivationPlan, BiasPlan, WeightPlan
from quantkit.planning.presets import Target
from quantkit.planning.protecting import Protected
from quantkit.planning.rescaling import layer_of, layout_of

_INT32_MAX = 2**31 - 1
# Block sizes that kernels take; those that divide a weight are named where the size asked for does not.
_SIZES = (16, 32, 64, 128, 256)
# These look at the weight alone; the others at the outputs too, which needs a linear operator with one weight.
_ALONE: Mapping[Rounding, WeightMethod] = {"amax": "amax", "mse": "mse"}


@dataclass(frozen=True, kw_only=True)
class SolvedWeights:
    """What became of a graph's weights.

    Attributes:
        graph: with the biases that take up the mean of the error, where that was asked for.
        weights, biases: see `Plan`.
        corrections: node → what was added to its bias, float64.
    """

    graph: Graph
    weights: list[WeightPlan]
    biases: list[BiasPlan]
    corrections: Mapping[str, NDArray[np.float64]]


def solve_weights(
    graph: Graph,
    placement: Placement,
    activations: Mapping[str, ActivationPlan],
    target: Target,
    scale_dtype: np.dtype | None = None,
    protected: Protected | None = None,
    *,
    kept: Mapping[str, Scale] | None = None,
) -> SolvedWeights:
    """Round every placed weight as its settings say; then its bias, where the target adds integers.

    Args:
        graph: the cleaned model, that of `protected` where that is given.
        placement: of this graph.
        activations: solved, by tensor.
        target: what will run the model.
        scale_dtype: the float type that the file's scales will have, where it is not the tensors' own.
        protected: what is known of the inputs of linear operators.
        kept: scales of tensors that the model quantizes itself.

    Raises:
        SpecError: a weight cannot be cut into whole blocks, or is not finite.
        CacheError: a Gram matrix is missing.
    """
    together: dict[tuple[str, QuantSpec, Rounding, bool], list[PlacedWeight]] = {}
    for placed in placement.weights:
        settings = placed.settings
        key = placed.site.name, placed.spec, settings.weight_method, settings.correct_bias
        together.setdefault(key, []).append(placed)
    weights: list[WeightPlan] = []
    corrections: dict[str, NDArray[np.float64]] = {}
    for members in together.values():
        plan, changes = _solve_weight(graph, members, target, scale_dtype, protected)
        weights.append(plan)
        corrections |= changes
    corrected = add_to_biases(graph, corrections)
    # s_x · s_w is often less than float16 can hold.
    if target.integer_bias and scale_dtype in (None, np.float32):
        weights, biases = _solve_biases(corrected, weights, together.values(), activations, kept or {})
    else:
        biases = []
    return SolvedWeights(graph=corrected, weights=weights, biases=biases, corrections=corrections)


def _solve_weight(
    graph: Graph,
    members: list[PlacedWeight],
    target: Target,
    scale_dtype: np.dtype | None,
    protected: Protected | None,
) -> tuple[WeightPlan, dict[str, NDArray[np.float64]]]:
    """The plan of a weight that these node inputs read alike, and what their biases take up."""
    name, spec, settings = members[0].site.name, members[0].spec, members[0].settings
    w = graph.array(name)
    if target.whole_blocks:
        _check_blocks(name, w.shape, spec)
    dtype = float_dtype(graph, name, scale_dtype)
    linears = [] if protected is None else [protected.linears.get(p.site.node) for p in members]
    whole = [linear for linear in linears if linear is not None]
    codes = None
    if settings.weight_method in _ALONE or protected is None or not _tells(protected, whole, members):
        qparams = _weight_qparams(name, w, spec, dtype, _ALONE.get(settings.weight_method, "mse"))
    else:
        layer = layer_of(
            graph,
            protected.rescaled,
            whole[0],
            spec,
            protected.evidence.needed_grams(settings.weight_method),
            others=whole[1:],
        )
        rounded = round_weight(
            replace(layer, w=w),
            settings.weight_method,
            correct_bias=settings.correct_bias,
            scale_dtype=dtype,
            xp=protected.evidence.xp,
        )
        qparams = rounded.qtensor.qparams
        # What goes to its nearest code is made of the weight whenever it is needed.
        codes = rounded.qtensor.qvalue if settings.weight_method == "gptq" else None
    plan = WeightPlan(
        name=name,
        spec=spec,
        qparams=qparams,
        readers=tuple((p.site.node, p.site.index) for p in members),
        codes=codes,
    )
    changes = {}
    if settings.correct_bias and protected is not None:
        values = dequantize(plan.quantize(w))
        for linear in whole:
            mean = protected.mean(linear)
            if mean is not None and can_add_to_bias(graph, linear.node):
                changes[linear.node] = bias_correction(w, values, mean, layout_of(linear), name=name)
    return plan, changes


def _tells(protected: Protected, linears: list[Linear], members: list[PlacedWeight]) -> bool:
    """Whether there are Gram matrices to round by.

    A stack of weights, a look-up table or a ConvTranspose has none, and that of NaN, or of no data, says nothing.
    """
    if not linears or len(linears) < len(members):
        return False
    protected.evidence.needed_grams(members[0].settings.weight_method)
    return all(protected.evidence.tells(linear) for linear in linears)


def _solve_biases(
    graph: Graph,
    weights: list[WeightPlan],
    together: Iterable[list[PlacedWeight]],
    activations: Mapping[str, ActivationPlan],
    kept: Mapping[str, Scale],
) -> tuple[list[WeightPlan], list[BiasPlan]]:
    """Biases as int32, and the weights with scales wide enough for them."""
    scales = {reader: a for a in activations.values() for reader in a.readers}
    everywhere = {a.name: a for a in activations.values() if not a.readers}
    solved: list[WeightPlan] = []
    biases: list[BiasPlan] = []
    for plan, members in zip(weights, together, strict=True):
        with_bias: list[tuple[Site, np.float32]] = []
        for placed in members if _can_add_bias(plan.spec) else ():
            site = placed.site
            if placed.settings.integer_activations and _bias(graph.node(site.node)) is not None:
                other = graph.node(site.node).inputs[1 - site.index]
                assert other is not None
                planned = scales.get((site.node, 1 - site.index)) or everywhere.get(str(other.name))
                # An input that the model itself quantizes is in no plan.
                held = kept.get(str(other.name)) if planned is None else (planned.spec, planned.static)
                if held is not None and (held[0].format.kind, held[0].format.bits) == ("integer", 8):
                    with_bias.append((site, np.float32(held[1].scale)))
        qparams = plan.qparams
        for site, input_scale in with_bias:
            qparams = _wide_enough(graph, site, qparams, input_scale)
        solved.append(_with_qparams(graph, plan, qparams))
        for site, input_scale in with_bias:
            biases.append(_solve_bias(graph, site, qparams, input_scale))
    return solved, biases


def _with_qparams(graph: Graph, plan: WeightPlan, qparams: QParams) -> WeightPlan:
    """The plan with other scales; chosen codes of channels whose scale changed are chosen anew, as the nearest."""
    if plan.codes is None or np.array_equal(plan.qparams.scale, qparams.scale):
        return replace(plan, qparams=qparams)
    axis = plan.spec.axis or 0
    shape = [1] * plan.codes.ndim
    shape[axis] = -1
    nearest = quantize(graph.array(plan.name), qparams, plan.spec).qvalue
    changed = (plan.qparams.scale != qparams.scale).reshape(shape)
    return replace(plan, qparams=qparams, codes=np.where(changed, nearest, plan.codes))


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
    if qparams.scale.ndim == 0:
        least = least.max(initial=0.0)
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


def float_dtype(graph: Graph, name: str, scale_dtype: np.dtype | None) -> np.dtype:
    """Return the float type in which a tensor's scale is stored: its own, unless float32 is cast to another one."""
    dtype = graph.values[name].dtype
    own = np.dtype(np.float32) if dtype is None else np.dtype(dtype.numpy())
    return scale_dtype if scale_dtype is not None and own == np.float32 else own

"""From the range of a tensor to the scale and zero point that hold it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantkit.errors import SpecError
from quantkit.formats.format import E8M0
from quantkit.formats.layout import scale_shape
from quantkit.formats.scales import (
    SMALLEST_SCALE,
    block_scales,
    float_scales,
    global_scale_of,
    power_of_two_scale,
)
from quantkit.formats.spec import QuantSpec


@dataclass(frozen=True)
class Range:
    """The real values that a quantization must be able to hold: lo ≤ x ≤ hi.

    `lo` and `hi` are float64, of shape () for one range per tensor, (channels,) per channel, or of the scales' own
    shape in blocks.
    """

    lo: NDArray[np.float64]
    hi: NDArray[np.float64]

    def __init__(self, lo: ArrayLike, hi: ArrayLike) -> None:
        low, high = np.asarray(lo, np.float64), np.asarray(hi, np.float64)
        if low.shape != high.shape:
            raise SpecError(f"range: lo has shape {low.shape}, hi {high.shape}; give both the same shape.")
        if not (np.all(np.isfinite(low)) and np.all(np.isfinite(high)) and np.all(low <= high)):
            raise SpecError(f"range: lo {low} and hi {high} must be finite with lo ≤ hi.")
        object.__setattr__(self, "lo", low)
        object.__setattr__(self, "hi", high)

    @property
    def amax(self) -> NDArray[np.float64]:
        """The absolute maximum, max(|lo|, |hi|), of the range's own shape."""
        return np.maximum(np.abs(self.lo), np.abs(self.hi))


@dataclass(frozen=True)
class QParams:
    """What turns codes into real numbers: x ≈ (q − zero_point) · scale.

    `scale` is float32 of shape (), (channels,) or, in blocks, the tensor's shape with the blocked axis shortened;
    `zero_point` has the same shape in the format's dtype, or is None where the format is a float.
    `global_scale`, float32 of shape (), multiplies scales that are themselves stored in few bits.
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[np.generic] | None = None
    global_scale: NDArray[np.float32] | None = None

    @property
    def effective_scale(self) -> NDArray[np.float32]:
        """scale · global_scale, rounded to float32 before any code meets it, as DequantizeLinear of the scales does."""
        return self.scale if self.global_scale is None else self.scale * self.global_scale


def qparams_from_range(
    range_: Range,
    spec: QuantSpec,
    *,
    scale_dtype: np.dtype | None = None,
    global_scale: NDArray[np.float32] | None = None,
) -> QParams:
    """Return the scale and zero point with which `spec` covers `range_`.

    Symmetric: scale = amax / symmetric_max (127 for 8-bit integers, 448 for E4M3), zero point on the middle code.
    Asymmetric: the range is widened to hold zero exactly; scale = (hi − lo) / (max − min),
    zero_point = round(min − lo / scale). A range that is zero altogether has the scale 1. Scales in few bits are
    those of `quantkit.formats.scales`.

    Args:
        range_: the values to hold, of the shape of the scales.
        spec: the format and its symmetry.
        scale_dtype: the float type the scale will be stored in, float32 unless given. The scale is rounded to it
            upward where rounding down would clip by more than the rounding of a code. Without meaning where
            `spec.scale_format` is set.
        global_scale: the one to use where `spec` has one; that of `range_` unless given.

    Raises:
        SpecError: the scale cannot be held by `scale_dtype`.
    """
    fmt = spec.format
    if spec.scale_format is not None:
        amax = range_.amax
        if spec.scale_format == E8M0:
            found = QParams(power_of_two_scale(amax, fmt, spec.scale_rule))
        else:
            shared = global_scale_of(amax, spec) if global_scale is None else global_scale
            found = QParams(block_scales(amax, shared, spec), None, shared)
        zero = None if fmt.kind == "float" else np.full(found.scale.shape, fmt.middle, fmt.dtype)
        return QParams(found.scale, zero, found.global_scale)
    if spec.symmetric:
        width, steps = range_.amax, fmt.symmetric_max
    else:
        lo, hi = np.minimum(range_.lo, 0.0), np.maximum(range_.hi, 0.0)
        width, steps = hi - lo, fmt.max - fmt.min
    ratio = np.where(width == 0, 1.0, np.maximum(width / steps, SMALLEST_SCALE))
    scale = float_scales(ratio, scale_dtype or np.dtype(np.float32), steps)
    if fmt.kind == "float":
        return QParams(scale)
    if spec.symmetric:
        return QParams(scale, np.full(scale.shape, fmt.middle, fmt.dtype))
    zero = np.clip(np.rint(fmt.min - lo / scale.astype(np.float64)), fmt.min, fmt.max)
    return QParams(scale, zero.astype(fmt.dtype))


def range_of(x: NDArray[np.floating], spec: QuantSpec) -> Range:
    """Return the least and greatest value among the elements that share a scale, of `scale_shape(x.shape, spec)`.

    Raises:
        SpecError: `x` is empty or not finite, or has no such axis.
    """
    shape = scale_shape(x.shape, spec)
    if x.size == 0:
        raise SpecError(f"range: a tensor of shape {x.shape} has no values; leave it in float.")
    ends = []
    for least in (np.minimum, np.maximum):
        if spec.block_shape is not None:
            found = x
            for axis, size in zip((-2, -1), spec.block_shape, strict=True):
                found = least.reduceat(found, np.arange(0, x.shape[axis], size), axis=axis)
        elif spec.dynamic == "token":
            found = least.reduce(x, axis=-1, keepdims=True)
        elif spec.axis is None:
            found = least.reduce(x, axis=None)
        elif spec.block_size is not None:
            starts = np.arange(0, x.shape[spec.axis], spec.block_size)
            found = least.reduceat(x, starts, axis=spec.axis)
        else:
            others = tuple(i for i in range(x.ndim) if i != spec.axis % x.ndim)
            found = least.reduce(x, axis=others)
        ends.append(np.asarray(found).reshape(shape))
    return Range(*ends)


def dynamic_qparams(
    x: NDArray[np.floating], spec: QuantSpec, *, global_scale: NDArray[np.float32] | None = None
) -> QParams:
    """Return the scales that a runtime computes from `x` itself, where `spec` is dynamic.

    Args:
        x: one tensor as it is met while the model runs.
        spec: a dynamic one.
        global_scale: that of scales in few bits, which stays fixed while the model runs.

    Raises:
        SpecError: `x` is empty or not finite, or has no such axis.
    """
    return qparams_from_range(range_of(x, spec), spec, global_scale=global_scale)

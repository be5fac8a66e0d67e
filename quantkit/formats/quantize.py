"""The three pure steps: range → scale and zero point → codes, and the way back."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantkit.errors import SpecError
from quantkit.formats.spec import QuantSpec

# GPUs flush subnormal numbers to zero, and a zero scale divides by zero.
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Range:
    """The real values that a quantization must be able to hold: lo ≤ x ≤ hi.

    `lo` and `hi` are float64, of shape () for one range per tensor, (channels,) per channel.
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
    `global_scale` multiplies scales that are themselves stored in few bits.
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[np.generic] | None = None
    global_scale: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class QTensor:
    """Codes and what they mean."""

    qvalue: NDArray[np.generic]
    qparams: QParams
    spec: QuantSpec


def qparams_from_range(range_: Range, spec: QuantSpec, *, scale_dtype: np.dtype | None = None) -> QParams:
    """Return the scale and zero point with which `spec` covers `range_`.

    Symmetric: scale = amax / symmetric_max (127 for 8-bit integers, 448 for E4M3), zero point on the middle code.
    Asymmetric: the range is widened to hold zero exactly; scale = (hi − lo) / (max − min),
    zero_point = round(min − lo / scale). A range that is zero altogether has the scale 1.

    Args:
        range_: the values to hold.
        spec: the format and its symmetry.
        scale_dtype: the float type the scale will be stored in, float32 unless given. The scale is rounded to it
            upward where rounding down would clip by more than the rounding of a code.

    Raises:
        SpecError: the scale cannot be held by `scale_dtype`.
    """
    fmt = spec.format
    if spec.symmetric:
        width, steps = range_.amax, fmt.symmetric_max
    else:
        lo, hi = np.minimum(range_.lo, 0.0), np.maximum(range_.hi, 0.0)
        width, steps = hi - lo, fmt.max - fmt.min
    ratio = np.where(width == 0, 1.0, np.maximum(width / steps, SMALLEST_SCALE))
    scale = _stored_scale(ratio, scale_dtype or np.dtype(np.float32), steps)
    if fmt.kind == "float":
        return QParams(scale)
    if spec.symmetric:
        return QParams(scale, np.full(scale.shape, fmt.middle, fmt.dtype))
    zero = np.clip(np.rint(fmt.min - lo / scale.astype(np.float64)), fmt.min, fmt.max)
    return QParams(scale, zero.astype(fmt.dtype))


def _stored_scale(ratio: NDArray[np.float64], dtype: np.dtype, steps: float) -> NDArray[np.float32]:
    """The ratio as `dtype` holds it, such that `steps` of it fall short of the range by half a step at most."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = ratio.astype(dtype)
        stored = rounded.astype(np.float32)
        short = (ratio - stored) * steps > stored / 2
        if np.any(short & (stored > 0)):
            above = np.nextafter(rounded, dtype.type(np.inf)).astype(np.float32)
            stored = np.where(short & (stored > 0), above, stored)
    if not np.all(np.isfinite(stored)) or not np.all(stored > 0):
        raise SpecError(
            f"scale: {ratio.min():.3g} … {ratio.max():.3g} does not fit {dtype.name}; keep this tensor in float."
        )
    return stored


def quantize(x: NDArray[np.floating], qparams: QParams, spec: QuantSpec) -> QTensor:
    """Return the codes nearest to `x`.

    q = clip(round_half_even(x / scale) + zero_point, min, max), in float32 as ONNX's QuantizeLinear computes it.
    Float formats are clipped first: a cast beyond their maximum would give NaN.

    Raises:
        SpecError: `x` does not fit the scales' shape.
    """
    fmt = spec.format
    scale = _spread(qparams.scale, x.shape, spec)
    with np.errstate(over="ignore"):
        ratio = np.asarray(x, np.float32) / scale
    if fmt.kind == "float":
        return QTensor(np.clip(ratio, fmt.min, fmt.max).astype(fmt.dtype), qparams, spec)
    if qparams.zero_point is None:
        raise SpecError(f"{fmt.name}: an integer format needs a zero point; give 0 where it is symmetric.")
    zero = _spread(qparams.zero_point.astype(np.float32), x.shape, spec)
    codes = np.clip(np.rint(ratio) + zero, fmt.min, fmt.max)
    return QTensor(codes.astype(fmt.dtype), qparams, spec)


def dequantize(qt: QTensor) -> NDArray[np.float32]:
    """Return the float32 values that `qt` stands for.

    x[i] = (qvalue[i] − zero_point) · scale, with scale repeated block_size times along axis.
    """
    shape = qt.qvalue.shape
    values = qt.qvalue.astype(np.float32)
    if qt.qparams.zero_point is not None:
        values = values - _spread(qt.qparams.zero_point.astype(np.float32), shape, qt.spec)
    scaled: NDArray[np.float32] = values * _spread(qt.qparams.scale, shape, qt.spec)
    if qt.qparams.global_scale is not None:
        scaled = scaled * qt.qparams.global_scale
    return scaled


def fake_quantize(x: NDArray[np.floating], qparams: QParams, spec: QuantSpec) -> NDArray[np.float32]:
    """Return `x` as it is after quantize and dequantize, float32."""
    return dequantize(quantize(x, qparams, spec))


def _spread(values: NDArray[np.float32], shape: tuple[int, ...], spec: QuantSpec) -> NDArray[np.float32]:
    """Return `values` so shaped that it broadcasts against a tensor of `shape`."""
    if spec.axis is None:
        if values.ndim != 0:
            raise SpecError(f"scale: shape {values.shape} for one scale per tensor; give a scalar.")
        return values
    axis = spec.axis % len(shape) if shape else -1
    if spec.block_size is not None:
        blocks = -(-shape[axis] // spec.block_size)
        if values.shape != (*shape[:axis], blocks, *shape[axis + 1 :]):
            raise SpecError(
                f"scale: shape {values.shape} for a tensor of {shape} with blocks of {spec.block_size} on axis {axis}; "
                f"give {(*shape[:axis], blocks, *shape[axis + 1 :])}."
            )
        return np.repeat(values, spec.block_size, axis=axis).take(np.arange(shape[axis]), axis=axis)
    if axis < 0 or values.shape != (shape[axis],):
        raise SpecError(
            f"scale: shape {values.shape} for a tensor of {shape} with a scale per index of axis {spec.axis}; "
            "give one scale per index."
        )
    return values.reshape([-1 if i == axis else 1 for i in range(len(shape))])

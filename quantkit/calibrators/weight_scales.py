"""Scales of weights: chosen by the error that rounding with them leaves, scale by scale."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from quantkit.calibrators.weights import WeightMethod, check_weight
from quantkit.errors import SpecError
from quantkit.formats import (
    E8M0,
    Format,
    QParams,
    QuantSpec,
    Range,
    qparams_from_range,
    range_of,
    scale_shape,
)
from quantkit.formats.layout import slabs, to_groups
from quantkit.formats.rounding import nearest_values
from quantkit.formats.scales import SMALLEST_SCALE, global_scale_of

# Elements worked on at a time: with what is computed of them they stay in a core's cache.
_CHUNK = 1 << 15

# Factors on the scale that holds amax: first over the octaves where an optimum can lie, then around the best of
# those. Small blocks often gain from a wider scale too, one whose steps meet their few large values; and E2M1 is
# finer where amax falls on 4 instead of 6. Against all scales 1/400 octave apart these lose 0.1 % of the error in
# blocks of 16, and less in larger ones. Floats have the same precision in every octave: one is enough.
_INTEGER_FACTORS = np.exp2(np.arange(8, -33, -1) / 16)
_FLOAT_FACTORS = np.exp2(np.arange(9, -10, -1) / 16)
_NEAR_FACTORS = np.exp2(np.arange(-5, 6) / 96)
# Codes of an 8-bit float scale, counted from the one that holds amax, and exponents of E8M0 alike.
_NEAR_CODES = (1, 2, 3, 4, 5, -1, -2, -3, -4)
_NEAR_EXPONENTS = (1, -1)


def weight_qparams(
    w: NDArray[np.floating],
    spec: QuantSpec,
    *,
    method: WeightMethod = "mse",
    importance: NDArray[np.floating] | None = None,
    signed_scales: bool = False,
    scale_dtype: np.dtype | None = None,
    name: str = "weight",
) -> QParams:
    """Return the scales, and zero points where they are free, with which `spec` rounds a weight.

    "mse" minimises Σ h (w − dequantize(quantize(w)))² for every scale on its own, h = `importance`:

    - free scales: around the one that holds amax, from half an octave above to two octaves below, 1/16 octave apart,
      then 1/96 octave apart around the best. Zero points, where free, follow the range, then move by one either way.
    - 8-bit float scales (NVFP4): the codes near that of amax; the global scale stays that of the largest block.
    - E8M0 scales (MX): the power of two that `spec.scale_rule` gives, the one above and the one below.

    "amax" holds every value, and follows `spec.scale_rule` for E8M0. Symmetric integers of ≤ 4 bits have one code
    more below zero than above, which is much of their range: there the scale is amax / 7 or amax / 8 (for 4 bits),
    whichever loses less.

    Args:
        w: the weight, any float type, finite.
        spec: its format and how its scales lie.
        method: "mse" or "amax".
        importance: what an error counts for, ≥ 0, broadcast against `w`: of a weight [K, N] the diagonal of the
            Gram matrix as (K, 1). None where all count the same. Ranges are those of what counts at all. "amax" uses
            it where it chooses by error.
        signed_scales: let the scales of symmetric integers of ≤ 4 bits be negative, so that the additional code
            serves the side that needs it: "amax" is then (value of largest magnitude) / −8. MatMulNBits and
            compressed-tensors read such scales, TensorRT refuses them.
        scale_dtype: the float type free scales will be stored in, float32 unless given.
        name: what errors call the weight.

    Raises:
        SpecError: `w` is empty or not finite, has no such axis, or its scales do not fit `scale_dtype`.
        UnknownNameError: `method` is neither.
    """
    check_weight(w, spec, method, name)
    if importance is not None:
        _check_importance(importance, w, name)
    range_, counted = _ranges(w, importance, spec)
    shared = global_scale_of(counted.amax, spec) if spec.has_global_scale else None
    covering = qparams_from_range(range_, spec, scale_dtype=scale_dtype, global_scale=shared)
    additional_code = _has_additional_code(spec) and spec.scale_format is None
    signed = signed_scales and additional_code
    if method == "amax" and signed:
        side = np.where(-range_.lo >= range_.hi, 1, -1)
        return replace(covering, scale=_on_least_code(covering.scale, side, spec, scale_dtype))
    if method == "amax" and not additional_code:
        return covering
    unit = np.float32(1 if covering.global_scale is None else covering.global_scale)
    scale = covering.scale.reshape(-1).copy()
    zero = None if covering.zero_point is None else covering.zero_point.reshape(-1).copy()
    for where, x, h in _chunks(w, importance, spec):
        free_zero = None if spec.symmetric or zero is None else zero[where].astype(np.float32)
        best = _Best(x, h, spec, scale[where], free_zero, unit)
        if method == "amax":
            best.offer(_on_least_code(best.scale, 1, spec, scale_dtype))
        elif spec.scale_format is None:
            _search_free(best, signed=signed, dtype=scale_dtype)
        elif spec.scale_format == E8M0:
            _offer_exponents(best)
        else:
            _offer_codes(best, spec.scale_format)
        scale[where] = best.scale
        if zero is not None and best.zero is not None:
            zero[where] = best.zero.astype(zero.dtype)
    shape = scale_shape(w.shape, spec)
    return QParams(scale.reshape(shape), None if zero is None else zero.reshape(shape), covering.global_scale)


def _check_importance(importance: NDArray[np.floating], w: NDArray[np.floating], name: str) -> None:
    try:
        fits = np.broadcast_shapes(importance.shape, w.shape) == w.shape
    except ValueError:
        fits = False
    if not fits:
        raise SpecError(
            f"{name}: importance of shape {importance.shape} does not broadcast against {w.shape}; "
            "give one value for every index of the contraction axis, with 1 in place of the other axes."
        )
    if not (np.isfinite(importance).all() and (importance >= 0).all()):
        raise SpecError(f"{name}: importance that is negative, NaN or infinite; give the mean of squares.")


def _ranges(
    w: NDArray[np.floating], importance: NDArray[np.floating] | None, spec: QuantSpec
) -> tuple[Range, Range]:
    """The range of every group, and that of what counts for something in it.

    They are the same but for groups in which nothing counts: inputs that are always zero.
    """
    whole = range_of(w, spec)
    if importance is None or importance.all() or not importance.any():
        return whole, whole
    counted = range_of(np.where(importance > 0, w, np.zeros((), w.dtype)), spec)
    dead = counted.amax == 0
    return Range(np.where(dead, whole.lo, counted.lo), np.where(dead, whole.hi, counted.hi)), counted


def _chunks(
    w: NDArray[np.floating], importance: NDArray[np.floating] | None, spec: QuantSpec
) -> Iterator[tuple[slice, NDArray[np.float32], NDArray[np.float32] | None]]:
    """Yield the weight in pieces of whole groups: which scales, their elements in columns, what those count for."""
    whole = None if importance is None else np.broadcast_to(importance, w.shape)
    # A piece of a tensor with one scale, or with scales that run across its rows, is the whole of it.
    shape = scale_shape(w.shape, spec)
    cut = len(shape) == w.ndim or (len(shape) == 1 and spec.axis is not None and spec.axis % w.ndim == 0)
    at = 0
    for rows in (r for r, _ in slabs(w.shape, spec)) if cut else (...,):
        x = to_groups(np.asarray(w[rows], np.float32), spec)
        h = None if whole is None else to_groups(np.asarray(whole[rows], np.float32), spec)
        width = max(_CHUNK // x.shape[0], 1)
        for left in range(0, x.shape[1], width):
            columns = slice(left, min(left + width, x.shape[1]))
            yield (
                slice(at + left, at + columns.stop),
                np.ascontiguousarray(x[:, columns]),
                None if h is None else np.ascontiguousarray(h[:, columns]),
            )
        at += x.shape[1]


@dataclass
class _Best:
    """The scales and zero points of least error among those offered so far, one for every column of `x`.

    Attributes:
        x: the weight, shape (elements, scales).
        h: what the elements count for, of that shape, or None.
        spec: how `x` is rounded.
        scale: the best, float32 of shape (scales,), in units of `unit`.
        zero: its zero point as float32, or None where that is not free.
        unit: the global scale.
    """

    x: NDArray[np.float32]
    h: NDArray[np.float32] | None
    spec: QuantSpec
    scale: NDArray[np.float32]
    zero: NDArray[np.float32] | None
    unit: np.float32

    def __post_init__(self) -> None:
        self._error = self._errors(self.scale, self.zero)

    def offer(self, scale: NDArray[np.float32], zero: NDArray[np.float32] | None = None) -> None:
        """Take these where they lose less; of equal ones the first offered stays."""
        tried = self.zero if zero is None else zero
        error = self._errors(scale, tried)
        better = error < self._error
        self._error = np.where(better, error, self._error)
        self.scale = np.where(better, scale, self.scale)
        if tried is not None and self.zero is not None:
            self.zero = np.where(better, tried, self.zero)

    def _errors(self, scale: NDArray[np.float32], zero: NDArray[np.float32] | None) -> NDArray[np.float64]:
        fmt, step = self.spec.format, scale * self.unit
        lost = self.x / step
        if fmt.kind == "float":
            lost = nearest_values(lost, fmt)
        else:
            offset = fmt.middle if zero is None else zero
            np.rint(lost, out=lost)
            np.clip(lost, fmt.min - offset, fmt.max - offset, out=lost)
        lost *= step
        lost -= self.x
        lost *= lost
        if self.h is not None:
            lost *= self.h
        # float64: float32 sums of a long channel stall.
        found: NDArray[np.float64] = lost.sum(axis=0, dtype=np.float64)
        return found


def _search_free(best: _Best, *, signed: bool, dtype: np.dtype | None) -> None:
    """Offer scales of any value."""
    covering, zero = best.scale, best.zero
    integer, bits = best.spec.format.kind == "integer", best.spec.format.bits
    for sign in (1, -1) if signed else (1,):
        if _has_additional_code(best.spec):
            best.offer(_on_least_code(covering, sign, best.spec, dtype))
        # Of four codes or eight one more on either side is a different range; of sixteen it hardly is.
        for shift in (0, -1, 1) if zero is not None and bits <= 3 else (0,):
            for factor in _INTEGER_FACTORS if integer else _FLOAT_FACTORS:
                scale = _stored(covering * np.float32(sign * factor), dtype, covering)
                best.offer(scale, _shifted(zero, shift, best.spec))
    around, zero = best.scale, best.zero
    for shift in (0,) if zero is None else (0, -1, 1):
        for factor in _NEAR_FACTORS:
            scale = _stored(around * np.float32(factor), dtype, around)
            best.offer(scale, _shifted(zero, shift, best.spec))


def _shifted(zero: NDArray[np.float32] | None, shift: int, spec: QuantSpec) -> NDArray[np.float32] | None:
    return None if zero is None else np.clip(zero + np.float32(shift), spec.format.min, spec.format.max)


def _on_least_code(
    covering: NDArray[np.float32], sign: NDArray[np.integer] | int, spec: QuantSpec, dtype: np.dtype | None
) -> NDArray[np.float32]:
    """The scale that puts amax, or −amax where `sign` is negative, on the least code, from that which covers it."""
    most = spec.format.symmetric_max
    return _stored(covering * np.float32(most / (most + 1)) * np.float32(sign), dtype, covering)


def _has_additional_code(spec: QuantSpec) -> bool:
    """Whether the code −2^(bits − 1) is used, of which a positive scale has no counterpart.

    In 8 bits it would be 1/128 of the range, and −128 · −128 overflows the sums of some integer kernels.
    """
    return spec.format.kind == "integer" and spec.symmetric and spec.format.bits <= 4


def _stored(
    scale: NDArray[np.float32], dtype: np.dtype | None, otherwise: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The scales as they will be stored, and others where they could not be."""
    with np.errstate(over="ignore", under="ignore"):
        held = scale if dtype is None else scale.astype(dtype).astype(np.float32)
    return np.where(np.isfinite(held) & (np.abs(held) >= SMALLEST_SCALE), held, otherwise)


def _offer_codes(best: _Best, held: Format) -> None:
    """Offer the codes of an 8-bit float scale that are near the best."""
    codes = held.codes().astype(np.float32)
    codes = codes[codes > 0]
    at = np.searchsorted(codes, best.scale)
    for step in _NEAR_CODES:
        best.offer(codes[np.clip(at + step, 0, codes.size - 1)])


def _offer_exponents(best: _Best) -> None:
    """Offer the powers of two beside the best."""
    rule = best.scale
    for step in _NEAR_EXPONENTS:
        best.offer(np.clip(np.ldexp(rule, step), np.float32(E8M0.min), np.float32(E8M0.max)))

"""Ranges of weights: they are known whole, so nothing has to be estimated from a histogram."""

from dataclasses import replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import SpecError, UnknownNameError
from quantkit.formats import QuantSpec, Range, fake_quantize, qparams_from_range

WeightMethod = Literal["amax", "mse"]

# Factors on a channel's range, widest first, so that a tie leaves it as it is; and how often they may be
# applied.
_FACTORS = np.linspace(1.0, 0.5, 26)
_OCTAVES = 8
# Elements worked on at a time: a group of channels and what is computed of it stay in a core's cache.
_CHUNK = 1 << 15


def weight_range(
    w: NDArray[np.floating], spec: QuantSpec, method: WeightMethod = "amax", *, name: str = "weight"
) -> Range:
    """Return the range of a weight for `spec`: shape (channels,) along `spec.axis`, or () where that is None.

    "amax" holds every value. "mse" shrinks the range of each channel, both ends by one factor, to the least
    Σ (w − dequantize(quantize(w)))², as `spec.format` rounds: in steps of 2 % down to half, and on from there
    for the channels that are best at half.

    Args:
        w: the weight, any float type, finite.
        spec: its format and axis; not in blocks, for which `weight_qparams` is.
        method: "amax" or "mse".
        name: what errors call the weight.

    Raises:
        SpecError: `w` is empty or not finite, has no such axis, or `spec` is in blocks.
        UnknownNameError: `method` is neither.
    """
    check_weight(w, spec, method, name)
    if spec.block_size is not None or spec.block_shape is not None:
        raise SpecError(f"{name}: {spec} is in blocks, a range is per tensor or channel; use weight_qparams.")
    rows = _rows(w, spec)
    lo, hi = rows.min(axis=1), rows.max(axis=1)
    if method == "mse":
        keep = _best_shrinks(rows, lo, hi, spec)
        lo, hi = lo * keep, hi * keep
    shape = () if spec.axis is None else lo.shape
    return Range(lo.reshape(shape), hi.reshape(shape))


def check_weight(w: NDArray[np.floating], spec: QuantSpec, method: str, name: str) -> None:
    """Raise unless `w` is what the solvers of weights take; see `weight_range`."""
    if method not in get_args(WeightMethod):
        raise UnknownNameError(
            f"{name}: no weight method {method}; choose one of {', '.join(get_args(WeightMethod))}."
        )
    if w.size == 0:
        raise SpecError(f"{name}: empty, of shape {w.shape}; leave it in float.")
    if spec.axis is not None and not -w.ndim <= spec.axis < w.ndim:
        raise SpecError(f"{name}: no axis {spec.axis} in shape {w.shape}; choose 0 to {w.ndim - 1}.")
    # The ends tell: NaN is neither least nor greatest without showing.
    if not (np.isfinite(w.min()) and np.isfinite(w.max())):
        raise SpecError(f"{name}: NaN or infinity in it; mend the model or keep it in float.")


def _rows(w: NDArray[np.floating], spec: QuantSpec) -> NDArray[np.float32]:
    """The weight with its channels in rows, shape (channels, values); one row where there is one scale."""
    values = np.asarray(w, np.float32)
    if spec.axis is None:
        return values.reshape(1, -1)
    return np.ascontiguousarray(np.moveaxis(values, spec.axis, 0)).reshape(w.shape[spec.axis], -1)


def _best_shrinks(
    rows: NDArray[np.float32], lo: NDArray[np.float32], hi: NDArray[np.float32], spec: QuantSpec
) -> NDArray[np.float64]:
    """The factor of least error for every row, shape (rows,)."""
    keep = np.ones(len(rows))
    searched = np.arange(len(rows))
    for _ in range(_OCTAVES):
        part, ends = rows[searched], (lo[searched], hi[searched])
        errors = [
            _row_errors(part, Range(*(end * keep[searched] * f for end in ends)), spec) for f in _FACTORS
        ]
        best = np.argmin(errors, axis=0)
        keep[searched] *= _FACTORS[best]
        searched = searched[best == len(_FACTORS) - 1]
        if searched.size == 0:
            break
    return keep


def _row_errors(rows: NDArray[np.float32], range_: Range, spec: QuantSpec) -> NDArray[np.float64]:
    """Σ (w − dequantize(quantize(w)))² of every row, shape (rows,)."""
    by_row = replace(spec, axis=0)
    errors = np.zeros(len(rows))
    height = max(_CHUNK // rows.shape[1], 1)
    for top in range(0, len(rows), height):
        group = slice(top, top + height)
        qparams = qparams_from_range(Range(range_.lo[group], range_.hi[group]), by_row)
        for left in range(0, rows.shape[1], _CHUNK):
            part = rows[group, left : left + _CHUNK]
            lost = part - fake_quantize(part, qparams, by_row)
            errors[group] += (lost * lost).sum(axis=1, dtype=np.float64)
    return errors

"""The range with the least expected squared quantization error."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantkit.calibrators.base import clipped, observed_range
from quantkit.formats import Format, QuantSpec, Range
from quantkit.statistics import Bins, FloatHistogram

# Candidates as multiples of a range's end: first of the widest range, then of the best so far.
_WHOLE = np.exp2(-np.arange(16 * 16 + 1) / 16)
_NEAR = np.exp2(np.arange(16, -17, -1) / 256)
# The same for ends that are searched one after the other.
_WHOLE_PAIR = np.exp2(-np.arange(16 * 8 + 1) / 8)
_WIDE_END = np.exp2(np.arange(8, -25, -1) / 4)
_NEAR_END = np.exp2(np.arange(8, -9, -1) / 32)
# Errors that differ by less than this fraction are equal; of equally good ranges the first, the widest, is
# taken.
_TIE = 1e-9


@dataclass(frozen=True, kw_only=True)
class MseCalibrator:
    """Minimises E[(x − dequantize(quantize(x)))²] over the threshold, or over both ends where they are free.

    The expectation is over the finest bins of the histogram, with values spread evenly inside a bin and zeros
    exact. Grids of up to 8 bits are read value by value (`GridError`). Grids of 16 bits are finer than the
    bins: there a value inside the range costs scale² / 12 (W. R. Bennett, Spectra of Quantized Signals, 1948).

    Candidates lie 1/16 of an octave apart over 16 octaves below amax, then 1/256 about the best. The ends
    of an asymmetric range start from the best pair [max(min, −t), min(max, t)] and are then moved in turn.

    The optimum is that of the tensor alone: a network may lose more by a few clipped outliers than it gains.
    """

    name: ClassVar[str] = "mse"

    def solve(self, histogram: FloatHistogram, spec: QuantSpec) -> Range:
        """Return the range of least error within the observed range; of equally good ones the widest.

        Raises:
            SpecError: no finite value was observed, or `spec` is not per tensor.
        """
        observed = observed_range(histogram, spec)
        if histogram.min == histogram.max:
            return observed
        fine = spec.format.kind == "integer" and spec.format.bits > 8
        if spec.symmetric:
            bins = _tightened(histogram.magnitude_bins(), histogram, 0.0, histogram.amax)
            threshold = _fine_threshold(bins, spec.format) if fine else _threshold(bins, spec.format)
            return clipped(observed, -threshold, threshold)
        bins = _tightened(histogram.bins(), histogram, min(histogram.min, 0.0), max(histogram.max, 0.0))
        return clipped(observed, *(_fine_ends(bins, spec.format) if fine else _ends(bins, spec.format)))


class GridError:
    """Σ (x − nearest value)² over binned x, for many grids of values at once.

    With v_0 < … < v_K the values of a grid, b_k midway between v_k and v_k+1, and G(b) = Σ_{x<b} (b − x):

        Σ error² = Σ (x − v_K)² − 2 Σ_k (v_k+1 − v_k) · G(b_k)

    by summing over the values in parts. So a grid costs one reading of G for each value, however many bins
    there are and however uneven the grid is. Inside a bin of evenly spread values G is a parabola.
    """

    def __init__(self, bins: Bins) -> None:
        counts, width, middle = bins.counts.astype(np.float64), np.diff(bins.edges), bins.centers
        self._count, self._sum = counts.sum(), (counts * middle).sum()
        self._squares = (counts * (middle**2 + width**2 / 12)).sum()
        below = np.concatenate([[0.0], np.cumsum(counts)])
        at_edges = np.concatenate([[0.0], np.cumsum((below[:-1] + below[1:]) / 2 * width)])
        # Row k + 1 serves bin k, the first and the last row what lies outside.
        self._edges, self._start = bins.edges, np.concatenate([bins.edges[:1], bins.edges])
        self._at, self._slope = np.concatenate([[0.0], at_edges]), np.concatenate([[0.0], below])
        bend = np.divide(counts, 2 * width, out=np.zeros_like(counts), where=width > 0)
        self._bend = np.concatenate([[0.0], bend, [0.0]])

    def __call__(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the summed squared error on each grid, (grids,); `values`, (grids, levels), ascend."""
        boundaries = (values[:, 1:] + values[:, :-1]) / 2
        row = np.searchsorted(self._edges, boundaries.ravel(), side="right").reshape(boundaries.shape)
        past = boundaries - self._start[row]
        hinge = self._at[row] + past * (self._slope[row] + past * self._bend[row])
        top = values[:, -1]
        from_top = self._squares - 2 * top * self._sum + top**2 * self._count
        error: NDArray[np.float64] = from_top - 2 * (np.diff(values, axis=1) * hinge).sum(axis=1)
        return error


def _tightened(bins: Bins, histogram: FloatHistogram, lo: float, hi: float) -> Bins:
    """The bins without the zeros, which every grid holds exactly, and cut off at [lo, hi] ∋ 0.

    A bin that lo or hi is the inner edge of becomes a point: what a ReLU6 heaps up at 6.
    """
    counts = bins.counts.copy()
    counts[np.searchsorted(bins.edges, 0.0)] -= histogram.zero_count
    kept = np.flatnonzero((bins.edges[1:] >= lo) & (bins.edges[:-1] <= hi))
    first, last = kept[0], kept[-1]
    return Bins(np.clip(bins.edges[first : last + 2], lo, hi), counts[first : last + 1])


def _threshold(bins: Bins, fmt: Format) -> float:
    error, grid = GridError(bins), fmt.magnitudes() / fmt.symmetric_max
    amax = best = float(bins.edges[-1])
    for factors in (_WHOLE, _NEAR):
        candidates = np.minimum(best * factors, amax)
        best = float(candidates[_first_least(error(np.multiply.outer(candidates, grid)))])
    return best


def _ends(bins: Bins, fmt: Format) -> tuple[float, float]:
    error, codes = GridError(bins), np.arange(fmt.min, fmt.max + 1)
    least, most = float(bins.edges[0]), float(bins.edges[-1])

    def best(lows: ArrayLike, highs: ArrayLike) -> tuple[float, float]:
        lo, hi = np.broadcast_arrays(np.maximum(lows, least), np.minimum(highs, most))
        scale = (hi - lo) / (fmt.max - fmt.min)
        zero_point = np.rint(fmt.min - lo / scale)
        i = _first_least(error((codes - zero_point[:, None]) * scale[:, None]))
        return float(lo[i]), float(hi[i])

    both = max(-least, most) * _WHOLE_PAIR
    lo, hi = best(-both, both)
    for factors in (_WIDE_END, _NEAR_END, _NEAR_END):
        lo, hi = best(lo, hi * factors)
        lo, hi = best(lo * factors, hi)
    return lo, hi


def _fine_threshold(bins: Bins, fmt: Format) -> float:
    """The bin edge t of least Σ_{x>t} (x − t)² + (t / symmetric_max)² / 12 · #{x ≤ t}."""
    clipping, outside = _clipping(bins)
    inside = bins.counts.sum() - outside
    error = clipping + (bins.edges / fmt.symmetric_max) ** 2 / 12 * inside
    return float(bins.edges[::-1][_first_least(error[::-1])])


def _fine_ends(bins: Bins, fmt: Format) -> tuple[float, float]:
    """The pair of bin edges of least error, each moved in turn until both rest."""
    mirrored = Bins(-bins.edges[::-1], bins.counts[::-1])
    zero = int(np.searchsorted(bins.edges, 0.0))
    # Widest first: the ends of the range inward to zero.
    highs, lows = bins.edges[zero:][::-1], bins.edges[: zero + 1]
    above, beyond = (part[zero:][::-1] for part in _clipping(bins))
    below, under = (part[::-1][: zero + 1] for part in _clipping(mirrored))
    total, i, j = bins.counts.sum(), 0, 0
    steps = (fmt.max - fmt.min) ** 2 * 12
    for _ in range(8):
        error = above + below[j] + (highs - lows[j]) ** 2 / steps * (total - beyond - under[j])
        i = _first_least(error)
        error = above[i] + below + (highs[i] - lows) ** 2 / steps * (total - beyond[i] - under)
        if j == (j := _first_least(error)):
            break
    return float(lows[j]), float(highs[i])


def _clipping(bins: Bins) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Σ_{x>e} (x − e)² and #{x > e} for every edge e, both of shape (n + 1,)."""
    width, middle = np.diff(bins.edges), bins.centers
    outside, total, squares = (
        np.concatenate([np.cumsum((bins.counts * m)[::-1])[::-1], [0]])
        for m in (np.ones_like(bins.counts), middle, middle**2 + width**2 / 12)
    )
    return np.maximum(squares - 2 * bins.edges * total + bins.edges**2 * outside, 0), outside


def _first_least(error: NDArray[np.float64]) -> int:
    return int(np.flatnonzero(error <= error.min() * (1 + _TIE))[0])

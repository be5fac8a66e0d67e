"""The threshold that keeps the most information: least KL divergence, after TensorRT's entropy calibrator."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from quantkit.calibrators.base import clipped, observed_range
from quantkit.formats import Format, QuantSpec, Range
from quantkit.statistics import FloatHistogram

# Divergences that differ by less are equal: about what the sums lose in float64.
_ROUNDING = 1e-12
# For float formats, so are those up to this multiple of the least one: with nothing clipped, the divergence
# changes by 5 to 25 % (of heavy tails up to 80 %) as the level edges move against the bins within an octave.
_ALIGNMENT = 1.5
# Candidates times levels worked on at a time: the temporaries stay in a core's cache.
_CHUNK = 1 << 14


@dataclass(frozen=True, kw_only=True)
class EntropyCalibrator:
    """Minimises KL(P ‖ Q) over every threshold between the bins of |x| (NVIDIA GTC 2017, s7310).

    For a threshold after i bins with counts c, P is c[:i] with the clipped tail added to its last bin; Q is
    c[:i] without the tail, averaged over the non-empty bins of each level of the format and zero where c is
    zero. Both are normalised. The threshold is the outer edge of the slice, of equally good ones the largest.

    - Bins: all of |x| at one width, 2048 < n ≤ 4096 of them. Bin 0 takes the count of bin 1, as in
      pytorch-quantization: else the zeros that a ReLU leaves outweigh everything, and half the range is
      clipped.
    - Where the tail falls into an empty bin, P has mass where Q has none: KL is infinite and the threshold
      is out.
    - Levels: integers have 2^(bits−1) of one width, unsigned and asymmetric ones too. A one-sided uint8 has
      256, but at ten bins a level their KL is mostly noise: on x · Φ(x), x ~ N(0, 2²), it clips 4 dB away.
      With 16 bits there are more levels than bins: no bin is averaged with another, clipping can gain
      nothing, and the result is the observed range.
    - Float formats: the levels are the format's own magnitudes, with the threshold on the largest and edges
      midway between them. Levels of one width would clip what a float format holds with ease. What a float
      resolves hardly depends on the threshold, so one is taken only where it gains more than the place of
      the edges explains.

    KL is not the squared error: of heavy tails it clips more than is good for the error (`mse` does not).
    """

    name: ClassVar[str] = "entropy"

    def solve(self, histogram: FloatHistogram, spec: QuantSpec) -> Range:
        """Return [−t, t] within the observed range, for the threshold t of least divergence.

        Raises:
            SpecError: no finite value was observed, or `spec` is not per tensor.
        """
        observed = observed_range(histogram, spec)
        bins = histogram.linear_magnitudes()
        levels = _levels(spec.format)
        start = levels.size - 1
        if bins.counts.size <= start:
            return observed
        divergence = divergences(bins.counts, levels, _shift(spec.format))
        factor = 1.0 if spec.format.kind == "integer" else _ALIGNMENT
        best = np.flatnonzero(divergence <= divergence.min() * factor + _ROUNDING)[-1]
        threshold = bins.edges[start + best]
        return clipped(observed, -threshold, threshold)


def divergences(counts: NDArray[np.int64], levels: NDArray[np.float64], shift: float) -> NDArray[np.float64]:
    """Return KL(P ‖ Q) in nats of every threshold that leaves at least a bin for every level.

    With N the sum of all counts, S_i that of the slice and T_i that of the tail; C_L the count of level L,
    n_L its non-empty bins, so that Q = C_L / n_L in each:

        KL_i = [Σ P log P − Σ_L C_L log(C_L / n_L) − T_i log Q_last] / N + log(S_i / N)

    All sums over bins are differences of prefix sums, so a candidate costs O(levels).

    Args:
        counts: of |x|, in bins of one width from 0, shape (n,), n > levels.
        levels: the edges of the levels, from 0 to the threshold, in any unit; shape (levels + 1,).
        shift: a bin belongs to the level in which its point at this fraction of its width lies.

    Returns:
        Shape (n − levels + 1,): of slices of `levels`, `levels` + 1, … n bins; inf where P has mass and Q
        none.
    """
    p = counts.astype(np.float64)
    p[0] = p[1]
    sizes = np.arange(levels.size - 1, p.size + 1)
    p_log_p = _prefix(p * np.log(np.maximum(p, 1)))
    total, filled = _prefix(p), _prefix(p > 0)
    cross, last_mean = np.empty(sizes.size), np.empty(sizes.size)
    rows = max(_CHUNK // levels.size, 1)
    for at in range(0, sizes.size, rows):
        part = sizes[at : at + rows]
        # Multiplied before divided: an edge that falls on a bin's must not be moved by rounding.
        edges = np.ceil(np.multiply.outer(part, levels) / levels[-1] - shift).astype(np.int64)
        edges[:, 0], edges[:, -1] = 0, part
        in_level, bins_filled = _steps(total.take(edges)), _steps(filled.take(edges))
        # An empty level adds nothing: 0 · log 1.
        mean = in_level / np.maximum(bins_filled, 1, out=bins_filled)
        mean[in_level == 0] = 1
        last_mean[at : at + rows] = mean[:, -1]
        cross[at : at + rows] = np.einsum("ij,ij->i", in_level, np.log(mean, out=mean))
    kept, tail, last = total[sizes], total[-1] - total[sizes], p[sizes - 1]
    with_tail = last + tail
    own = p_log_p[sizes - 1] + with_tail * np.log(np.maximum(with_tail, 1))
    kl: NDArray[np.float64] = (own - cross - tail * np.log(last_mean)) / total[-1]
    kl += np.log(np.maximum(kept, 1) / total[-1])
    kl[(last == 0) & (tail > 0)] = np.inf
    return kl


def _prefix(x: NDArray[np.generic]) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(x, dtype=np.float64)])


def _steps(prefix: NDArray[np.float64]) -> NDArray[np.float64]:
    # Half the time of np.diff on rows this short.
    steps: NDArray[np.float64] = prefix[:, 1:] - prefix[:, :-1]
    return steps


def _levels(fmt: Format) -> NDArray[np.float64]:
    """The edges of the format's levels on |x|, from 0 to the threshold."""
    if fmt.kind == "integer":
        return np.arange(2.0 ** (fmt.bits - 1) + 1)
    values = fmt.magnitudes()
    return np.concatenate([[0.0], (values[1:] + values[:-1]) / 2, [fmt.max]])


def _shift(fmt: Format) -> float:
    """Integer levels take a bin by its lower edge, as published; float levels, cut midway, by its centre."""
    return 0.0 if fmt.kind == "integer" else 0.5

"""The range that holds a given percentage of the values observed."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from quantkit.calibrators.base import clipped, observed_range
from quantkit.errors import SpecError
from quantkit.formats import QuantSpec, Range
from quantkit.statistics import FloatHistogram


@dataclass(frozen=True, kw_only=True)
class PercentileCalibrator:
    """Clips what lies beyond a percentile.

    Every finite value counts once, zeros too: where nine values of ten are zero, as a ReLU may leave them,
    percentile 99.99 cuts 0.1 % of the others. Where it would cut all of the others, it cuts none.

    Attributes:
        percentile: the percentage of values that must be held, 0 < percentile ≤ 100. Symmetric and float
            formats cut 100 − percentile of |x|, asymmetric ones half of it at each end. The default cuts one
            value in 100,000; 99.99 is known to destroy transformers (BERT-large, onnxruntime issue 10571).
    """

    name: ClassVar[str] = "percentile"
    percentile: float = 99.999

    def __post_init__(self) -> None:
        if not isinstance(self.percentile, int | float) or not 0 < self.percentile <= 100:
            raise SpecError(
                f"calibration method percentile: percentile is {self.percentile}; give 0 < percentile ≤ 100."
            )

    def solve(self, histogram: FloatHistogram, spec: QuantSpec) -> Range:
        """Return the narrowest range between bin edges that holds the percentile, within the observed range.

        A bin that must be held in part is held whole, so a range is never too narrow, and too wide by less
        than one bin.

        Raises:
            SpecError: no finite value was observed, or `spec` is not per tensor.
        """
        observed = observed_range(histogram, spec)
        # Fraction of the text: in floats 1000 · (100 − 99.9) / 100 is less than 1.
        beyond = histogram.finite_count * (100 - Fraction(str(self.percentile))) / 100
        if spec.symmetric:
            magnitudes = histogram.magnitude_bins()
            last = _first_reaching(magnitudes.counts[::-1], math.floor(beyond))
            threshold = magnitudes.edges[::-1][last]
            return _unless_empty(clipped(observed, -threshold, threshold), observed)
        bins, per_side = histogram.bins(), math.floor(beyond / 2)
        lo = bins.edges[_first_reaching(bins.counts, per_side)]
        hi = bins.edges[::-1][_first_reaching(bins.counts[::-1], per_side)]
        return _unless_empty(clipped(observed, lo, hi), observed)


def _unless_empty(solved: Range, observed: Range) -> Range:
    """The range solved for, or the observed one when that holds nothing but zeros."""
    # The zeros' bin ends at the least float32.
    return solved if solved.amax > 2.0**-149 else observed


def _first_reaching(counts: NDArray[np.int64], beyond: int) -> int:
    """Index of the first bin that cannot be cut whole when at most `beyond` values may be."""
    return int(np.searchsorted(np.cumsum(counts), beyond, side="right"))

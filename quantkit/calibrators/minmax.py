"""The observed minimum and maximum: nothing is clipped."""

from dataclasses import dataclass
from typing import ClassVar

from quantkit.calibrators.base import observed_range
from quantkit.formats import QuantSpec, Range
from quantkit.statistics import FloatHistogram


@dataclass(frozen=True, kw_only=True)
class MinMaxCalibrator:
    """Holds every value that was observed."""

    name: ClassVar[str] = "minmax"

    def solve(self, histogram: FloatHistogram, spec: QuantSpec) -> Range:
        """Return [min, max], exact.

        Raises:
            SpecError: no finite value was observed, or `spec` is not per tensor.
        """
        return observed_range(histogram, spec)

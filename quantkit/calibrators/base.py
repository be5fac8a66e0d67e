"""What a calibrator is, how one is found by its name, and the two steps that all of them share."""

import inspect
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np

from quantkit.errors import SpecError
from quantkit.formats import QuantSpec, Range
from quantkit.plugins import Registry
from quantkit.statistics import FloatHistogram


@runtime_checkable
class Calibrator(Protocol):
    """Solves statistics into a range. Its options are the keyword arguments of its class."""

    @property
    def name(self) -> str:
        """The name it is registered under."""

    def solve(self, histogram: FloatHistogram, spec: QuantSpec) -> Range:
        """Return the range that a tensor with these statistics must hold under `spec`; per tensor, shape ().

        The range lies within the observed minimum and maximum. For symmetric and float formats its `amax` is
        the threshold that was solved for.

        Raises:
            SpecError: no finite value was observed, or `spec` is not per tensor.
        """


_REGISTRY: Registry[Callable[..., Calibrator]] = Registry(
    group="quantkit.calibrators",
    noun="calibration method",
    builtin={
        "entropy": "quantkit.calibrators.entropy:EntropyCalibrator",
        "minmax": "quantkit.calibrators.minmax:MinMaxCalibrator",
        "mse": "quantkit.calibrators.mse:MseCalibrator",
        "percentile": "quantkit.calibrators.percentile:PercentileCalibrator",
    },
)


def get_calibrator(name: str, **options: object) -> Calibrator:
    """Return the calibrator registered as `name`, made with `options`.

    Raises:
        UnknownNameError: nobody has registered the name; the message gives the nearest ones.
        SpecError: an option that the method does not have, or a value that it refuses.
    """
    factory = _REGISTRY.get(name)
    known = inspect.signature(factory).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        for option in options:
            if option not in known:
                has = f"its options are {', '.join(known)}" if known else "it has no options"
                raise SpecError(f"calibration method {name}: no option {option}; {has}.")
    return factory(**options)


def list_calibrators() -> dict[str, str]:
    """Return every registered method, with "" or the error that keeps its plug-in from loading."""
    return _REGISTRY.status()


def observed_range(histogram: FloatHistogram, spec: QuantSpec) -> Range:
    """Return [min, max] of the finite values; the door through which every calibrator's input comes.

    Raises:
        SpecError: no finite value was observed, or `spec` is not per tensor.
    """
    if spec.axis is not None:
        raise SpecError(f"{spec}: a histogram solves one range per tensor; use axis=None.")
    if histogram.finite_count == 0:
        raise SpecError(
            f"statistics: no finite value among {histogram.count} observed; "
            "calibrate with data that reaches this tensor, or leave it in float."
        )
    return Range(histogram.min, histogram.max)


def clipped(observed: Range, lo: float, hi: float) -> Range:
    """Return [lo, hi] drawn into the observed range.

    Of a threshold's [−t, t] the result keeps the `amax`, min(t, observed amax): one side reaches it.
    """
    ends = np.clip([lo, hi], observed.lo, observed.hi)
    return Range(ends[0], ends[1])

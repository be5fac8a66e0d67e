"""What a calibrator is, how one is found by its name, and the two steps that all of them share."""

import inspect
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np

from quantkit.errors import SpecError, UnknownNameError
from quantkit.formats import QuantSpec, Range
from quantkit.plugins import Registry, in_one_line
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


def _is_no_calibrator(loaded: object) -> str:
    if not callable(loaded):
        return f"is of type {type(loaded).__name__}, no Calibrator class"
    if isinstance(loaded, type) and not callable(getattr(loaded, "solve", None)):
        return "is no Calibrator class: it has no solve(histogram, spec)"
    try:
        inspect.signature(loaded)
    except (TypeError, ValueError):
        return "is no Calibrator class: its options cannot be read off it"
    return ""


_REGISTRY: Registry[Callable[..., Calibrator]] = Registry(
    group="quantkit.calibrators",
    noun="calibration method",
    builtin={
        "entropy": "quantkit.calibrators.entropy:EntropyCalibrator",
        "minmax": "quantkit.calibrators.minmax:MinMaxCalibrator",
        "mse": "quantkit.calibrators.mse:MseCalibrator",
        "percentile": "quantkit.calibrators.percentile:PercentileCalibrator",
    },
    check=_is_no_calibrator,
)


def get_calibrator(name: str, **options: object) -> Calibrator:
    """Return the calibrator registered as `name`, made with `options`.

    Raises:
        UnknownNameError: nobody has registered the name, and the message gives the nearest ones; or its plug-in makes
            no calibrator.
        SpecError: an option that the method does not have, or a value that it refuses.
    """
    factory = _REGISTRY.get(name)
    known = inspect.signature(factory).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        for option in options:
            if option not in known:
                has = f"its options are {', '.join(known)}" if known else "it has no options"
                raise SpecError(f"calibration method {name}: no option {option}; {has}.")
    try:
        made = factory(**options)
    except SpecError:
        raise
    except Exception as error:
        # A plug-in may raise whatever it likes.
        given = ", ".join(f"{option}={value!r}" for option, value in options.items()) or "no options"
        raise SpecError(
            f"calibration method {name}: cannot be made with {given} ({in_one_line(error)}); "
            "give other options, mend its package or choose another --method."
        ) from error
    if not isinstance(made, Calibrator):
        raise UnknownNameError(
            f"calibration method {name}: its plug-in makes {type(made).__name__}, no Calibrator with a name and "
            "solve(histogram, spec); mend or uninstall that package."
        )
    return made


def solve_range(calibrator: Calibrator, histogram: FloatHistogram, spec: QuantSpec, *, tensor: str) -> Range:
    """Return what the calibrator solves for a tensor; where a plug-in goes wrong, say which and on what.

    Raises:
        SpecError: it raises, or returns anything but one finite range.
    """
    where = f"calibration method {calibrator.name}, tensor {tensor}"
    mend = "mend its plug-in, or choose another --method."
    try:
        found = calibrator.solve(histogram, spec)
    except Exception as error:
        # A plug-in may raise whatever it likes.
        raise SpecError(f"{where}: solve raised {in_one_line(error)}; {mend}") from error
    if not isinstance(found, Range):
        raise SpecError(f"{where}: solve returned {type(found).__name__}, not a Range; {mend}")
    finite = bool(np.all(np.isfinite(found.lo)) and np.all(np.isfinite(found.hi)))
    if found.lo.shape != () or not finite or found.lo > found.hi:
        raise SpecError(
            f"{where}: solve returned a range from {found.lo} to {found.hi}, where one finite lo ≤ hi belongs; {mend}"
        )
    return found


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

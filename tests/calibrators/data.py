"""Data and formats that every calibrator is tried on."""

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf

from quantkit.formats import FP8_E4M3, FP8_E5M2, INT8, INT16, UINT8, UINT16, QuantSpec
from quantkit.statistics import FloatHistogram

SPECS = {
    str(spec): spec
    for spec in (
        *(QuantSpec(format=f) for f in (INT8, UINT8, INT16, UINT16, FP8_E4M3, FP8_E5M2)),
        *(QuantSpec(format=f, symmetric=False) for f in (INT8, UINT8, INT16, UINT16)),
    )
}


def _awkward() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(7)
    normal = rng.normal(size=5000)
    found = {
        "random": normal,
        "sparse": rng.choice([0.0, 0.03, 1.0, -17.0, 400.0], size=300),
        "positive": np.abs(normal) + 0.5,
        "negative": -np.abs(normal) * 1e-3,
        "relu": np.maximum(normal, 0),
        "constant": np.full(100, 3.3),
        "negative constant": np.full(100, -1e-4),
        "single value": np.array([0.7]),
        "all zeros": np.zeros(50),
        "negative zeros": np.array([-0.0, 1.0, -0.0, -2.0]),
        "two values": np.array([0.0, 6.0] * 20),
        "one outlier": np.append(normal, 1e6),
        "huge": normal * 1e37,
        "subnormal": normal * 1e-42,
        "with infinities": np.concatenate([normal, [np.inf, -np.inf, np.nan]]),
    }
    return {name: x.astype(np.float32) for name, x in found.items()}


AWKWARD = _awkward()


def histogram_of(x: NDArray[np.floating]) -> FloatHistogram:
    """The histogram of one array."""
    histogram = FloatHistogram()
    histogram.observe(x)
    return histogram


def distribution(name: str) -> NDArray[np.float32]:
    """400,000 draws of a distribution that published thresholds are known for."""
    rng, size = np.random.default_rng(0), 400_000
    match name:
        case "laplace":
            x = rng.laplace(size=size)
        case "relu":
            x = np.maximum(rng.normal(size=size), 0)
        case "gelu":
            normal = rng.normal(scale=2, size=size)
            x = normal * (1 + erf(normal / np.sqrt(2))) / 2
        case "student-t":
            x = rng.standard_t(3, size=size)
        case _:
            raise KeyError(name)
    return x.astype(np.float32)

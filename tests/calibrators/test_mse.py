import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.calibrators import get_calibrator
from quantkit.calibrators.mse import GridError
from quantkit.formats import (
    FP8_E4M3,
    FP8_E5M2,
    INT8,
    INT16,
    UINT8,
    UINT16,
    QuantSpec,
    Range,
    fake_quantize,
    qparams_from_range,
)
from quantkit.statistics import Bins
from tests.calibrators.data import AWKWARD, SPECS, distribution, histogram_of

EIGHT_BITS = [spec for spec in SPECS.values() if spec.format.bits == 8]


def squared_error(x, spec, range_):
    lost = x - fake_quantize(x, qparams_from_range(range_, spec), spec).astype(np.float64)
    return np.sum(lost**2)


def solve(x, spec):
    return get_calibrator("mse").solve(histogram_of(x), spec)


def least_error(x, spec, size=60):
    """The least error of a brute search over thresholds, or over a lattice of both ends."""
    most, least = max(float(x.max()), 0.0), min(float(x.min()), 0.0)
    ts = max(most, -least) * np.linspace(0.02, 1, size)
    pairs = {(max(-t, least), min(t, most)) for t in ts}
    if not spec.symmetric:
        pairs |= {(a * least, b * most) for a in np.linspace(0.1, 1, 12) for b in np.linspace(0.1, 1, 12)}
    return min(squared_error(x, spec, Range(lo, hi)) for lo, hi in pairs)


@given(
    values=st.lists(st.floats(-60, 60), min_size=2, max_size=12, unique=True).map(sorted),
    counts=st.lists(st.integers(0, 50), min_size=8, max_size=8),
)
def test_the_error_of_a_grid_is_that_of_values_spread_evenly_over_each_bin(values, counts):
    edges = np.array([-40.0, -13, -2, 0, 0.5, 3, 10, 11, 44])
    found = GridError(Bins(edges, np.array(counts)))(np.array([values]))[0]
    literal, fine = 0.0, 2000
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        x = low + (np.arange(fine) + 0.5) / fine * (high - low)
        nearest = np.abs(x[:, None] - np.array(values)).min(axis=1)
        literal += count * np.mean(nearest**2)
    # The literal mean over points loses about (width / points)².
    assert found == pytest.approx(literal, rel=1e-4, abs=1e-3)


def test_a_bin_of_no_width_is_a_point():
    bins = Bins(np.array([0.0, 6.0, 6.0]), np.array([0, 10]))
    assert GridError(bins)(np.array([[0.0, 5.0], [0.0, 6.0], [0.0, 7.0]])) == pytest.approx([10, 0, 10])


@pytest.mark.parametrize("name", ["random", "sparse", "positive", "negative", "relu", "one outlier", "huge"])
@pytest.mark.parametrize("spec", EIGHT_BITS, ids=str)
def test_no_brute_search_finds_a_better_range(spec, name):
    # In float64: squares of the huge ones leave float32.
    x = AWKWARD[name].astype(np.float64)
    # 2 % of the error is 0.09 dB; bins and the spacing of candidates cost less.
    assert squared_error(x, spec, solve(x, spec)) <= 1.02 * least_error(x, spec)


# Threshold of the best 8-bit symmetric range, and its SQNR in dB.
OPTIMUM = {"laplace": (9.8, 35.2), "relu": (4.0, 40.3), "gelu": (7.3, 38.0)}


@pytest.mark.parametrize("name", OPTIMUM)
def test_thresholds_are_the_published_optima(name):
    x, spec = distribution(name), QuantSpec(format=INT8)
    solved = solve(x, spec)
    threshold, sqnr_db = OPTIMUM[name]
    assert solved.amax == pytest.approx(threshold, rel=0.05)
    found_db = 10 * np.log10(np.sum(x.astype(np.float64) ** 2) / squared_error(x, spec, solved))
    assert found_db >= sqnr_db - 0.1


@pytest.mark.parametrize("spec", EIGHT_BITS, ids=str)
def test_it_never_loses_more_than_the_other_methods(spec):
    for name in ("laplace", "student-t"):
        x = distribution(name)
        histogram = histogram_of(x)
        errors = {
            method: squared_error(x, spec, get_calibrator(method).solve(histogram, spec))
            for method in ("mse", "minmax", "entropy", "percentile")
        }
        assert errors["mse"] <= 1.002 * min(errors.values())


def test_what_heaps_up_at_the_maximum_is_not_clipped():
    relu6 = np.clip(distribution("laplace") * 4, 0, 6)
    for fmt in (INT8, UINT8):
        assert solve(relu6, QuantSpec(format=fmt)).amax == 6
        assert solve(relu6, QuantSpec(format=UINT8, symmetric=False)).hi == 6


@pytest.mark.parametrize("fmt", [INT16, FP8_E4M3, FP8_E5M2], ids=lambda f: f.name)
def test_fine_and_float_grids_need_no_clipping_of_a_smooth_tail(fmt):
    x, spec = distribution("laplace"), QuantSpec(format=fmt)
    unclipped = squared_error(x, spec, Range(x.min(), x.max()))
    assert squared_error(x, spec, solve(x, spec)) == pytest.approx(unclipped, rel=0.02)


def test_sixteen_bits_clip_what_costs_more_than_it_brings():
    # Many small values pay for the scale of one large one: (amax − t)² + count · (t / 32767)² / 12 is least.
    body = np.random.default_rng(0).uniform(-200, 200, 200_000)
    histogram = histogram_of(body)
    # Seen many times over, as over a long calibration.
    for _ in range(16):
        histogram = histogram.merge(histogram)
    histogram = histogram.merge(histogram_of(np.array([1e5])))
    count = histogram.finite_count
    expected = 1e5 / (1 + count / (12 * 32767**2))
    solved = get_calibrator("mse").solve(histogram, QuantSpec(format=INT16))
    assert solved.amax == pytest.approx(expected, rel=1 / 1024)
    pair = get_calibrator("mse").solve(histogram, QuantSpec(format=UINT16, symmetric=False))
    expected_pair = 1e5 / (1 + count / (12 * 65535**2))
    assert pair.hi == pytest.approx(expected_pair, rel=1 / 512)
    assert pair.lo == pytest.approx(-200, rel=0.02)

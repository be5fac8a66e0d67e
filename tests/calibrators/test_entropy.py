import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.calibrators import get_calibrator
from quantkit.calibrators.entropy import divergences
from quantkit.formats import (
    FP8_E4M3,
    FP8_E5M2,
    INT8,
    INT16,
    UINT8,
    QuantSpec,
    fake_quantize,
    qparams_from_range,
)
from tests.calibrators.data import AWKWARD, distribution, histogram_of

EQUAL = 1e-12


def literal_divergence(counts, size, levels, shift=0.0):
    """KL(P ‖ Q) of the slice counts[:size], straight from the published description, one bin at a time."""
    bins = [float(c) for c in counts]
    bins[0] = bins[1]
    p = bins[:size]
    p[-1] += sum(bins[size:])
    members = {}
    for b in range(size):
        if bins[b] > 0:
            level = (
                int(np.searchsorted(np.asarray(levels) * size, (b + shift) * levels[-1], side="right")) - 1
            )
            members.setdefault(level, []).append(b)
    q = [0.0] * size
    for inside in members.values():
        for b in inside:
            q[b] = sum(bins[m] for m in inside) / len(inside)
    if sum(q) == 0:
        return np.inf
    p, q = np.array(p) / sum(p), np.array(q) / sum(q)
    if np.any((p > 0) & (q == 0)):
        return np.inf
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def even(levels):
    return np.arange(levels + 1.0)


def midpoints(fmt):
    values = fmt.magnitudes()
    return np.concatenate([[0], (values[:-1] + values[1:]) / 2, values[-1:]])


def last_of_the_least(divergence):
    return np.flatnonzero(divergence <= divergence.min() + EQUAL)[-1]


def counts_of(kind):
    rng = np.random.default_rng(3)
    counts = np.zeros(400, np.int64)
    match kind:
        case "random":
            counts[:] = rng.poisson(2e4 * np.exp(-np.arange(400) / 40))
            counts[-1] += 1
        case "sparse":
            counts[rng.choice(400, 25, replace=False)] = rng.integers(1, 1000, 25)
            counts[-1] = 3
        case "mostly zeros":
            counts[:] = rng.poisson(300 * np.exp(-(np.arange(400) ** 2) / 3e4))
            counts[0] = 10**7
        case "constant":
            counts[-1] = 1000
        case "single value":
            counts[-1] = 1
        case "uniform":
            counts[:] = 10
    return counts


KINDS = ["random", "sparse", "mostly zeros", "constant", "single value", "uniform"]


@pytest.mark.parametrize("levels", [16, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_every_candidate_agrees_with_the_literal_implementation(kind, levels):
    counts = counts_of(kind)
    found = divergences(counts, even(levels), 0.0)
    literal = np.array([literal_divergence(counts, i, even(levels)) for i in range(levels, counts.size + 1)])
    np.testing.assert_allclose(found, literal, rtol=0, atol=EQUAL)
    assert last_of_the_least(found) == last_of_the_least(literal)


@pytest.mark.parametrize("fmt", [FP8_E4M3, FP8_E5M2], ids=lambda f: f.name)
@pytest.mark.parametrize("kind", KINDS)
def test_every_candidate_of_a_float_grid_agrees_with_the_literal_implementation(kind, fmt):
    counts, levels = counts_of(kind), midpoints(fmt)
    found = divergences(counts, levels, 0.5)
    sizes = range(levels.size - 1, counts.size + 1, 7)
    literal = [literal_divergence(counts, i, levels, 0.5) for i in sizes]
    np.testing.assert_allclose(found[::7], literal, rtol=0, atol=EQUAL)


@given(
    counts=st.lists(st.just(0) | st.integers(0, 10**9), min_size=10, max_size=60), levels=st.integers(2, 9)
)
def test_any_histogram_agrees_with_the_literal_implementation(counts, levels):
    counts = np.array([*counts, 1])
    found = divergences(counts, even(levels), 0.0)
    literal = [literal_divergence(counts, i, even(levels)) for i in range(levels, counts.size + 1)]
    np.testing.assert_allclose(found, literal, rtol=0, atol=EQUAL)


@pytest.mark.parametrize("name", ["random", "sparse", "positive", "relu", "constant", "single value"])
def test_the_threshold_is_the_literal_optimum(name):
    x = AWKWARD[name]
    histogram = histogram_of(x)
    bins = histogram.linear_magnitudes()
    solved = get_calibrator("entropy").solve(histogram, QuantSpec(format=INT8)).amax
    # The literal loop takes a second for ten candidates of this many bins: the chosen one and its rivals.
    fast = divergences(bins.counts, even(128), 0.0)
    chosen = 128 + last_of_the_least(fast)
    rivals = {*np.linspace(128, bins.counts.size, 5).astype(int), *(np.argsort(fast)[:3] + 128)}
    assert solved == min(bins.edges[chosen], histogram.amax)
    least = literal_divergence(bins.counts, chosen, even(128))
    for rival in rivals:
        other = literal_divergence(bins.counts, rival, even(128))
        assert least < other + 2 * EQUAL
        assert rival <= chosen or other > least


# Threshold of pytorch-quantization, and the SQNR that is reached at least with 8 signed bits.
PUBLISHED = {"laplace": (11.0, 34.0), "relu": (4.35, 39.5), "gelu": (7.4, 37.5), "student-t": (19.7, 13.4)}


def sqnr_db(x, spec, range_):
    lost = x - fake_quantize(x, qparams_from_range(range_, spec), spec)
    return 10 * np.log10(np.sum(x.astype(np.float64) ** 2) / np.sum(lost.astype(np.float64) ** 2))


@pytest.mark.parametrize("name", PUBLISHED)
def test_thresholds_are_those_of_pytorch_quantization_or_wider(name):
    x, spec = distribution(name), QuantSpec(format=INT8)
    published, floor_db = PUBLISHED[name]
    solved = get_calibrator("entropy").solve(histogram_of(x), spec)
    assert solved.amax > 0.9 * published
    assert sqnr_db(x, spec, solved) >= floor_db


@pytest.mark.parametrize("fmt", [FP8_E4M3, FP8_E5M2], ids=lambda f: f.name)
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_float_format_loses_next_to_nothing_against_its_observed_range(name, fmt):
    x, spec = distribution(name), QuantSpec(format=fmt)
    histogram = histogram_of(x)
    unclipped = sqnr_db(x, spec, get_calibrator("minmax").solve(histogram, spec))
    assert sqnr_db(x, spec, get_calibrator("entropy").solve(histogram, spec)) > unclipped - 0.2


def test_zeros_do_not_move_the_threshold():
    x = distribution("laplace")
    calibrator, spec = get_calibrator("entropy"), QuantSpec(format=INT8)
    mostly_zero = np.concatenate([x, np.zeros(20 * x.size, np.float32)])
    assert (
        calibrator.solve(histogram_of(mostly_zero), spec).amax == calibrator.solve(histogram_of(x), spec).amax
    )


def test_an_asymmetric_format_clips_both_sides_at_the_threshold_or_where_the_data_ends():
    x = np.concatenate([np.maximum(distribution("laplace"), -0.25), [30.0]])
    calibrator, histogram = get_calibrator("entropy"), histogram_of(x)
    solved = calibrator.solve(histogram, QuantSpec(format=UINT8, symmetric=False))
    assert solved.lo == -0.25
    assert solved.hi == calibrator.solve(histogram, QuantSpec(format=INT8)).amax < 30


def test_sixteen_bits_have_nothing_to_gain_by_clipping():
    x = distribution("student-t")
    solved = get_calibrator("entropy").solve(histogram_of(x), QuantSpec(format=INT16))
    assert (solved.lo, solved.hi) == (x.min(), x.max())

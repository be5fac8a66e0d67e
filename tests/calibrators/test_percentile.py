import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantkit.calibrators import get_calibrator
from quantkit.errors import SpecError
from quantkit.formats import INT8, UINT8, QuantSpec
from tests.calibrators.data import histogram_of

SYMMETRIC = QuantSpec(format=INT8)
ASYMMETRIC = QuantSpec(format=UINT8, symmetric=False)
VALUES = hnp.arrays(
    np.float32, st.integers(1, 200), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
)
# In hundredths, so that the expected count is exact in integers.
HUNDREDTHS = st.integers(1, 10_000)


def solve(x, percentile, spec=SYMMETRIC):
    return get_calibrator("percentile", percentile=percentile).solve(histogram_of(np.asarray(x)), spec)


def test_percentile_ignores_one_outlier():
    x = np.append(np.random.default_rng(0).uniform(-1, 1, 20_000), 1e4)
    assert solve(x, 99.99).amax == pytest.approx(1, rel=1 / 128)
    assert solve(x, 100).amax == 1e4


@given(x=VALUES, hundredths=HUNDREDTHS)
def test_a_symmetric_percentile_holds_its_share_and_not_a_bin_more(x, hundredths):
    amax = solve(x, hundredths / 100).amax
    magnitudes = np.sort(np.abs(x).astype(np.float64))
    cut = x.size * (10_000 - hundredths) // 10_000
    assert np.count_nonzero(magnitudes > amax) <= cut
    # The largest value that must be held: the range ends in its bin or at it.
    needed = magnitudes[x.size - 1 - cut]
    if needed > 0:
        assert amax <= needed + np.abs(x).max() / 2048
    else:
        assert amax == magnitudes[-1]


@given(x=VALUES, hundredths=HUNDREDTHS)
def test_an_asymmetric_percentile_cuts_half_of_it_at_either_end(x, hundredths):
    solved = solve(x, hundredths / 100, ASYMMETRIC)
    cut = x.size * (10_000 - hundredths) // 20_000
    assert np.count_nonzero(x < solved.lo) <= cut
    assert np.count_nonzero(x > solved.hi) <= cut
    ordered = np.sort(x.astype(np.float64))
    low, high = ordered[cut], ordered[x.size - 1 - cut]
    if low == high == 0:
        assert (solved.lo, solved.hi) == (ordered[0], ordered[-1])
    else:
        assert solved.hi <= high + np.abs(x).max() / 2048
        assert solved.lo >= low - np.abs(x).max() / 2048


@given(x=VALUES, hundredths=HUNDREDTHS)
def test_a_percentile_never_exceeds_the_maximum(x, hundredths):
    for spec in (SYMMETRIC, ASYMMETRIC):
        solved = solve(x, hundredths / 100, spec)
        assert x.min() <= solved.lo <= solved.hi <= x.max()


@given(x=VALUES, a=HUNDREDTHS, b=HUNDREDTHS)
def test_a_higher_percentile_never_narrows_the_range(x, a, b):
    x = np.where(x == 0, np.float32(1), x)
    low, high = solve(x, min(a, b) / 100), solve(x, max(a, b) / 100)
    assert high.amax >= low.amax


def test_a_percentile_written_in_decimals_is_meant_in_decimals():
    # In floats (100 − 99.9) / 100 · 1000 is a little less than the one value that may be cut.
    x = np.arange(1, 1001, dtype=np.float32)
    assert 999 <= solve(x, 99.9).amax < 1000


def test_zeros_count_like_other_values():
    x = np.concatenate([np.zeros(9_000), np.linspace(1, 2, 1_000)])
    assert 1.9 <= solve(x, 99).amax < 1.91


def test_a_percentile_that_would_leave_only_zeros_cuts_nothing():
    x = np.concatenate([np.zeros(9_000), np.linspace(-1, 2, 1_000)])
    assert solve(x, 90).amax == 2
    assert solve(x, 91).amax < 0.25
    asymmetric = solve(x, 50, ASYMMETRIC)
    assert (asymmetric.lo, asymmetric.hi) == (-1, 2)


def test_the_whole_of_it_is_minmax():
    x = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    assert solve(x, 100, ASYMMETRIC).lo == x.min()
    assert solve(x, 100, ASYMMETRIC).hi == x.max()


@pytest.mark.parametrize("percentile", [0, -1, 100.001, float("nan"), "99"])
def test_a_percentile_outside_its_bounds_is_refused(percentile):
    with pytest.raises(SpecError, match=r"percentile is .*; give 0 < percentile ≤ 100"):
        get_calibrator("percentile", percentile=percentile)

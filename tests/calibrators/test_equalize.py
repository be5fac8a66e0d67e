import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantkit.calibrators.equalize import equalizing_scale

RANGES = hnp.arrays(np.float64, st.integers(1, 12), elements=st.floats(1, 900))


@given(RANGES, st.randoms())
def test_both_layers_get_the_same_range(first, random):
    second = np.array([random.uniform(1, 900) for _ in first])
    scale = equalizing_scale(first, second)
    np.testing.assert_allclose(first / scale, second * scale)
    np.testing.assert_allclose(first / scale, np.sqrt(first * second))


def test_channels_that_are_dead_on_either_side_stay():
    scale = equalizing_scale(np.array([4.0, 0, 1, 1e-9]), np.array([1.0, 2, 0, 1]))
    np.testing.assert_array_equal(scale, [2, 1, 1, 1])


def test_equal_ranges_stay():
    np.testing.assert_array_equal(equalizing_scale(np.full(3, 2.5), np.full(3, 2.5)), 1)

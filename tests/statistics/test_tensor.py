import numpy as np
import pytest

from quantkit.errors import CacheError
from quantkit.statistics import ChannelStats, FloatHistogram
from quantkit.statistics.tensor import TensorStatistics


def statistics(values, *, channels=True, dtype="float32", shape=("N", 2)):
    x = np.asarray(values, np.float32)
    histogram, per_channel = FloatHistogram(), ChannelStats(1)
    histogram.observe(x)
    per_channel.observe(x)
    return TensorStatistics(
        histogram=histogram, channels=per_channel if channels else None, dtype=dtype, shape=shape
    )


ONE, TWO = [[1.0, -2.0]], [[0.5, 8.0], [3.0, 0.0]]


@pytest.mark.parametrize("channels", [True, False])
def test_merging_is_observing_both(channels):
    merged = statistics(ONE, channels=channels).merge(statistics(TWO, channels=channels))
    assert merged == statistics(ONE + TWO, channels=channels)


def test_a_dimension_in_which_they_differ_is_unknown():
    merged = statistics(ONE, shape=(1, 2)).merge(statistics(TWO, shape=(2, 2)))
    assert merged.shape == (None, 2)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"shape": (2,)}, "rank 1"),
        ({"channels": False}, "only one of them has per-channel statistics"),
    ],
)
def test_statistics_of_another_tensor_are_refused(other, reason):
    with pytest.raises(CacheError, match=reason):
        statistics(ONE).merge(statistics(TWO, **other))


def test_another_number_of_channels_is_refused():
    with pytest.raises(CacheError, match="3 channels on axis 1 after 2"):
        statistics(ONE).merge(statistics([[1.0, 2.0, 3.0]]))


def test_the_sign_of_zero_leaves_no_trace_of_the_order():
    zeros = np.array([[0.0], [-0.0]], np.float32)
    forward, backward = statistics(zeros), statistics(zeros[::-1])
    for a, b in ((forward.histogram, backward.histogram), (forward.channels, backward.channels)):
        first, second = a.to_arrays(), b.to_arrays()
        assert {k: v.tobytes() for k, v in first.items()} == {k: v.tobytes() for k, v in second.items()}


def test_statistics_with_nan_equal_themselves():
    assert statistics([[np.nan, 1.0]]) == statistics([[np.nan, 1.0]])


@pytest.mark.parametrize(("value", "absolute"), [(np.inf, np.inf), (-np.inf, np.inf), (np.nan, np.nan)])
def test_what_is_not_finite_stays_in_its_channel(value, absolute):
    seen = statistics([[value, 1.0], [2.0, -3.0]]).merge(statistics([[-1.0, 1.0]])).channels
    assert np.array_equal(seen.abs_sum, [absolute, 5.0], equal_nan=True)
    assert np.array_equal(seen.sum, [value, -1.0], equal_nan=True)


def test_opposite_infinities_have_no_sum_and_an_infinite_magnitude():
    seen = statistics([[np.inf, 1.0]]).merge(statistics([[-np.inf, 1.0]])).channels
    assert np.isnan(seen.sum[0])
    assert seen.abs_sum[0] == np.inf
    assert seen.amax[0] == np.inf

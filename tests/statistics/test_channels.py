import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantkit.errors import CacheError, DataError
from quantkit.statistics import ChannelStats

ELEMENTS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
BATCHES = st.lists(
    st.integers(1, 4).flatmap(lambda n: hnp.arrays(np.float32, (n, 3, 2), elements=ELEMENTS)),
    min_size=1,
    max_size=5,
)


def stats_of(*batches, axis=1):
    stats = ChannelStats(axis)
    for batch in batches:
        stats.observe(batch)
    return stats


def assert_sums_equal(a, b):
    """To 1e-12 of what was added up: a sum may cancel, its terms do not."""
    np.testing.assert_allclose(a.abs_sum, b.abs_sum, rtol=1e-12)
    assert np.all(np.abs(a.sum - b.sum) <= 1e-12 * b.abs_sum)


@given(batches=BATCHES)
def test_statistics_are_those_of_the_whole(batches):
    whole = np.concatenate(batches).astype(np.float64)
    stats = stats_of(*batches)
    np.testing.assert_array_equal(stats.min, whole.min(axis=(0, 2)))
    np.testing.assert_array_equal(stats.max, whole.max(axis=(0, 2)))
    np.testing.assert_array_equal(stats.amax, np.abs(whole).max(axis=(0, 2)))
    assert stats.count == whole.shape[0] * 2
    absolute = np.abs(whole).sum(axis=(0, 2))
    np.testing.assert_allclose(stats.abs_sum, absolute, rtol=1e-12)
    assert np.all(np.abs(stats.sum - whole.sum(axis=(0, 2))) <= 1e-12 * absolute)
    np.testing.assert_allclose(stats.abs_mean, absolute / stats.count, rtol=1e-12)
    assert np.all(np.abs(stats.mean - whole.mean(axis=(0, 2))) <= 1e-12 * stats.abs_mean)


@given(batches=BATCHES, data=st.data())
def test_any_order_gives_the_same_limits_and_sums(batches, data):
    a = stats_of(*batches)
    b = stats_of(*data.draw(st.permutations(batches)))
    assert (a.count, a.min.tobytes(), a.max.tobytes()) == (b.count, b.min.tobytes(), b.max.tobytes())
    assert_sums_equal(a, b)


@given(batches=BATCHES)
def test_merging_equals_observing_at_once(batches):
    merged = ChannelStats(1)
    for batch in batches:
        merged = stats_of(batch).merge(merged)
    whole = stats_of(np.concatenate(batches))
    assert merged.count == whole.count
    assert (merged.min.tobytes(), merged.max.tobytes()) == (whole.min.tobytes(), whole.max.tobytes())
    assert_sums_equal(merged, whole)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (5, 2, 3), (2, 5, 3, 4)])
def test_the_axis_may_be_any(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    axis = shape.index(5)
    others = tuple(i for i in range(x.ndim) if i != axis)
    for given_axis in (axis, axis - x.ndim):
        stats = stats_of(x, axis=given_axis)
        np.testing.assert_array_equal(stats.max, x.max(axis=others))
        np.testing.assert_allclose(stats.abs_sum, np.abs(x).sum(axis=others, dtype=np.float64), rtol=1e-12)


def test_float16_is_summed_without_loss():
    x = np.full((4096, 2), 60000, np.float16)
    assert stats_of(x).sum.tolist() == [4096 * 60000.0] * 2


def test_long_sums_do_not_stall():
    # In float32, 2^24 + 1 is 2^24.
    stats = stats_of(np.full((1, 1), 2.0**24, np.float32), *[np.ones((1, 1), np.float32)] * 10)
    assert stats.sum[0] == 2**24 + 10


def test_nan_stays_in_its_channel():
    stats = stats_of(np.array([[1.0, np.nan], [-2.0, 3.0]], np.float32))
    assert np.isnan([stats.min[1], stats.max[1], stats.sum[1], stats.abs_sum[1]]).all()
    assert (stats.min[0], stats.max[0], stats.sum[0], stats.abs_sum[0]) == (-2, 1, -1, 3)


def test_nothing_observed_leaves_the_channels_unknown():
    stats = stats_of(np.zeros((0, 3), np.float32))
    assert (stats.count, stats.min.size) == (0, 0)
    assert stats_of(np.zeros((0, 3), np.float32), np.ones((1, 3), np.float32)).count == 1


@given(batches=BATCHES)
def test_saving_and_loading_is_the_identity(batches):
    stats = stats_of(*batches)
    assert ChannelStats.from_arrays(stats.to_arrays()) == stats


def test_another_number_of_channels_is_refused():
    with pytest.raises(DataError, match="3 channels on axis 1 after 2"):
        stats_of(np.ones((1, 2), np.float32), np.ones((1, 3), np.float32))


@pytest.mark.parametrize("shape", [(), (4,), (4, 4)])
def test_a_tensor_without_the_axis_is_refused(shape):
    with pytest.raises(DataError, match="no axis 2 in a tensor of shape"):
        stats_of(np.ones(shape, np.float32), axis=2)


def test_statistics_along_another_axis_do_not_merge():
    with pytest.raises(DataError, match="axes 1 and 0 differ"):
        ChannelStats(1).merge(ChannelStats(0))


@pytest.mark.parametrize("key", ["place", "min", "max", "sum", "abs_sum"])
def test_a_damaged_state_is_refused(key):
    arrays = dict(stats_of(np.ones((2, 3), np.float32)).to_arrays())
    arrays[key] = arrays[key][:1]
    with pytest.raises(CacheError, match="channel statistics: damaged"):
        ChannelStats.from_arrays(arrays)

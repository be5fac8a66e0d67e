import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantkit.errors import CacheError
from quantkit.statistics import FloatHistogram

# Any bits at all: every exponent, both zeros, subnormals, NaN and infinities; and values that look like data.
ANY_BITS = hnp.arrays(np.uint32, st.integers(0, 40)).map(lambda bits: bits.view(np.float32))
NEAR_ONE = hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(-8, 8, width=32))
SPECIAL = hnp.arrays(
    np.float32,
    st.integers(0, 20),
    elements=st.sampled_from(
        [0.0, -0.0, 1e-45, -1e-45, 1.17e-38, -6e-39, 1.0, -1.0, 2.0, 0.125, 3.4e38, -3.4e38]
    )
    | st.sampled_from([np.inf, -np.inf, np.nan]),
)
VALUES = ANY_BITS | NEAR_ONE | SPECIAL
SHARDS = st.lists(VALUES, min_size=1, max_size=5)
FINITE = VALUES.map(lambda x: x[np.isfinite(x)])


def histogram_of(*parts):
    histogram = FloatHistogram()
    for part in parts:
        histogram.observe(part)
    return histogram


def state(histogram):
    return {key: (array.dtype, array.shape, array.tobytes()) for key, array in histogram.to_arrays().items()}


# --- one multiset, one state ---


@given(parts=SHARDS, data=st.data())
def test_any_order_and_grouping_gives_the_same_bytes(parts, data):
    whole = np.concatenate(parts)
    shuffled = whole[np.array(data.draw(st.permutations(range(whole.size))), np.int64)]
    assert state(histogram_of(*parts)) == state(histogram_of(shuffled)) == state(histogram_of(whole))


@given(parts=SHARDS)
def test_merging_equals_observing_at_once_bit_for_bit(parts):
    merged = FloatHistogram()
    for part in parts:
        merged = merged.merge(histogram_of(part))
    assert state(merged) == state(histogram_of(np.concatenate(parts)))


@given(a=VALUES, b=VALUES, c=VALUES)
def test_merging_commutes_and_associates(a, b, c):
    one, two, three = histogram_of(a), histogram_of(b), histogram_of(c)
    assert state(one.merge(two)) == state(two.merge(one))
    assert state(one.merge(two).merge(three)) == state(one.merge(two.merge(three)))


@given(a=VALUES, b=VALUES)
def test_merging_changes_neither_operand(a, b):
    one, two = histogram_of(a), histogram_of(b)
    before = state(one), state(two)
    one.merge(two)
    two.merge(one)
    assert (state(one), state(two)) == before


def test_large_and_small_arrays_are_counted_alike():
    # Longer than what is worked on at a time, with values far below the largest in every part.
    rng = np.random.default_rng(0)
    x = (rng.normal(size=200_000) * np.exp(rng.normal(size=200_000) * 9)).astype(np.float32)
    x[::7] = 0
    for values in (x, np.abs(x), -np.abs(x)):
        assert state(histogram_of(values)) == state(histogram_of(*np.array_split(values, 97)))


@given(x=VALUES)
def test_saving_and_loading_is_the_identity(x):
    histogram = histogram_of(x)
    loaded = FloatHistogram.from_arrays(histogram.to_arrays())
    assert loaded == histogram
    assert state(loaded) == state(histogram)
    # And what was loaded goes on like the other.
    more = np.array([1e30, -3.0], np.float32)
    loaded.observe(more)
    histogram.observe(more)
    assert state(loaded) == state(histogram)


# --- what is counted ---


@given(x=VALUES)
def test_the_counts_and_limits_are_exact(x):
    histogram = histogram_of(x)
    finite = x[np.isfinite(x)]
    assert histogram.count == x.size
    assert histogram.finite_count == finite.size
    assert histogram.zero_count == np.count_nonzero(finite == 0)
    assert histogram.nan_count == np.count_nonzero(np.isnan(x))
    assert histogram.inf_count == np.count_nonzero(np.isinf(x))
    if finite.size:
        assert (histogram.min, histogram.max) == (finite.min(), finite.max())
        assert histogram.amax == np.abs(finite).max()
    else:
        assert (histogram.min, histogram.max, histogram.amax) == (np.inf, -np.inf, 0)


def literal_counts(x, edges):
    """Values in [edge, next) on the positive side, in (edge, next] on the negative."""
    x = x.astype(np.float64)
    positive = np.searchsorted(edges, x, side="right") - 1
    negative = np.searchsorted(edges, x, side="left") - 1
    return np.bincount(np.where(x < 0, negative, positive), minlength=edges.size - 1)


@given(x=FINITE)
def test_bins_are_what_a_histogram_at_their_edges_would_count(x):
    histogram = histogram_of(x)
    bins = histogram.bins()
    assert np.all(np.diff(bins.edges) > 0)
    assert bins.counts.dtype == np.int64
    np.testing.assert_array_equal(bins.counts, literal_counts(x, bins.edges))
    magnitudes = histogram.magnitude_bins()
    np.testing.assert_array_equal(magnitudes.counts, literal_counts(np.abs(x), magnitudes.edges))


def test_bins_are_those_of_numpy_at_the_same_edges():
    x = np.random.default_rng(0).laplace(size=100_000).astype(np.float32)
    bins = histogram_of(x).bins()
    # No draw lies on an edge of the negative side, where the two are closed at different ends.
    np.testing.assert_array_equal(bins.counts, np.histogram(x.astype(np.float64), bins.edges)[0])


@given(x=FINITE)
def test_zeros_of_either_sign_have_a_bin_of_their_own(x):
    bins = histogram_of(x).bins()
    zero = np.searchsorted(bins.edges, 0.0)
    assert bins.edges[zero] == 0
    assert bins.edges[zero + 1] == float(np.finfo(np.float32).smallest_subnormal)
    assert bins.counts[zero] == np.count_nonzero(x == 0)


@given(x=FINITE.filter(lambda x: np.abs(x).max(initial=0) >= 2.0**-100))
def test_no_bin_that_holds_values_is_wider_than_promised(x):
    histogram = histogram_of(x)
    bins = histogram.magnitude_bins()
    width, used = np.diff(bins.edges), bins.counts > 0
    assert np.all(width[used] <= histogram.amax / 2048)
    # Below the top octaves also in proportion; subnormal numbers have no proportion to keep.
    low = used & (bins.edges[:-1] >= 2.0**-126) & (bins.edges[1:] <= histogram.amax / 16)
    assert np.all(width[low] <= bins.edges[:-1][low] / 128)


@given(x=FINITE, max_bins=st.sampled_from([4096, 2048, 512, 1]))
def test_linear_magnitudes_are_exact(x, max_bins):
    histogram = histogram_of(x)
    bins = histogram.linear_magnitudes(max_bins)
    assert bins.counts.size <= max_bins
    assert np.all(np.diff(bins.edges) == bins.edges[1])
    assert np.log2(bins.edges[1]) % 1 == 0
    magnitudes = np.abs(x.astype(np.float64))
    expected = np.bincount((magnitudes // bins.edges[1]).astype(np.int64), minlength=bins.counts.size)
    np.testing.assert_array_equal(bins.counts, expected)
    if histogram.amax >= 2.0**-100:
        assert bins.edges[-2] <= histogram.amax < bins.edges[-1]
        assert bins.counts.size > max_bins / 2 or max_bins == 1


# --- what may be observed ---


@given(x=hnp.arrays(np.float16, st.integers(0, 30)))
def test_float16_is_counted_as_the_float32_it_equals(x):
    assert state(histogram_of(x)) == state(histogram_of(x.astype(np.float32)))


def test_bfloat16_and_float64_are_cast():
    x = np.array([1.0, -2.5, 0.0], np.float32)
    assert state(histogram_of(x.astype(ml_dtypes.bfloat16))) == state(histogram_of(x.astype(np.float64)))


def test_any_shape_and_stride_is_counted():
    x = np.arange(-12, 12, dtype=np.float32).reshape(2, 3, 4)
    for view in (x.T, x[:, ::-1], np.asfortranarray(x), x[..., None]):
        assert state(histogram_of(view)) == state(histogram_of(x.ravel()))
    assert histogram_of(np.float32(3)).max == 3


def test_nothing_observed_is_nothing():
    histogram = histogram_of(np.zeros((0, 3), np.float32))
    assert (histogram.count, histogram.amax) == (0, 0)
    assert histogram.bins().counts.sum() == 0
    assert histogram == FloatHistogram()


def test_an_observed_array_is_not_changed():
    x = np.array([1.0, -0.0, np.nan, 5.0], np.float32)
    before = x.tobytes()
    x.setflags(write=False)
    histogram_of(x)
    assert x.tobytes() == before


# --- damage ---


@pytest.mark.parametrize("key", ["counts", "limits", "places", "linear", "prefixes"])
def test_a_state_that_lacks_an_array_is_refused(key):
    arrays = histogram_of(np.array([1.0, -2.0], np.float32)).to_arrays()
    del arrays[key]
    with pytest.raises(CacheError, match="histogram: damaged"):
        FloatHistogram.from_arrays(arrays)


@pytest.mark.parametrize("key", ["linear", "prefixes"])
def test_counts_that_do_not_add_up_are_refused(key):
    arrays = dict(histogram_of(np.array([1.0, -2.0, 0.0], np.float32)).to_arrays())
    arrays[key] = arrays[key] * 2
    with pytest.raises(CacheError, match="do not add up"):
        FloatHistogram.from_arrays(arrays)

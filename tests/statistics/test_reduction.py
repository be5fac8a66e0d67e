"""The C extension against NumPy: counts and limits bit for bit, sums to 1e-12."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantkit.statistics import NATIVE, ChannelStats, FloatHistogram, reduction
from quantkit.statistics.reduction import as_float32, reduce_cube
from quantkit.statistics.tensor import observe_tensor

# What a tensor may hold, drawn by the number of elements. Lengths beside those at which C starts something anew.
KINDS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "relu": lambda rng, n: np.maximum(rng.standard_normal(n), 0),
    "negative": lambda rng, n: -np.abs(rng.standard_normal(n)),
    "constant": lambda rng, n: np.full(n, rng.standard_normal()),
    "signed zeros": lambda rng, n: rng.choice([0.0, -0.0, 1.0], n),
    "growing": lambda rng, n: rng.standard_normal(n) * np.exp2(np.linspace(-140, 126, n)),
    "shrinking": lambda rng, n: rng.standard_normal(n) * np.exp2(np.linspace(126, -149, n)),
    "one outlier": lambda rng, n: np.where(np.arange(n) == n // 2, 3e38, 1e-30 * rng.standard_normal(n)),
    "subnormal": lambda rng, n: rng.integers(-5, 6, n) * 2.0**-149,
    "any bits": lambda rng, n: rng.integers(0, 1 << 32, n, dtype=np.uint32).view(np.float32),
    "mask": lambda rng, n: rng.choice([0.0, -np.inf], n),
    "a few holes": lambda rng, n: np.where(rng.random(n) < 1e-3, np.nan, rng.standard_normal(n)),
    "nothing finite": lambda rng, n: rng.choice([np.nan, np.inf, -np.inf], n),
}
SHAPES = [
    (1, 1, 1),
    (1, 1, 8193),
    (1, 3, 65535),
    (2, 64, 1023),
    (70_001, 1, 1),
    (300, 513, 1),
    (2, 20_000, 1),
    (5000, 7, 4),
    (3, 2, 16_385),
    (1, 8192, 2),
    (40, 1, 49),
]


@pytest.fixture(autouse=True, scope="module")
def implementation():
    """Here both run in every test."""
    if not NATIVE:
        pytest.skip(f"the C extension is not built ({reduction.NATIVE_ERROR})")


def with_numpy(call):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction, "_native", None)
        return call()


def assert_equal_counts(a, b):
    fields = ("size", "zeros", "nans", "infinities", "min", "max", "exponent")
    assert [repr(getattr(a, name)) for name in fields] == [repr(getattr(b, name)) for name in fields]
    for one, two in ((a.positive, b.positive), (a.negative, b.negative)):
        assert one.first == two.first
        np.testing.assert_array_equal(one.prefixes, two.prefixes)
        np.testing.assert_array_equal(one.linear, two.linear)


def assert_equal_channels(a, b):
    assert a.count == b.count
    assert (a.min.tobytes(), a.max.tobytes()) == (b.min.tobytes(), b.max.tobytes())
    np.testing.assert_allclose(a.abs_sum, b.abs_sum, rtol=1e-12)
    both = np.isfinite(a.sum) & np.isfinite(b.sum)
    np.testing.assert_array_equal(a.sum[~both], b.sum[~both])
    assert np.all(np.abs(a.sum[both] - b.sum[both]) <= 1e-12 * b.abs_sum[both])


def assert_both_agree(cube, exponent=-100):
    sums, counts = reduce_cube(cube, channels=True, exponent=exponent)
    expected_sums, expected = with_numpy(lambda: reduce_cube(cube, channels=True, exponent=exponent))
    assert_equal_channels(sums, expected_sums)
    assert_equal_counts(counts, expected)
    # Each alone is what it is beside the other.
    assert_equal_counts(reduce_cube(cube, channels=False, exponent=exponent)[1], counts)
    assert_equal_channels(reduce_cube(cube, channels=True)[0], sums)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_reduce_every_kind_and_shape_alike(kind, shape):
    rng = np.random.default_rng(len(kind))
    assert_both_agree(KINDS[kind](rng, int(np.prod(shape))).astype(np.float32).reshape(shape))


@given(
    cube=hnp.arrays(np.uint32, hnp.array_shapes(min_dims=3, max_dims=3, max_side=9)),
    exponent=st.integers(-100, 127),
)
def test_both_reduce_any_bits_alike(cube, exponent):
    assert_both_agree(cube.view(np.float32), exponent)


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)),
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 1000),
    exponent=st.integers(-100, 127),
)
@settings(deadline=None)
def test_both_reduce_any_shape_alike(shape, kind, seed, exponent):
    x = KINDS[kind](np.random.default_rng(seed), int(np.prod(shape))).astype(np.float32)
    assert_both_agree(x.reshape(shape), exponent)


@given(data=st.data())
def test_both_keep_one_state_over_many_tensors(data):
    parts = data.draw(st.lists(hnp.arrays(np.uint32, st.integers(1, 30)), min_size=1, max_size=4))

    def observed():
        histogram = FloatHistogram()
        for part in parts:
            histogram.observe(part.view(np.float32))
        return {key: array.tobytes() for key, array in histogram.to_arrays().items()}

    assert observed() == with_numpy(observed)


def test_counts_below_the_exponent_reached_meanwhile_are_taken_in():
    # Two threads count for one histogram: the other one has raised its exponent.
    small = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    for large in (3.0, 1e3, 1e38):
        counts = observe_tensor(small, None, exponent=-100)
        late, whole = FloatHistogram(), FloatHistogram()
        late.observe(np.float32(large))
        late.include(counts)
        whole.observe(np.append(small, np.float32(large)))
        assert late == whole


def test_one_pass_is_what_two_are():
    x = np.random.default_rng(0).standard_normal((4, 6, 5, 5)).astype(np.float32)
    together, alone, counted = ChannelStats(1), ChannelStats(1), FloatHistogram()
    histogram = FloatHistogram()
    histogram.include(observe_tensor(x, together, exponent=histogram.exponent))
    alone.observe(x)
    counted.observe(x)
    assert (together, histogram) == (alone, counted)


def test_memory_that_is_not_aligned_is_read_as_its_copy():
    x = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    moved = np.frombuffer(b"?" + x.tobytes(), np.float32, offset=1)
    assert not moved.flags.aligned
    assert_both_agree(as_float32(moved).reshape(1, 4, 25))
    np.testing.assert_array_equal(as_float32(moved), x)


@pytest.mark.parametrize("order", ["<f4", ">f4"])
def test_either_byte_order_is_read(order):
    x = np.array([1.0, -2.5, 0.0, 3e-39], np.float32)
    histogram, expected = FloatHistogram(), FloatHistogram()
    histogram.observe(x.astype(order))
    expected.observe(x)
    assert histogram == expected


def test_what_is_aligned_and_in_order_is_not_copied():
    x = np.ones((2, 3), np.float32)
    assert np.shares_memory(as_float32(x), x)


def arguments(**changed):
    """What `reduce` takes, with one thing wrong."""
    right = {
        "x": np.ones(6, np.float32),
        "shape": (1, 2, 3),
        "lo": np.zeros(2, np.float32),
        "sum": np.zeros(2),
        "linear": np.zeros((2, 4096), np.int64),
        "exponent": 0,
    } | changed
    channels = (right["lo"], np.zeros(2, np.float32), right["sum"], np.zeros(2))
    return right["x"], right["shape"], channels, right["linear"], right["exponent"]


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"x": np.ones(5, np.float32)}, ValueError),
        ({"x": np.ones(12, np.float32)[::2]}, (ValueError, BufferError)),
        ({"x": np.frombuffer(b"?" * 25, np.float32, offset=1)}, ValueError),
        ({"shape": (0, 2, 3)}, ValueError),
        ({"shape": (-1, -2, 3)}, ValueError),
        ({"shape": (1 << 40, 1 << 40, 1 << 40)}, (ValueError, OverflowError)),
        ({"lo": np.zeros(1, np.float32)}, ValueError),
        ({"sum": np.zeros(2, np.float32)}, ValueError),
        ({"linear": np.zeros(4096, np.int64)}, ValueError),
        ({"linear": b"\0" * 8192 * 8}, BufferError),
        ({"exponent": 128}, ValueError),
        ({"exponent": -101}, ValueError),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_buffers_that_do_not_fit_are_refused_before_they_are_read(changed, error):
    with pytest.raises(error):
        reduction._native.reduce(*arguments(**changed))


def test_buffers_that_fit_are_taken():
    assert reduction._native.reduce(*arguments())[:4] == (0, 0, 0, 0)

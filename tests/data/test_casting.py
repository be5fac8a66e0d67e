import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantkit.data.casting import Misfit, cast

INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, ml_dtypes.int4]
FLOATS = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


@given(
    x=st.sampled_from(INTEGERS[:-1]).flatmap(lambda d: hnp.arrays(d, st.integers(0, 5))),
    wanted=st.sampled_from(INTEGERS),
)
def test_an_integer_keeps_its_value_or_is_refused(x, wanted):
    info = ml_dtypes.iinfo(wanted)
    if all(info.min <= v <= info.max for v in x.tolist()):
        assert cast(x, np.dtype(wanted)).astype(object).tolist() == x.tolist()
    else:
        with pytest.raises(Misfit):
            cast(x, np.dtype(wanted))


@given(
    x=hnp.arrays(np.float64, st.integers(0, 5), elements=st.floats(-1e300, 1e300)),
    wanted=st.sampled_from(INTEGERS[:-1]),
)
def test_a_float_becomes_an_integer_only_where_it_is_one(x, wanted):
    info = np.iinfo(wanted)
    if all(v.is_integer() and info.min <= int(v) <= info.max for v in x.tolist()):
        assert cast(x, np.dtype(wanted)).tolist() == x.tolist()
    else:
        with pytest.raises(Misfit):
            cast(x, np.dtype(wanted))


@given(
    x=hnp.arrays(np.float64, st.integers(0, 5), elements=st.floats(-1e300, 1e300)),
    wanted=st.sampled_from(FLOATS),
)
def test_a_float_is_rounded_to_the_nearest_or_refused_as_overflow(x, wanted):
    with np.errstate(over="ignore"):
        rounded = x.astype(wanted)
    if np.isfinite(rounded).all():
        np.testing.assert_array_equal(cast(x, np.dtype(wanted)), rounded)
    else:
        with pytest.raises(Misfit, match=f"overflows {np.dtype(wanted).name}"):
            cast(x, np.dtype(wanted))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_in_every_float_type(dtype, value):
    x = np.array([1, value, 2]).astype(dtype)
    with pytest.raises(Misfit, match="among 3 values"):
        cast(x, np.dtype(dtype))


@pytest.mark.parametrize(
    ("x", "wanted"),
    [
        (np.array([1, 2**24 + 1]), np.float32),
        (np.array([2**63 - 1]), np.float32),
        (np.array([-(2**63)]), np.float16),
        (np.array([2049], np.int16), np.float16),
        (np.array([2**63], np.uint64), np.int64),
        (np.array([-1]), np.uint64),
        (np.array([2]), np.bool_),
        (np.array([1.0 + 2j]), np.float32),
        (np.array(["2024-01-01"], "datetime64[D]"), np.int64),
        (np.array(["a"]), np.float32),
        (np.array([b"a"]), np.float32),
        (np.array([None]), np.float32),
        (np.zeros(2, [("a", "f4")]), np.float32),
        (np.zeros(2, "V4"), np.float32),
        (np.array([3], np.uint8), np.float32),
        (np.array([1.5]), np.object_),
    ],
)
def test_what_would_not_keep_its_value_is_refused(x, wanted):
    with pytest.raises(Misfit):
        cast(x, np.dtype(wanted))


@pytest.mark.parametrize(
    ("x", "wanted"),
    [
        (np.array([1.5, -2]), np.float32),
        (np.array([1, 2], np.int32), np.int64),
        (np.array([0, 1]), np.bool_),
        (np.array([True, False]), np.int64),
        (np.array([True, False]), np.float32),
        (np.array([7, -7], np.int32), np.float32),
        (np.array([1, 2], ">f4"), np.float32),
        (np.array([1, 2], ">i8"), np.int64),
        (np.array([1, 2], ml_dtypes.bfloat16), np.float32),
    ],
)
def test_what_keeps_its_value_is_cast(x, wanted):
    result = cast(x, np.dtype(wanted))
    assert result.dtype == wanted
    assert result.tolist() == x.tolist()


def test_strings_pass_as_objects():
    result = cast(np.array(["a", "bc"]), np.dtype(object))
    assert result.dtype == object
    assert result.tolist() == ["a", "bc"]


def test_bfloat16_comes_back_from_npy_which_has_no_name_for_it(tmp_path):
    x = np.array([1.5, -3], ml_dtypes.bfloat16)
    np.save(tmp_path / "x.npy", x)
    np.testing.assert_array_equal(cast(np.load(tmp_path / "x.npy"), x.dtype), x)


def test_the_result_is_a_copy_of_its_own():
    x = np.arange(6, dtype=np.float32).reshape(2, 3).T
    result = cast(x, np.dtype(np.float32))
    assert result.flags.c_contiguous
    assert not np.shares_memory(result, x)


def test_a_scalar_stays_a_scalar():
    assert cast(np.array(3), np.dtype(np.float32)).shape == ()


def test_minus_infinity_is_taken_where_an_input_masks():
    mask = np.array([0.0, -np.inf], np.float32)
    np.testing.assert_array_equal(cast(mask, np.dtype(np.float32), masks=True), mask)
    for array in (mask, -mask, np.array([np.nan], np.float32)):
        with pytest.raises(Misfit):
            cast(array, np.dtype(np.float32), masks=array is not mask)

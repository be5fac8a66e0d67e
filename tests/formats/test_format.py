import ml_dtypes
import numpy as np
import pytest

from quantkit.errors import SpecError, UnknownNameError
from quantkit.formats import (
    FP8_E4M3,
    FP8_E5M2,
    INT8,
    INT16,
    UINT8,
    UINT16,
    QuantSpec,
    get_format,
    list_formats,
)

FORMATS = [INT8, UINT8, INT16, UINT16, FP8_E4M3, FP8_E5M2]
# name: (bits, min, max, value that amax maps to, middle code, number of finite codes)
FACTS = {
    "int8": (8, -128, 127, 127, 0, 256),
    "uint8": (8, 0, 255, 127, 128, 256),
    "int16": (16, -32768, 32767, 32767, 0, 65536),
    "uint16": (16, 0, 65535, 32767, 32768, 65536),
    "fp8_e4m3": (8, -448, 448, 448, 0, 254),
    "fp8_e5m2": (8, -57344, 57344, 57344, 0, 248),
}


def decoded(code, exponent_bits, mantissa_bits, bias):
    """The value of an 8-bit float, from its bits (OCP 8-bit Floating Point Specification, section 5)."""
    sign = -1 if code >> 7 else 1
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    fraction = (code & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    if exponent == 0:
        return sign * fraction * 2.0 ** (1 - bias)
    return sign * (1 + fraction) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_a_format_has_the_limits_of_its_standard(fmt):
    facts = (fmt.bits, fmt.min, fmt.max, fmt.symmetric_max, fmt.middle, fmt.codes().size)
    assert facts == FACTS[fmt.name]


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_codes_ascend_in_the_dtype_that_stores_them(fmt):
    codes = fmt.codes()
    assert codes.dtype == fmt.dtype
    assert codes.dtype.itemsize * 8 == fmt.bits
    values = codes.astype(np.float64)
    # A float has two zeros.
    assert np.count_nonzero(np.diff(values) == 0) == (1 if fmt.kind == "float" else 0)
    assert np.all(np.diff(values) >= 0)
    assert (values[0], values[-1]) == (fmt.min, fmt.max)


@pytest.mark.parametrize(
    ("fmt", "dtype", "layout", "not_finite"),
    [
        (FP8_E4M3, ml_dtypes.float8_e4m3fn, (4, 3, 7), {0x7F, 0xFF}),
        (FP8_E5M2, ml_dtypes.float8_e5m2, (5, 2, 15), {*range(0x7C, 0x80), *range(0xFC, 0x100)}),
    ],
    ids=["fp8_e4m3", "fp8_e5m2"],
)
def test_every_float_code_means_what_its_bits_say(fmt, dtype, layout, not_finite):
    codes = fmt.codes()
    assert codes.dtype == dtype
    raw = codes.view(np.uint8).tolist()
    assert sorted(raw) == [code for code in range(256) if code not in not_finite]
    assert codes.astype(np.float64).tolist() == [decoded(code, *layout) for code in raw]


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_magnitudes_are_those_of_the_codes_that_a_symmetric_range_uses(fmt):
    values = fmt.codes().astype(np.float64) - fmt.middle
    used = np.unique(np.abs(values[np.abs(values) <= fmt.symmetric_max]))
    np.testing.assert_array_equal(fmt.magnitudes(), used)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_a_format_is_found_by_its_name(fmt):
    assert get_format(fmt.name) is fmt
    assert list_formats()[fmt.name] == ""


def test_an_unknown_format_names_its_nearest():
    with pytest.raises(UnknownNameError, match=r"fp8e4m3.*fp8_e4m3"):
        get_format("fp8e4m3")


def test_a_float_format_has_no_asymmetric_spec():
    with pytest.raises(SpecError, match="fp8_e4m3: float formats have no zero point"):
        QuantSpec(format=FP8_E4M3, symmetric=False)


@pytest.mark.parametrize(("axis", "block_size"), [(None, 32), (0, 0)])
def test_blocks_need_an_axis_and_a_size(axis, block_size):
    with pytest.raises(SpecError, match="int8: block_size"):
        QuantSpec(format=INT8, axis=axis, block_size=block_size)

import ml_dtypes
import numpy as np
import pytest

from quantkit.errors import SpecError, UnknownNameError
from quantkit.formats import (
    E8M0,
    FP4_E2M1,
    FP8_E4M3,
    FP8_E5M2,
    INT2,
    INT3,
    INT4,
    INT8,
    INT16,
    UINT2,
    UINT3,
    UINT4,
    UINT8,
    UINT16,
    QuantSpec,
    get_format,
    list_formats,
)
from quantkit.formats.packing import code_bits

INTEGERS = [INT2, UINT2, INT3, UINT3, INT4, UINT4, INT8, UINT8, INT16, UINT16]
FLOATS = [FP4_E2M1, FP8_E4M3, FP8_E5M2, E8M0]
FORMATS = [*INTEGERS, *FLOATS]
# name: (bits, min, max, value that amax maps to, middle code, number of finite codes)
FACTS = {
    "int2": (2, -2, 1, 1, 0, 4),
    "uint2": (2, 0, 3, 1, 2, 4),
    "int3": (3, -4, 3, 3, 0, 8),
    "uint3": (3, 0, 7, 3, 4, 8),
    "int4": (4, -8, 7, 7, 0, 16),
    "uint4": (4, 0, 15, 7, 8, 16),
    "fp4_e2m1": (4, -6, 6, 6, 0, 16),
    "e8m0": (8, 2.0**-127, 2.0**127, 2.0**127, 0, 255),
    "int8": (8, -128, 127, 127, 0, 256),
    "uint8": (8, 0, 255, 127, 128, 256),
    "int16": (16, -32768, 32767, 32767, 0, 65536),
    "uint16": (16, 0, 65535, 32767, 32768, 65536),
    "fp8_e4m3": (8, -448, 448, 448, 0, 254),
    "fp8_e5m2": (8, -57344, 57344, 57344, 0, 248),
}


def decoded(code, exponent_bits, mantissa_bits, bias):
    """The value of a signed float, from its bits (OCP 8-bit Floating Point Specification, section 5)."""
    sign = -1 if code >> (exponent_bits + mantissa_bits) else 1
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
    assert codes.dtype.itemsize * 8 >= fmt.bits
    values = codes.astype(np.float64)
    # A float with a sign has two zeros.
    assert np.count_nonzero(np.diff(values) == 0) == (1 if fmt.kind == "float" and fmt.min < 0 else 0)
    assert np.all(np.diff(values) >= 0)
    assert (values[0], values[-1]) == (fmt.min, fmt.max)


@pytest.mark.parametrize(
    ("fmt", "dtype", "layout", "not_finite"),
    [
        (FP4_E2M1, ml_dtypes.float4_e2m1fn, (2, 1, 1), set()),
        (FP8_E4M3, ml_dtypes.float8_e4m3fn, (4, 3, 7), {0x7F, 0xFF}),
        (FP8_E5M2, ml_dtypes.float8_e5m2, (5, 2, 15), {*range(0x7C, 0x80), *range(0xFC, 0x100)}),
    ],
    ids=["fp4_e2m1", "fp8_e4m3", "fp8_e5m2"],
)
def test_every_float_code_means_what_its_bits_say(fmt, dtype, layout, not_finite):
    codes = fmt.codes()
    assert codes.dtype == dtype
    raw = codes.view(np.uint8).tolist()
    assert sorted(raw) == [code for code in range(2**fmt.bits) if code not in not_finite]
    assert codes.astype(np.float64).tolist() == [decoded(code, *layout) for code in raw]


def test_every_code_of_e8m0_is_the_power_of_two_of_its_bits():
    raw = E8M0.codes().view(np.uint8)
    assert raw.tolist() == list(range(255))
    assert E8M0.dtype == ml_dtypes.float8_e8m0fnu
    assert E8M0.codes().astype(np.float64).tolist() == [2.0 ** (code - 127) for code in range(255)]


@pytest.mark.parametrize("fmt", [f for f in INTEGERS if f.bits <= 8], ids=lambda f: f.name)
def test_every_integer_code_means_what_its_bits_say(fmt):
    codes = fmt.codes()
    top = 2 ** (fmt.bits - 1) if fmt.min < 0 else 0
    for code, pattern in zip(codes.astype(int).tolist(), code_bits(codes, fmt).tolist(), strict=True):
        # Two's complement: the top bit counts −2^(bits − 1).
        assert code == (pattern & ~top) - (pattern & top)


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [
        (INT2, ml_dtypes.int2),
        (UINT2, ml_dtypes.uint2),
        (INT4, ml_dtypes.int4),
        (UINT4, ml_dtypes.uint4),
        (INT8, np.int8),
        (UINT8, np.uint8),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_an_integer_has_the_codes_of_its_ml_dtype(fmt, dtype):
    info = ml_dtypes.iinfo(dtype)
    assert fmt.dtype == dtype
    assert fmt.codes().astype(int).tolist() == list(range(int(info.min), int(info.max) + 1))


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f is not E8M0], ids=lambda f: f.name)
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 32}, "int8: block_size 32 without a fitting axis"),
        ({"axis": 0, "block_size": 0}, "int8: block_size 0 without a fitting axis"),
        ({"block_shape": (128, 128), "axis": 0}, r"int8: block_shape \(128, 128\) cuts the last two axes"),
        ({"block_shape": (0, 128)}, r"int8: block_shape \(0, 128\)"),
        ({"axis": 0, "block_size": 2, "scale_format": UINT8}, "int8: uint8 cannot hold scales"),
        (
            {"axis": 0, "block_size": 2, "scale_format": E8M0, "symmetric": False},
            "int8: scales in e8m0 have no zero points",
        ),
        ({"scale_rule": "floor"}, "int8: no scale rule floor; choose one of ocp, rceil, even"),
        ({"dynamic": "block"}, "int8: dynamic per block without blocks"),
        ({"dynamic": "token", "axis": 1}, "int8: dynamic per token has no axis"),
        ({"dynamic": "tensor", "block_shape": (2, 2)}, "int8: dynamic per tensor has no axis and no blocks"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(fields, message):
    with pytest.raises(SpecError, match=message):
        QuantSpec(format=INT8, **fields)


def test_values_cannot_be_powers_of_two_only():
    with pytest.raises(SpecError, match="e8m0: has no zero, so it can only be a scale_format"):
        QuantSpec(format=E8M0)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (QuantSpec(format=INT8), "int8"),
        (QuantSpec(format=INT8, axis=1), "int8, per channel"),
        (QuantSpec(format=UINT4, axis=0, block_size=32, symmetric=False), "uint4, block 32, asymmetric"),
        (QuantSpec(format=FP8_E4M3, block_shape=(128, 128)), "fp8_e4m3, block 128×128"),
        (
            QuantSpec(format=FP4_E2M1, axis=0, block_size=16, scale_format=FP8_E4M3, dynamic="block"),
            "fp4_e2m1, block 16, fp8_e4m3 scales, dynamic per block",
        ),
        (
            QuantSpec(format=FP4_E2M1, axis=0, block_size=32, scale_format=E8M0, scale_rule="even"),
            "fp4_e2m1, block 32, e8m0 scales (even)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_spec_reads_as_words(spec, text):
    assert str(spec) == text

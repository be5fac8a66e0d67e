import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantkit.errors import SpecError
from quantkit.formats import (
    FP8_E4M3,
    FP8_E5M2,
    INT8,
    INT16,
    UINT8,
    UINT16,
    QParams,
    QTensor,
    QuantSpec,
    Range,
    dequantize,
    fake_quantize,
    qparams_from_range,
    quantize,
)

INTEGERS = [INT8, UINT8, INT16, UINT16]
FLOATS = [FP8_E4M3, FP8_E5M2]
INTEGER_SPECS = [QuantSpec(format=f, symmetric=s) for f in INTEGERS for s in (True, False)]
SPECS = [*INTEGER_SPECS, *(QuantSpec(format=f) for f in FLOATS)]
TINY = float(np.finfo(np.float32).tiny)

# Wide enough that no scale meets its floor, narrow enough that no value leaves float32.
VALUES = hnp.arrays(
    np.float32, st.integers(1, 30), elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)
)
POSITIVE = st.floats(2.0**-40, 2.0**40, width=32)


def by_name(value):
    return str(value) if isinstance(value, QuantSpec) else value.name


def qparams(spec, scale, zero_point=None):
    if spec.format.kind == "float":
        return QParams(np.float32(scale))
    zero = spec.format.middle if zero_point is None else zero_point
    return QParams(np.asarray(scale, np.float32), np.asarray(zero, spec.format.dtype))


# --- range → scale and zero point ---


def test_symmetric_scales_are_those_of_the_literature():
    scales = {
        fmt.name: float(qparams_from_range(Range(-1, 2), QuantSpec(format=fmt)).scale)
        for fmt in (INT8, UINT8, INT16, FP8_E4M3, FP8_E5M2)
    }
    assert scales == pytest.approx(
        {
            "int8": 2 / 127,
            "uint8": 2 / 127,
            "int16": 2 / 32767,
            "fp8_e4m3": 2 / 448,
            "fp8_e5m2": 2 / 57344,
        },
        rel=2**-23,
    )


def test_an_asymmetric_range_uses_every_code():
    found = qparams_from_range(Range(-1, 4), QuantSpec(format=UINT8, symmetric=False))
    assert (float(found.scale), int(found.zero_point)) == (pytest.approx(5 / 255, rel=2**-23), 51)
    found = qparams_from_range(Range(-1, 4), QuantSpec(format=INT8, symmetric=False))
    assert int(found.zero_point) == 51 - 128


@pytest.mark.parametrize(("lo", "hi", "zero_point"), [(2, 6, 0), (-6, -2, 255)])
def test_an_asymmetric_range_is_widened_to_zero(lo, hi, zero_point):
    found = qparams_from_range(Range(lo, hi), QuantSpec(format=UINT8, symmetric=False))
    assert (float(found.scale), int(found.zero_point)) == (pytest.approx(6 / 255, rel=2**-23), zero_point)


@pytest.mark.parametrize("spec", SPECS, ids=by_name)
@given(x=VALUES)
def test_zero_is_exact(spec, x):
    found = qparams_from_range(Range(x.min(), x.max()), spec)
    zeros = np.array([0.0, -0.0], np.float32)
    assert not fake_quantize(zeros, found, spec).any()


@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_scales_stop_at_the_smallest_normal_number(spec):
    found = qparams_from_range(Range(0, 1e-44), spec)
    assert found.scale == np.float32(TINY)
    assert np.isfinite(fake_quantize(np.array([1e-44, 1.0], np.float32), found, spec)).all()


@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_a_range_that_is_zero_altogether_has_the_scale_one(spec):
    assert qparams_from_range(Range(0, 0), spec).scale == 1


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("spec", SPECS, ids=by_name)
@given(amax=st.floats(2.0**-5, 2.0**10))
def test_a_scale_in_few_bits_is_one_and_clips_no_more_than_half_a_step(dtype, spec, amax):
    scale = qparams_from_range(Range(-amax, amax), spec, scale_dtype=np.dtype(dtype)).scale
    assert scale == scale.astype(dtype).astype(np.float32)
    steps, width = (
        (spec.format.symmetric_max, amax) if spec.symmetric else (spec.format.max - spec.format.min, 2 * amax)
    )
    assert float(scale) * (steps + 0.5) >= width * (1 - 1e-12)


@pytest.mark.parametrize("amax", [1e-20, 1e9], ids=["too small", "too large"])
def test_a_scale_that_its_type_cannot_hold_is_refused(amax):
    with pytest.raises(SpecError, match="does not fit float16; keep this tensor in float"):
        qparams_from_range(Range(-amax, amax), QuantSpec(format=INT8), scale_dtype=np.dtype(np.float16))


@pytest.mark.parametrize(("lo", "hi"), [(1, 0), (np.nan, 1), (0, np.inf), ([0], [1, 2])])
def test_a_range_that_is_none_is_refused(lo, hi):
    with pytest.raises(SpecError, match="range: lo"):
        Range(lo, hi)


# --- values → codes → values ---


@pytest.mark.parametrize("spec", INTEGER_SPECS, ids=by_name)
@given(x=VALUES)
def test_no_value_in_range_moves_by_more_than_half_a_step(spec, x):
    found = qparams_from_range(Range(x.min(), x.max()), spec)
    lost = np.abs(x.astype(np.float64) - fake_quantize(x, found, spec))
    # x / scale and the product back are rounded to 24 bits, of a code of up to `bits`.
    rounding = 2.0 ** (spec.format.bits - 22)
    assert np.all(lost <= float(found.scale) * (0.5 + rounding))


@pytest.mark.parametrize(("fmt", "mantissa_bits", "least"), [(FP8_E4M3, 3, 2.0**-9), (FP8_E5M2, 2, 2.0**-16)])
@given(x=VALUES)
def test_a_float_moves_no_value_by_more_than_half_its_spacing(fmt, mantissa_bits, least, x):
    spec = QuantSpec(format=fmt)
    found = qparams_from_range(Range(x.min(), x.max()), spec)
    lost = np.abs(x.astype(np.float64) - fake_quantize(x, found, spec))
    spacing = np.maximum(np.abs(x) * 2.0**-mantissa_bits, least * float(found.scale))
    assert np.all(lost <= spacing / 2 * (1 + 2.0**-20))


@pytest.mark.parametrize("fmt", [INT8, UINT8, FP8_E4M3, FP8_E5M2], ids=by_name)
@given(scale=POSITIVE, data=st.data())
def test_every_code_returns_to_itself(fmt, scale, data):
    spec = QuantSpec(format=fmt)
    zero_point = data.draw(st.integers(int(fmt.min), int(fmt.max))) if fmt.kind == "integer" else None
    params, codes = qparams(spec, scale, zero_point), fmt.codes()
    values = dequantize(QTensor(codes, params, spec))
    np.testing.assert_array_equal(
        values, (codes.astype(np.float32) - np.float32(zero_point or 0)) * np.float32(scale)
    )
    back = quantize(values, params, spec).qvalue
    assert back.dtype == fmt.dtype
    np.testing.assert_array_equal(back.astype(np.float32), codes.astype(np.float32))


@pytest.mark.parametrize("fmt", [INT8, UINT8], ids=by_name)
def test_integers_round_half_to_even_and_saturate(fmt):
    spec = QuantSpec(format=fmt)
    # Every quarter step from far below to far above, literally.
    steps = np.arange(-1200, 1201) / 4
    floor = np.floor(steps)
    rounded = np.where(steps - floor > 0.5, floor + 1, floor)
    rounded = np.where((steps - floor == 0.5) & (floor % 2 == 1), floor + 1, rounded)
    expected = np.clip(rounded + fmt.middle, fmt.min, fmt.max)
    found = quantize((steps * 0.25).astype(np.float32), qparams(spec, 0.25), spec).qvalue
    np.testing.assert_array_equal(found, expected.astype(fmt.dtype))


@pytest.mark.parametrize("fmt", FLOATS, ids=by_name)
def test_floats_round_half_to_even_and_saturate(fmt):
    spec = QuantSpec(format=fmt)
    codes = fmt.codes()
    values = np.unique(codes.astype(np.float64))
    middles = (values[1:] + values[:-1]) / 2
    # Halfway between two codes the one with an even last bit is taken; a hair off it, the nearer.
    raw = np.array([int(v.view(np.uint8)) for v in values.astype(fmt.dtype)])
    even = np.where(raw[1:] % 2 == 0, values[1:], values[:-1])
    for x, expected in (
        (values, values),
        (middles, even),
        (np.nextafter(middles.astype(np.float32), np.float32(-np.inf)), values[:-1]),
        (np.nextafter(middles.astype(np.float32), np.float32(np.inf)), values[1:]),
        (np.array([fmt.max * 1.2, -fmt.max * 9, 3e38]), np.array([fmt.max, fmt.min, fmt.max])),
    ):
        found = quantize(x.astype(np.float32), qparams(spec, 1), spec).qvalue
        np.testing.assert_array_equal(found.astype(np.float64), expected)


@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_infinities_saturate(spec):
    found = fake_quantize(np.array([np.inf, -np.inf], np.float32), qparams(spec, 0.5), spec)
    top, low = spec.format.max - spec.format.middle, spec.format.min - spec.format.middle
    assert found.tolist() == [0.5 * top, 0.5 * low]


# --- shapes ---


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("fmt", [INT8, FP8_E4M3], ids=by_name)
def test_per_channel_is_per_tensor_of_every_channel(fmt, axis):
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    spec, single = QuantSpec(format=fmt, axis=axis), QuantSpec(format=fmt)
    scales = np.linspace(0.01, 0.1, x.shape[axis]).astype(np.float32)
    zeros = None if fmt.kind == "float" else np.arange(x.shape[axis]).astype(fmt.dtype)
    found = fake_quantize(x, QParams(scales, zeros), spec)
    for channel in range(x.shape[axis]):
        one = QParams(scales[channel], None if zeros is None else zeros[channel])
        np.testing.assert_array_equal(
            found.take(channel, axis), fake_quantize(x.take(channel, axis), one, single)
        )


def test_blocks_repeat_their_scale_along_the_axis():
    x = np.arange(10, dtype=np.float32).reshape(2, 5)
    spec = QuantSpec(format=INT8, axis=1, block_size=2)
    scales = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    codes = quantize(x, QParams(scales, np.zeros((2, 3), np.int8)), spec).qvalue
    # The last block is short.
    repeated = np.array([[1, 1, 2, 2, 3], [4, 4, 5, 5, 6]])
    np.testing.assert_array_equal(codes, np.rint(x / repeated))


def test_a_global_scale_multiplies():
    spec = QuantSpec(format=INT8)
    params = QParams(np.float32(0.5), np.int8(0), np.float32(4))
    assert dequantize(QTensor(np.array([3], np.int8), params, spec)).tolist() == [6]


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (QuantSpec(format=INT8), (3,)),
        (QuantSpec(format=INT8, axis=1), (2,)),
        (QuantSpec(format=INT8, axis=1), ()),
        (QuantSpec(format=INT8, axis=1, block_size=2), (2, 3)),
    ],
    ids=["per tensor", "per channel", "scalar", "blocks"],
)
def test_scales_of_another_shape_are_refused(spec, shape):
    params = QParams(np.ones(shape, np.float32), np.zeros(shape, np.int8))
    with pytest.raises(SpecError, match="scale: shape"):
        quantize(np.ones((2, 3), np.float32), params, spec)


def test_an_integer_without_a_zero_point_is_refused():
    with pytest.raises(SpecError, match="int8: an integer format needs a zero point"):
        quantize(np.ones(2, np.float32), QParams(np.float32(1)), QuantSpec(format=INT8))


@given(x=VALUES)
def test_a_second_pass_changes_nothing(x):
    for spec in SPECS:
        found = qparams_from_range(Range(x.min(), x.max()), spec)
        once = fake_quantize(x, found, spec)
        np.testing.assert_array_equal(fake_quantize(once, found, spec), once)

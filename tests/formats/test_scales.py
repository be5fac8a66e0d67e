"""Scales in few bits, against literal readings of their specifications."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantkit.formats import (
    E8M0,
    FP4_E2M1,
    FP8_E4M3,
    FP8_E5M2,
    INT8,
    QTensor,
    QuantSpec,
    dequantize,
    dynamic_qparams,
    qparams_from_range,
    quantize,
    range_of,
)
from quantkit.formats.scales import power_of_two_scale

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
# Powers of two up to which the mantissa's neighbours are exact in float32.
AMAX = st.floats(2.0**-100, 2.0**100, width=32)
BLOCKS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 70)),
    elements=st.floats(-(2.0**20), 2.0**20, width=32, allow_subnormal=False),
)


def floor_log2(x):
    """floor(log2(x)) of a rational, exactly."""
    x, power = Fraction(x), 0
    while x >= 2:
        x, power = x / 2, power + 1
    while x < 1:
        x, power = x * 2, power - 1
    return power


def literal_nearest(x, magnitudes):
    """The value of least distance; of two equally near the one whose code is even; saturating."""
    distance = [abs(abs(Fraction(float(x))) - Fraction(m)) for m in magnitudes]
    least = min(distance)
    near = [code for code, d in enumerate(distance) if d == least]
    code = near[0] if len(near) == 1 or near[0] % 2 == 0 else near[1]
    return float(np.copysign(magnitudes[code], x))


def literal_mx_power(amax, largest, mantissa_bits, rule):
    if amax == 0:
        return 0
    emax = floor_log2(largest)
    if rule == "ocp":
        power = floor_log2(amax) - emax
    elif rule == "rceil":
        ratio = Fraction(amax) / Fraction(largest)
        power = floor_log2(ratio)
        power += Fraction(2) ** power < ratio
    else:
        step = Fraction(2) ** (floor_log2(amax) - mantissa_bits)
        # Python rounds fractions half to even.
        power = floor_log2(round(Fraction(amax) / step) * step) - emax
    return max(-127, min(127, power))


# --- MX ---


@pytest.mark.parametrize("rule", ["ocp", "rceil", "even"])
@pytest.mark.parametrize(
    ("fmt", "mantissa_bits"),
    [(FP4_E2M1, 1), (FP8_E4M3, 3), (FP8_E5M2, 2)],
    ids=lambda v: getattr(v, "name", ""),
)
@given(amax=AMAX)
def test_the_scale_of_a_block_is_the_power_of_two_that_its_rule_says(fmt, mantissa_bits, rule, amax):
    power = literal_mx_power(amax, fmt.max, mantissa_bits, rule)
    assert power_of_two_scale(np.float64(amax), fmt, rule) == 2.0**power


@pytest.mark.parametrize("fmt", [FP4_E2M1, FP8_E4M3], ids=lambda f: f.name)
@pytest.mark.parametrize("rule", ["ocp", "rceil", "even"])
def test_rules_part_where_the_specification_says(fmt, rule):
    top, mantissa_bits = fmt.max, {"fp4_e2m1": 1, "fp8_e4m3": 3}[fmt.name]
    next_power = 2.0 ** (floor_log2(top) + 1)
    tie = next_power * (1 - 2.0 ** -(mantissa_bits + 2))
    up = np.nextafter
    for amax in (top, up(top, np.inf), up(tie, 0), tie, up(next_power, 0), next_power):
        expected = {
            "ocp": 2 if amax >= next_power else 1,
            "rceil": 2 if amax > top else 1,
            "even": 2 if amax >= tie else 1,
        }[rule]
        assert power_of_two_scale(np.float64(amax), fmt, rule) == expected


@given(amax=AMAX)
def test_rceil_saturates_nothing_and_ocp_less_than_an_octave(amax):
    for fmt in (FP4_E2M1, FP8_E4M3):
        assert amax <= fmt.max * float(power_of_two_scale(np.float64(amax), fmt, "rceil"))
        assert amax < 2 * 2.0 ** floor_log2(fmt.max) * float(power_of_two_scale(np.float64(amax), fmt, "ocp"))


@pytest.mark.parametrize("rule", ["ocp", "rceil", "even"])
def test_exponents_stop_where_e8m0_does(rule):
    ends = np.array([0.0, 2.0**-149, 3.4e38])
    found = power_of_two_scale(ends, FP4_E2M1, rule)
    assert found[:2].tolist() == [1, 2.0**-127]
    assert found[2] <= 2.0**127
    assert np.array_equal(found.astype(E8M0.dtype).astype(np.float32), found)


def test_int8_blocks_are_those_of_mxint8():
    # Elements of MXINT8 are code / 64 under 2^floor(log2(amax)).
    found = power_of_two_scale(np.array([1.0, 1.99, 2.0]), INT8, "ocp")
    assert found.tolist() == [1 / 64, 1 / 64, 2 / 64]


@pytest.mark.parametrize("rule", ["ocp", "rceil", "even"])
@given(x=BLOCKS)
def test_mxfp4_is_its_specification_to_the_letter(rule, x):
    spec = QuantSpec(format=FP4_E2M1, axis=1, block_size=32, scale_format=E8M0, scale_rule=rule)
    params = dynamic_qparams(x, spec)
    found = dequantize(quantize(x, params, spec))
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], 32):
            block = x[row, start : start + 32]
            power = literal_mx_power(float(np.abs(block).max()), 6, 1, rule)
            assert params.scale[row, start // 32] == 2.0**power
            scaled = [float(v) / 2.0**power for v in block]
            assert found[row, start : start + 32].tolist() == [
                literal_nearest(v, E2M1) * 2.0**power for v in scaled
            ]


def test_mxfp8_saturates_under_ocp_and_not_under_rceil():
    x = np.zeros((1, 32), np.float32)
    x[0, 0] = 511
    for rule, expected in (("ocp", 448), ("rceil", 512)):
        spec = QuantSpec(format=FP8_E4M3, axis=1, block_size=32, scale_format=E8M0, scale_rule=rule)
        assert dequantize(quantize(x, dynamic_qparams(x, spec), spec))[0, 0] == expected


# --- NVFP4 ---

NVFP4 = QuantSpec(format=FP4_E2M1, axis=1, block_size=16, scale_format=FP8_E4M3)


@given(x=BLOCKS)
def test_nvfp4_is_its_specification_to_the_letter(x):
    params = qparams_from_range(range_of(x, NVFP4), NVFP4)
    found = quantize(x, params, NVFP4)
    values = dequantize(found)
    amax = float(np.abs(x).max())
    shared = np.float32(max(amax / (6 * 448), 2.0**-126)) if amax else np.float32(1)
    assert params.global_scale == shared
    e4m3 = FP8_E4M3.magnitudes().tolist()
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], 16):
            block = x[row, start : start + 16]
            top = float(np.abs(block).max())
            wanted = 1.0 if top == 0 else max(top / (6 * float(shared)), 2.0**-9)
            scale = params.scale[row, start // 16]
            assert scale == literal_nearest(wanted, e4m3)
            # Quantized with the rounded scale, decoded with it as two DequantizeLinear in a row do.
            step = np.float32(scale) * shared
            with np.errstate(over="ignore"):
                ratios = block / step
            codes = [literal_nearest(min(max(v, -6), 6), E2M1) for v in ratios]
            assert found.qvalue[row, start : start + 16].astype(float).tolist() == codes
            assert values[row, start : start + 16].tolist() == [float(np.float32(c) * step) for c in codes]


def test_the_scales_of_nvfp4_are_codes_of_e4m3():
    x = np.random.default_rng(0).standard_t(3, size=(8, 64)).astype(np.float32)
    params = qparams_from_range(range_of(x, NVFP4), NVFP4)
    assert params.scale.max() == 448
    np.testing.assert_array_equal(params.scale.astype(FP8_E4M3.dtype).astype(np.float32), params.scale)
    assert params.zero_point is None


def test_blocks_far_below_the_largest_keep_a_scale():
    x = np.ones((1, 64), np.float32)
    x[0, 16:32], x[0, 32:48], x[0, 48:] = 2.0**-16, 2.0**-30, 0
    params = qparams_from_range(range_of(x, NVFP4), NVFP4)
    # 448 · 2⁻¹⁶ = 3.5 · 2⁻⁹ lies between two subnormal codes; half to even.
    assert params.scale[0].tolist() == [448, 4 * 2.0**-9, 2.0**-9, 1]
    back = dequantize(quantize(x, params, NVFP4))
    assert back[0, 32:].tolist() == [0] * 32


def test_a_fixed_global_scale_is_kept():
    x = np.full((1, 16), 12, np.float32)
    params = dynamic_qparams(x, NVFP4, global_scale=np.asarray(0.5, np.float32))
    assert (float(params.global_scale), params.scale.tolist()) == (0.5, [[4]])
    assert dequantize(quantize(x, params, NVFP4)).tolist() == x.tolist()


def test_a_tensor_beyond_its_fixed_global_scale_saturates():
    x = np.full((1, 16), 1e6, np.float32)
    params = dynamic_qparams(x, NVFP4, global_scale=np.asarray(1, np.float32))
    assert dequantize(quantize(x, params, NVFP4))[0, 0] == 6 * 448


def test_integers_take_scales_in_few_bits_too():
    spec = QuantSpec(format=INT8, axis=0, block_size=2, scale_format=FP8_E4M3)
    x = np.array([127, -254, 1, 0.5], np.float32)
    params = qparams_from_range(range_of(x, spec), spec)
    assert params.zero_point is not None
    assert params.zero_point.tolist() == [0, 0]
    np.testing.assert_allclose(dequantize(quantize(x, params, spec)), x, atol=1.1)


@pytest.mark.parametrize(
    "spec", [NVFP4, QuantSpec(format=FP4_E2M1, axis=1, block_size=16, scale_format=E8M0)]
)
def test_a_tensor_of_zeros_stays_zero(spec):
    x = np.zeros((2, 20), np.float32)
    params = qparams_from_range(range_of(x, spec), spec)
    assert params.scale.tolist() == [[1, 1], [1, 1]]
    assert not dequantize(QTensor(quantize(x, params, spec).qvalue, params, spec)).any()

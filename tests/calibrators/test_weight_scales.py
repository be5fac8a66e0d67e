import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantkit.calibrators import weight_qparams
from quantkit.errors import SpecError, UnknownNameError
from quantkit.formats import (
    E8M0,
    FP4_E2M1,
    FP8_E4M3,
    INT2,
    INT3,
    INT4,
    INT8,
    UINT2,
    UINT4,
    UINT8,
    QParams,
    QuantSpec,
    fake_quantize,
    qparams_from_range,
    range_of,
    scale_shape,
)
from quantkit.formats.layout import to_groups

BLOCKS = {"axis": 0, "block_size": 16}
SPECS = [
    QuantSpec(format=INT4, **BLOCKS),
    QuantSpec(format=UINT4, **BLOCKS),
    QuantSpec(format=UINT4, axis=-1, block_size=16, symmetric=False),
    QuantSpec(format=INT3, **BLOCKS),
    QuantSpec(format=INT2, **BLOCKS),
    QuantSpec(format=UINT2, **BLOCKS, symmetric=False),
    QuantSpec(format=INT8, axis=1),
    QuantSpec(format=UINT8, axis=0, symmetric=False),
    QuantSpec(format=INT4),
    QuantSpec(format=FP4_E2M1, **BLOCKS),
    QuantSpec(format=FP8_E4M3, block_shape=(2, 3)),
    QuantSpec(format=FP4_E2M1, axis=-1, block_size=16, scale_format=FP8_E4M3),
    QuantSpec(format=FP4_E2M1, axis=0, block_size=32, scale_format=E8M0, scale_rule="ocp"),
    QuantSpec(format=FP8_E4M3, axis=0, block_size=32, scale_format=E8M0),
]
WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=3, max_side=20),
    elements=st.floats(-1e4, 1e4, width=32).map(lambda v: np.float32(v) if abs(v) > 1e-4 else np.float32(0)),
)
INT4_BLOCKS = SPECS[0]


def by_name(spec):
    return f"{spec}"


def errors(w, params, spec, importance=1.0):
    """Σ importance · error² of every group, in the order of the scales."""
    lost = (w - fake_quantize(w, params, spec)).astype(np.float64) ** 2 * importance
    return to_groups(lost, spec).sum(axis=0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("spec", SPECS, ids=by_name)
@settings(max_examples=40)
@given(w=WEIGHTS)
def test_mse_never_loses_more_than_amax_in_any_group(spec, w):
    amax, mse = (weight_qparams(w, spec, method=method) for method in ("amax", "mse"))
    assert mse.scale.shape == amax.scale.shape == scale_shape(w.shape, spec)
    before, after = errors(w, amax, spec), errors(w, mse, spec)
    # A search in float32 tells errors apart to about 1e-5 of themselves, and of w² where they are but rounding.
    floor = 1e-12 * to_groups(w.astype(np.float64) ** 2, spec).sum(axis=0)
    assert np.all(after <= before * (1 + 1e-5) + floor)


@pytest.mark.parametrize("method", ["amax", "mse"])
@pytest.mark.parametrize("spec", SPECS, ids=by_name)
@settings(max_examples=25)
@given(w=WEIGHTS)
def test_scales_are_positive_normal_numbers_unless_asked_otherwise(spec, method, w):
    found = weight_qparams(w, spec, method=method)
    assert found.scale.dtype == np.float32
    assert np.all(found.scale >= np.finfo(np.float32).tiny)
    assert (found.zero_point is None) == (spec.format.kind == "float")
    assert (found.global_scale is None) == (not spec.has_global_scale)
    if found.zero_point is not None:
        assert found.zero_point.dtype == spec.format.dtype
        if spec.symmetric:
            assert np.all(found.zero_point.astype(int) == spec.format.middle)


@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_a_group_of_zeros_has_the_scale_one_and_stays_zero(spec):
    w = np.zeros((64, 64), np.float32)
    w[:32] = normal(32, 64)
    for method in ("amax", "mse"):
        found = weight_qparams(w, spec, method=method)
        back = fake_quantize(w, found, spec)
        assert not back[32:].any()
        groups = to_groups(w, spec)
        assert np.all(found.scale.reshape(-1)[~groups.any(axis=0)] == 1)


@pytest.mark.parametrize(
    "spec", [s for s in SPECS if s.scale_format is None and s.block_shape is None], ids=by_name
)
def test_mse_comes_near_the_least_error_of_a_brute_search(spec):
    w = np.random.default_rng(0).standard_t(5, size=(64, 160)).astype(np.float32)
    w += np.float32(0.3)
    amax = qparams_from_range(range_of(w, spec), spec)
    brute = np.full(errors(w, amax, spec).shape, np.inf)
    for factor in np.geomspace(1.55, 0.2, 300):
        scale = (amax.scale * np.float32(factor)).astype(np.float32)
        shifts = (0,) if spec.symmetric else (-2, -1, 0, 1, 2)
        for shift in shifts:
            zero = amax.zero_point
            if zero is not None and shift:
                moved = np.clip(zero.astype(int) + shift, spec.format.min, spec.format.max)
                zero = moved.astype(spec.format.dtype)
            brute = np.minimum(brute, errors(w, QParams(scale, zero), spec))
    found = errors(w, weight_qparams(w, spec), spec)
    assert found.sum() <= 1.02 * brute.sum()


@pytest.mark.parametrize("seed", range(3))
def test_nvfp4_scales_are_nearly_the_best_codes_of_all(seed):
    spec = QuantSpec(format=FP4_E2M1, axis=0, block_size=16, scale_format=FP8_E4M3)
    w = normal(64, 32, seed=seed) * np.exp(normal(1, 32, seed=seed))
    found = weight_qparams(w, spec)
    np.testing.assert_array_equal(found.scale.astype(FP8_E4M3.dtype).astype(np.float32), found.scale)
    codes = [c for c in FP8_E4M3.codes().astype(np.float32) if c > 0]
    best = np.min(
        [errors(w, QParams(np.full_like(found.scale, c), None, found.global_scale), spec) for c in codes],
        axis=0,
    )
    loss = errors(w, found, spec)
    assert loss.sum() <= 1.01 * best.sum()
    assert loss.sum() < 0.8 * errors(w, weight_qparams(w, spec, method="amax"), spec).sum()


def test_mse_takes_the_best_power_of_two_for_mx():
    spec = QuantSpec(format=FP4_E2M1, axis=0, block_size=32, scale_format=E8M0)
    w = normal(64, 32)
    found = weight_qparams(w, spec)
    rule = weight_qparams(w, spec, method="amax")
    powers = [np.ldexp(rule.scale, shift) for shift in range(-3, 4)]
    best = np.min([errors(w, QParams(p), spec) for p in powers], axis=0)
    np.testing.assert_array_equal(errors(w, found, spec), best)


@pytest.mark.parametrize("rule", ["ocp", "rceil", "even"])
def test_amax_follows_the_rule_of_mx(rule):
    spec = QuantSpec(format=FP4_E2M1, axis=0, block_size=32, scale_format=E8M0, scale_rule=rule)
    w = normal(64, 8)
    expected = qparams_from_range(range_of(w, spec), spec)
    np.testing.assert_array_equal(weight_qparams(w, spec, method="amax").scale, expected.scale)


# --- the additional code of symmetric integers ---


@pytest.mark.parametrize(
    ("block", "divisor"),
    [
        # −8 serves the larger side: nothing is clipped.
        ([-8, 7, 3, 1], 8),
        # 8 would be clipped to 7, and all others fit steps of 8 / 7 badly enough to bear that.
        ([8, 7, 6, 5, 4, 3, 2, 1, -1, -2, -3, -4, -5, -6, -7, -7], 8),
        ([8, 0, 0, 0], 7),
    ],
)
def test_amax_of_few_bits_is_divided_by_what_loses_less(block, divisor):
    w = np.array(block, np.float32).reshape(-1, 1)
    spec = QuantSpec(format=INT4, axis=0, block_size=len(block))
    assert weight_qparams(w, spec, method="amax").scale == np.float32(8 / divisor)


def test_signed_scales_put_the_largest_magnitude_on_the_additional_code():
    w = np.array([[8.0, -4, 1], [-2, 16, -3]], np.float32)
    spec = QuantSpec(format=INT4, axis=1, block_size=3)
    found = weight_qparams(w, spec, method="amax", signed_scales=True)
    assert found.scale.tolist() == [[-1], [-2]]
    assert fake_quantize(w, found, spec)[:, :2].tolist() == [[8, -4], [-2, 16]]


@pytest.mark.parametrize("fmt", [INT2, INT3, INT4], ids=lambda f: f.name)
def test_signed_scales_lose_less(fmt):
    spec = QuantSpec(format=fmt, axis=0, block_size=32)
    w = normal(256, 64)
    positive, signed = (weight_qparams(w, spec, signed_scales=s) for s in (False, True))
    assert np.all(positive.scale > 0)
    assert np.any(signed.scale < 0)
    # Block by block only nearly: the search ends beside another scale.
    assert np.all(errors(w, signed, spec) <= errors(w, positive, spec) * 1.05)
    assert errors(w, signed, spec).sum() < 0.95 * errors(w, positive, spec).sum()


def test_eight_bits_have_no_negative_scales():
    w = np.abs(normal(32, 4))
    spec = QuantSpec(format=INT8, axis=1)
    found = weight_qparams(w, spec, signed_scales=True)
    assert np.all(found.scale > 0)


# --- importance ---


@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_what_counts_for_nothing_does_not_widen_a_range(spec):
    w = normal(64, 48)
    importance = np.ones((64, 1), np.float32)
    importance[::16] = 0
    outliers, zeros = w.copy(), w.copy()
    outliers[::16], zeros[::16] = 1000, 0
    for method in ("amax", "mse"):
        found = weight_qparams(outliers, spec, method=method, importance=importance)
        expected = weight_qparams(zeros, spec, method=method, importance=importance)
        counts = to_groups(np.broadcast_to(importance, w.shape), spec).any(axis=0)
        assert counts.any()
        np.testing.assert_array_equal(found.scale.reshape(-1)[counts], expected.scale.reshape(-1)[counts])
        assert found.global_scale == expected.global_scale


def test_a_group_that_counts_for_nothing_keeps_its_own_range():
    w = normal(32, 4)
    importance = np.ones((32, 1), np.float32)
    importance[:16] = 0
    found = weight_qparams(w, INT4_BLOCKS, importance=importance)
    assert np.abs(w - fake_quantize(w, found, INT4_BLOCKS)).max() < 0.5


@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_importance_lowers_the_error_that_it_weighs(spec):
    w = normal(64, 48)
    importance = np.exp(2 * normal(64, 1, seed=1))
    weighed = weight_qparams(w, spec, importance=importance)
    plain = weight_qparams(w, spec)
    before, after = (errors(w, p, spec, importance).sum() for p in (plain, weighed))
    assert after <= before


def test_equal_importance_changes_nothing():
    w = normal(64, 48)
    found = weight_qparams(w, INT4_BLOCKS, importance=np.full((64, 1), 4, np.float32))
    np.testing.assert_array_equal(found.scale, weight_qparams(w, INT4_BLOCKS).scale)


# --- shapes and types ---


@pytest.mark.parametrize(
    ("spec", "axis"),
    [
        (QuantSpec(format=INT4, axis=0, block_size=128), 1),
        (QuantSpec(format=INT4, axis=1, block_size=128), 0),
        (QuantSpec(format=INT4, axis=1), 1),
        (QuantSpec(format=UINT4, axis=0, symmetric=False), 0),
        (QuantSpec(format=FP4_E2M1, axis=1, block_size=16), 0),
        (QuantSpec(format=FP8_E4M3, block_shape=(5, 700)), 0),
    ],
    ids=str,
)
def test_a_weight_is_solved_as_its_parts_are(spec, axis):
    # Larger than what is worked on at a time.
    w = normal(500, 700)
    importance = np.exp(normal(500, 700, seed=1))
    whole = weight_qparams(w, spec, importance=importance)
    part = np.s_[:, 300:305] if axis else np.s_[300:305]
    found = weight_qparams(w[part], spec, importance=importance[part])
    scales = np.s_[300:305] if whole.scale.ndim == 1 else part
    if spec.block_shape is not None:
        scales = np.s_[60:61]
    np.testing.assert_array_equal(found.scale, whole.scale[scales])
    if found.zero_point is not None:
        np.testing.assert_array_equal(found.zero_point, whole.zero_point[scales])


def test_a_weight_of_three_axes_is_solved_matrix_by_matrix():
    w = normal(3, 40, 20)
    for spec in (
        QuantSpec(format=INT4, axis=1, block_size=16),
        QuantSpec(format=FP8_E4M3, block_shape=(16, 16)),
    ):
        flat = QuantSpec(format=INT4, axis=0, block_size=16) if spec.axis else spec
        whole = weight_qparams(w, spec)
        for index in range(3):
            np.testing.assert_array_equal(whole.scale[index], weight_qparams(w[index], flat).scale)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("method", ["amax", "mse"])
@pytest.mark.parametrize("signed", [False, True])
def test_scales_are_numbers_of_the_type_that_will_store_them(dtype, method, signed):
    w = normal(64, 8).astype(dtype)
    found = weight_qparams(w, INT4_BLOCKS, method=method, signed_scales=signed, scale_dtype=np.dtype(dtype))
    np.testing.assert_array_equal(found.scale.astype(dtype).astype(np.float32), found.scale)


@pytest.mark.parametrize(
    ("w", "spec", "message"),
    [
        (np.zeros((0, 3), np.float32), INT4_BLOCKS, "fc.weight: empty"),
        (np.array([[np.nan, 1]], np.float32), INT4_BLOCKS, "fc.weight: NaN or infinity"),
        (np.array([[1, -np.inf]], np.float32), INT4_BLOCKS, "fc.weight: NaN or infinity"),
        (
            np.ones((2, 3), np.float32),
            QuantSpec(format=INT4, axis=2, block_size=2),
            "fc.weight: no axis 2 in",
        ),
    ],
    ids=["empty", "nan", "inf", "axis"],
)
def test_a_weight_that_cannot_be_solved_is_named(w, spec, message):
    with pytest.raises(SpecError, match=message):
        weight_qparams(w, spec, name="fc.weight")


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (
            np.ones(7, np.float32),
            r"fc.weight: importance of shape \(7,\) does not broadcast against \(16, 3\)",
        ),
        (np.ones((2, 16, 3), np.float32), "does not broadcast"),
        (np.full((16, 1), -1, np.float32), "importance that is negative"),
        (np.full((16, 1), np.nan, np.float32), "importance that is negative, NaN or infinite"),
    ],
)
def test_importance_that_does_not_fit_is_refused(importance, message):
    with pytest.raises(SpecError, match=message):
        weight_qparams(normal(16, 3), INT4_BLOCKS, importance=importance, name="fc.weight")


def test_an_unknown_method_names_those_that_exist():
    with pytest.raises(UnknownNameError, match="choose one of amax, mse"):
        weight_qparams(normal(2, 2), INT4_BLOCKS, method="hqq")

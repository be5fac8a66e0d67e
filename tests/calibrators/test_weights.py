import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantkit.calibrators import weight_range
from quantkit.errors import SpecError, UnknownNameError
from quantkit.formats import FP8_E4M3, INT8, UINT8, QuantSpec, fake_quantize, qparams_from_range

SPECS = [
    QuantSpec(format=INT8),
    QuantSpec(format=INT8, axis=0),
    QuantSpec(format=INT8, axis=-1),
    QuantSpec(format=UINT8, axis=1, symmetric=False),
    QuantSpec(format=FP8_E4M3, axis=1),
]
WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=4, max_side=5),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)


def channel_errors(w, spec, range_):
    lost = (w - fake_quantize(w, qparams_from_range(range_, spec), spec)).astype(np.float64)
    axis = None if spec.axis is None else tuple(i for i in range(w.ndim) if i != spec.axis % w.ndim)
    return np.sum(lost**2, axis=axis)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.format.name}-{s.axis}")
@given(w=WEIGHTS)
def test_amax_holds_every_value_of_every_channel(spec, w):
    found = weight_range(w, spec)
    rows = (
        w.reshape(1, -1)
        if spec.axis is None
        else np.moveaxis(w, spec.axis, 0).reshape(w.shape[spec.axis], -1)
    )
    assert np.array_equal(found.lo.reshape(-1), rows.min(axis=1))
    assert np.array_equal(found.hi.reshape(-1), rows.max(axis=1))


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.format.name}-{s.axis}")
@given(w=WEIGHTS)
def test_mse_never_loses_more_than_amax_in_any_channel(spec, w):
    amax, mse = weight_range(w, spec), weight_range(w, spec, "mse")
    assert mse.lo.shape == amax.lo.shape == (() if spec.axis is None else (w.shape[spec.axis],))
    assert np.all((np.minimum(amax.lo, 0) <= mse.lo) & (mse.hi <= np.maximum(amax.hi, 0)))
    before = channel_errors(w, spec, amax)
    assert np.all(channel_errors(w, spec, mse) <= before * (1 + 1e-6))


def test_mse_finds_the_least_error_of_a_brute_search():
    w = np.random.default_rng(0).standard_t(3, size=(6, 4000)).astype(np.float32)
    spec = QuantSpec(format=INT8, axis=0)
    amax = weight_range(w, spec)
    shrinks = np.linspace(0.02, 1, 200)
    brute = np.min([channel_errors(w, spec, type(amax)(amax.lo * f, amax.hi * f)) for f in shrinks], axis=0)
    assert np.all(channel_errors(w, spec, weight_range(w, spec, "mse")) <= 1.03 * brute)


def test_mse_follows_an_outlier_through_several_octaves():
    w = np.random.default_rng(0).normal(size=(2, 200_000)).astype(np.float32)
    w[0, 7] = 300
    spec = QuantSpec(format=INT8, axis=0)
    found = weight_range(w, spec, "mse")
    # (300 − t)² + 200,000 t² / (12 · 127²) is least at t = 148.
    assert found.amax[0] == pytest.approx(148, rel=0.05)
    assert found.amax[1] == pytest.approx(np.abs(w[1]).max(), rel=0.25)


def test_a_channel_of_zeros_stays_as_it_is():
    w = np.zeros((2, 8), np.float32)
    w[1] = 1
    found = weight_range(w, QuantSpec(format=INT8, axis=0), "mse")
    assert found.amax.tolist() == [0, 1]


def test_groups_and_columns_are_cut_where_they_do_not_show():
    # More values a channel than are worked on at a time, and more channels than go into one group.
    rng = np.random.default_rng(1)
    spec = QuantSpec(format=INT8, axis=0)
    for shape in ((3, 70_001), (70_001, 3)):
        w = rng.standard_t(4, size=shape).astype(np.float32)
        whole = weight_range(w, spec, "mse")
        for rows in (slice(0, 1), slice(1, 3)):
            assert np.array_equal(weight_range(w[rows], spec, "mse").hi, whole.hi[rows])


def test_float16_weights_are_read():
    w = np.array([[1, -2], [0.5, 0.25]], np.float16)
    assert weight_range(w, QuantSpec(format=INT8, axis=0)).amax.tolist() == [2, 0.5]


@pytest.mark.parametrize(
    ("w", "spec", "message"),
    [
        (np.zeros((0, 3), np.float32), QuantSpec(format=INT8, axis=0), "fc.weight: empty"),
        (np.array([[np.nan, 1]], np.float32), QuantSpec(format=INT8), "fc.weight: NaN or infinity"),
        (np.ones((2, 3), np.float32), QuantSpec(format=INT8, axis=2), "fc.weight: no axis 2 in shape"),
        (
            np.ones((2, 4), np.float32),
            QuantSpec(format=INT8, axis=1, block_size=2),
            "fc.weight: .* in blocks",
        ),
    ],
    ids=["empty", "nan", "axis", "blocks"],
)
def test_a_weight_that_cannot_be_ranged_is_named(w, spec, message):
    with pytest.raises(SpecError, match=message):
        weight_range(w, spec, name="fc.weight")


def test_an_unknown_method_names_those_that_exist():
    with pytest.raises(UnknownNameError, match="choose one of amax, mse"):
        weight_range(np.ones((2, 2), np.float32), QuantSpec(format=INT8), "hqq")

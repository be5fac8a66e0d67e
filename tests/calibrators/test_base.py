import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantkit.calibrators import Calibrator, get_calibrator, list_calibrators
from quantkit.errors import SpecError, UnknownNameError
from quantkit.formats import INT8, QuantSpec
from quantkit.statistics import FloatHistogram
from tests.calibrators.data import AWKWARD, SPECS, histogram_of

METHODS = ["entropy", "minmax", "mse", "percentile"]
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def test_the_four_methods_are_listed_and_load():
    assert dict.fromkeys(METHODS, "").items() <= list_calibrators().items()


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_a_calibrator_that_knows_its_name(method):
    calibrator = get_calibrator(method)
    assert isinstance(calibrator, Calibrator)
    assert calibrator.name == method


def test_an_unknown_method_names_its_nearest():
    with pytest.raises(UnknownNameError, match=r"entropi.*did you mean entropy"):
        get_calibrator("entropi")


def test_an_unknown_option_names_the_options_that_exist():
    with pytest.raises(SpecError, match="percentile: no option quantile; its options are percentile"):
        get_calibrator("percentile", quantile=99)
    with pytest.raises(SpecError, match="minmax: no option percentile; it has no options"):
        get_calibrator("minmax", percentile=99)


def test_an_option_reaches_its_method():
    assert get_calibrator("percentile", percentile=99.0) != get_calibrator("percentile")


@pytest.mark.parametrize("method", METHODS)
def test_statistics_without_a_finite_value_are_refused(method):
    for x in ([], [np.nan, np.inf]):
        with pytest.raises(SpecError, match=f"no finite value among {len(x)} observed"):
            get_calibrator(method).solve(histogram_of(np.array(x, np.float32)), QuantSpec(format=INT8))


@pytest.mark.parametrize("method", METHODS)
def test_a_spec_per_channel_is_refused(method):
    with pytest.raises(SpecError, match="one range per tensor; use axis=None"):
        get_calibrator(method).solve(histogram_of(AWKWARD["random"]), QuantSpec(format=INT8, axis=1))


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("method", METHODS)
def test_a_range_lies_within_what_was_observed(method, spec, name):
    x = AWKWARD[name]
    finite = x[np.isfinite(x)]
    solved = get_calibrator(method).solve(histogram_of(x), SPECS[spec])
    assert solved.lo.shape == ()
    assert finite.min() <= solved.lo <= solved.hi <= finite.max()


@pytest.mark.parametrize("name", ["constant", "negative constant", "single value", "all zeros"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_of_one_value_is_held_exactly(method, spec, name):
    x = AWKWARD[name]
    solved = get_calibrator(method).solve(histogram_of(x), SPECS[spec])
    assert (solved.lo, solved.hi) == (x[0], x[0])


@pytest.mark.parametrize("method", METHODS)
@given(x=hnp.arrays(np.float32, st.integers(1, 60), elements=FINITE), spec=st.sampled_from(sorted(SPECS)))
def test_any_finite_data_gives_a_range_within_it(method, x, spec):
    solved = get_calibrator(method).solve(histogram_of(x), SPECS[spec])
    assert x.min() <= solved.lo <= solved.hi <= x.max()


@pytest.mark.parametrize("method", METHODS)
@given(
    parts=st.lists(hnp.arrays(np.float32, st.integers(0, 20), elements=FINITE), min_size=2, max_size=4),
    spec=st.sampled_from(sorted(SPECS)),
)
def test_shards_in_any_order_give_the_same_range(method, parts, spec):
    whole = np.concatenate(parts)
    if whole.size == 0:
        return
    merged = FloatHistogram()
    for part in reversed(parts):
        merged = merged.merge(histogram_of(part))
    calibrator = get_calibrator(method)
    a, b = (calibrator.solve(h, SPECS[spec]) for h in (merged, histogram_of(whole)))
    assert (a.lo, a.hi) == (b.lo, b.hi)

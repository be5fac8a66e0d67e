import pytest

from quantkit.calibrators import get_calibrator
from tests.calibrators.data import AWKWARD, SPECS, histogram_of


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["random", "one outlier", "positive", "negative", "subnormal"])
def test_minmax_clips_nothing(name, spec):
    x = AWKWARD[name]
    solved = get_calibrator("minmax").solve(histogram_of(x), SPECS[spec])
    assert (solved.lo, solved.hi) == (x.min(), x.max())


def test_minmax_leaves_infinities_out():
    x = AWKWARD["with infinities"]
    solved = get_calibrator("minmax").solve(histogram_of(x), SPECS["int8"])
    assert solved.hi == AWKWARD["random"].max()

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantkit.formats import FP4_E2M1, FP8_E4M3, FP8_E5M2, INT2, INT4, INT8, UINT4
from quantkit.formats.rounding import nearest_values

FORMATS = [FP4_E2M1, FP8_E4M3, FP8_E5M2, INT2, INT4, UINT4, INT8]
VALUES = hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(width=32, allow_nan=False))


def cast(x, fmt):
    clipped = np.clip(np.rint(x) if fmt.kind == "integer" else x, fmt.min, fmt.max)
    return clipped.astype(fmt.dtype).astype(np.float32)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@given(x=VALUES)
def test_rounding_is_clipping_and_casting(fmt, x):
    np.testing.assert_array_equal(nearest_values(x, fmt), cast(x, fmt))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_rounding_takes_the_side_of_every_boundary_that_a_cast_takes(fmt):
    values = np.unique(fmt.codes().astype(np.float32))
    middles = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    for x in (values, middles, *(np.nextafter(middles, np.float32(end)) for end in (-np.inf, np.inf))):
        np.testing.assert_array_equal(nearest_values(x, fmt), cast(x, fmt))

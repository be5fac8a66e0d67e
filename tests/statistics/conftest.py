import pytest

from quantkit.statistics import NATIVE, reduction


# Of a module, for Hypothesis runs a test many times within one call.
@pytest.fixture(params=["native", "numpy"], scope="module", autouse=True)
def implementation(request):
    """Every test runs with the C extension, where it was built, and with NumPy alone."""
    if request.param == "native" and not NATIVE:
        pytest.skip(f"the C extension is not built ({reduction.NATIVE_ERROR})")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(reduction, "_native", None)
        yield request.param

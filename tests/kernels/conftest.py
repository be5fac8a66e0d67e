import pytest

from quantkit.kernels.emulator import Mode, find_compiler

from .backends import EmulatorBackend, gpu


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `machine` runs on the emulator in every mode, and on the GPU if there is one."""
    if "machine" in metafunc.fixturenames:
        names = [mode.name.lower() for mode in Mode] + (["gpu"] if gpu() else [])
        metafunc.parametrize("machine", names, indirect=True)


@pytest.fixture
def machine(request: pytest.FixtureRequest):
    if request.param == "gpu":
        return gpu()
    if find_compiler() is None:
        pytest.skip("the emulator needs a C++ compiler")
    return EmulatorBackend(Mode[request.param.upper()])


@pytest.fixture
def compiler() -> str:
    """For tests of the emulator alone."""
    found = find_compiler()
    if found is None:
        pytest.skip("the emulator needs a C++ compiler")
    return found

from pathlib import Path

import pytest

from quantkit.kernels.emulator import Mode, find_compiler

from .backends import EmulatorBackend, gpu

HERE = Path(__file__).parent


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `machine` runs on the emulator in every mode, and on the GPU if there is one."""
    if "machine" in metafunc.fixturenames:
        names = [mode.name.lower() for mode in Mode] + (["gpu"] if gpu() else [])
        metafunc.parametrize("machine", names, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests of this folder out unless a marker expression asks for them."""
    if config.option.markexpr:
        return
    slow = [item for item in items if item.path.is_relative_to(HERE) and item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


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

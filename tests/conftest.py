"""What every test may ask for: the shipped example, the shared models, and how Hypothesis runs."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# No deadline: a busy machine is not a failing property. CI draws the same examples every time.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shared",
        metavar="DIR",
        help="folder that holds models/ and data/ (write --shared=DIR); without it tests of real models are skipped",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests out unless a marker expression asks for them."""
    if config.option.markexpr:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@dataclass(frozen=True, kw_only=True)
class DigitsExample:
    """Where the shipped example lies."""

    model: Path
    calib: Path
    eval: Path


@pytest.fixture(scope="session")
def digits() -> DigitsExample:
    """The shipped example: `model` (.onnx), `calib` (a folder of PNG), `eval` (.npz of images and labels)."""
    folder = ROOT / "examples" / "digits"
    return DigitsExample(model=folder / "model.onnx", calib=folder / "calib", eval=folder / "eval.npz")


@pytest.fixture(scope="session")
def shared_models(request: pytest.FixtureRequest) -> Path:
    """The folder of trained models given by --shared=DIR."""
    return _shared(request, "models")


@pytest.fixture(scope="session")
def shared_data(request: pytest.FixtureRequest) -> Path:
    """The folder of calibration and evaluation data given by --shared=DIR."""
    return _shared(request, "data")


def _shared(request: pytest.FixtureRequest, name: str) -> Path:
    given = request.config.getoption("--shared")
    if given is None:
        pytest.skip("needs --shared=DIR, a folder that holds models/ and data/")
    # Relative to where pytest was started, not to a test's temporary folder.
    folder = request.config.invocation_params.dir / given / name
    if not folder.is_dir():
        pytest.skip(f"--shared={given} holds no {name}/")
    return folder

import shutil
from pathlib import Path

import pytest

from quantkit.cache import CalibrationCache, ModelIdentity
from quantkit.data import open_data
from quantkit.graph import load_graph
from quantkit.observing.observe import observe
from tests.conftest import DigitsExample


@pytest.fixture(scope="session")
def digits_cache(tmp_path_factory: pytest.TempPathFactory, digits: DigitsExample) -> bytes:
    """The bytes of a calibration cache of model.onnx over calib/, both beside it."""
    here = tmp_path_factory.mktemp("digits")
    shutil.copy(digits.model, here / "model.onnx")
    (here / "calib").mkdir()
    for picture in sorted(digits.calib.iterdir())[:20]:
        shutil.copy(picture, here / "calib")
    graph = load_graph(here / "model.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        source = open_data("calib", graph.inputs)
        found = observe(graph, source)
        cache = CalibrationCache(
            model=ModelIdentity(path="model.onnx", name="model", fingerprint=graph.fingerprint),
            statistics=found.statistics,
            sample_fingerprints=found.fingerprints,
            data=source.description,
            method="entropy",
            method_options={},
            probe=found.probe,
            versions={},
        )
        cache.save("model.calib")
    return (here / "model.calib").read_bytes()


@pytest.fixture
def folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: DigitsExample, digits_cache: bytes
) -> Path:
    """The current folder, with model.onnx, calib/ and model.calib."""
    shutil.copy(digits.model, tmp_path / "model.onnx")
    (tmp_path / "calib").mkdir()
    for picture in sorted(digits.calib.iterdir())[:20]:
        shutil.copy(picture, tmp_path / "calib")
    (tmp_path / "model.calib").write_bytes(digits_cache)
    monkeypatch.chdir(tmp_path)
    return tmp_path

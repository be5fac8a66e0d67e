"""Folders to run commands in."""

import shutil
import sys
import warnings
from pathlib import Path

import pytest

from quantkit.cli import main
from tests.cli.commands import SAMPLES, Result, Run, script
from tests.conftest import DigitsExample


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `quantkit` with these words, in this process."""

    def run(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["quantkit", *map(str, words)])
        capsys.readouterr()
        with warnings.catch_warnings(), pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        code = exit_.value.code
        return Result(code if isinstance(code, int) else 0, out, err)

    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: DigitsExample) -> Path:
    """The current folder, which holds model.onnx and calib/ and nothing else."""
    here = tmp_path / "here"
    (here / "calib").mkdir(parents=True)
    shutil.copy(digits.model, here / "model.onnx")
    for picture in sorted(digits.calib.iterdir())[:SAMPLES]:
        shutil.copy(picture, here / "calib")
    monkeypatch.chdir(here)
    return here


@pytest.fixture(scope="session")
def saved_cache(tmp_path_factory: pytest.TempPathFactory, digits: DigitsExample) -> bytes:
    """The bytes of model.calib, as `quantkit calibrate` writes it."""
    here = tmp_path_factory.mktemp("cache")
    shutil.copy(digits.model, here / "model.onnx")
    script("calibrate", "model.onnx", "--data", digits.calib, "--samples", SAMPLES, cwd=here)
    return (here / "model.calib").read_bytes()


@pytest.fixture
def calibrated(folder: Path, saved_cache: bytes) -> Path:
    """`folder`, with model.calib in it."""
    Path("model.calib").write_bytes(saved_cache)
    return folder

"""Ctrl-C, wherever it comes."""

import subprocess
import sys
from pathlib import Path

import pytest

from quantkit import __version__
from tests.cli.commands import Result, files, interrupted


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_an_interrupted_calibration_leaves_no_file(folder: Path) -> None:
    before = files(folder)
    found = interrupted("calibrate", "model.onnx", "--data", "calib", at="quantkit.pipeline.observe")
    assert found == Result(130, "", "interrupted; nothing was written\n")
    assert files(folder) == before


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_an_interrupted_evaluation_does_not_speak_of_files(folder: Path) -> None:
    words = ("evaluate", "model.onnx", "model.onnx", "--data", "calib")
    assert interrupted(*words, at="quantkit.pipeline.evaluate") == Result(130, "", "interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_an_interrupt_after_writing_does_not_deny_it(calibrated: Path) -> None:
    found = interrupted("export", "--int8", at="quantkit.cli.export._show")
    assert found == Result(130, "", "interrupted\n")
    assert Path("model.int8.onnx").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize("package", ["typer", "numpy", "onnx_ir", "onnxruntime"])
def test_an_interrupt_while_packages_are_imported_is_one_line(calibrated: Path, package: str) -> None:
    interrupt = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {package!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from quantkit.cli import main\n"
        "main()"
    )
    words = ("calibrate", "model.onnx", "--data", "calib", "--out", "new.calib")
    found = subprocess.run([sys.executable, "-c", interrupt, *words], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (130, "")
    assert found.stderr in ("interrupted\n", "interrupted; nothing was written\n")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_an_interrupt_of_the_way_out_changes_nothing(calibrated: Path) -> None:
    late = (
        "import atexit, os, signal\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
        "from quantkit.cli import main\n"
        "main()"
    )
    found = subprocess.run([sys.executable, "-c", late, "--version"], capture_output=True, text=True)
    assert Result(found.returncode, found.stdout, found.stderr) == Result(0, f"quantkit {__version__}\n", "")

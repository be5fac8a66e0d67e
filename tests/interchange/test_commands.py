import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import quantkit
from quantkit.cli import main
from tests.conftest import DigitsExample

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `quantkit` with these words in this process; return exit code, output and errors."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quantkit", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def measured(digits: DigitsExample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example's model.onnx and model.calib."""
    folder = tmp_path_factory.mktemp("measured")
    shutil.copy(digits.model, folder / "model.onnx")
    quantkit.calibrate_model(folder / "model.onnx", digits.calib, samples=20).save(folder / "model.calib")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Path) -> Path:
    folder = tmp_path / "here"
    shutil.copytree(measured, folder)
    monkeypatch.chdir(folder)
    return folder


def test_from_a_tensorrt_cache_to_an_int8_file(here: Path, run: Run) -> None:
    code, out, _ = run("cache", "export", "--format", "tensorrt", "--trt", "100900", "--out", "old.cache")
    assert (code, out) == (0, "wrote old.cache: ranges of 11 tensors, method entropy\n")
    assert Path("old.cache").read_text().startswith("TRT-100900-EntropyCalibration2\n")
    Path("model.calib").unlink()
    code, out, _ = run("cache", "import", "old.cache", "--model", "model.onnx")
    assert code == 0
    assert "wrote model.calib: fixed ranges from old.cache (TRT-100900-EntropyCalibration2)" in out
    assert "next: quantkit export --int8" in out
    code, out, err = run("export", "--int8")
    assert code == 0
    assert "method imported" in out
    assert "made-up input alone" in err
    assert Path("model.int8.onnx").exists()
    assert run("cache", "show")[0] == 0


def test_a_measured_cache_is_not_replaced_unasked(here: Path, run: Run) -> None:
    before = Path("model.calib").read_bytes()
    run("cache", "export", "--format", "tensorrt", "--out", "x.cache")
    code, _, err = run("cache", "import", "x.cache", "--model", "model.onnx")
    assert code == 2
    assert "error: model.calib: is there, and was measured; name another file to write with --out." in err
    assert Path("model.calib").read_bytes() == before
    for _ in range(2):
        # What was imported may be imported again.
        assert run("cache", "import", "x.cache", "--model", "model.onnx", "--out", "i.calib")[0] == 0


def test_another_method_is_refused_in_one_line(here: Path, run: Run) -> None:
    run("cache", "export", "--format", "ort", "--method", "minmax", "--out", "x.cache")
    run("cache", "import", "x.cache", "--model", "model.onnx", "--format", "ort", "--out", "i.calib")
    for words in (
        ("export", "--int8", "--cache", "i.calib", "--method", "entropy"),
        ("cache", "export", "i.calib", "--format", "aimet", "--out", "y", "--method", "mse"),
        ("export", "--int8", "--cache", "i.calib", "--method", "percentile", "--percentile", "99"),
    ):
        code, _, err = run(*words)
        assert code == 2
        assert "the cache holds fixed ranges, imported from x.cache" in err
        assert err.count("\n") == 1


def test_both_commands_speak_json(here: Path, run: Run) -> None:
    written = json.loads(run("cache", "export", "--format", "ort-json", "--out", "x.json", "--json")[1])
    assert written["format"] == "ort-json"
    assert len(written["ranges"]) == 11
    found = json.loads(
        run("cache", "import", "x.json", "--model", "model.onnx", "--out", "i.calib", "--json")[1]
    )
    assert found["format"] == "ort"
    assert len(found["used"]) == 11
    assert found["not_in_file"] == found["not_in_model"] == []


def test_a_tensorrt_cache_given_as_a_cache_names_the_command(here: Path, run: Run) -> None:
    run("cache", "export", "--format", "tensorrt", "--out", "x.cache")
    code, _, err = run("export", "--int8", "--cache", "x.cache")
    assert code == 2
    assert "bring it in with `quantkit cache import x.cache --model MODEL`" in err


def test_an_input_is_not_written_over(here: Path, run: Run) -> None:
    run("cache", "export", "--format", "tensorrt", "--out", "x.cache")
    for words in (
        ("cache", "import", "x.cache", "--model", "model.onnx", "--out", "x.cache"),
        ("cache", "export", "model.calib", "--format", "ort", "--out", "model.calib"),
    ):
        code, _, err = run(*words)
        assert code == 2
        assert "is an input here" in err

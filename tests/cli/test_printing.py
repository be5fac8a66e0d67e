"""What commands print: closing lines, JSON, help, and where standard output goes nowhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

from quantkit import __version__
from tests.cli.commands import SAMPLES, Result, Run, command, next_commands

# --- closing lines ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "more"),
    [
        ("calib", ()),
        ("calib", ("--out", "other.calib")),
        ("calib", ("--out", "a folder/model.calib", "--image-preset", "0-1", "--mean", "0.2")),
        ("arrays.npz", ("--input", "input=pixels")),
    ],
    ids=["plain", "two caches", "a cache elsewhere", "renamed arrays"],
)
def test_the_next_commands_work_as_they_stand_there(
    calibrated: Path, run: Run, data: str, more: tuple[str, ...]
) -> None:
    Path("a folder").mkdir()
    np.savez("arrays.npz", pixels=np.ones((4, 1, 8, 8), np.float32), other=np.ones(4, np.float32))
    if "--out" not in more:
        Path("model.calib").unlink()
    exports = next_commands(run("calibrate", "model.onnx", "--data", data, *more))
    assert [words[:2] for words in exports] == [["export", "--int8"], ["export", "--fp8"]]
    for words in exports:
        exported = run(*words)
        assert exported.code == 0
        (evaluation,) = next_commands(exported)
        assert evaluation[0] == "evaluate"
        evaluated = run(*evaluation)
        assert evaluated.code == 0
        assert "SQNR" in evaluated.out
        assert ("images prepared as in" in evaluated.err) == (data == "calib")


def test_the_next_commands_of_a_merge_work_too(folder: Path, run: Run) -> None:
    run("calibrate", "model.onnx", "--data", "calib", "--samples", 8, "--out", "a.calib")
    merged = run("cache", "merge", "a.calib", "a.calib", "--allow-overlap", "--out", "b.calib")
    for words in next_commands(merged):
        assert run(*words).code == 0


@pytest.mark.parametrize(
    "words",
    [
        ("calibrate", "model.onnx", "--data", "calib"),
        ("export", "--int8"),
        ("export", "--fp8", "--target", "ort"),
        ("evaluate", "model.onnx", "model.onnx", "--data", "calib", "--per-layer"),
        ("cache", "show"),
        ("cache", "merge", "model.calib", "--out", "sum.calib"),
        ("cache", "export", "--format", "ort", "--out", "ranges.txt"),
        ("plugins",),
    ],
    ids=" ".join,
)
def test_json_is_all_that_stands_on_standard_output(
    calibrated: Path, run: Run, words: tuple[str, ...]
) -> None:
    result = run(*words, "--json")
    assert result.code == 0

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert isinstance(json.loads(result.out, parse_constant=refuse), dict)


def test_every_command_has_json(run: Run) -> None:
    import typer.main

    from quantkit.cli.app import app

    groups = [app, *(group.typer_instance for group in app.registered_groups)]
    commands = [
        typer.main.get_command_from_info(c, pretty_exceptions_short=True, rich_markup_mode=None)
        for group in groups
        for c in group.registered_commands
    ]
    assert len(commands) >= 8
    assert [c.name for c in commands if not any("--json" in p.opts for p in c.params)] == []


def test_the_json_of_a_cache_has_numbers_and_objects(calibrated: Path, run: Run) -> None:
    shown = json.loads(run("cache", "show", "--json").out)
    assert shown["samples"] == SAMPLES
    assert shown["model"]["path"] == "model.onnx"
    assert len(shown["model"]["fingerprint"]) == 64
    assert shown["data"]["samples"] == SAMPLES
    assert shown["versions"]["quantkit"] == __version__
    merged = json.loads(run("cache", "merge", "model.calib", "--out", "sum.calib", "--json").out)
    assert merged == {"cache": "sum.calib", "size_bytes": Path("sum.calib").stat().st_size, **shown}


def test_one_is_not_many(calibrated: Path, run: Run) -> None:
    calibrate = run("calibrate", "model.onnx", "--data", "calib", "--samples", 1, "--out", "one.calib")
    assert "warning: 1 sample: few" in calibrate.err
    assert "1 sample from 1 cache\n" in run("cache", "merge", "one.calib", "--out", "sum.calib").out
    words = ("evaluate", "model.onnx", "model.onnx", "--data", "calib", "--samples", 1)
    assert run(*words).out.startswith("1 sample ")


def test_cache_show_lists_every_tensor(calibrated: Path, run: Run) -> None:
    out = run("cache", "show").out
    for name in ("input", "stem", "block1", "features"):
        assert f"\n{name} " in out


def test_plugins_lists_methods_formats_and_targets(run: Run) -> None:
    found = json.loads(run("plugins", "--json").out)
    assert set(found["method"]) >= {"entropy", "minmax", "mse", "percentile"}
    assert set(found["format"]) >= {"int8", "uint8", "int16", "uint16", "fp8_e4m3", "fp8_e5m2"}
    assert set(found["target"]) >= {"ort", "ort-cpu", "tensorrt"}
    assert not any(error for names in found.values() for error in names.values())


# --- output that goes nowhere -------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has /dev/full")
@pytest.mark.parametrize("words", ["plugins --json", "--help", "cache show"])
def test_a_standard_output_that_is_full_is_named(calibrated: Path, words: str) -> None:
    with open("/dev/full", "w") as full:
        found = subprocess.run(command(tuple(words.split())), stdout=full, stderr=subprocess.PIPE, text=True)
    assert found.returncode == 2
    assert found.stderr == (
        "error: standard output: cannot be written (no space left on device); "
        "free some space there, or send it elsewhere.\n"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
@pytest.mark.parametrize("words", ["plugins --json", "--help", "export --int8"])
def test_a_reader_that_has_gone_ends_quantkit_as_it_ends_other_tools(calibrated: Path, words: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    found = subprocess.run(command(tuple(words.split())), stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (found.returncode, found.stderr) == (141, "")
    assert Path("model.int8.onnx").exists() == ("export" in words)


def test_a_progress_bar_is_shown_on_terminals_alone(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def bar(what: str, source: object, progress: bool) -> tqdm:
        asked.append(progress)
        return tqdm(disable=True)

    monkeypatch.setattr("quantkit.pipeline._bar", bar)
    words = ("calibrate", "model.onnx", "--data", "calib", "--samples", 2)
    for terminal in (True, False):
        monkeypatch.setattr("quantkit.cli.options.on_terminal", lambda terminal=terminal: terminal)
        assert run(*words).code == 0
    assert asked == [True, False]


# --- help ---------------------------------------------------------------------------------------------------


def test_version_is_that_of_the_package(run: Run) -> None:
    assert run("--version") == Result(0, f"quantkit {__version__}\n", "")


@pytest.mark.parametrize("words", ["", "calibrate", "export", "evaluate", "plugins", "cache", "cache show"])
def test_every_command_explains_itself(run: Run, words: str) -> None:
    result = run(*words.split(), "--help")
    assert result.code == 0
    assert result.err == ""
    assert "Usage: quantkit" in result.out


def test_evaluate_says_why_it_judges_at_the_basic_level(run: Run) -> None:
    text = " ".join(run("evaluate", "--help").out.split())
    assert "[default: basic]" in text
    assert "drops the Relu" in text


def test_quantkit_alone_shows_its_help(run: Run) -> None:
    result = run()
    assert result.code == 2
    assert "Usage: quantkit" in result.out + result.err

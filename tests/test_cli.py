import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from tqdm import tqdm

from quantkit import __version__, calibrate_model
from quantkit.cache import CalibrationCache
from quantkit.cli import main
from tests.conftest import DigitsExample
from tests.models import MODELS

SAMPLES = 40


@dataclass(frozen=True)
class Result:
    """What a command left: its exit code, and what it printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


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


@pytest.fixture(scope="module")
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


def script(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the installed script `quantkit` with these words; it must succeed."""
    return subprocess.run(command(words), check=True, cwd=cwd, capture_output=True, text=True)


def command(words: tuple[object, ...]) -> list[str]:
    return [sys.executable, "-c", "from quantkit.cli import main; main()", *map(str, words)]


def files(folder: Path) -> dict[str, tuple[str, int]]:
    """What lies in a folder: path → contents and time of change."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def new_files(folder: Path) -> list[str]:
    return sorted(set(files(folder)) - {"model.onnx", *(f"calib/{p.name}" for p in Path("calib").glob("*"))})


def next_commands(result: Result) -> list[list[str]]:
    """The commands that the closing lines name, split into words, without the leading `quantkit`."""
    (line,) = [line for line in result.out.splitlines() if line.startswith("next: ")]
    found = [shlex.split(part) for part in line.removeprefix("next: ").split("   or   ")]
    assert all(words[0] == "quantkit" for words in found)
    return [words[1:] for words in found]


# --- the job ------------------------------------------------------------------------------------------------


def test_the_documented_lines_work_in_an_empty_folder(folder: Path) -> None:
    script("calibrate", "model.onnx", "--data", "calib/", "--method", "entropy")
    shutil.rmtree("calib")
    # From here on no data are there to run the model on.
    script("export", "--fp8")
    script("export", "--int8", "--method", "percentile", "--target", "ort-cpu")
    assert sorted(files(folder)) == [
        "model.calib",
        "model.fp8.onnx",
        "model.int8.ort-cpu.onnx",
        "model.onnx",
    ]
    for name in ("model.fp8.onnx", "model.int8.ort-cpu.onnx"):
        onnx.checker.check_model(name, full_check=True)


@pytest.mark.parametrize("preset", ["int8", "fp8"])
@pytest.mark.parametrize("target", ["tensorrt", "ort", "ort-cpu"])
def test_exports_are_named_after_model_preset_and_target(
    calibrated: Path, run: Run, preset: str, target: str
) -> None:
    assert run("export", f"--{preset}", "--target", target).code == 0
    middle = "" if target == "tensorrt" else f".{target}"
    assert new_files(calibrated) == ["model.calib", f"model.{preset}{middle}.onnx"]


def test_files_go_to_the_current_folder_wherever_the_model_lies(
    calibrated: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    before = files(calibrated)
    assert run("calibrate", "../here/model.onnx", "--data", "../here/calib", "--samples", 8).code == 0
    assert run("export", "--int8").code == 0
    assert sorted(p.name for p in elsewhere.iterdir()) == ["model.calib", "model.int8.onnx"]
    assert files(calibrated) == before


def test_out_names_the_files(folder: Path, run: Run) -> None:
    Path("out").mkdir()
    assert run("calibrate", "model.onnx", "--data", "calib", "--out", "out/a.calib").code == 0
    assert run("export", "--cache", "out/a.calib", "--int8", "--out", "out/small.onnx").code == 0
    assert new_files(folder) == ["out/a.calib", "out/small.onnx"]


def test_the_method_of_calibrate_is_the_default_of_export(folder: Path, run: Run) -> None:
    run("calibrate", "model.onnx", "--data", "calib", "--method", "percentile", "--percentile", 99)
    assert "method percentile" in run("export", "--int8").out
    assert "method mse" in run("export", "--int8", "--method", "mse").out
    clipped, whole = (
        json.loads(run("export", "--int8", "--json", *more).out)["activations"]["stem"]["range"][1]
        for more in ([], ["--percentile", 100])
    )
    assert clipped < whole


def test_all_quantizes_what_fp8_leaves_in_float(calibrated: Path, run: Run) -> None:
    some, every = (json.loads(run("export", "--fp8", "--json", *more).out) for more in ([], ["--all"]))
    assert some["left_in_float"]
    assert not every["left_in_float"]
    assert len(every["quantized"]) == len(some["quantized"]) + len(some["left_in_float"])


def test_export_lists_what_stays_in_float_and_why(calibrated: Path, run: Run) -> None:
    out = run("export", "--fp8").out
    assert "depthwise or ≤ 16 channels" in out
    assert "leaves Gemm in float" in out


def test_merged_shards_export_as_the_whole(folder: Path, run: Run) -> None:
    for shard in ("monday", "tuesday"):
        Path(shard).mkdir()
    for index, picture in enumerate(sorted(Path("calib").iterdir())):
        shutil.copy(picture, "monday" if index % 3 else "tuesday")
    for shard in ("calib", "monday", "tuesday"):
        assert run("calibrate", "model.onnx", "--data", shard, "--out", f"{shard}.calib").code == 0
    merged = run("cache", "merge", "monday.calib", "tuesday.calib", "--out", "week.calib")
    assert f"{SAMPLES} samples from 2 caches" in merged.out
    for cache in ("week", "calib"):
        assert run("export", "--cache", f"{cache}.calib", "--int8", "--out", f"{cache}.onnx").code == 0
    assert Path("week.onnx").read_bytes() == Path("calib.onnx").read_bytes()


def test_evaluate_prepares_pictures_as_calibration_did(folder: Path, run: Run, digits: DigitsExample) -> None:
    run("calibrate", "model.onnx", "--data", "calib", "--mean", 0.5, "--std", 0.5)
    run("export", "--int8")
    words = ("evaluate", "model.onnx", "model.int8.onnx", "--data", "calib")
    same, given, other = run(*words), run(*words, "--mean", 0.5, "--std", 0.5), run(*words, "--mean", 0)
    assert "images prepared as in model.calib" in same.err
    assert same.out == given.out != other.out


def test_evaluate_asks_which_cache_to_follow_where_they_differ(folder: Path, run: Run) -> None:
    for name, mean in (("a", 0.9), ("b", 0.5), ("c", 0.5)):
        run(
            "calibrate",
            "model.onnx",
            "--data",
            "calib",
            "--samples",
            4,
            "--mean",
            mean,
            "--out",
            f"{name}.calib",
        )
    words = ("evaluate", "model.onnx", "model.onnx", "--data", "calib", "--samples", 4)
    result = run(*words)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: a.calib and b.calib and c.calib: ")
    assert "--cache a.calib" in result.err
    assert "images prepared as in b.calib\n" in run(*words, "--cache", "b.calib").err
    assert run(*words, "--mean", 0.5).code == 0
    Path("a.calib").unlink()
    assert "images prepared as in b.calib\n" in run(*words).err


def test_evaluate_of_arrays_does_not_ask_how_pictures_were_prepared(folder: Path, run: Run) -> None:
    for name, mean in (("a", 0.9), ("b", 0.5)):
        run(
            "calibrate",
            "model.onnx",
            "--data",
            "calib",
            "--samples",
            4,
            "--mean",
            mean,
            "--out",
            f"{name}.calib",
        )
    np.savez("held_out.npz", input=np.random.default_rng(0).random((5, 1, 8, 8), np.float32))
    result = run("evaluate", "model.onnx", "model.onnx", "--data", "held_out.npz")
    assert (result.code, result.err) == (0, "")


def test_pictures_prepared_without_a_word_how_are_said_to_be(folder: Path, run: Run) -> None:
    said = "scaled to 0…1; give --mean and --std if the model was trained otherwise"
    words = ("evaluate", "model.onnx", "model.onnx", "--data", "calib")
    for more in ((), ("--json",)):
        assert f"images {said}\n" in run(*words, *more).err
        assert said not in run(*words, *more, "--mean", 0).err
    calibrate = ("calibrate", "model.onnx", "--data", "calib")
    assert re.search(f"^images  +{re.escape(said)}$", run(*calibrate).out, re.MULTILINE)
    assert said not in run(*calibrate, "--image-preset", "0-1").out


def test_evaluate_takes_float_arrays_though_calibration_took_pictures(calibrated: Path, run: Run) -> None:
    np.savez("held_out.npz", input=np.random.default_rng(0).random((5, 1, 8, 8), np.float32))
    result = run("evaluate", "model.onnx", "model.onnx", "--data", "held_out.npz")
    assert result.code == 0
    assert "images prepared" not in result.err


def test_evaluate_shows_accuracy_where_there_are_labels(
    calibrated: Path, run: Run, digits: DigitsExample
) -> None:
    run("export", "--int8")
    words = ("evaluate", "model.onnx", "model.int8.onnx", "--data", digits.eval, "--labels", digits.eval)
    found = json.loads(run(*words, "--json").out)["outputs"]["logits"]
    assert found["accuracy_float"] > 0.98
    assert found["accuracy_quantized"] > 0.97
    shown = run(*words).out
    assert f"{found['accuracy_quantized']:.2%}" in shown
    assert "accuracy, float" in shown


def test_evaluate_per_layer_names_the_least_faithful(calibrated: Path, run: Run) -> None:
    run("export", "--int8")
    out = run("evaluate", "model.onnx", "model.int8.onnx", "--data", "calib", "--per-layer").out
    assert out.count("Conv  ") == 7
    assert "least faithful: " in out


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


# --- refusals -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Bad:
    """Bad input: the words to type in the folder `calibrated` after `prepare`, and what the error says."""

    words: str
    says: str
    prepare: Callable[[], object] = lambda: None


def _pictures_are_not_finite(value: float) -> Callable[[], None]:
    def prepare() -> None:
        x = np.zeros((3, 1, 8, 8), np.float32)
        x[2, 0, 4, 4] = value
        np.save("data.npy", x)

    return prepare


def _npz(**arrays: object) -> Callable[[], None]:
    return lambda: np.savez("data.npz", **arrays)  # type: ignore[arg-type]


def _truncate(path: str) -> Callable[[], object]:
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:5000])


def _split(*, calibrated: bool = False) -> None:
    """Write the model with its weights beside it, as split.onnx and split.data, and perhaps split.calib."""
    onnx.save(
        onnx.load("model.onnx"),
        "split.onnx",
        save_as_external_data=True,
        location="split.data",
        size_threshold=0,
    )
    if calibrated:
        cache = CalibrationCache.load("model.calib")
        replace(cache, model=replace(cache.model, path="split.onnx", name="split")).save("split.calib")


CALIBRATE = "calibrate model.onnx --data calib"
EVALUATE = "evaluate model.onnx model.onnx --data calib"
BAD = {
    "truncated model": Bad(
        words=CALIBRATE, says="model.onnx: not a readable", prepare=_truncate("model.onnx")
    ),
    "text as model": Bad(
        words=CALIBRATE,
        says="model.onnx: not a readable",
        prepare=lambda: Path("model.onnx").write_text("hello, I am no model\n" * 40),
    ),
    "empty model": Bad(
        words=CALIBRATE, says="model.onnx", prepare=lambda: Path("model.onnx").write_bytes(b"")
    ),
    "missing model": Bad(words="calibrate nowhere.onnx --data calib", says="nowhere.onnx: no such file"),
    "folder as model": Bad(words="calibrate calib --data calib", says="calib: is a folder"),
    "cache as model": Bad(words="calibrate model.calib --data calib --out x.calib", says="model.calib"),
    "newer opset": Bad(
        words="calibrate opset24.onnx --data calib",
        says="24",
        prepare=lambda: onnx.save(
            onnx.helper.make_model(
                onnx.load("model.onnx").graph,
                opset_imports=[onnx.helper.make_opsetid("", 24)],
                ir_version=10,
            ),
            "opset24.onnx",
        ),
    ),
    "empty data folder": Bad(
        words="calibrate model.onnx --data empty",
        says="empty: no calib",
        prepare=lambda: Path("empty").mkdir(),
    ),
    "folder without data": Bad(
        words="calibrate model.onnx --data notes",
        says="found 1 .md",
        prepare=lambda: (Path("notes").mkdir(), Path("notes/read.md").touch()),
    ),
    "missing data folder": Bad(words="calibrate model.onnx --data nowhere", says="nowhere: no such file"),
    "damaged picture": Bad(
        words=CALIBRATE, says="zzz.png", prepare=lambda: Path("calib/zzz.png").write_bytes(b"\x89PNG no")
    ),
    "NaN in the data": Bad(
        words="calibrate model.onnx --data data.npy",
        says="sample 2: found 1 NaN",
        prepare=_pictures_are_not_finite(np.nan),
    ),
    "Inf in the data": Bad(
        words="calibrate model.onnx --data data.npy",
        says="sample 2: found 1 Inf",
        prepare=_pictures_are_not_finite(-np.inf),
    ),
    "wrong input names": Bad(
        words="calibrate model.onnx --data data.npz",
        says="found a: float32[4, 9], b: float32[4]; the model wants input: float32[",
        prepare=_npz(a=np.ones((4, 9), np.float32), b=np.ones(4, np.float32)),
    ),
    "wrong name of --input": Bad(
        words="calibrate model.onnx --data data.npz --input inptu=a",
        says="did you mean input",
        prepare=_npz(a=np.ones((4, 1, 8, 8), np.float32)),
    ),
    "wrong shape": Bad(
        words="calibrate model.onnx --data data.npz",
        says="float32[4, 3, 9, 9]",
        prepare=_npz(input=np.ones((4, 3, 9, 9), np.float32)),
    ),
    "wrong type": Bad(
        words="calibrate model.onnx --data data.npz",
        says="store them as float32",
        prepare=_npz(input=np.full((4, 1, 8, 8), "seven")),
    ),
    "pixels without a word how": Bad(
        words="calibrate model.onnx --data data.npz",
        says="--mean and --std, or --image-preset 0-1",
        prepare=_npz(input=np.ones((4, 1, 8, 8), np.uint8)),
    ),
    "unknown method": Bad(words=f"{CALIBRATE} --method entropi", says="did you mean entropy?"),
    "unknown method of export": Bad(words="export --int8 --method percent", says="did you mean percentile?"),
    "unknown target": Bad(words="export --int8 --target tensor", says="did you mean tensorrt?"),
    "two formats": Bad(words="export --int8 --fp8", says="--int8 and --fp8: give one format alone"),
    "a format and a preset": Bad(words="export --int8 --preset mxfp4", says="give one format alone"),
    "no format": Bad(words="export", says="no format; give one of --int8"),
    "unknown preset": Bad(words="export --preset int9", says="did you mean int"),
    "group of nothing": Bad(
        words="export --int4 --group 0", says="--group 0: neither a number of weights nor"
    ),
    "group that is none": Bad(words="export --int4 --group half", says="--group half: neither a number"),
    "group of a format without": Bad(
        words="export --fp8 --group 32", says="preset fp8: its weights have no groups"
    ),
    "zero points of a format without": Bad(words="export --fp8 --zero-points", says="no zero points"),
    "per tensor of a format in blocks": Bad(words="export --int4 --per-tensor", says="lie in blocks"),
    "scale rule of a format without": Bad(words="export --int4 --scale-rule ocp", says="no powers of two"),
    "scale rule that is none": Bad(words="export --mxfp4 --scale-rule floor", says="choose ocp, rceil, even"),
    "activations of a format without": Bad(words="export --int4 --activations", says="weights alone"),
    "precision that is none": Bad(words="export --int8 --high-precision fp8", says="choose fp32, fp16, bf16"),
    "TensorRT that is none": Bad(words="export --int8 --trt 9", says="TensorRT 9"),
    "TensorRT for another target": Bad(
        words="export --int8 --trt 10 --target ort", says="target ort: has no trt"
    ),
    "accuracy level that is none": Bad(
        words="export --int4 --group channel --target ort --accuracy-level 9", says="accuracy level 9"
    ),
    "recipe that is not there": Bad(words="export --recipe none.toml", says="none.toml: cannot be read"),
    "recipe that is no recipe": Bad(words="export --recipe model.onnx", says="model.onnx: not TOML"),
    "plan that is not there": Bad(words="export --plan none.json", says="none.json: cannot be read"),
    "plan that is no plan": Bad(words="export --plan model.onnx", says="model.onnx: not JSON"),
    "plan over the model": Bad(words="export --int8 --plan-out model.onnx", says="would be lost"),
    "bfloat16 where nothing runs it": Bad(
        words="export --int8 --target ort-cpu --high-precision bf16", says="no kernels for bfloat16"
    ),
    "plan over the cache": Bad(words="export --int8 --plan-out model.calib", says="would be lost"),
    "plan over the export": Bad(
        words="export --int8 --out q.onnx --plan-out ./q.onnx", says="the model goes there"
    ),
    "only what is not there": Bad(words="export --int8 --include layers.*", says="no node matches layers.*"),
    "a target without the format": Bad(
        words="export --nvfp4 --target ort", says="choose another preset or another"
    ),
    "percentile above 100": Bad(
        words="export --int8 --method percentile --percentile 100.5", says="100.5; give 0 < percentile ≤ 100"
    ),
    "percentile of nothing": Bad(words=f"{CALIBRATE} --method percentile --percentile 0", says="percentile"),
    "percentile of another method": Bad(
        words="export --int8 --method mse --percentile 99", says="only --method percentile"
    ),
    "size that is none": Bad(words=f"{CALIBRATE} --size nan", says="--size nan: write HEIGHTxWIDTH"),
    "layout that is none": Bad(words=f"{CALIBRATE} --layout CHWN", says="choose NCHW or NHWC"),
    "mean that is none": Bad(words=f"{CALIBRATE} --mean red", says="--mean red: not numbers"),
    "std of zero": Bad(words=f"{CALIBRATE} --std 0", says="std"),
    "image preset that is none": Bad(words=f"{CALIBRATE} --image-preset cifar", says="imagenet"),
    "input that maps nothing": Bad(words=f"{CALIBRATE} --input input", says="NAME=KEY"),
    "no samples wanted": Bad(words=f"{CALIBRATE} --samples 0", says="--samples"),
    "option that is none": Bad(words=f"{CALIBRATE} --metod mse", says="--metod"),
    "command that is none": Bad(words="quantize model.onnx", says="quantize"),
    "cache of another model": Bad(
        words="export conv_relu.onnx --int8",
        says="belongs to another model",
        prepare=lambda: MODELS["conv_relu"].save(Path()),
    ),
    "model retrained since": Bad(
        words="export --int8",
        says="belongs to another model",
        prepare=lambda: MODELS["conv_relu"].save(Path()).replace("model.onnx"),
    ),
    "model gone": Bad(
        words="export --int8",
        says="model.calib: its model model.onnx is not there",
        prepare=lambda: Path("model.onnx").unlink(),
    ),
    "model gone before its table": Bad(
        words="cache export --format ort --out ranges.txt",
        says="model.calib: its model model.onnx is not there",
        prepare=lambda: Path("model.onnx").unlink(),
    ),
    "truncated cache": Bad(words="export --int8", says="model.calib", prepare=_truncate("model.calib")),
    "model as cache": Bad(words="export --int8 --cache model.onnx", says="not a calibration cache"),
    "missing cache": Bad(words="export --int8 --cache nowhere.calib", says="nowhere.calib"),
    "no cache": Bad(
        words="export --int8", says="quantkit calibrate MODEL", prepare=lambda: Path("model.calib").unlink()
    ),
    "two caches": Bad(
        words="export --int8",
        says="2 calibration caches (again.calib, model.calib)",
        prepare=lambda: shutil.copy("model.calib", "again.calib"),
    ),
    "a shard merged twice": Bad(
        words="cache merge model.calib model.calib --out sum.calib", says="--allow-overlap"
    ),
    "cache into no folder": Bad(words=f"{CALIBRATE} --out nowhere/x.calib", says="nowhere/x.calib"),
    "cache over the model": Bad(words=f"{CALIBRATE} --out model.onnx", says="would be lost"),
    "cache onto a folder": Bad(
        words=f"{CALIBRATE} --out calib", says="calib: cannot be written (it is a folder)"
    ),
    "export into no folder": Bad(words="export --int8 --out nowhere/x.onnx", says="nowhere/x.onnx"),
    "export over the model": Bad(words="export --int8 --out model.onnx", says="would be lost"),
    "export over the model by another name": Bad(
        words="export --int8 --out calib/../model.onnx", says="would be lost"
    ),
    "export over the cache": Bad(words="export --int8 --out model.calib", says="would be lost"),
    "export over the model's weights": Bad(
        words="export --int8 --cache split.calib --out split.data",
        says="split.data: is an input here and would be lost",
        prepare=lambda: _split(calibrated=True),
    ),
    "weights alone over the model": Bad(
        words="export split.onnx --int4 --out calib/../split.onnx",
        says="would be lost",
        prepare=lambda: _split(),
    ),
    "cache over the model's weights": Bad(
        words="calibrate split.onnx --data calib --out split.data",
        says="would be lost",
        prepare=lambda: _split(),
    ),
    "cache over a picture": Bad(
        words=f"{CALIBRATE} --out calib/one.png",
        says="calib/one.png: is an input here and would be lost",
        prepare=lambda: shutil.copy(min(Path("calib").iterdir()), "calib/one.png"),
    ),
    "model over a picture that calibration ran on": Bad(
        words="export --int8 --cache own.calib --out calib/one.png",
        says="calib/one.png: is an input here and would be lost",
        prepare=lambda: (
            shutil.copy(min(Path("calib").iterdir()), "calib/one.png"),
            calibrate_model("model.onnx", "calib").save("own.calib"),
        ),
    ),
    "cache over an array": Bad(
        words="calibrate model.onnx --data data.npz --out data.npz",
        says="would be lost",
        prepare=_npz(input=np.ones((4, 1, 8, 8), np.float32)),
    ),
    "merge over one of the merged": Bad(
        words="cache merge model.calib again.calib --allow-overlap --out again.calib",
        says="again.calib: is an input here and would be lost",
        prepare=lambda: shutil.copy("model.calib", "again.calib"),
    ),
    "merge over the model": Bad(
        words="cache merge model.calib model.calib --allow-overlap --out model.onnx", says="would be lost"
    ),
    "table over the model's weights": Bad(
        words="cache export split.calib --format ort --out split.data",
        says="would be lost",
        prepare=lambda: _split(calibrated=True),
    ),
    "quantized model missing": Bad(
        words="evaluate model.onnx gone.onnx --data calib", says="gone.onnx: no such"
    ),
    "quantized model is none": Bad(
        words="evaluate model.onnx model.calib --data calib", says="model.calib: not a readable"
    ),
    "quantized model of another network": Bad(
        words="evaluate model.onnx conv_relu.onnx --data calib",
        says="one network",
        prepare=lambda: MODELS["conv_relu"].save(Path()),
    ),
    "too few labels": Bad(
        words=f"{EVALUATE} --labels labels.npy",
        says=f"labels.npy: 7 labels for {SAMPLES} samples",
        prepare=lambda: np.save("labels.npy", np.zeros(7, np.int64)),
    ),
    "too many labels": Bad(
        words=f"{EVALUATE} --labels labels.txt",
        says=f"labels.txt: 50 labels for {SAMPLES} samples",
        prepare=lambda: Path("labels.txt").write_text("1\n" * 50),
    ),
    "labels that are none": Bad(
        words=f"{EVALUATE} --labels labels.txt",
        says="line 2",
        prepare=lambda: Path("labels.txt").write_text("1\nseven\n"),
    ),
    "missing labels": Bad(words=f"{EVALUATE} --labels nowhere.npy", says="nowhere.npy"),
    "unknown level": Bad(words=f"{EVALUATE} --ort-level most", says="basic or all"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_input_gives_one_line_and_leaves_every_file_as_it_was(
    calibrated: Path, run: Run, bad: Bad
) -> None:
    bad.prepare()
    before = files(calibrated)
    result = run(*shlex.split(bad.words))
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert result.err.endswith("\n")
    assert bad.says in result.err
    assert files(calibrated) == before


def test_weights_that_would_go_beside_an_export_do_not_replace_the_models(
    calibrated: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _split()
    Path("split.data").rename("x.onnx.data")
    moved = onnx.load("split.onnx", load_external_data=False)
    for tensor in moved.graph.initializer:
        next(e for e in tensor.external_data if e.key == "location").value = "x.onnx.data"
    Path("split.onnx").write_bytes(moved.SerializeToString())
    monkeypatch.setattr("quantkit.exporting._EXTERNAL_BYTES", 0)
    before = files(calibrated)
    result = run("export", "split.onnx", "--int8", "--out", "x.onnx")
    assert result.code == 2
    assert "x.onnx.data: is an input here and would be lost" in result.err
    assert files(calibrated) == before


def test_an_error_in_a_process_of_its_own_is_one_line_too(calibrated: Path) -> None:
    found = subprocess.run(
        command(("export", "--int8", "--method", "entropi")), capture_output=True, text=True
    )
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.splitlines() == [
        "error: calibration method entropi: no such calibration method; did you mean entropy?"
    ]


def test_a_terminal_without_the_right_signs_gets_the_error_all_the_same(calibrated: Path) -> None:
    found = subprocess.run(
        command(("export", "--int8", "--method", "percentile", "--percentile", "101")),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert found.returncode == 2
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="limits on file sizes are POSIX")
@pytest.mark.parametrize(
    ("words", "target"),
    [
        ("calibrate model.onnx --data calib", "model.calib"),
        ("export --int8", "model.int8.onnx"),
        ("cache merge model.calib model.calib --allow-overlap --out sum.calib", "sum.calib"),
    ],
)
@pytest.mark.parametrize("there", [False, True], ids=["new", "replacing"])
def test_a_full_disk_leaves_the_old_file_or_none(
    calibrated: Path, words: str, target: str, there: bool
) -> None:
    import resource

    if target != "model.calib":
        shutil.rmtree("calib")
    if there:
        Path(target).write_bytes(b"the file of yesterday")
    elif target == "model.calib":
        Path(target).unlink()
    before = files(calibrated)

    def limit() -> None:
        # What a full disk does to a write, without a disk to fill.
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    found = subprocess.run(command(tuple(words.split())), capture_output=True, text=True, preexec_fn=limit)
    assert found.returncode == 2
    assert found.stderr.splitlines()[-1].startswith(f"error: {target}: cannot be written (file too large)")
    assert "Traceback" not in found.stderr
    assert files(calibrated) == before


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are POSIX")
@pytest.mark.parametrize("words", [CALIBRATE + " --out locked/x.calib", "export --int8 --out locked/x.onnx"])
def test_a_folder_that_may_not_be_written_is_refused_before_anything_is_run(
    calibrated: Path, run: Run, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("locked").mkdir(mode=0o555)
    if os.access("locked", os.W_OK):
        # Root may write anywhere: say what the system would say to anybody else.
        def refuse(*_: object, **__: object) -> str:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("quantkit.files.tempfile.mkdtemp", refuse)
    monkeypatch.setattr("quantkit.pipeline.observe", None)
    monkeypatch.setattr("quantkit.exporting.plan_model", None)
    result = run(*words.split())
    assert result.code == 2
    assert "cannot be written (permission denied); choose a folder that you may write to" in result.err


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


def interrupted(*words: object, at: str) -> Result:
    """Run `quantkit` in a process of its own, where calling the function named `at` is Ctrl-C."""
    program = (
        "import importlib, os, signal\n"
        f"module, _, name = {at!r}.rpartition('.')\n"
        "def interrupt(*_, **__):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "setattr(importlib.import_module(module), name, interrupt)\n"
        "from quantkit.cli import main\n"
        "main()"
    )
    found = subprocess.run([sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True)
    return Result(found.returncode, found.stdout, found.stderr)


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

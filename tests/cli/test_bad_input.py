"""Bad input gives one line and exit code 2, and leaves every file as it was."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from quantkit import calibrate_model
from quantkit.cache import CalibrationCache
from tests.cli.commands import SAMPLES, Run, command, files
from tests.models import MODELS


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

"""The job from end to end: calibrate, export, evaluate, merge."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.cli.commands import SAMPLES, Run, files, new_files, script
from tests.conftest import DigitsExample


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


@pytest.mark.parametrize(
    "words", ["--int8 --no-activations", "--w4a8 --group 32 --target vllm --out folder", "--mxfp8 --all"]
)
def test_what_looks_at_no_activation_needs_no_cache(folder: Path, run: Run, words: str) -> None:
    assert run("export", "model.onnx", *words.split()).code == 0


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

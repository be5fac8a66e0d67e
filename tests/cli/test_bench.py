"""`quantkit bench`, `tune` and `kernels build` as a user types them, on a machine without a GPU."""

import csv
import io
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import pytest

from quantkit.bench import run as bench_run
from quantkit.cli import main
from quantkit.kernels import compile as compiling
from quantkit.kernels import present
from quantkit.kernels.gpus import GPUS
from quantkit.kernels.timing import Timing
from tests.bench.quantized import BUILDERS
from tests.conftest import DigitsExample


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run `quantkit` with these words, in this process, where there is no GPU."""
    monkeypatch.chdir(tmp_path)
    for module in (bench_run, present):
        monkeypatch.setattr(module, "why_no_gpu", lambda: "CUDA counts none")

    def run(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["quantkit", *map(str, words)])
        capsys.readouterr()
        with warnings.catch_warnings(), pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return Result(left.value.code if isinstance(left.value.code, int) else 0, out, err)

    return run


SHAPE = ("bench", "--shapes", "64x512x256")


def test_bench_without_a_gpu_says_so_in_its_first_line_and_ends_well(run: Run) -> None:
    found = run(*SHAPE)
    assert found.code == 0 and found.err == ""
    assert found.out.splitlines()[0].startswith("no GPU here (CUDA counts none): what would run on H200")
    assert "64 × 512 × 256" in found.out
    assert "gemm_sm90" in found.out


def test_dry_run_and_another_gpu(run: Run) -> None:
    found = run(*SHAPE, "--dry-run", "--device-model", "L40S", "--format", "int8")
    assert found.out.startswith("dry run: what would run on L40S")
    assert "gemm_mma" in found.out


def test_json_and_csv_are_alone_on_standard_output(run: Run) -> None:
    told = json.loads(run(*SHAPE, "--format", "int8,bf16", "--json").out)
    assert [row["format"] for row in told["rows"]] == ["int8", "bf16"]
    assert told["mode"] == "predicted"
    rows = list(csv.DictReader(io.StringIO(run(*SHAPE, "--csv").out)))
    assert [row["m"] for row in rows] == ["64", "64"]


def test_a_measured_table_says_where_it_was_measured_and_who_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = Timing(median_us=20.0, q1_us=19.0, q3_us=22.0, runs=25)

    def measured(gpu: object, **options: object) -> Callable[..., dict[str, object]]:
        # Each row has a reason of its own, more than a screen has room for.
        return lambda case, family, prediction: {
            "timing": timing,
            "peers": {"cuBLAS bf16": replace(timing, median_us=50.0)},
            "refused": {"Humming": f"no {case.work.m}"},
            "error": 0.0,
        }

    for name, stand_in in (
        ("why_no_gpu", lambda: None),
        ("present_gpu", lambda: GPUS["h200"]),
        ("compile_ahead", lambda chosen, gpu: None),
        ("facts", lambda: {"device": "NVIDIA H200", "nvrtc": "13.0", "torch": "2.11"}),
        ("measured", measured),
        ("missing_peers", list),
    ):
        monkeypatch.setattr(bench_run, name, stand_in)
    shapes = ",".join(f"{m}x512x256" for m in range(1, 11))
    lines = run("bench", "--shapes", shapes, "--format", "int8").out.splitlines()
    assert lines[:2] == ["measured on NVIDIA H200: nvrtc 13.0, torch 2.11", ""]
    assert lines[2].split("  ")[0] == "m × n × k"
    assert [lines[4].split()[i] for i in (10, 11, 15)] == ["20", "1.5", "2.50"]
    assert lines[-9] == "Humming refused 1 product (1 × 512 × 256 int8): no 1"
    assert lines[-1] == "and 2 further reasons to refuse; --json has all"


def test_a_product_that_errs_by_more_than_rounding_ends_with_code_1(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"error": 0.5, "checked": "64 × 192 × 256"}
    monkeypatch.setattr(bench_run, "_emulated", lambda case, family, prediction: told)
    for option in ((), ("--json",), ("--csv",)):
        found = run(*SHAPE, "--emulate", *option)
        assert found.code == 1
        assert found.err == "wrong: gemm_sm90 of 64x512x256 int8 errs by 5.0e-01 and 1 more; report this.\n"
        assert "0.5" in found.out or "5.0e-01" in found.out


def test_a_roofline_is_drawn_beside_the_table(run: Run) -> None:
    found = run(*SHAPE, "--plot", "roofline.svg")
    assert found.out.splitlines()[-1] == "roofline: roofline.svg"
    assert Path("roofline.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("bench", "--shapes", "64x512"), "--shapes 64x512: write MxNxK"),
        (("bench", "--shapes", "64x512x0"), "--shapes 64x512x0: write MxNxK"),
        (("bench", "--shapes", ""), "--shapes : write MxNxK"),
        (("bench", "--shapes", f"{2**31}x1x1"), "each below 2^31"),
        ((*SHAPE, "--format", "int5"), "int5: no format of a product"),
        ((*SHAPE, "--format", ","), "--format ',': names nothing; give a name"),
        ((*SHAPE, "--batch", "0"), "--batch 0: write whole numbers from 1 up"),
        ((*SHAPE, "--json", "--csv"), "bench: --json and --csv were given"),
        ((*SHAPE, "--dry-run", "--emulate"), "bench: --dry-run and --emulate were given"),
        ((*SHAPE, "--plot", "a.bmp"), "a.bmp: a plot is written as one of"),
        ((*SHAPE, "--dim", "seq"), "--dim seq: write NAME=SIZE"),
        ((*SHAPE, "--cache", "a.calib"), "--cache: is of a model, and --shapes were given instead"),
        ((*SHAPE, "--data", "calib"), "--data: is of a model, and --shapes were given instead"),
        ((*SHAPE, "--batch", "4"), "--batch: is of a model, and --shapes were given instead"),
        ((*SHAPE, "--dim", "seq=4"), "--dim: is of a model, and --shapes were given instead"),
        (("bench", "m.onnx", "--mean", "0.5"), "--mean: says how to read --data, and none were named"),
        (("bench", "m.onnx", "--input", "a=b"), "--input: says how to read --data, and none were named"),
        (("tune", "--shapes", "1x2x3", "--batch", "4"), "--batch: is of a model, and --shapes were given"),
        (("kernels", "build", "--batch", "4"), "--batch: is of a model, and none was named; name one"),
        (("bench",), "holds no calibration cache"),
        (("bench", "gone.onnx"), "gone.onnx: no such file"),
        (("tune", "--shapes", "64x512x256"), "no GPU here (CUDA counts none); run this on a machine with"),
        (("kernels", "build", "--arch", "sm_75"), "sm_75: no kernel is written for it; choose of"),
        (("kernels", "build", "--arch", ""), "--arch '': names nothing"),
        (("kernels", "build", "--format", "int5"), "int5: no format of a product"),
        (("kernels", "build", "--format", "int2"), "int2: no kernel multiplies it; choose of bf16"),
        (
            ("kernels", "build", "--format", "mxfp4-fp4", "--arch", "sm_90a"),
            "mxfp4-fp4 on sm_90a: no kernel multiplies it; choose another --format or --arch",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    run: Run, words: tuple[str, ...], message: str
) -> None:
    found = run(*words)
    assert found.code == 2
    assert found.out == ""
    assert message in found.err
    assert found.err.count("\n") == 1


def test_a_picture_that_is_read_is_not_drawn_over(run: Run, digits: DigitsExample) -> None:
    picture = sorted(digits.calib.iterdir())[0]
    Path("calib").mkdir()
    shutil.copy(digits.model, "model.onnx")
    for name in ("calib/a.png", "b.png"):
        shutil.copy(picture, name)
    assert run("calibrate", "model.onnx", "--data", "calib").code == 0
    before = picture.read_bytes()
    for words in (
        ("bench", "--plot", "calib/a.png"),
        ("bench", "model.onnx", "--data", "calib", "--plot", "calib/a.png"),
        ("bench", "model.onnx", "--data", "b.png", "--plot", "b.png"),
    ):
        found = run(*words)
        assert (found.code, found.out) == (2, "")
        assert f"{words[-1]}: is an input here and would be lost" in found.err
    assert Path("calib/a.png").read_bytes() == Path("b.png").read_bytes() == before
    # Another picture that is there is replaced, as a plot drawn before.
    assert run("bench", "model.onnx", "--data", "calib", "--plot", "b.png", "--batch", "1").code == 0
    assert Path("b.png").read_bytes() != before


def test_a_folder_for_vllm_asks_for_the_onnx_model(run: Run) -> None:
    Path("net.vllm").mkdir()
    Path("net.vllm/config.json").write_text("{}")
    found = run("bench", "net.vllm")
    assert (found.code, found.out) == (2, "")
    assert (
        "net.vllm: is a folder for vLLM, which holds no graph to take shapes from; give the ONNX" in found.err
    )


def test_a_table_of_totals_is_not_drawn_where_no_total_is_known(run: Run) -> None:
    onnx.save(BUILDERS["int8_weights_alone"](), "w8a16.onnx")
    found = run("bench", "w8a16.onnx", "--batch", "4")
    assert found.code == 0
    assert "µs for all products" not in found.out
    assert "no kernel yet for w8a16 on sm_90a" in found.out


@pytest.mark.skipif(not compiling.is_available(), reason="NVRTC is not installed")
def test_formats_without_a_kernel_are_told_beside_what_was_built(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.kernels.build.ROWS", (64,))
    monkeypatch.setattr("quantkit.kernels.build.LAYERS", ((512, 512),))
    words = ("kernels", "build", "--arch", "sm_80", "--format", "int8,mxfp4-fp4", "--cubins", "cubins")
    assert run(*words).out.splitlines()[1] == "no kernel: mxfp4-fp4 on sm_80"
    assert json.loads(run(*words, "--json").out)["missing"] == ["mxfp4-fp4 on sm_80"]


@pytest.mark.skipif(not compiling.is_available(), reason="NVRTC is not installed")
def test_kernels_are_built_once_and_found_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.kernels.build.ROWS", (64,))
    monkeypatch.setattr("quantkit.kernels.build.LAYERS", ((512, 512),))
    words = ("kernels", "build", "--arch", "sm_80", "--format", "int8", "--cubins", "cubins", "--json")
    first, second = json.loads(run(*words).out), json.loads(run(*words).out)
    assert first["kernels"] == first["compiled"] == len(list(Path("cubins").glob("*.cubin"))) > 0
    assert (second["kernels"], second["compiled"]) == (first["kernels"], 0)
    plain = run(*words[:-1]).out
    assert plain.startswith("cubins: 0 kernels compiled, ")

"""The script that a GPU is checked with, as far as it goes without one."""

import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from quantkit.kernels.emulator import find_compiler
from quantkit.kernels.families import FAMILIES
from quantkit.kernels.gpus import GPUS
from tests.kernels.fake_cupy import install

from .scripts import script


@pytest.fixture
def gpu_run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("gpu_run", monkeypatch)


@pytest.fixture
def gpu_checks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("gpu_checks", monkeypatch)


@pytest.fixture
def gpu_plan(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    found = script("gpu_plan", monkeypatch)
    monkeypatch.setattr(found, "present_gpu", lambda: GPUS["h200"])
    return found


def test_without_a_gpu_it_says_so_in_one_line(gpu_run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run, "MISSING", "cupy is not installed")
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--check"])
    with pytest.raises(
        SystemExit, match=r"^gpu_run.py: no GPU to run on \(cupy is not installed\); it needs"
    ):
        gpu_run.main()


def test_help_needs_no_gpu(
    gpu_run: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--help"])
    with pytest.raises(SystemExit) as left:
        gpu_run.main()
    assert left.value.code == 0
    assert "--budget SECONDS" in capsys.readouterr().out


@pytest.mark.parametrize("only", [False, True])
def test_every_kernel_of_a_gpu_is_checked_in_every_format(gpu_checks: ModuleType, only: bool) -> None:
    for name in ("h200", "l40s"):
        here = GPUS[name]
        there = {
            (f.name, form) for f in FAMILIES if here.architecture in f.architectures for form in f.formats
        }
        parts = [gpu_checks.check_cases(1, here, pair) for pair in sorted(there)]
        cases = [case for part in (parts if only else [gpu_checks.check_cases(1, here)]) for case in part]
        assert {(family.name, work.format) for family, work, _ in cases} == there


def test_what_is_quantized_is_compared_with_the_oracle(
    gpu_checks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_compiler() is None:
        pytest.skip("the emulator needs a C++ compiler")
    monkeypatch.setattr(gpu_checks, "cupy", install(monkeypatch, "sm_90a"), raising=False)
    found = dict(gpu_checks.quantized_exactly([(3, 264)]))
    assert len(found) == len(gpu_checks.QUANTIZED)
    assert all(found.values())


class Broken:
    """A family of which some configurations do not run."""

    name = "broken"

    def __init__(self, right: set[int]) -> None:
        self.right = right

    def prepare(self, work, operands, configuration):
        if configuration not in self.right:
            raise RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        return lambda: self.reference(work, operands)

    def reference(self, work, operands):
        return (operands.activations.astype("float64") @ operands.weight.astype("float64").T).astype(
            "float32"
        )

    def describe(self, configuration):
        return f"number {configuration}"


def test_a_configuration_that_does_not_run_is_told_and_the_others_are_checked(
    gpu_checks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = gpu_checks.Work(m=3, n=5, k=7, format="bf16", output="float32")
    monkeypatch.setattr(gpu_checks, "answers", lambda: True)
    found = gpu_checks.compared((Broken({0, 2}), work, number) for number in range(3))
    assert (found["cases"], found["exact"]) == (3, {"broken": 2})
    assert "broken number 1: ['CUDA_ERROR_INVALID_VALUE" in found["wrong"][0]["error"]
    monkeypatch.setattr(gpu_checks, "answers", lambda: False)
    with pytest.raises(RuntimeError, match=r"broken number 1.*m=3"):
        gpu_checks.compared((Broken({0, 2}), work, number) for number in range(3))


def test_formats_of_few_bits_are_timed_where_weights_are_streamed(gpu_run: ModuleType) -> None:
    assert {"int4", "mxfp4", "nvfp4", "int8", "fp8", "bf16"} <= set(gpu_run.FORMATS)
    assert (1, 28672, 8192) in gpu_run.STREAMED
    assert gpu_run.TABLE[0] == (8192, 8192, 8192)


# ---- everything in one call --------------------------------------------------------------------------------


def test_all_is_asked_in_the_order_of_its_importance(gpu_plan: ModuleType, tmp_path: Path) -> None:
    jobs = list(gpu_plan.jobs(repeats=5, pause_s=0.0, depth=2, tuned=tmp_path / "tuned.json"))
    parts = list(dict.fromkeys(job.part for job in jobs))
    assert parts[:5] == ["facts", "check", "four_bits", "table", "blocks"]
    assert (
        parts.index("statistics") < parts.index("golden") < parts.index("tune") < parts.index("table_tuned")
    )
    assert parts[-1] == "sanitized"
    assert max(Counter((job.part, job.name) for job in jobs).values()) == 1
    # A tuned table is read by a process that has not chosen yet.
    assert [job.part for job in jobs if job.fresh] == ["four_bits_tuned"]
    some = list(gpu_plan.jobs(repeats=5, pause_s=0.0, depth=2, tuned=tmp_path / "t", only="table,golden"))
    assert list(dict.fromkeys(job.part for job in some)) == ["facts", "table", "golden"]


def test_what_two_hundred_seconds_must_show_comes_within_them(gpu_plan: ModuleType, tmp_path: Path) -> None:
    """By the seconds that jobs are thought to take: checks, and each figure that a goal is set for."""
    asked = gpu_plan.jobs(repeats=25, pause_s=0.002, depth=8, tuned=tmp_path / "tuned.json")
    needed = {"facts", "check", "four_bits", "table", "blocks"}
    assert sum(job.needs_s for job in asked if job.part in needed) < 200


def test_kernels_are_compiled_ahead_and_found_there(
    gpu_plan: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_plan, "nvrtc_version", lambda: (13, 0))
    folder, cache = tmp_path / "carried", tmp_path / "cache"
    folder.mkdir()
    for name in ("a.cubin", "a.log", "b.cubin", "b.log"):
        (folder / name).write_text(name)
    (folder / gpu_plan._BY).write_text("13.0")
    monkeypatch.setattr(gpu_plan, "DEFAULT_CACHE", cache)
    assert gpu_plan.carry(folder) == f"{folder}: 2 cubins"
    assert sorted(path.name for path in cache.iterdir()) == ["a.cubin", "a.log", "b.cubin", "b.log"]
    monkeypatch.setattr(gpu_plan, "nvrtc_version", lambda: (13, 1))
    assert "made by NVRTC 13.0, and here is 13.1" in gpu_plan.carry(folder)


def test_each_part_says_what_it_compiles(gpu_plan: ModuleType) -> None:
    here = GPUS["h200"]
    every = {build.source.stem for build in gpu_plan.builds(here, depth=1)}
    assert {"gemm_sm90", "gemm_blocks_sm90", "gemm_w4_sm90", "gemm_w4_few", "quantize", "statistics"} <= every
    tables = gpu_plan.builds(here, depth=1, only="table")
    assert {build.source.stem for build in tables} >= {"gemm_sm90", "gemm_w4_few", "timing"}
    assert "quantize" not in {build.source.stem for build in tables}


def test_results_are_kept_up_to_date_while_a_worker_runs(
    gpu_run: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    seen: list[list[str]] = []

    def fake(command, journal, *, deadline, on_news):
        assert "--worker" in command
        for part, found in (("facts", {"device": "a GPU"}), ("table", [{"m": 1}]), ("table", [{"m": 2}])):
            journal.write("done", {"part": part, "name": "facts"}, seconds=1.0, found=found)
            on_news()
            seen.append(list(json.loads(out.read_text())["parts"]))
        journal.write("failed", {"part": "check", "name": "x"}, reason="it faulted")

    monkeypatch.setattr(gpu_run, "supervise", fake)
    monkeypatch.setattr(gpu_run, "MISSING", None)
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--all", "--budget", "9", "--out", str(out)])
    gpu_run.main()
    found = json.loads(out.read_text())
    assert seen == [[], ["table"], ["table"]]
    assert (found["device"], found["budget_s"]) == ("a GPU", 9.0)
    assert found["parts"]["table"] == [{"m": 1}, {"m": 2}]
    assert "FAILED check: x: it faulted" in capsys.readouterr().out

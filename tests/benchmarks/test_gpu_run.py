"""The script that a GPU is checked with, as far as it goes without one."""

import importlib.util
import sys
from types import ModuleType

import pytest

from quantkit.kernels.emulator import find_compiler
from quantkit.kernels.families import FAMILIES
from quantkit.kernels.gpus import GPUS
from tests.conftest import ROOT
from tests.kernels.fake_cupy import install


@pytest.fixture(scope="module")
def gpu_run() -> ModuleType:
    # Scripts in benchmarks/ are no package: they are loaded by their path.
    spec = importlib.util.spec_from_file_location("gpu_run", ROOT / "benchmarks" / "gpu_run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    assert "--check" in capsys.readouterr().out


def test_every_kernel_of_a_gpu_is_checked_in_every_format(
    gpu_run: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("h200", "l40s"):
        here = GPUS[name]
        monkeypatch.setattr(gpu_run, "present_gpu", lambda here=here: here)
        checked = {(family.name, work.format) for family, work, _ in gpu_run.check_cases(1)}
        there = {
            (f.name, form) for f in FAMILIES if here.architecture in f.architectures for form in f.formats
        }
        assert checked == there


def test_what_is_quantized_is_compared_with_the_oracle(
    gpu_run: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_compiler() is None:
        pytest.skip("the emulator needs a C++ compiler")
    monkeypatch.setattr(gpu_run, "cupy", install(monkeypatch, "sm_90a"), raising=False)
    found = dict(gpu_run.quantized_exactly([(3, 264)]))
    assert len(found) == len(gpu_run.QUANTIZED)
    assert all(found.values())


def test_formats_of_few_bits_are_timed_where_weights_are_streamed(gpu_run: ModuleType) -> None:
    assert {"int4", "mxfp4", "nvfp4", "int8", "fp8", "bf16"} <= set(gpu_run.FORMATS)
    assert (1, 28672, 8192) in gpu_run.STREAMED
    assert gpu_run.TABLE[0] == (8192, 8192, 8192)

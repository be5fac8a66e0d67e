"""What benchmarks and tuning know of the kernels for weights of four bits."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from quantkit.kernels import tuning
from quantkit.kernels.build import jobs_of
from quantkit.kernels.families import best_family, family_of
from quantkit.kernels.gpus import GPUS, get_gpu
from quantkit.kernels.timing import Timing
from quantkit.kernels.w4.launch import FEW_SOURCE, SOURCE
from quantkit.kernels.w4.mma_launch import SOURCE as MMA_SOURCE
from quantkit.kernels.work import Work

FORMATS = ("int4", "nvfp4", "mxfp4", "w4a8", "w4a8-fp8", "mxfp4-fp8")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("m", [1, 16, 17, 300])
def test_every_gpu_has_a_configuration_and_a_time_that_its_ceilings_allow(form, m):
    for gpu in GPUS.values():
        work = Work(m=m, n=4096, k=2880, format=form)
        found = best_family(work, gpu)
        if found is None:  # tensor cores before sm_89 have no e4m3
            assert form.endswith("-fp8")
            assert gpu.architecture in ("sm_80", "sm_86") or form == "w4a8-fp8"
            assert gpu.architecture != "sm_90a"
            continue
        family, prediction = found
        assert prediction.time_us >= work.roofline(gpu)[0]
        assert prediction.configuration in list(family.ranked(work, gpu))
        source, defines = family.source(work, prediction.configuration, gpu)
        assert source.stem == prediction.kernel and "GROUP" in defines


def test_few_rows_and_many_have_kernels_of_their_own_on_hopper():
    h200 = get_gpu("h200")

    def kernel(m: int, form: str) -> str:
        found = best_family(Work(m=m, n=8192, k=8192, format=form), h200)
        assert found is not None
        return found[1].kernel

    assert kernel(32, "int4") == kernel(1, "w4a8") == "gemm_w4_few"
    assert kernel(65, "int4") == kernel(1, "mxfp4-fp8") == "gemm_w4_sm90"


def test_groups_that_are_no_power_of_two_have_no_kernel():
    assert family_of(Work(m=4, n=64, k=256, format="int4", group=48), get_gpu("h200")) is None


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("remember", "table"):
        monkeypatch.setattr(tuning, name, partial(getattr(tuning, name), cache=tmp_path))
    monkeypatch.setattr(tuning, "environment", lambda: "driver-1")
    return tmp_path


@pytest.mark.parametrize(("gpu", "form"), [("h200", "int4"), ("h200", "mxfp4-fp8"), ("a100", "nvfp4")])
def test_what_was_timed_fastest_is_predicted(cache, monkeypatch, gpu, form):
    target = get_gpu(gpu)
    work = Work(m=5, n=512, k=1024, format=form)
    family = family_of(work, target)
    assert family is not None
    ranked = list(family.ranked(work, target))
    assert len(ranked) > 2 and not family.predict(work, target).tuned
    timed: dict[Any, Timing] = {
        tile: Timing(median_us=50.0, q1_us=49.0, q3_us=51.0, runs=9) for tile in ranked
    }
    timed[ranked[-1]] = Timing(median_us=7.0, q1_us=6.9, q3_us=7.1, runs=9)
    monkeypatch.setattr(tuning, "forget", lambda: None)
    family.remember(work, target, timed)
    tuning.table.func.cache_clear()  # type: ignore[attr-defined]
    found = family.predict(work, target)
    assert (found.configuration, found.time_us, found.tuned) == (ranked[-1], 7.0, True)
    # For its bucket of rows, more of which take longer, and for no other format.
    assert family.predict(Work(m=8, n=512, k=1024, format=form), target).time_us == pytest.approx(7.0 * 8 / 5)
    assert not family.predict(Work(m=9, n=512, k=1024, format=form), target).tuned


def test_what_is_built_ahead_is_what_is_launched():
    works = [Work(m=m, n=256, k=512, format=form) for m in (1, 64) for form in FORMATS]
    sources = {job.source for job in jobs_of(works, ["sm_90a"])}
    assert sources == {FEW_SOURCE, SOURCE}
    assert {job.source for job in jobs_of(works, ["sm_89"])} == {MMA_SOURCE}

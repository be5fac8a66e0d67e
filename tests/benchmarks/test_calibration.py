import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.conftest import ROOT, DigitsExample


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    # Scripts in benchmarks/ are no package: they are loaded by their path.
    spec = importlib.util.spec_from_file_location("calibration_benchmark", ROOT / "benchmarks/calibration.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(work_s: float, peak_bytes: float) -> dict[str, float]:
    return {"setup_s": 1.0, "work_s": work_s, "search_s": 0.0, "peak_bytes": peak_bytes}


def test_a_machine_that_slows_down_between_rounds_leaves_the_ratio_alone(benchmark: ModuleType) -> None:
    rounds = [{"plain": _run(s, 100), "tool": _run(3 * s, 250)} for s in (1.0, 2.0, 10.0)]
    plain, tool = benchmark.summarize(rounds)
    assert plain["ratio"] == 1
    assert tool["ratio"] == 3
    assert tool["above_plain_bytes"] == 150


def test_made_up_samples_are_distinct_and_the_same_each_time(benchmark: ModuleType) -> None:
    job = benchmark.Job(model="", folder=None, samples=6, batch_size=4)
    first = [sample["input"] for sample in benchmark.Samples(job)]
    again = [sample["input"] for sample in benchmark.Samples(job)]
    assert len({sample.tobytes() for sample in first}) == 6
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_last_batch_holds_what_is_left(benchmark: ModuleType) -> None:
    job = benchmark.Job(model="", folder=None, samples=6, batch_size=4)
    assert [len(batch["input"]) for batch in benchmark.Samples(job).batches(4)] == [4, 2]


def test_a_contender_runs_in_a_process_of_its_own(
    benchmark: ModuleType, digits: DigitsExample, tmp_path: Path
) -> None:
    count = benchmark.write_samples(str(digits.model), str(digits.calib), tmp_path, 3, None)
    job = benchmark.Job(model=str(digits.model), folder=str(tmp_path), samples=count, batch_size=2)
    found = benchmark.measure("plain", job)
    assert count == 3
    assert found["work_s"] > 0
    assert found["peak_bytes"] > 2**20


def test_a_contender_that_fails_says_why(benchmark: ModuleType) -> None:
    job = benchmark.Job(model="missing.onnx", folder=None, samples=1, batch_size=1)
    with pytest.raises(RuntimeError, match=r"missing\.onnx"):
        benchmark.measure("plain", job)

"""What is measured, and how D is held against the oracle, with a family and a clock of the tests' own."""

import numpy as np
import pytest

from quantkit.bench import measuring, tune
from quantkit.bench.cases import Case, cases_of_shapes
from quantkit.bench.measuring import measured
from quantkit.bench.row import relative_error
from quantkit.bench.tune import tune_case
from quantkit.errors import KernelError
from quantkit.kernels.gpus import get_gpu
from quantkit.kernels.timing import Contender
from tests.bench.fakes import FakeClock, FakeFamily

H200 = get_gpu("h200")


def case_of(m: int = 70, n: int = 40, k: int = 32, form: str = "int8") -> Case:
    (case,) = cases_of_shapes([(m, n, k)], [form]).cases
    return case


def run(case: Case, family: FakeFamily, peers: dict[str, float], monkeypatch: pytest.MonkeyPatch):
    clock = family.clock

    def of(us: float) -> Contender:
        def run() -> None:
            clock.now += us

        return Contender(run=run)

    monkeypatch.setattr(
        measuring,
        "peers_of",
        lambda work, operands: ({n: of(us) for n, us in peers.items()}, {"Other": "no"}),
    )
    time_one = measured(H200, peers=bool(peers), repeats=5, pause_s=0, stopwatch=clock)
    return time_one(case, family, family.predict(case.work, H200))


def test_ours_and_the_peers_are_timed_in_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FakeFamily(FakeClock(), [20.0])
    told = run(case_of(), family, {"cuBLAS bf16": 50.0, "Triton": 10.0}, monkeypatch)
    assert told["timing"].median_us == 20.0
    assert {name: t.median_us for name, t in told["peers"].items()} == {"cuBLAS bf16": 50.0, "Triton": 10.0}
    assert told["refused"] == {"Other": "no"}
    assert told["error"] == 0


def test_a_wrong_element_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    told = run(case_of(), FakeFamily(FakeClock(), [20.0], wrong=True), {}, monkeypatch)
    assert 0 < told["error"] < 1


@pytest.mark.parametrize("m", [1, 64, 65, 2000])
def test_what_is_compared_is_rows_from_the_start_and_columns_from_all_over(
    m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = run(case_of(m=m, n=3000, k=16, form="fp8"), FakeFamily(FakeClock(), [1.0]), {}, monkeypatch)
    assert told["error"] == 0
    assert told["checked"] == f"{min(m, 64)} × 1024 of {m} × 3000"


def test_a_kernel_that_fails_stops_the_run_and_names_kernel_and_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family = FakeFamily(FakeClock(), [-1.0])
    with pytest.raises(KernelError, match=r"fake tile: fails on 70x40x32 int8 \(out of registers\)"):
        run(case_of(), family, {}, monkeypatch)


def test_tuning_remembers_what_was_fastest_and_tells_the_gain() -> None:
    clock = FakeClock()
    family = FakeFamily(clock, [30.0, -1.0, 20.0, 25.0])
    case = case_of()
    found = tune_case(case, family, family.times_us, H200, repeats=5, pause_s=0, stopwatch=clock)
    assert found is not None
    assert (found.first_us, found.fastest_us, found.tried) == (30.0, 20.0, 4)
    assert found.refused == {"-1.0": "out of registers"}
    assert {c: t.median_us for c, t in family.remembered.items()} == {30.0: 30.0, 20.0: 20.0, 25.0: 25.0}


def test_where_nothing_runs_nothing_is_remembered() -> None:
    clock = FakeClock()
    family = FakeFamily(clock, [-1.0, -2.0])
    assert tune_case(case_of(), family, family.times_us, H200, repeats=2, pause_s=0, stopwatch=clock) is None
    assert family.remembered == {}


def test_what_could_not_be_tuned_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    family = FakeFamily(clock, [-1.0, -2.0])
    for name, stand_in in (
        ("present_gpu", lambda: H200),
        ("GpuStopwatch", lambda: clock),
        ("compile_ahead", lambda chosen, gpu: None),
        ("family_of", lambda work, gpu: family if work.format in family.formats else None),
    ):
        monkeypatch.setattr(tune, name, stand_in)
    found = tune.tune_model(shapes=[(70, 40, 32)], formats=["int8", "int2"], repeats=2, pause_ms=0)
    assert found.products == ()
    assert found.untuned == {
        "70 × 40 × 32 int2": "no kernel multiplies it on sm_90a",
        "70 × 40 × 32 int8": "none of 2 configurations runs",
    }
    assert found.to_dict()["untuned"] == found.untuned


def test_the_error_is_relative_and_infinite_where_something_is_not_finite() -> None:
    want = np.full((4, 4), 2.0, np.float32)
    assert relative_error(want.copy(), want) == 0
    assert relative_error(want * 1.5, want) == pytest.approx(0.5)
    broken = want.copy()
    broken[1, 1] = np.nan
    assert relative_error(broken, want) == float("inf")


def test_what_does_not_fit_into_memory_names_the_option_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FakeFamily(FakeClock(), [1.0])

    def full(*given: object) -> None:
        raise MemoryError

    monkeypatch.setattr(family, "prepare", full)
    with pytest.raises(KernelError, match=r"70x40x32 int8: does not fit .*give a smaller --batch"):
        run(case_of(), family, {}, monkeypatch)

"""Timing in turns, on a clock that the tests hold."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.kernels.timing import Contender, time_in_turns


class FakeGpu:
    """A GPU on which time passes only as its calls say; it notes what it is asked to do."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def works(self, name: str, times_us: Callable[[int], float]) -> Contender:
        """A call that takes times_us(i) the i-th time that it is replayed."""
        runs = iter(range(10**6))

        def run() -> None:
            self.log.append(name)
            self.now += times_us(next(runs))

        return Contender(run=run)

    def capture(self, contender: Contender) -> Callable[[], None]:
        before = self.now
        contender.run()
        self.now = before
        self.log.clear()
        return contender.run

    def cold(self) -> None:
        self.log.append("cold")
        self.now += 1000.0

    def mark(self) -> float:
        return self.now

    def elapsed_us(self, start: float, end: float) -> float:
        return end - start

    def release(self) -> None:
        pass

    def wait(self) -> None:
        self.log.append("wait")


def test_the_time_between_launches_is_nobodys() -> None:
    gpu = FakeGpu()
    found, refused = time_in_turns({"a": gpu.works("a", lambda i: 5.0)}, repeats=3, pause_s=0, stopwatch=gpu)
    assert found["a"].median_us == found["a"].q1_us == found["a"].q3_us == 5.0
    assert found["a"].runs == 3
    assert refused == {}


def test_one_slow_launch_moves_no_median() -> None:
    gpu = FakeGpu()
    slow = gpu.works("a", lambda i: 900.0 if i == 4 else 5.0)
    found, _ = time_in_turns({"a": slow}, repeats=25, pause_s=0, stopwatch=gpu)
    assert (found["a"].median_us, found["a"].q3_us) == (5.0, 5.0)


def test_every_launch_begins_cold_and_all_take_turns() -> None:
    gpu = FakeGpu()
    contenders = {name: gpu.works(name, lambda i: 1.0) for name in ("a", "b", "c")}
    time_in_turns(contenders, repeats=20, pause_s=0, stopwatch=gpu)
    launches = [entry for entry in gpu.log if entry not in ("cold", "wait")]
    assert sorted(launches) == sorted("abc" * 20)
    assert gpu.log[0::2][:60] == ["cold"] * 60
    # Drawn, not one after the other: no contender has a third of the run for itself.
    assert len(set(launches[:20])) == len(set(launches[-20:])) == 3


def test_who_cannot_run_is_told_and_the_others_run() -> None:
    gpu = FakeGpu()

    def refuse() -> None:
        raise RuntimeError("M must be above 16\nat some place in a library")

    contenders = {"no": Contender(run=refuse), "yes": gpu.works("yes", lambda i: 2.0)}
    found, refused = time_in_turns(contenders, repeats=5, pause_s=0, stopwatch=gpu)
    assert found.keys() == {"yes"}
    assert refused == {"no": "M must be above 16"}


def test_a_rest_follows_each_launch_once_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    monkeypatch.setattr("quantkit.kernels.timing.time.sleep", rests.append)
    gpu = FakeGpu()
    time_in_turns({"a": gpu.works("a", lambda i: 1.0)}, repeats=4, pause_s=0.002, stopwatch=gpu)
    assert rests == [0.002] * 4
    assert gpu.log[:3] == ["cold", "a", "wait"]


@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=40))
def test_quartiles_lie_around_the_median(times: list[float]) -> None:
    gpu: Any = FakeGpu()
    gpu.elapsed_us = lambda start, end: start
    gpu.mark = iter([t for time in times for t in (time, time)]).__next__
    found, _ = time_in_turns(
        {"a": gpu.works("a", lambda i: 0.0)}, repeats=len(times), pause_s=0, stopwatch=gpu
    )
    told = found["a"]
    assert min(times) <= told.q1_us <= told.median_us <= told.q3_us <= max(times)

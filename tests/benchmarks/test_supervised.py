"""Jobs on a GPU within a budget, with workers that are Python processes: they fail, die and hang as kernels do."""

import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT

from .scripts import script

# What a worker runs: each job is one line of what it does, and is called by its number.
WORKER = """
import os, sys, time
sys.path.insert(0, {folder!r})
from supervised import Job, Journal, work
from pathlib import Path

def job(number, text):
    return Job(part="p", name=str(number), run=lambda: eval(text), needs_s={needs}, limit_s=0.6)

jobs = [job(number, text) for number, text in enumerate({jobs!r})]
sys.exit(work(jobs, Journal(Path({journal!r})), deadline={deadline}, answers=lambda: {answers}))
"""


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("supervised", monkeypatch)


def ran(supervised, tmp_path: Path, *jobs: str, needs=0.0, seconds=30.0, answers=True, **options):
    journal = supervised.Journal(tmp_path / "journal")
    deadline = time.time() + seconds
    text = WORKER.format(
        folder=str(ROOT / "benchmarks"), jobs=list(jobs), journal=str(journal.path), deadline=deadline, needs=needs,
        answers=answers,
    )  # fmt: skip
    options = {"silence_s": 20.0, "grace_s": 0.3} | options
    supervised.supervise([sys.executable, "-c", text], journal, deadline=deadline, **options)
    return supervised.gathered(journal)


def test_jobs_run_in_their_order_and_their_results_are_kept(supervised, tmp_path):
    found = ran(supervised, tmp_path, "[1]", "[2, 3]", "[4]")
    assert found["parts"] == {"p": [1, 2, 3, 4]}
    assert (found["failed"], found["left_out"], list(found["seconds"])) == ([], [], ["p"])


def test_a_job_that_fails_is_told_and_the_others_run(supervised, tmp_path):
    found = ran(supervised, tmp_path, "[1]", "1 / 0", "[2]")
    assert found["parts"] == {"p": [1, 2]}
    (failed,) = found["failed"]
    assert (failed["name"], failed["reason"][:17]) == ("1", "ZeroDivisionError")


def test_a_worker_whose_gpu_answers_no_more_is_started_again_behind_what_stopped_it(supervised, tmp_path):
    found = ran(supervised, tmp_path, "[os.getpid()]", "1 / 0", "[os.getpid()]", answers=False)
    first, second = found["parts"]["p"]
    assert first != second
    assert [entry["name"] for entry in found["failed"]] == ["1"]


def test_a_worker_that_dies_or_hangs_loses_one_job(supervised, tmp_path):
    found = ran(supervised, tmp_path, "[1]", "os._exit(7)", "[2]", "time.sleep(60)", "[3]")
    assert found["parts"] == {"p": [1, 2, 3]}
    reasons = {entry["name"]: entry["reason"] for entry in found["failed"]}
    assert reasons == {"1": "its process ended with 7", "3": "nothing for 0.6 s"}


def test_what_does_not_fit_the_budget_is_left_out_and_named(supervised, tmp_path):
    found = ran(supervised, tmp_path, "[1]", "[2]", needs=100.0, seconds=10.0)
    assert (found["parts"], found["left_out"]) == ({}, ["p: 0", "p: 1"])


def test_the_time_ends_a_job_too(supervised, tmp_path):
    begin = time.monotonic()
    found = ran(supervised, tmp_path, "[1]", "time.sleep(0.5) or time.sleep(60)", seconds=2.0, grace_s=0.0)
    assert time.monotonic() - begin < 10
    assert found["parts"] == {"p": [1]}
    assert found["failed"]


def test_a_worker_that_never_gets_to_a_job_is_not_started_for_ever(supervised, tmp_path):
    journal = supervised.Journal(tmp_path / "journal")
    command = [sys.executable, "-c", "import sys; sys.exit(5)"]
    supervised.supervise(command, journal, deadline=time.time() + 30)
    (failed,) = supervised.gathered(journal)["failed"]
    assert (failed["part"], failed["reason"]) == ("worker", "exit 5")


def test_a_job_that_wants_a_fresh_worker_gets_one(supervised, tmp_path):
    journal = supervised.Journal(tmp_path / "journal")
    jobs = [supervised.Job(part="p", name=str(n), run=lambda n=n: [n], fresh=n == 1) for n in range(3)]
    again = supervised.work(jobs, journal, deadline=time.time() + 9, answers=lambda: True)
    assert (again, supervised.gathered(journal)["parts"]) == (supervised.AGAIN, {"p": [0]})
    last = supervised.work(jobs, journal, deadline=time.time() + 9, answers=lambda: True)
    assert (last, supervised.gathered(journal)["parts"]) == (0, {"p": [0, 1, 2]})


def test_a_line_that_is_being_written_is_not_read(supervised, tmp_path):
    journal = supervised.Journal(tmp_path / "journal")
    journal.write("left", {"part": "p", "name": "a"})
    with journal.path.open("a") as file:
        file.write('{"state": "le')
    assert len(journal.lines()) == 1

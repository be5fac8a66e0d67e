"""Many jobs on a GPU within a budget of seconds: the most important first, each result on disk as soon as it is there.

A kernel that faults takes its process along, for CUDA gives a context up after an illegal address; one that waits for
ever hangs it. So jobs run in a worker process, which notes in a journal, a line of JSON each, when a job begins and how
it ended. This side reads the journal, writes what it says as one JSON file, and starts the worker again behind a job
that stopped it. Whatever ends a run, what was found until then is kept.
"""

import json
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a worker leaves with when a job failed and the GPU answers no more: it wants to be started again.
AGAIN = 3


@dataclass(frozen=True, kw_only=True)
class Job:
    """One thing to find out, for one line of the journal.

    part, name: what it is called; results of one part are put together. run: returns what JSON can hold. needs_s: the
    seconds that it is thought to take; it is left out where fewer are left. limit_s: after these it counts as hung.
    fresh: it wants a worker that has run nothing yet, and so remembers nothing.
    """

    part: str
    name: str
    run: Callable[[], Any]
    needs_s: float = 2.0
    limit_s: float = 60.0
    fresh: bool = False


class Journal:
    """Lines of JSON in a file that one process writes and another reads."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, state: str, job: Job | dict[str, Any], **more: Any) -> None:
        """Append a line: began, done, failed, or left (out)."""
        part, name = (job.part, job.name) if isinstance(job, Job) else (job["part"], job["name"])
        line = json.dumps({"state": state, "part": part, "name": name, **more}, default=str)
        with self.path.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> list[dict[str, Any]]:
        """Return what is written, but for a line that is just being written."""
        if not self.path.exists():
            return []
        whole, _, _ = self.path.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def settled(self) -> set[tuple[str, str]]:
        """Return the part and name of each job that is done or failed."""
        return {(x["part"], x["name"]) for x in self.lines() if x["state"] in ("done", "failed")}

    def open_job(self) -> dict[str, Any] | None:
        """Return the line of the job that began and did not end, if there is one."""
        lines = self.lines()
        return lines[-1] if lines and lines[-1]["state"] == "began" else None


def work(jobs: Iterable[Job], journal: Journal, *, deadline: float, answers: Callable[[], bool]) -> int:
    """Run the jobs that are not settled, in their order, and return the exit code of a worker.

    deadline: of time.time(). answers: whether the GPU still does anything, asked after a job that failed.
    """
    settled, idle = journal.settled(), True
    for job in jobs:
        if (job.part, job.name) in settled:
            continue
        if job.fresh and not idle:
            return AGAIN
        if time.time() + job.needs_s > deadline:
            journal.write("left", job)
            continue
        idle = False
        journal.write("began", job, limit_s=job.limit_s)
        begin = time.monotonic()
        try:
            found = job.run()
        except Exception as error:
            # Whatever one job dies of, the others run; its reason is told with where it happened.
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            journal.write(
                "failed", job, reason=f"{type(error).__name__}: {reason} ({Path(where.filename).name}:{where.lineno})"
            )  # fmt: skip
            if not answers():
                return AGAIN
            continue
        journal.write("done", job, seconds=round(time.monotonic() - begin, 2), found=found)
    return 0


def supervise(
    command: Sequence[str],
    journal: Journal,
    *,
    deadline: float,
    silence_s: float = 90.0,
    grace_s: float = 10.0,
    on_news: Callable[[], object] = lambda: None,
) -> None:
    """Run the worker `command` until it has been through all its jobs, or the time is up.

    silence_s: how long it may write nothing while no job is open: it starts up. grace_s: how long a job that began in
    time may run beyond the deadline. on_news: called when the journal has grown.
    """
    deaths = 0
    while True:
        before = len(journal.lines())
        # A group of its own, so that what it started ends with it.
        process = subprocess.Popen(command, process_group=0)
        try:
            reason = _watch(process, journal, deadline + grace_s, silence_s, on_news)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        stopped = journal.open_job()
        if stopped is not None:
            journal.write("failed", stopped, reason=reason or f"its process ended with {process.returncode}")
        on_news()
        if process.returncode == 0 or time.time() >= deadline:
            return
        # A worker that dies without a job of its own would do so again, and again.
        deaths = 0 if len(journal.lines()) > before else deaths + 1
        if deaths == 2:
            journal.write(
                "failed", {"part": "worker", "name": "start"}, reason=reason or f"exit {process.returncode}"
            )
            on_news()
            return


def _watch(
    process: "subprocess.Popen[bytes]",
    journal: Journal,
    end: float,
    silence_s: float,
    on_news: Callable[[], object],
) -> str | None:
    """Return once the worker has ended, or why it must be ended."""
    size, since = -1, time.monotonic()
    while process.poll() is None:
        now = journal.path.stat().st_size if journal.path.exists() else 0
        if now != size:
            size, since = now, time.monotonic()
            on_news()
        opened = journal.open_job()
        limit = silence_s if opened is None else opened["limit_s"]
        if time.monotonic() - since > limit:
            return f"nothing for {limit:g} s"
        if time.time() > end:
            return "the time was up"
        time.sleep(0.05)
    return None


def gathered(journal: Journal) -> dict[str, Any]:
    """Return all that the journal says: by part what was found, and what failed or was left out, and why.

    Lists of one part are joined to one, dictionaries lie under their jobs' names. "seconds" has what each part took.
    """
    parts: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    lines = journal.lines()
    for line in lines:
        if line["state"] != "done":
            continue
        part, found = line["part"], line["found"]
        seconds[part] = round(seconds.get(part, 0.0) + line["seconds"], 2)
        if isinstance(found, list):
            parts.setdefault(part, []).extend(found)
        else:
            parts.setdefault(part, {})[line["name"]] = found
    failed = [{k: x[k] for k in ("part", "name", "reason")} for x in lines if x["state"] == "failed"]
    settled = journal.settled()
    # A worker that was started again leaves out what another had left out before.
    left = dict.fromkeys((x["part"], x["name"]) for x in lines if x["state"] == "left")
    return {
        "parts": parts,
        "seconds": seconds,
        "failed": failed,
        "left_out": [f"{part}: {name}" for part, name in left if (part, name) not in settled],
    }


def write_json(path: Path, found: dict[str, Any]) -> None:
    """Write a JSON file whole: whoever ends this process, the file is an old one or a new one."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(found, indent=1))
    temporary.replace(path)

"""Check, tune, time and profile every kernel on the GPU that is there, beside torch's and others', and write JSON.

    python benchmarks/gpu_run.py --all --budget 200 --cubins .cubins --out results.json
    python benchmarks/gpu_run.py --check --tune --time --formats --out results.json
    python benchmarks/gpu_run.py --statistics
    python benchmarks/gpu_run.py --profile 4096x7168x16384 --format fp8
    python benchmarks/gpu_run.py --build .cubins           # anywhere: what --all would compile

--all is everything, the most important first, within --budget seconds: see gpu_plan.py for the order and supervised.py
for what happens to kernels that fault or hang. The JSON is whole after every step. Compiling takes most of the time of
a first run; --build does that elsewhere, with the NVRTC of the same version as there (a cubin's name has it): another
one's wheel is nvidia-cuda-nvrtc==13.0.*, and LD_PRELOAD of the libnvrtc.so.13 in it is enough.

A kernel that is in quantkit.kernels.families.FAMILIES is checked, tuned and timed here without a further line.
--tune writes what it finds where the package ships it: quantkit/kernels/tuned/<gpu>.json (--tuned elsewhere; --all
beside its results).

Timing: quantkit.kernels.timing. All contenders of a shape in one run, in random order, each a CUDA graph of one call,
on a cold and clean L2; medians over --repeats; random data. --pause-ms of rest after each measure what a kernel does at
full clock; without it a large product runs into the board's power limit, and so does every contender.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Beside this file; scripts find each other wherever they are started from.
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from gpu_checks import answers, check  # noqa: E402
from gpu_plan import FORMATS, LAYERS, ROWS, STREAMED, TABLE, carry, jobs, prebuild  # noqa: E402
from gpu_times import compare, facts, formats_table, tune  # noqa: E402
from supervised import Journal, gathered, supervise, work, write_json  # noqa: E402

from quantkit.bench.operands import random_operands  # noqa: E402
from quantkit.kernels import tuning  # noqa: E402
from quantkit.kernels.families import family_of  # noqa: E402
from quantkit.kernels.present import present_gpu, why_no_gpu  # noqa: E402
from quantkit.kernels.work import Work  # noqa: E402

try:
    import cupy
    import torch  # noqa: F401
except ImportError as error:
    # --help needs neither; `main` says what is missing.
    MISSING: str | None = f"{error.name} is not installed"
else:
    MISSING = why_no_gpu()


def profile(shape: str, form: str, out: Path) -> None:
    """Run one product under Nsight Compute and keep its report beside `out`."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise SystemExit("--profile: ncu is not on the PATH; install Nsight Compute.")
    report = out.with_suffix("")
    command = [
        ncu, "--set", "full", "--kernel-name", "regex:gemm", "--launch-skip", "2", "--launch-count", "1",
        "--clock-control", "none", "-f", "-o", str(report), sys.executable, __file__, "--once", shape,
        "--format", form,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    subprocess.run([ncu, "--import", f"{report}.ncu-rep", "--page", "details"], check=True)


def once(shape: str, form: str) -> None:
    """Launch one product three times: what a profiler looks at."""
    m, n, k = parse(shape)
    work = Work(m=m, n=n, k=k, format=form)
    here = present_gpu()
    family = family_of(work, here)
    if family is None:
        raise SystemExit(f"--once: no kernel for {form} on {here.name}.")
    call = family.prepare(work, random_operands(work), family.predict(work, here).configuration)
    for _ in range(3):
        call()
    cupy.cuda.Device().synchronize()


def parse(shape: str) -> tuple[int, int, int]:
    """Return M, N, K of "MxNxK"."""
    m, n, k = map(int, shape.split("x"))
    return m, n, k


def run_all(options: argparse.Namespace) -> None:
    """Run all jobs in a worker, and keep the JSON up to date with its journal."""
    begin = time.time()
    journal = Journal(options.out.with_suffix(".journal"))
    journal.path.unlink(missing_ok=True)
    deadline = begin + options.budget
    known = {"budget_s": options.budget, "commit": options.commit, "repeats": options.repeats}
    known |= {"pause_ms": options.pause_ms}

    def write() -> None:
        found = gathered(journal)
        found |= {"wall_s": round(time.time() - begin, 1)}
        write_json(options.out, known | found["parts"].pop("facts", {}).get("facts", {}) | found)

    write()
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(deadline)]
    supervise(command, journal, deadline=deadline, on_news=write)
    write()
    found = json.loads(options.out.read_text())
    for name, seconds in found["seconds"].items():
        print(f"{name}: {seconds:.1f} s")
    for entry in found["failed"]:
        print(f"FAILED {entry['part']}: {entry['name']}: {entry['reason']}")
    print(
        f"left out: {len(found['left_out'])}; all: {found['wall_s']} s of {options.budget:g} s; {options.out}"
    )


def run_worker(options: argparse.Namespace) -> int:
    """Be the worker of `run_all`."""
    if options.cubins:
        print(carry(options.cubins))
    tuned = options.tuned or options.out.with_name("tuned.json")
    every = jobs(
        repeats=options.repeats, pause_s=options.pause_ms / 1e3, depth=options.depth, tuned=tuned, only=options.only
    )  # fmt: skip
    journal = Journal(options.out.with_suffix(".journal"))
    return work(every, journal, deadline=options.worker, answers=answers)


def main() -> None:
    """Run what the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="everything, by importance, within --budget")
    parser.add_argument("--budget", type=float, default=600.0, metavar="SECONDS", help="for --all")
    parser.add_argument("--only", metavar="PART,...", help="of --all")
    parser.add_argument("--cubins", type=Path, metavar="FOLDER", help="what --build made, for --all")
    parser.add_argument("--build", type=Path, metavar="FOLDER", help="compile what --all needs; needs no GPU")
    parser.add_argument("--gpu", default="h200", help="for --build")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true")
    parser.add_argument(
        "--few", type=int, default=3, help="configurations to check beyond a family's first format"
    )
    parser.add_argument("--tune", action="store_true")
    parser.add_argument(
        "--tuned", type=Path, help="where --tune writes its table (default: into the package)"
    )
    parser.add_argument("--time", action="store_true", help="int8, fp8 and bf16 beside torch")
    parser.add_argument(
        "--formats", action="store_true", help="every format beside every peer, as quantkit bench"
    )
    parser.add_argument(
        "--statistics",
        action="store_true",
        help="calibration's reductions: right bit for bit, and beside a copy",
    )
    parser.add_argument("--layers", action="store_true", help="also the layers of well-known models")
    parser.add_argument(
        "--format", default=",".join(FORMATS), help="for --tune, --formats and --profile (default: all)"
    )
    parser.add_argument("--depth", type=int, default=8, help="configurations to tune")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--shapes", nargs="*", help="MxNxK instead of the table")
    parser.add_argument("--pause-ms", type=float, default=2.0)
    parser.add_argument("--profile", metavar="MxNxK", help="one product under Nsight Compute")
    parser.add_argument("--once", metavar="MxNxK", help="launch one product, for a profiler")
    parser.add_argument("--commit", default="", help="of the code, for the record")
    parser.add_argument("--out", type=Path, default=Path("gpu_run.json"))
    options = parser.parse_args()
    if options.build:
        print(prebuild(options.build, options.gpu, depth=options.depth, only=options.only))
        return
    if MISSING:
        raise SystemExit(f"gpu_run.py: no GPU to run on ({MISSING}); it needs one, with CuPy and torch.")
    if options.all:
        if options.worker:
            raise SystemExit(run_worker(options))
        run_all(options)
        return
    formats = options.format.split(",")
    if options.once:
        once(options.once, formats[0])
        return
    if options.profile:
        profile(options.profile, formats[0], options.out)
        return
    pause_s = options.pause_ms / 1e3
    results: dict[str, Any] = facts() | {
        "pause_ms": options.pause_ms,
        "repeats": options.repeats,
        "commit": options.commit,
    }
    print(results)
    shapes = [parse(shape) for shape in options.shapes] if options.shapes else list(TABLE)
    layers = {name: [(m, n, k) for n, k in sizes for m in ROWS] for name, sizes in LAYERS.items()}
    every = shapes + [shape for part in layers.values() for shape in part] if options.layers else shapes
    repeats = options.repeats
    tuned = options.tuned or tuning.SHIPPED / f"{present_gpu().name}.json"
    stages: list[tuple[str, bool, Callable[[], Any]]] = [
        ("check", options.check, lambda: check(options.few)),
        # Before the tables, which then show what was tuned.
        (
            "tune",
            options.tune,
            lambda: tune(every, formats, options.depth, max(9, repeats // 2), pause_s, tuned),
        ),
        ("table", options.time, lambda: compare(shapes, repeats, pause_s)),
        ("sustained", options.time, lambda: compare(shapes, repeats, 0.0)),
        (
            "layers",
            options.time and options.layers,
            lambda: {name: compare(part, repeats, pause_s) for name, part in layers.items()},
        ),
        (
            "formats",
            options.formats,
            lambda: formats_table(
                shapes if options.shapes else list(dict.fromkeys([*shapes, *STREAMED])),
                formats,
                repeats,
                options.pause_ms,
            ),
        ),
    ]
    if options.statistics:
        from statistics_run import check_statistics, time_grams, time_statistics

        stages += [
            ("statistics", True, check_statistics),
            ("statistics_times", True, lambda: time_statistics(repeats, pause_s)),
            ("gram_times", True, lambda: time_grams(repeats, pause_s)),
        ]
    for name, wanted, run in stages:
        if wanted:
            begin = time.monotonic()
            results[name] = run()
            options.out.write_text(json.dumps(results, indent=1))
            print(f"{name}: {time.monotonic() - begin:.1f} s")


if __name__ == "__main__":
    main()

"""Check, tune, time and profile every kernel on the GPU that is there, beside torch's and others', and write JSON.

    PYTHONPATH=. python benchmarks/gpu_run.py --check --tune --time --formats --out results.json
    PYTHONPATH=. python benchmarks/gpu_run.py --statistics
    PYTHONPATH=. python benchmarks/gpu_run.py --profile 4096x7168x16384 --format fp8

A kernel that is in quantkit.kernels.families.FAMILIES is checked, tuned and timed here without a further line.
--tune writes what it finds where the package ships it: quantkit/kernels/tuned/<gpu>.json (--tuned elsewhere).

Timing: quantkit.kernels.timing. All contenders of a shape in one run, in random order, each a CUDA graph of one call,
on a cold and clean L2; medians over --repeats; random data. --pause-ms of rest after each measure what a kernel does at
full clock; without it a large product runs into the board's power limit, and so does every contender.
"""

import argparse
import datetime
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.bench import bench_model
from quantkit.bench.cases import cases_of_shapes
from quantkit.bench.measuring import as_numpy, compile_ahead
from quantkit.bench.operands import exact_operands, random_operands
from quantkit.bench.row import relative_error
from quantkit.bench.tune import tune_case
from quantkit.formats import FP8_E4M3, INT8, QParams, QuantSpec
from quantkit.formats.packing import code_bits, pack_bits
from quantkit.formats.presets import ACTIVATION_SPECS
from quantkit.kernels import device as gpu
from quantkit.kernels import tuning
from quantkit.kernels.build import Job, build_all
from quantkit.kernels.compile import nvrtc_version
from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.families import FAMILIES, family_of
from quantkit.kernels.family import Family
from quantkit.kernels.gemm import Epilogue, PackedWeight, matmul
from quantkit.kernels.gemm_launch import SOURCE, launch_of
from quantkit.kernels.heuristics import Problem, Tile, choose
from quantkit.kernels.present import present_gpu, why_no_gpu
from quantkit.kernels.quantize import quantize_activation
from quantkit.kernels.quantize_launch import QuantizeKind
from quantkit.kernels.quantize_launch import launch_of as quantize_launch_of
from quantkit.kernels.quantize_reference import quantize_reference
from quantkit.kernels.timing import Contender, GpuStopwatch, time_in_turns
from quantkit.kernels.work import Work

try:
    import cupy
    import torch
except ImportError as error:
    # --help needs neither; `main` says what is missing.
    MISSING: str | None = f"{error.name} is not installed"
else:
    MISSING = why_no_gpu()

TABLE = [
    (8192, 8192, 8192),
    (4096, 4096, 4096),
    (4096, 7168, 16384),
    (1024, 8192, 8192),
    (256, 8192, 8192),
    (64, 8192, 8192),
    (16, 8192, 8192),
    (1, 8192, 8192),
]
# Where the weight's bytes are the cost: formats of few bits are held against the others on these.
STREAMED = [(m, n, 8192) for n in (8192, 28672) for m in (1, 16, 64, 256, 1024, 4096)]
LAYERS = {
    "llama3_8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "llama3_70b": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
    "vit_b": [(2304, 768), (768, 768), (3072, 768), (768, 3072)],
    "resnet50": [(64, 576), (256, 64), (128, 1152), (512, 1024), (256, 2304), (2048, 512), (1000, 2048)],
}
ROWS = (1, 16, 64, 256, 1024, 4096, 8192)
RAGGED = [
    (1, 8, 16),
    (3, 130, 48),
    (17, 288, 272),
    (64, 136, 1040),
    (130, 264, 400),
    (257, 520, 2880),
    (300, 1000, 700),
]
FORMATS = sorted({form for family in FAMILIES for form in family.formats})
# What quantize.cu is asked for, and its fixed scale where it has one.
QUANTIZED: list[tuple[QuantSpec, float | None]] = [
    (QuantSpec(format=INT8), 0.023),
    (QuantSpec(format=FP8_E4M3), 0.0071),
    (QuantSpec(format=INT8, dynamic="token"), None),
    (QuantSpec(format=FP8_E4M3, dynamic="token"), None),
    *((ACTIVATION_SPECS[name], None) for name in ("fp8-block", "mxfp8", "mxfp4", "nvfp4")),
]
MATRICES = [(1, 16), (3, 264), (130, 2880), (2048, 8192)]
BOTH_EACH = EpilogueKind(row_scale="each", column_scale="each")
BOTH_ONE = EpilogueKind(row_scale="one", column_scale="one")


# ---- correctness -------------------------------------------------------------------------------------------------


def check_cases(few: int) -> Iterator[tuple[Family, Work, Any]]:
    """Every configuration of every family on ragged shapes; beyond the first format a `few` of them."""
    here = present_gpu()
    for family in FAMILIES:
        for m, n, k in RAGGED:
            for index, form in enumerate(sorted(family.formats)):
                for output in ("bfloat16", "float32"):
                    work = Work(
                        m=m, n=n, k=k, format=form, output=output, bias=True, relu=output == "float32"
                    )
                    if not family.takes(work, here):
                        continue
                    configurations = list(family.ranked(work, here))
                    if index or output != "bfloat16":
                        step = max(1, len(configurations) // few)
                        configurations = configurations[::step][:few]
                    for configuration in configurations:
                        yield family, work, configuration


def check(few: int) -> dict[str, Any]:
    """Compare with the oracles: whole numbers and powers of two, so every result has one right answer."""
    cases = list(check_cases(few))
    compile_ahead(cases, present_gpu())
    wrong: list[dict[str, Any]] = []
    exact: dict[str, int] = {}
    for family, work, configuration in cases:
        operands = exact_operands(work)
        call = family.prepare(work, operands, configuration)
        call().fill(77)  # the second call must write every element
        got, want = as_numpy(call(), work.output), family.reference(work, operands)
        same = np.array_equal(got, want)
        exact[family.name] = exact.get(family.name, 0) + same
        if not same:
            wrong.append(
                {
                    "kernel": family.name,
                    "work": asdict(work),
                    "configuration": family.describe(configuration),
                    "elements": int((got != want).sum()),
                    "relative_error": relative_error(got, want),
                }
            )
    if not (replays_exactly() and streams_agree()):
        wrong.append({"kernel": "matmul", "work": "CUDA graph or two streams"})
    quantized = list(quantized_exactly(MATRICES))
    exact["quantize"] = sum(same for _, same in quantized)
    wrong += [{"kernel": "quantize", "work": what} for what, same in quantized if not same]
    count = len(cases) + len(quantized)
    print(f"check: {sum(exact.values())} of {count} exact, by kernel {exact}")
    for entry in wrong[:10]:
        print("WRONG", entry)
    return {"cases": count, "exact": exact, "wrong": wrong}


def quantized_exactly(shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, bool]]:
    """Yield what was quantized, in words, and whether codes and scales are the oracle's bit for bit."""
    rng = np.random.default_rng(0)
    for rows, columns in shapes:
        x = rng.standard_normal((rows, columns)).astype(np.float32)
        for spec, fixed in QUANTIZED:
            shared = np.float32(0.0031) if spec.has_global_scale else None
            got = quantize_activation(
                cupy.asarray(x), spec, scale=fixed, global_scale=None if shared is None else float(shared)
            )
            threads = quantize_launch_of(
                QuantizeKind(x_type="float32", spec=spec), rows, columns, vector=columns % 8 == 0
            ).row_threads
            known = None if fixed is None else QParams(np.float32(fixed), spec.format.dtype.type(0))
            want = quantize_reference(x, spec, known, global_scale=shared, row_threads=threads)
            codes = code_bits(want.qvalue, spec.format)
            codes = pack_bits(codes, 4) if spec.format.bits == 4 else codes
            same = np.array_equal(
                np.ascontiguousarray(cupy.asnumpy(got.codes)).view(np.uint8), codes.view(np.uint8)
            )
            if fixed is None:
                scales = want.qparams.scale
                if spec.scale_format is not None:
                    scales = scales.astype(spec.scale_format.dtype).view(np.uint8)
                same = same and np.array_equal(cupy.asnumpy(got.scale), scales)
            yield f"{rows} x {columns}, {spec}", same


def replays_exactly() -> bool:
    """Return whether a CUDA graph of a product, replayed on new operands, gives what a plain call gives."""
    operands = Operands(300, 520, 1024)
    run = operands.ours("int8", "row")
    replay = GpuStopwatch().capture(Contender(run=run))
    operands.i8[0].copy_(torch.randint_like(operands.i8[0], -127, 128))
    run()
    want = operands.out.copy()
    operands.out.fill(0x55)
    torch.cuda.synchronize()
    replay()
    torch.cuda.synchronize()
    return bool((operands.out == want).all())


def streams_agree() -> bool:
    """Return whether products on two streams at once give what they give alone."""
    pairs = [Operands(2048, 2048, size) for size in (2048, 4096)]
    runs = [operands.ours("int8", "row") for operands in pairs]
    want = []
    for run, operands in zip(runs, pairs, strict=True):
        run()
        want.append(operands.out.copy())
        operands.out.fill(0x55)
    torch.cuda.synchronize()
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in runs]
    for _ in range(20):
        for stream, run in zip(streams, runs, strict=True):
            with stream:
                run()
    torch.cuda.synchronize()
    return all(bool((o.out == w).all()) for o, w in zip(pairs, want, strict=True))


# ---- timing ------------------------------------------------------------------------------------------------------


class Operands:
    """Random operands of a shape in every format, for torch and for us."""

    def __init__(self, m: int, n: int, k: int) -> None:
        torch.manual_seed(m + n + k)
        self.shape = m, n, k
        cuda = {"device": "cuda"}
        self.i8 = [torch.randint(-127, 128, (rows, k), dtype=torch.int8, **cuda) for rows in (m, n)]
        self.bf16 = [torch.randn(rows, k, dtype=torch.bfloat16, **cuda) for rows in (m, n)]
        self.fp8 = [(x * 32).to(torch.float8_e4m3fn) for x in self.bf16]
        self.row, self.column = torch.rand(m, 1, **cuda), torch.rand(1, n, **cuda)
        self.one = torch.full((), 0.01, **cuda)
        self.out = cupy.empty((m, n), np.uint16)

    def ours(
        self, form: str, kind: str, tile: Tile | None = None, output: str = "bfloat16"
    ) -> Callable[[], Any]:
        """Return a call of our kernel. kind: row (scales of each row and column) or tensor."""
        _, n, k = self.shape
        pair = {"int8": self.i8, "float8_e4m3fn": self.fp8, "bfloat16": self.bf16}[form]
        carrier = {"int8": torch.int8, "float8_e4m3fn": torch.uint8, "bfloat16": torch.int16}[form]
        a, b = (cupy.asarray(x.view(carrier)) for x in pair)
        a = a.view(np.uint16) if form == "bfloat16" else a
        row, column = (self.row, self.column) if kind == "row" else (self.one, self.one)
        scaled = form != "bfloat16"
        weight = PackedWeight(
            data=b.view(np.uint8), scale=cupy.asarray(column).reshape(-1) if scaled else None, n=n, k=k, format=form,
            arch=gpu.architecture(0),
        )  # fmt: skip
        epilogue = Epilogue(row_scale=cupy.asarray(row).reshape(-1) if scaled else None)
        return lambda: matmul(a, weight, epilogue=epilogue, out_dtype=output, out=self.out, tile=tile)

    def peers(self) -> dict[str, Callable[[], Any]]:
        """Return torch's kernels: cuBLAS and cuBLASLt."""
        (a8, b8), (a16, b16), (af, bf) = self.i8, self.bf16, self.fp8
        scaled = torch._scaled_mm
        options = {"out_dtype": torch.bfloat16}
        one = self.one
        found = {
            "torch_bf16": lambda: a16 @ b16.t(),
            "torch_int8": lambda: torch._int_mm(a8, b8.t()),
            "one_element": one.clone,
            "torch_fp8_tensor": lambda: scaled(af, bf.t(), scale_a=one, scale_b=one, **options),
            "torch_fp8_tensor_fast": lambda: scaled(
                af, bf.t(), scale_a=one, scale_b=one, use_fast_accum=True, **options
            ),
            "torch_fp8_row": lambda: scaled(af, bf.t(), scale_a=self.row, scale_b=self.column, **options),
            "torch_fp8_row_fast": lambda: scaled(
                af, bf.t(), scale_a=self.row, scale_b=self.column, use_fast_accum=True, **options
            ),
        }
        if self.shape[0] <= 16:
            del found["torch_int8"]  # it refuses so few rows
        return found


def tune(
    shapes: list[tuple[int, int, int]],
    formats: list[str],
    depth: int,
    repeats: int,
    pause_s: float,
    shipped: Path,
) -> list[dict[str, Any]]:
    """Time the best-ranked configurations of each shape and format, and write the fastest as the package's table."""
    here = present_gpu()
    jobs = [
        (case, family, list(family.ranked(case.work, here))[:depth])
        for case in cases_of_shapes(shapes, formats).cases
        if (family := family_of(case.work, here)) is not None
    ]
    compile_ahead([(family, case.work, c) for case, family, found in jobs for c in found], here)
    watch, rows = GpuStopwatch(), list[dict[str, Any]]()
    for case, family, configurations in jobs:
        found = tune_case(
            case, family, configurations, here, repeats=repeats, pause_s=pause_s, stopwatch=watch
        )
        if found is None:
            print(f"tune {case.work}: nothing runs")
            continue
        rows.append(
            {
                "work": asdict(case.work),
                "kernel": found.kernel,
                "modelled_best": found.first,
                "modelled_best_us": found.first_us,
                "fastest": found.fastest,
                "fastest_us": found.fastest_us,
                "tried": found.tried,
            }
        )
    gains = [row["modelled_best_us"] / row["fastest_us"] for row in rows if row["modelled_best_us"]]
    print(
        f"tune: {len(rows)} products, {math.prod(gains) ** (1 / max(len(gains), 1)):.3f}x over the model's choice"
    )
    tuning.forget()
    table = tuning.table(here.name, local=tuning.environment())
    shipped.parent.mkdir(parents=True, exist_ok=True)
    shipped.write_text(table.to_json({"gpu": here.name, **facts()}))
    print(f"{shipped}: {len(table.entries)} entries")
    return rows


OURS = {
    "int8": ("int8", "row"),
    "fp8_tensor": ("float8_e4m3fn", "tensor"),
    "fp8_row": ("float8_e4m3fn", "row"),
    "bf16": ("bfloat16", "row"),
}
PEER = {
    "int8": "torch_int8",
    "fp8_tensor": "torch_fp8_tensor",
    "fp8_row": "torch_fp8_row",
    "bf16": "torch_bf16",
}


def compare(shapes: list[tuple[int, int, int]], repeats: int, pause_s: float) -> list[dict[str, Any]]:
    """Time the chosen tiles beside torch's kernels."""
    kinds = {"int8": BOTH_EACH, "fp8_tensor": BOTH_ONE, "fp8_row": BOTH_EACH, "bf16": EpilogueKind()}
    jobs = []
    for m, n, k in shapes:
        for name, (form, _) in OURS.items():
            problem = Problem(m=m, n=n, k=k, format=form, output="bfloat16")
            tile = tuning.best_tile(problem, kinds[name], 0) or choose(problem)
            defines = launch_of(problem, tile, kinds[name], gpu.multiprocessors(0)).defines
            jobs.append(Job(source=SOURCE, arch=gpu.architecture(0), defines=tuple(sorted(defines.items()))))
    if gpu.architecture(0) == "sm_90a":  # elsewhere gemm_mma.cu runs, and is compiled when it first does
        build_all(jobs)
    watch, rows = GpuStopwatch(), []
    for shape in shapes:
        m, n, k = shape
        operands = Operands(*shape)
        contenders = {
            name: Contender(run=operands.ours(form, kind)) for name, (form, kind) in OURS.items()
        } | {name: Contender(run=run, framework="torch") for name, run in operands.peers().items()}
        timings, refused = time_in_turns(
            contenders, repeats=repeats, pause_s=pause_s, seed=m, stopwatch=watch
        )
        for name, reason in refused.items():
            print(f"  {name}: refused: {reason}")
        found = {name: {"us": t.median_us, "q1": t.q1_us, "q3": t.q3_us} for name, t in timings.items()}
        flops = 2e-6 * m * n * k
        row: dict[str, Any] = {"m": m, "n": n, "k": k, "times": found}
        row["tflops"] = {name: flops / times["us"] for name, times in found.items()}
        row["speedup"] = {o: found[p]["us"] / found[o]["us"] for o, p in PEER.items() if p in found}
        rows.append(row)
        parts = [
            f"{o} {found[o]['us']:.1f} us {flops / found[o]['us']:.0f} TF x{row['speedup'].get(o, math.nan):.2f}"
            for o in OURS
        ]
        fast = [
            f"{p} {found[p]['us']:.1f}" for p in ("torch_fp8_tensor_fast", "torch_fp8_row_fast") if p in found
        ]
        print(f"{m}x{n}x{k}: " + " | ".join(parts) + " | " + " ".join(fast))
    return rows


def formats_table(
    shapes: list[tuple[int, int, int]], formats: list[str], repeats: int, pause_ms: float
) -> dict[str, Any]:
    """Time every format that has a kernel, beside all peers that are installed, as `quantkit bench` does."""
    found = bench_model(shapes=shapes, formats=formats, repeats=repeats, pause_ms=pause_ms)
    print(found)
    print(*found.notes, sep="\n")
    for reason in dict.fromkeys(f"{p}: {why}" for row in found.rows for p, why in row.refused.items()):
        print("  refused", reason)
    return found.to_dict()


# ---- profiling ---------------------------------------------------------------------------------------------------


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


def facts() -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": torch.version.cuda,
        "nvrtc": ".".join(map(str, nvrtc_version())),
        "torch": torch.__version__,
        "cupy": cupy.__version__,
        "python": sys.version.split()[0],
        "date": datetime.date.today().isoformat(),
    }


def parse(shape: str) -> tuple[int, int, int]:
    """Return M, N, K of "MxNxK"."""
    m, n, k = map(int, shape.split("x"))
    return m, n, k


def main() -> None:
    """Run what the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    if MISSING:
        raise SystemExit(f"gpu_run.py: no GPU to run on ({MISSING}); it needs one, with CuPy and torch.")
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
        # Beside this file; what `import` finds is where scripts are.
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

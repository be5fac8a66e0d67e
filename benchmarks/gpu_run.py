"""Check, tune and time the GEMM kernels on the GPU that is there, beside torch's, and write JSON.

    PYTHONPATH=. python benchmarks/gpu_run.py --check --tune --time --out results.json

Timing: all contenders of a shape in one run, in random order, each a CUDA graph of one call; before each, 256 MB are
written and then another 256 MB read, so that L2 holds none of its operands and nothing that must be written back;
medians over --repeats; random data. --pause-ms of rest after each measure what a kernel does at full clock; without
it a large product runs into the board's power limit, and so does every contender.
"""

import argparse
import datetime
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cupy
import ml_dtypes
import numpy as np
import torch

from quantkit.kernels import device as gpu
from quantkit.kernels.compile import compile_kernel, nvrtc_version
from quantkit.kernels.gemm import Epilogue, PackedWeight, matmul, pack_codes
from quantkit.kernels.gemm_launch import SOURCE, EpilogueKind, launch_of
from quantkit.kernels.heuristics import Problem, Tile, candidates, choose, rank
from quantkit.kernels.reference import gemm_reference

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
FORMATS = ("int8", "float8_e4m3fn", "bfloat16")
DTYPES = {"int8": np.int8, "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "bfloat16": ml_dtypes.bfloat16}
CARRIERS = {"int8": np.int8, "float8_e4m3fn": np.uint8, "bfloat16": np.uint16}
BOTH_EACH = EpilogueKind(row_scale="each", column_scale="each")
BOTH_ONE = EpilogueKind(row_scale="one", column_scale="one")


def compile_all(launches: list[dict[str, str | int]]) -> None:
    """Compile every configuration, one a core."""
    unique = [dict(items) for items in {tuple(sorted(defines.items())) for defines in launches}]
    with ProcessPoolExecutor() as pool:
        for spills in pool.map(_compile, unique):
            if spills:
                print(spills)


def _compile(defines: dict[str, str | int]) -> str:
    built = compile_kernel(SOURCE, arch="sm_90a", defines=defines)
    return (
        f"{built.spill_bytes} bytes spilled: {defines} {built.warnings}"
        if built.spill_bytes or built.warnings
        else ""
    )


# ---- correctness -------------------------------------------------------------------------------------------------


def check_cases() -> list[tuple[Problem, Tile, EpilogueKind]]:
    """Every tile on ragged shapes; every format and output on a few tiles."""
    full = EpilogueKind(row_scale="each", column_scale="each", bias=True, relu=True)
    cases = []
    for m, n, k in RAGGED:
        tiles = list(candidates(Problem(m=m, n=n, k=k, format="int8", output="bfloat16")))
        cases += [(Problem(m=m, n=n, k=k, format="int8", output="bfloat16"), t, BOTH_EACH) for t in tiles]
        for j, (form, output) in enumerate(
            (f, o) for f in FORMATS for o in ("float32", "bfloat16", "float16", "int32")
        ):
            if output == "int32" and form != "int8":
                continue
            problem = Problem(m=m, n=n, k=k, format=form, output=output)
            few = list(candidates(problem))
            kind = EpilogueKind() if output == "int32" else full
            cases += [(problem, few[(7 * j + 11 * q) % len(few)], kind) for q in range(2)]
    return cases


def check() -> dict[str, Any]:
    """Compare with the oracle: integers that every format holds exactly, so every result is exact."""
    cases = check_cases()
    compile_all([launch_of(problem, tile, kind, 132).defines for problem, tile, kind in cases])
    rng = np.random.default_rng(1)
    wrong = []
    for problem, tile, kind in cases:
        m, n, k = problem.m, problem.n, problem.k
        a, b = (rng.integers(-4, 5, (rows, k)).astype(DTYPES[problem.format]) for rows in (m, n))
        row, column = (rng.random(rows, np.float32) + 0.5 for rows in (m, n))
        bias = rng.standard_normal(n, np.float32)
        scaled, biased = kind.row_scale != "none", kind.bias
        weight = pack_codes(b, column if scaled else None, problem.format)
        on_gpu = cupy.asarray(a.view(CARRIERS[problem.format]))
        epilogue = Epilogue(
            row_scale=cupy.asarray(row) if scaled else None,
            bias=cupy.asarray(bias) if biased else None,
            activation="relu" if kind.relu else None,
        )
        out = cupy.full((m, n), 0x55, {2: np.uint16, 4: np.uint32}[np.dtype(_np(problem.output)).itemsize])
        matmul(on_gpu, weight, epilogue=epilogue, out_dtype=problem.output, out=out, tile=tile)
        want = gemm_reference(
            a, b, row_scale=row if scaled else None, column_scale=column if scaled else None,
            bias=bias if biased else None, relu=kind.relu, output=problem.output,
        )  # fmt: skip
        got = cupy.asnumpy(out).view(_np(problem.output))
        if not np.array_equal(got, want):
            wrong.append(
                {"problem": asdict(problem), "tile": asdict(tile), "elements": int((got != want).sum())}
            )
    if not (replays_exactly() and streams_agree()):
        wrong.append({"problem": "CUDA graph or two streams"})
    print(f"check: {len(cases) - len(wrong)} of {len(cases)} exact")
    for entry in wrong[:10]:
        print("WRONG", entry)
    return {"cases": len(cases), "wrong": wrong}


def replays_exactly() -> bool:
    """Return whether a CUDA graph of a product, replayed on new operands, gives what a plain call gives."""
    operands = Operands(300, 520, 1024)
    run = operands.ours("int8", "row")
    run()  # compiles and loads, which a capture cannot
    graph = captured(run)
    operands.i8[0].copy_(torch.randint_like(operands.i8[0], -127, 128))
    run()
    want = operands.out.copy()
    operands.out.fill(0x55)
    graph.replay()
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


def _np(output: str) -> Any:
    return ml_dtypes.bfloat16 if output == "bfloat16" else output


# ---- timing ------------------------------------------------------------------------------------------------------


def captured(run: Callable[[], Any]) -> Any:
    """Return one call as a CUDA graph, so that no time of Python's or the driver's is measured."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
        run()
    return graph


class Timer:
    """Medians of contenders that take turns, each on a cold L2."""

    def __init__(self, pause_s: float = 0.0) -> None:
        self.pause_s = pause_s
        self.written = torch.empty(64 << 20, dtype=torch.float32, device="cuda")
        self.read = torch.ones(64 << 20, dtype=torch.float32, device="cuda")

    def medians(self, contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
        """Return for each contender its median time and its quartiles in microseconds."""
        alive = {}
        for name, run in contenders.items():
            try:
                run()
                torch.cuda.synchronize()
                alive[name] = captured(run)
            except RuntimeError as error:
                print(f"  {name}: refused: {str(error).splitlines()[0][:100]}")
        events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in alive}
        order = [name for name in alive for _ in range(repeats)]
        random.Random(0).shuffle(order)
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.written.zero_()
            self.read.sum()
            torch.cuda._sleep(300_000)  # longer than a host just woken takes to enqueue what follows
            start.record()
            alive[name].replay()
            end.record()
            events[name].append((start, end))
            if self.pause_s:
                torch.cuda.synchronize()
                time.sleep(self.pause_s)
        torch.cuda.synchronize()
        found = {}
        for name, pairs in events.items():
            times = sorted(start.elapsed_time(end) * 1e3 for start, end in pairs)
            quarter = len(times) // 4
            found[name] = {"us": statistics.median(times), "q1": times[quarter], "q3": times[-1 - quarter]}
        return found


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


def tuning_tiles(problem: Problem, depth: int, groups: bool) -> list[Tile]:
    """Return the tiles modelled best, and for large problems other orders of them."""
    ranked = rank(problem)[:depth]
    if groups and problem.m >= 1024:
        ranked += [
            replace(t, group=g)
            for t in ranked
            if t.tile_m * t.tile_n == 32768
            for g in (4, 16, 32)
            if g != t.group
        ]
    return ranked


def tune(
    shapes: list[tuple[int, int, int]], depth: int, groups: bool, repeats: int, pause_s: float
) -> list[dict[str, Any]]:
    """Time the best-ranked tiles of each shape and format."""
    jobs = []
    for m, n, k in shapes:
        for form in FORMATS:
            problem = Problem(m=m, n=n, k=k, format=form, output="bfloat16")
            jobs.append((problem, tuning_tiles(problem, depth, groups)))
    kinds = {form: EpilogueKind() if form == "bfloat16" else BOTH_EACH for form in FORMATS}
    compile_all([launch_of(p, t, kinds[p.format], 132).defines for p, tiles in jobs for t in tiles])
    timer, rows = Timer(pause_s), []
    operands: Operands | None = None
    for number, (problem, tiles) in enumerate(jobs):
        shape = (problem.m, problem.n, problem.k)
        if operands is None or operands.shape != shape:
            operands = None
            operands = Operands(*shape)
        named = {f"{i}": operands.ours(problem.format, "row", tile) for i, tile in enumerate(tiles)}
        found = timer.medians(named, repeats)
        order = sorted(found, key=lambda name: found[name]["us"])
        for name in order:
            rows.append({"problem": asdict(problem), "tile": asdict(tiles[int(name)]), **found[name]})
        flops = 2e-6 * problem.m * problem.n * problem.k
        if number >= 3 * len(TABLE):
            continue
        print(f"tune {shape} {problem.format}")
        for name in order[:8]:
            us = found[name]["us"]
            print(f"   {us:8.1f} us {flops / us:7.0f} TF  rank {name:>2} {_short(tiles[int(name)])}")
    return rows


def _short(tile: Tile) -> str:
    flags = f"{'swap ' if tile.swap else ''}{'pingpong' if tile.pingpong else ''}"
    ring = f"stages {tile.stages} consumers {tile.consumers} cluster {tile.cluster} group {tile.group}"
    return f"{tile.tile_m}x{tile.tile_n} {ring} {flags}"


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
    defines = []
    for m, n, k in shapes:
        for name, (form, _) in OURS.items():
            problem = Problem(m=m, n=n, k=k, format=form, output="bfloat16")
            defines.append(launch_of(problem, choose(problem), kinds[name], 132).defines)
    compile_all(defines)
    timer, rows = Timer(pause_s), []
    for shape in shapes:
        m, n, k = shape
        operands = Operands(*shape)
        runs = {name: operands.ours(form, kind) for name, (form, kind) in OURS.items()}
        found = timer.medians(runs | operands.peers(), repeats)
        flops = 2e-6 * m * n * k
        row: dict[str, Any] = {"m": m, "n": n, "k": k, "times": found}
        row["tflops"] = {name: flops / times["us"] for name, times in found.items()}
        row["speedup"] = {o: found[p]["us"] / found[o]["us"] for o, p in PEER.items() if p in found}
        row["tiles"] = {
            name: asdict(choose(Problem(m=m, n=n, k=k, format=form, output="bfloat16")))
            for name, (form, _) in OURS.items()
        }
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--layers", action="store_true", help="also the layers of well-known models")
    parser.add_argument("--depth", type=int, default=12, help="tiles to tune")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--groups", action="store_true", help="tune the order of tiles too")
    parser.add_argument("--shapes", nargs="*", help="MxNxK instead of the table")
    parser.add_argument("--pause-ms", type=float, default=2.0)
    parser.add_argument("--commit", default="", help="of the code, for the record")
    parser.add_argument("--out", type=Path, default=Path("gpu_run.json"))
    options = parser.parse_args()
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
    stages: list[tuple[str, bool, Callable[[], Any]]] = [
        ("check", options.check, check),
        ("table", options.time, lambda: compare(shapes, repeats, pause_s)),
        ("sustained", options.time, lambda: compare(shapes, repeats, 0.0)),
        (
            "layers",
            options.time and options.layers,
            lambda: {name: compare(part, repeats, pause_s) for name, part in layers.items()},
        ),
        (
            "tune",
            options.tune,
            lambda: tune(every, options.depth, options.groups, max(9, repeats // 2), pause_s),
        ),
    ]
    for name, wanted, run in stages:
        if wanted:
            begin = time.monotonic()
            results[name] = run()
            options.out.write_text(json.dumps(results, indent=1))
            print(f"{name}: {time.monotonic() - begin:.1f} s")


if __name__ == "__main__":
    main()

"""What `gpu_run.py` times and tunes: our kernels beside torch's, and every format beside all peers."""

import datetime
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.bench import bench_model
from quantkit.bench.cases import cases_of_shapes
from quantkit.bench.measuring import compile_ahead
from quantkit.bench.tune import tune_case
from quantkit.kernels import device as gpu
from quantkit.kernels import tuning
from quantkit.kernels.build import Job, build_all
from quantkit.kernels.compile import nvrtc_version
from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.families import family_of
from quantkit.kernels.gemm import Epilogue, PackedWeight, matmul
from quantkit.kernels.gemm_launch import SOURCE, launch_of
from quantkit.kernels.heuristics import Problem, Tile, choose
from quantkit.kernels.present import present_gpu
from quantkit.kernels.timing import Contender, GpuStopwatch, time_in_turns

try:
    import cupy
    import torch
except ImportError:
    # `gpu_run.py` says what is missing.
    pass

BOTH_EACH = EpilogueKind(row_scale="each", column_scale="each")
BOTH_ONE = EpilogueKind(row_scale="one", column_scale="one")


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

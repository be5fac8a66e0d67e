"""Check, tune and time the 4-bit weight kernel on the GPU that is there, beside torch's bf16, and write JSON.

    PYTHONPATH=. python benchmarks/w4_run.py --check --tune --time --out results.json

Timing is that of gpu_run.py: contenders in one run and random order, each a CUDA graph of one call, on an L2 that holds
none of its operands; medians; random data.
"""

import argparse
import itertools
import json
import random
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cupy
import ml_dtypes
import numpy as np
import torch

from quantkit.formats.format import E8M0, FP4_E2M1, FP8_E4M3, INT4, UINT4
from quantkit.formats.packing import codes_from_bits
from quantkit.formats.qparams import QParams
from quantkit.formats.quantize import QTensor, dequantize
from quantkit.formats.spec import QuantSpec
from quantkit.kernels.build import Job, build_all
from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.w4.heuristics import (
    FEW_ROWS,
    W4Few,
    W4Problem,
    W4Tile,
    deepest,
    few_tiles,
    w4_candidates,
    w4_choose,
)
from quantkit.kernels.w4.launch import FEW_SOURCE, SOURCE, w4_few_launch_of, w4_launch_of
from quantkit.kernels.w4.layout import Layout4, Packed4
from quantkit.kernels.w4.matmul import PackedWeight4, Workspace4, matmul_w4, pack_weight4, upload4
from quantkit.kernels.w4.scales import into_fields

KIND = EpilogueKind(column_scale="each")
FORMS = {
    "int4": {"codes": "int4", "group": 128, "scales": "bfloat16", "zeros": False},
    "uint4z": {"codes": "uint4", "group": 128, "scales": "bfloat16", "zeros": True},
    "int4g32": {"codes": "int4", "group": 32, "scales": "bfloat16", "zeros": False},
    "nvfp4": {"codes": "fp4_e2m1", "group": 16, "scales": "e4m3", "zeros": False},
    "mxfp4": {"codes": "fp4_e2m1", "group": 32, "scales": "e8m0", "zeros": False},
    "w4a8": {"codes": "int4", "group": 128, "scales": "uint8", "zeros": False, "activations": "int8"},
    "w4a8-fp8": {
        "codes": "int4", "group": 128, "scales": "bfloat16", "zeros": False, "activations": "float8_e4m3fn"
    },
    "mxfp4-fp8": {
        "codes": "fp4_e2m1", "group": 32, "scales": "e8m0", "zeros": False, "activations": "float8_e4m3fn"
    },
}  # fmt: skip
CARRIERS = {"bfloat16": np.uint16, "float16": np.float16, "int8": np.int8, "float8_e4m3fn": np.uint8}


def problem_of(m: int, n: int, k: int, form: str, output: str = "bfloat16") -> W4Problem:
    return W4Problem(m=m, n=n, k=k, output=output, **({"activations": "bfloat16"} | FORMS[form]))


def candidates(problem: W4Problem) -> list[W4Tile | W4Few]:
    m = problem.m
    if m <= 16 or problem.activations == "float8_e4m3fn":
        return w4_candidates(problem)
    shapes: list[dict[str, Any]] = []
    if m <= 64:
        tile_n = 32 if m <= 32 else 64
        for (c, mi), (slabs, grain), cluster in itertools.product(
            [(4, 1), (2, 2), (3, 2)], [(2, 4), (1, 2), (2, 2)], [1, 2]
        ):
            shapes.append(
                {
                    "tile_n": tile_n,
                    "consumers": c,
                    "blocks_of_64": mi,
                    "slabs": slabs,
                    "grain": grain,
                    "cluster": cluster,
                }
            )
    else:
        for n, c, mi in [(256, 2, 1), (128, 2, 2), (128, 2, 1), (64, 2, 2), (64, 4, 1)]:
            if n > 2 * m:
                continue
            for (slabs, grain), cluster in itertools.product([(1, 2), (2, 2), (2, 4)], [1, 2]):
                for order in (8,) if m <= 512 else (4, 16):
                    shapes.append(
                        {
                            "tile_n": n,
                            "consumers": c,
                            "blocks_of_64": mi,
                            "slabs": slabs,
                            "grain": grain,
                            "order": order,
                            "cluster": cluster,
                        }
                    )
    if problem.group and problem.group > 64:
        shapes = [s for s in shapes if problem.group % (64 * s["slabs"]) == 0]
    tiles = [t for t in (deepest(problem, **shape) for shape in shapes) if t.stages >= 2]
    return [*few_tiles(problem, 132), *tiles] if m <= FEW_ROWS else list(tiles)


def words(t: W4Tile | W4Few) -> str:
    if isinstance(t, W4Few):
        parts = [f"few n{t.tile_n} w{t.warps_w}x{t.groups} k{t.warps_k}"]
    else:
        parts = [f"n{t.tile_n} c{t.consumers} mi{t.blocks_of_64} grain{t.grain} order{t.order}"]
    return " ".join([*parts, f"slabs{t.slabs} stages{t.stages} cluster{t.cluster}"])


def key_of(problem: W4Problem, tile: W4Tile | W4Few) -> tuple[bool, tuple[Any, ...]]:
    few = isinstance(tile, W4Few)
    launch = w4_few_launch_of(problem, tile, KIND) if few else w4_launch_of(problem, tile, KIND, 132)
    return few, tuple(sorted(launch.defines.items()))


def compile_all(keys: list[Any]) -> dict[Any, tuple[int, int, str]]:
    """Return registers, bytes of spills and what else the compiler complains of, by key."""
    unique = list(dict.fromkeys(keys))
    built = build_all(
        Job(source=FEW_SOURCE if few else SOURCE, arch="sm_90a", defines=d) for few, d in unique
    )
    said = [(b.registers, b.spill_bytes, " ".join(w for w in b.warnings if "C7" in w)) for b in built]
    return dict(zip(unique, said, strict=True))


# ---- correctness -------------------------------------------------------------------------------------------------


def random_weight(rng: np.random.Generator, n: int, k: int, form: str, group: int | None) -> QTensor:
    groups = 1 if group is None else -(-k // group)
    bits = rng.integers(0, 16, (n, k)).astype(np.uint8)
    if form == "nvfp4":
        scale = (rng.integers(0x28, 0x40, (n, groups)).astype(np.uint8) & 0xF8).view(ml_dtypes.float8_e4m3fn)
        spec = QuantSpec(format=FP4_E2M1, axis=1, block_size=16, scale_format=FP8_E4M3)
        params = QParams(scale.astype(np.float32), None, np.float32(0.5))
    elif form == "mxfp4":
        spec = QuantSpec(format=FP4_E2M1, axis=1, block_size=32, scale_format=E8M0)
        params = QParams(np.ldexp(1.0, rng.integers(-2, 3, (n, groups))).astype(np.float32))
    else:
        fmt, zeros = (INT4, False) if form.startswith("int4") else (UINT4, True)
        scale = (rng.integers(1, 5, (n, groups)) / 4).astype(np.float32)
        zero = rng.integers(0, 16, (n, groups)) if zeros else np.zeros((n, groups))
        if group is None:
            scale, zero = scale[:, 0], zero[:, 0]
        spec = QuantSpec(format=fmt, axis=0 if group is None else 1, block_size=group, symmetric=not zeros)
        params = QParams(scale, zero.astype(fmt.dtype))
    return QTensor(codes_from_bits(bits, spec.format), params, spec)


def check() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    forms = [
        ("int4", 128, None),
        ("int4", 32, None),
        ("int4", None, None),
        ("uint4", 64, None),
        ("uint4", 128, None),
        ("nvfp4", 16, None),
        ("mxfp4", 32, None),
        ("int4", 128, "int8"),
        ("uint4", 32, "int8"),
        ("int4", 128, "float8_e4m3fn"),
        ("mxfp4", 32, "float8_e4m3fn"),
    ]
    shapes = [
        (1, 8, 128),
        (3, 130, 2880),
        (16, 520, 1000),
        (17, 136, 300),
        (64, 1000, 4096),
        (130, 264, 700),
        (300, 1030, 2880),
        (16, 8192, 8192),
        (520, 2048, 4096),
    ]
    jobs = []
    for number, ((m, n, k), (form, group, eight)) in enumerate(itertools.product(shapes, forms)):
        act = eight or ("bfloat16", "float16")[number % 2]
        out = ("bfloat16", "float32", "float16")[number % 3]
        weight = random_weight(rng, n, k, form, group)
        packed = pack_weight4(weight, activation_bits=8 if eight else 16, activations=eight)
        problem = W4Problem.of(packed.layout, m=m, activations=act, output=out)
        tiles = candidates(problem)
        picked = {w4_choose(problem), *(tiles[(5 * number + 7 * i) % len(tiles)] for i in range(1))}
        jobs.append((problem, weight, packed, picked))
    info = compile_all([key_of(p, t) for p, _, _, tiles in jobs for t in tiles])
    wrong, count = [], 0
    for problem, weight, packed, tiles in jobs:
        m, n, k = problem.m, problem.n, problem.k
        a = rng.integers(-4, 5, (m, k)).astype(np.float32)
        want = cupy.asnumpy(
            cupy.asarray(a, np.float64) @ cupy.asarray(dequantize(weight), np.float64).T
        ).astype(np.float32)
        host = a.astype(getattr(ml_dtypes, problem.activations, problem.activations))
        on_gpu = cupy.asarray(host.view(CARRIERS[problem.activations]))
        kind = ml_dtypes.bfloat16 if problem.output == "bfloat16" else problem.output
        for tile in tiles:
            if info[key_of(problem, tile)][0] == 0:
                print("no build", problem, tile, info[key_of(problem, tile)][2][:200])
                continue
            out = cupy.full((m, n), 77, np.uint16 if problem.output != "float32" else np.uint32)
            for _ in range(2):
                matmul_w4(on_gpu, packed, out_dtype=problem.output, out=out, tile=tile)
            got = cupy.asnumpy(out).view(kind).astype(np.float32)
            count += 1
            if not np.array_equal(got, want.astype(kind).astype(np.float32)):
                wrong.append(
                    {"problem": asdict(problem), "tile": asdict(tile), "elements": int((got != want).sum())}
                )
    print(f"check: {count - len(wrong)} of {count} exact")
    for entry in wrong[:10]:
        print("WRONG", entry)
    return {"cases": count, "wrong": wrong}


# ---- timing ------------------------------------------------------------------------------------------------------


class Timer:
    """Medians of contenders that take turns, each on a cold L2."""

    def __init__(self, pause_s: float) -> None:
        self.pause_s = pause_s
        self.written = torch.empty(64 << 20, dtype=torch.float32, device="cuda")
        self.read = torch.ones(64 << 20, dtype=torch.float32, device="cuda")

    def medians(self, contenders: dict[str, Any], repeats: int) -> dict[str, float]:
        """Return for each contender its median time in microseconds."""
        alive = {}
        for name, run in contenders.items():
            run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph), cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
                run()
            alive[name] = graph
        events: dict[str, list[Any]] = {name: [] for name in alive}
        order = [name for name in alive for _ in range(repeats)]
        random.Random(0).shuffle(order)
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.written.zero_()
            self.read.sum()
            torch.cuda._sleep(300_000)
            start.record()
            alive[name].replay()
            end.record()
            events[name].append((start, end))
            if self.pause_s:
                torch.cuda.synchronize()
                time.sleep(self.pause_s)
        torch.cuda.synchronize()
        return {
            n: statistics.median(s.elapsed_time(e) * 1e3 for s, e in pairs) for n, pairs in events.items()
        }


class Operands:
    """Random operands of a shape: activations, a bf16 weight for torch, four-bit ones for us."""

    def __init__(self, n: int, k: int, rows: int) -> None:
        torch.manual_seed(n + k)
        self.n, self.k = n, k
        self.a = torch.randn(rows, k, dtype=torch.bfloat16, device="cuda")
        self.w = torch.randn(n, k, dtype=torch.bfloat16, device="cuda")
        self.weights: dict[str, PackedWeight4] = {}
        self.out = cupy.empty((rows, n), np.uint16)
        self.workspace = Workspace4()

    def weight(self, form: str) -> PackedWeight4:
        """Return a random weight of a form."""
        if form not in self.weights:
            plain = {name: FORMS[form][name] for name in ("codes", "group", "scales", "zeros")}
            eight = "activations" in FORMS[form]
            f = Layout4(
                n=self.n, k=self.k, activation_bits=8 if eight else 16, promoted=form == "w4a8-fp8", **plain
            )
            codes = cupy.random.randint(0, 256, (f.planes, f.blocks, 2048), dtype=np.uint8)
            size = 2 if f.scales == "bfloat16" else 1
            shape = (f.sides, f.blocks, 32, 2 * f.groups_in_slab * size)
            if size == 2:
                # As they are stored: from 2^126 on for upper rows, a sixteenth of that for lower ones.
                pairs = cupy.random.randint(0, 128, (*shape[:-1], 2, f.groups_in_slab), dtype=np.uint16)
                # Those that multiply sums are what they are.
                first = [[0x3F80], [0x3F80]] if f.promoted else [[0x7E80], [0x7C80]]
                pairs += cupy.asarray(first, np.uint16)
                scales = pairs.reshape(*shape[:-1], shape[-1] // 2).view(np.uint8)
            else:
                low, high = {"e4m3": (136, 176), "uint8": (1, 17), "e8m0": (3, 15) if eight else (240, 255)}[
                    f.scales
                ]
                drawn = np.random.default_rng(0).integers(low, high, shape, dtype=np.uint8)
                scales = cupy.asarray(into_fields(drawn, f))
            zeros = (
                cupy.random.randint(0, 256, (f.sides, f.blocks, 32, f.groups_in_slab), dtype=np.uint8)
                if f.zeros
                else None
            )
            channel = cupy.full(self.n, 1e-2, np.float32)
            packed = Packed4(layout=f, codes=codes, scales=scales, zeros=zeros, channel_scale=channel)
            self.weights[form] = upload4(packed, arch="sm_90a")
        return self.weights[form]

    def ours(self, m: int, form: str, tile: W4Tile | W4Few | None = None) -> Any:
        """Return a call of our kernel."""
        kind, weight = FORMS[form].get("activations", "bfloat16"), self.weight(form)
        if kind == "bfloat16":
            a = cupy.asarray(self.a[:m].view(torch.int16)).view(np.uint16)
        else:
            eight = torch.float8_e4m3fn if kind == "float8_e4m3fn" else torch.int8
            codes = (self.a[:m] * (1 if kind == "float8_e4m3fn" else 32)).to(eight)
            a = cupy.asarray(codes.view(torch.uint8)).view(CARRIERS[kind])
        return lambda: matmul_w4(a, weight, out=self.out[:m], tile=tile, workspace=self.workspace)

    def torch(self, m: int) -> Any:
        """Return a call of torch's product in bf16."""
        a = self.a[:m]
        return lambda: a @ self.w.t()


def tune(timer: Timer, jobs: list[tuple[int, int, int, str]], repeats: int) -> list[dict[str, Any]]:
    problems = [problem_of(*job) for job in jobs]
    tiles = [candidates(p) for p in problems]
    info = compile_all([key_of(p, t) for p, ts in zip(problems, tiles, strict=True) for t in ts])
    rows, operands = [], None
    for (m, n, k, form), problem, several in zip(jobs, problems, tiles, strict=True):
        if operands is None or (operands.n, operands.k) != (n, k):
            operands = None
            operands = Operands(n, k, 8192)
        good = [
            t
            for t in several
            if info[key_of(problem, t)][0]
            and info[key_of(problem, t)][1] == 0
            and not info[key_of(problem, t)][2]
        ]
        named = {str(i): operands.ours(m, form, t) for i, t in enumerate(good)}
        found = timer.medians({"torch": operands.torch(m)} | named, repeats)
        base = found.pop("torch")
        size = f"{len(several) - len(good)} spill; bytes {problem.weight_bytes / 1e6:.1f} MB"
        print(f"tune {m}x{n}x{k} {form}: torch {base:.1f} us, {size}")
        order = sorted(found, key=lambda name: found[name])
        for name in order:
            t = good[int(name)]
            rows.append(
                {
                    "m": m,
                    "n": n,
                    "k": k,
                    "form": form,
                    "torch": base,
                    "us": found[name],
                    "tile": asdict(t),
                    "registers": info[key_of(problem, t)][0],
                }
            )
        for name in order[:6]:
            t = good[int(name)]
            us = found[name]
            rates = f"{problem.weight_bytes / us / 1e6:.2f} TB/s {2e-6 * m * n * k / us:.0f} TF"
            print(f"   {us:7.1f} us x{base / us:.2f} {rates}  {words(t)}", flush=True)
    return rows


def compare(timer: Timer, jobs: list[tuple[int, int, int, str]], repeats: int) -> list[dict[str, Any]]:
    compile_all([key_of(problem_of(*job), w4_choose(problem_of(*job))) for job in jobs])
    rows, operands = [], None
    for (m, n, k), group in itertools.groupby(jobs, key=lambda job: job[:3]):
        forms = [job[3] for job in group]
        if operands is None or (operands.n, operands.k) != (n, k):
            operands = None
            operands = Operands(n, k, 8192)
        found = timer.medians(
            {"torch": operands.torch(m)} | {form: operands.ours(m, form) for form in forms}, repeats
        )
        parts = [f"{form} {found[form]:.1f} x{found['torch'] / found[form]:.2f}" for form in forms]
        print(f"{m}x{n}x{k}: torch {found['torch']:.1f} | " + " | ".join(parts), flush=True)
        rows.append({"m": m, "n": n, "k": k, "us": found})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--tune", nargs="*", help="MxNxK:form …")
    parser.add_argument("--time", nargs="*", help="MxNxK:form …")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--pause-ms", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=Path("w4_run.json"))
    options = parser.parse_args()
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}

    def jobs_of(texts: list[str]) -> list[tuple[int, int, int, str]]:
        return [(*map(int, text.split(":")[0].split("x")), text.split(":")[1]) for text in texts]  # type: ignore[misc]

    begin = time.monotonic()
    timer = Timer(options.pause_ms / 1e3)
    if options.check:
        results["check"] = check()
        print(f"check {time.monotonic() - begin:.1f} s")
    if options.tune:
        results["tune"] = tune(timer, jobs_of(options.tune), max(7, options.repeats // 3))
        print(f"tune {time.monotonic() - begin:.1f} s")
    if options.time:
        results["time"] = compare(timer, jobs_of(options.time), options.repeats)
    options.out.write_text(json.dumps(results, indent=1))
    print(f"all {time.monotonic() - begin:.1f} s")


if __name__ == "__main__":
    main()

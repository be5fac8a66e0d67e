"""What `gpu_run.py` checks: every kernel against its oracle, bit for bit, on the GPU that is here."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from gpu_times import Operands

from quantkit.bench.measuring import as_numpy, compile_ahead
from quantkit.bench.operands import exact_operands
from quantkit.bench.row import relative_error
from quantkit.formats import FP8_E4M3, INT8, QParams, QuantSpec
from quantkit.formats.packing import code_bits, pack_bits
from quantkit.formats.presets import ACTIVATION_SPECS
from quantkit.kernels.families import FAMILIES
from quantkit.kernels.family import Family
from quantkit.kernels.gpus import Gpu
from quantkit.kernels.present import present_gpu
from quantkit.kernels.quantize import quantize_activation
from quantkit.kernels.quantize_launch import QuantizeKind, launch_of
from quantkit.kernels.quantize_reference import quantize_reference
from quantkit.kernels.timing import Contender, GpuStopwatch
from quantkit.kernels.work import Work

try:
    import cupy
    import torch
except ImportError:
    # `gpu_run.py` says what is missing.
    pass

RAGGED = [
    (1, 8, 16),
    (3, 130, 48),
    (17, 288, 272),
    (64, 136, 1040),
    (130, 264, 400),
    (257, 520, 2880),
    (300, 1000, 700),
]
# What quantize.cu is asked for, and its fixed scale where it has one.
QUANTIZED: list[tuple[QuantSpec, float | None]] = [
    (QuantSpec(format=INT8), 0.023),
    (QuantSpec(format=FP8_E4M3), 0.0071),
    (QuantSpec(format=INT8, dynamic="token"), None),
    (QuantSpec(format=FP8_E4M3, dynamic="token"), None),
    *((ACTIVATION_SPECS[name], None) for name in ("fp8-block", "mxfp8", "mxfp4", "nvfp4")),
]
MATRICES = [(1, 16), (3, 264), (130, 2880), (2048, 8192)]


def check_cases(
    few: int, here: Gpu, only: tuple[str, str] | None = None
) -> Iterator[tuple[Family, Work, Any]]:
    """Configurations of every family on ragged shapes; of a family's first format all, of the others a `few`.

    only: the name of one family and one of its formats, of which there are a `few` too.
    """
    for family in FAMILIES:
        for m, n, k in RAGGED:
            for index, form in enumerate(sorted(family.formats)):
                if only is not None and only != (family.name, form):
                    continue
                for output in ("bfloat16", "float32"):
                    work = Work(
                        m=m, n=n, k=k, format=form, output=output, bias=True, relu=output == "float32"
                    )
                    if not family.takes(work, here):
                        continue
                    configurations = list(family.ranked(work, here))
                    if only is not None or index or output != "bfloat16":
                        step = max(1, len(configurations) // few)
                        configurations = configurations[::step][:few]
                    for configuration in configurations:
                        yield family, work, configuration


def check(few: int) -> dict[str, Any]:
    """Compare every kernel with its oracle."""
    here = present_gpu()
    cases = list(check_cases(few, here))
    compile_ahead(cases, here)
    parts = [compared(cases), quantized(), side_by_side()]
    found = joined(parts)
    exact, wrong, count = found["exact"], found["wrong"], found["cases"]
    print(f"check: {sum(exact.values())} of {count} exact, by kernel {exact}")
    for entry in wrong[:10]:
        print("WRONG", entry)
    return found


def joined(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return several results of checks as one."""
    found: dict[str, Any] = {"cases": 0, "exact": {}, "wrong": []}
    for part in parts:
        found["cases"] += part["cases"]
        found["wrong"] += part["wrong"]
        for name, count in part["exact"].items():
            found["exact"][name] = found["exact"].get(name, 0) + count
    return found


def answers() -> bool:
    """Return whether the GPU still does what it is told: after a fault its context is gone."""
    try:
        probe = cupy.arange(7).sum()
        cupy.cuda.Device().synchronize()
        return bool(int(probe) == 21)
    except Exception:
        # Each fault has an exception of its own; any of them means the same.
        return False


def compared(cases: Iterable[tuple[Family, Work, Any]]) -> dict[str, Any]:
    """Run products of whole numbers and powers of two, each of which has one right answer: how many are right.

    Raises:
        RuntimeError: one of them left the GPU without an answer.
    """
    count = 0
    wrong: list[dict[str, Any]] = []
    exact: dict[str, int] = {}
    for family, work, configuration in cases:
        count += 1
        operands = exact_operands(work)
        try:
            call = family.prepare(work, operands, configuration)
            call().fill(77)  # the second call must write every element
            got = as_numpy(call(), work.output)
        except Exception as error:
            # One configuration that does not run is told like one that is wrong, unless it took the GPU with it.
            told = f"{family.name} {family.describe(configuration)}: {str(error).strip().splitlines()[:1]}"
            if not answers():
                raise RuntimeError(f"{told} on {work}") from error
            wrong.append({"kernel": family.name, "work": asdict(work), "error": told})
            continue
        want = family.reference(work, operands)
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
    return {"cases": count, "exact": exact, "wrong": wrong}


def quantized() -> dict[str, Any]:
    """Quantize matrices to every format: how many codes and scales are the oracle's."""
    found = list(quantized_exactly(MATRICES))
    wrong = [{"kernel": "quantize", "work": what} for what, same in found if not same]
    return {"cases": len(found), "exact": {"quantize": len(found) - len(wrong)}, "wrong": wrong}


def side_by_side() -> dict[str, Any]:
    """Replay a product as a graph, and run two on streams of their own."""
    found = {"CUDA graph": replays_exactly(), "two streams": streams_agree()}
    wrong = [{"kernel": "matmul", "work": what} for what, same in found.items() if not same]
    return {"cases": 2, "exact": {"matmul": 2 - len(wrong)}, "wrong": wrong}


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
            threads = launch_of(
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

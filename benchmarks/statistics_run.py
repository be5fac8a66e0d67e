"""Calibration on the GPU, checked and timed in one go: what `gpu_run.py --statistics` runs.

Checked: counts and limits of tensors of every type, shape and kind of value, bit for bit NumPy's; sums and Gram
matrices to 1e-12; that sums are the same bits twice; that ONNX Runtime's CUDA provider hands CuPy its memory and not a
copy; and that a model calibrated on the GPU has seen as many values as on the CPU, with limits that differ by rounding
alone.

Timed: bytes read a second, beside a copy of the same tensor (which reads and writes it) in the same run.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from quantkit.data import open_data
from quantkit.graph import find_sites, load_graph
from quantkit.kernels import device as gpu
from quantkit.kernels.gram import DeviceGram
from quantkit.kernels.statistics import (
    DeviceArray,
    device_array,
    observe_device_tensor,
    reduce_device_cube,
    start_reduction,
)
from quantkit.kernels.timing import Contender, Stopwatch, time_in_turns
from quantkit.observing.observe import observe
from quantkit.runtime import CUDA, Session, upload
from quantkit.statistics import FloatHistogram, GramMatrix
from quantkit.statistics.reduction import reduce_cube

SAMPLES = 100
DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits"

TYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
KINDS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "relu": lambda rng, n: np.maximum(rng.standard_normal(n), 0),
    "softmax": lambda rng, n: np.exp(-30 * rng.random(n)),
    "growing": lambda rng, n: rng.standard_normal(n) * np.exp2(np.linspace(-140, 126, n)),
    "outlier": lambda rng, n: np.where(np.arange(n) == n // 2 + 1, 60000.0, rng.standard_normal(n)),
    "mask": lambda rng, n: rng.choice([0.0, -np.inf], n),
    "holes": lambda rng, n: np.where(rng.random(n) < 1e-3, np.nan, rng.standard_normal(n)),
    "any bits": lambda rng, n: rng.integers(0, 1 << 32, n, dtype=np.uint32).view(np.float32),
}
# A flat tensor, images wide and narrow, tokens, tokens of an odd number of channels; (before, channels, behind).
CHECKED = [
    ((1, 1, 1_000_003), False),
    ((1, 1, 1), False),
    ((8, 64, 56 * 56), True),
    ((5, 33, 1021), True),
    ((16, 512, 49), True),
    ((4096, 768, 1), True),
    ((700, 1001, 1), True),
]
# K, groups, vectors.
GRAMS = [(768, 1, 3000), (147, 1, 20000), (36, 8, 5000)]
# The same of 16-bit floats.
SHORT_GRAMS = [(4096, 1, 5000), (1001, 1, 3000), (264, 4, 2000)]
GRAM_SIZES, GRAM_VECTORS = (768, 4096, 14336), 4096
TIMED = [
    ("flat, 64 Mi", (1, 1, 1 << 26), False),
    ("flat, 4 Mi", (1, 1, 1 << 22), False),
    ("images, 32 x 64 x 112 x 112", (32, 64, 112 * 112), True),
    ("images, 32 x 256 x 56 x 56", (32, 256, 56 * 56), True),
    ("images, 32 x 2048 x 7 x 7", (32, 2048, 49), True),
    ("tokens, 16384 x 4096", (16384, 4096, 1), True),
    ("tokens, 4096 x 14336", (4096, 14336, 1), True),
]


def check_statistics() -> dict[str, Any]:
    """Compare everything with NumPy; return how much was right and what was not."""
    checks = [*reduced_exactly(), *grams_agree(), *fetched_exactly(), *calibrated_alike()]
    wrong = [f"{what}: {reason}" for what, reason in checks if reason]
    print(f"statistics: {len(checks) - len(wrong)} of {len(checks)} right")
    for line in wrong[:10]:
        print("WRONG", line)
    return {"cases": len(checks), "wrong": wrong}


def reduced_exactly(cubes: Sequence[Any] | None = None) -> Iterator[tuple[str, str]]:
    """Yield what was reduced, and in what it differs from NumPy's, "" for nothing."""
    for number, (cube, channels) in enumerate(CHECKED if cubes is None else cubes):
        for name, dtype in TYPES.items():
            for kind, draw in KINDS.items():
                rng = np.random.default_rng(number)
                with np.errstate(over="ignore", invalid="ignore"):
                    x = draw(rng, int(np.prod(cube))).astype(np.float32).astype(dtype).reshape(cube)
                yield f"{cube} {name} {kind}", difference(x, name, channels)


def difference(x: np.ndarray, dtype: str, channels: bool) -> str:
    """Return in what the statistics of a cube differ on the GPU, in words."""
    there = gpu.cupy().asarray(x.view(np.uint16) if dtype == "bfloat16" else x)
    with np.errstate(over="ignore", invalid="ignore"):
        sums, counts = reduce_cube(x.astype(np.float32), channels=channels, exponent=-100)
    found_sums, found = reduce_device_cube(there, dtype, channels=channels, exponent=-100)
    again, _ = reduce_device_cube(there, dtype, channels=channels, exponent=-100)
    assert counts is not None
    for name in ("zeros", "nans", "infinities", "min", "max", "exponent"):
        if repr(getattr(found, name)) != repr(getattr(counts, name)):
            return f"{name} {getattr(found, name)} for {getattr(counts, name)}"
    for side in ("positive", "negative"):
        mine, theirs = getattr(counts, side), getattr(found, side)
        if not (
            np.array_equal(mine.linear, theirs.linear) and np.array_equal(mine.prefixes, theirs.prefixes)
        ):
            return f"counts of {side} values"
    if sums is None or found_sums is None or again is None:
        return ""
    if (found_sums.min.tobytes(), found_sums.max.tobytes()) != (sums.min.tobytes(), sums.max.tobytes()):
        return "limits of channels"
    if found_sums.sum.tobytes() != again.sum.tobytes():
        return "sums differ from one run to the next"
    finite = np.isfinite(sums.sum)
    error = np.abs(found_sums.sum[finite] - sums.sum[finite]) - 1e-12 * sums.abs_sum[finite]
    return "sums" if (error > 0).any() or not np.array_equal(np.isfinite(found_sums.sum), finite) else ""


def grams_agree() -> Iterator[tuple[str, str]]:
    """Yield the Gram matrices that were made, and how far they are off where that is too far."""
    cupy = gpu.cupy()
    for size, groups, vectors in GRAMS:
        rows = np.random.default_rng(size).standard_normal((groups, vectors, size)).astype(np.float32)
        want, made = GramMatrix(size, groups), DeviceGram(size, groups, float64=True)
        rough = DeviceGram(size, groups, float64=False)
        want.observe(rows)
        made.observe(cupy.asarray(rows))
        rough.observe(cupy.asarray(rows))
        most = np.sqrt(want.products.diagonal(axis1=1, axis2=2))
        scale = most[:, :, None] * most[:, None, :]
        for what, gram, bound in (("float64", made, 1e-12), ("float32", rough, 1025 * 2.0**-24)):
            error = float((np.abs(gram.result().products - want.products) / scale).max())
            yield (
                f"gram of {groups} x {size}, {what}",
                "" if error <= bound else f"relative error {error:.1e}",
            )
    for size, groups, vectors in SHORT_GRAMS:
        for name in ("float16", "bfloat16"):
            # Whole numbers: their sums have one right answer.
            rows = np.random.default_rng(size).integers(-9, 10, (groups, vectors, size)).astype(TYPES[name])
            want, made = GramMatrix(size, groups), DeviceGram(size, groups)
            want.observe(rows)
            made.observe(cupy.asarray(rows if name == "float16" else rows.view(np.uint16)))
            same = np.array_equal(made.result().products, want.products)
            yield f"gram of {groups} x {size}, {name}", "" if same else "products"


def fetched_exactly() -> Iterator[tuple[str, str]]:
    """Yield tensors of the digit classifier that CUDA made, and whether their statistics are those of their copies."""
    graph = load_graph(DIGITS / "model.onnx")
    fed = {spec.name for spec in graph.inputs}
    names = sorted({s.name for s in find_sites(graph)[0] if s.role != "weight"} - fed)
    session = Session(graph.model, outputs=names, provider=CUDA)
    batch = {
        spec.name: next(iter(open_data(DIGITS / "calib", graph.inputs)))[spec.name] for spec in graph.inputs
    }
    for name, value in session.run_there(upload(batch, CUDA)).items():
        tensor: DeviceArray = device_array(value)
        if int(tensor.array.data.ptr) != int(value.data_ptr()):
            yield name, "a copy"
            continue
        want, found = FloatHistogram(), FloatHistogram()
        want.observe(gpu.cupy().asnumpy(tensor.array))
        counts = observe_device_tensor(tensor, None, exponent=found.exponent)
        assert counts is not None
        found.include(counts)
        yield name, "" if want == found else "its histogram"


def calibrated_alike() -> Iterator[tuple[str, str]]:
    """Yield the tensors of the digit classifier, calibrated on the CPU and on the GPU, and what differs too much."""
    graph = load_graph(DIGITS / "model.onnx")
    source = open_data(DIGITS / "calib", graph.inputs, samples=SAMPLES)
    here, there = (observe(graph, source, device=device).statistics for device in ("cpu", "cuda"))
    for name, want in here.items():
        mine, theirs = want.histogram, there[name].histogram
        far = abs(mine.amax - theirs.amax) > 1e-4 * mine.amax
        yield name, "limits" if far else "" if mine.count == theirs.count else "number of values"


def time_grams(repeats: int, pause_s: float, stopwatch: Stopwatch | None = None) -> list[dict[str, Any]]:
    """Time Gram matrices: ours of 16 bits, sums of vectors too, beside cuBLAS in float64 and float32."""
    cupy, rows = gpu.cupy(), []
    for size in GRAM_SIZES:
        short = cupy.asarray(
            np.random.default_rng(0).standard_normal((1, GRAM_VECTORS, size)).astype(np.float16)
        )
        ours = DeviceGram(size)
        plain = {name: short[0].astype(name) for name in ("float64", "float32")}
        contenders = {"gram": Contender(run=lambda o=ours, x=short: o.observe(x))} | {
            name: Contender(run=lambda x=x: x.T @ x) for name, x in plain.items()
        }
        timings, refused = time_in_turns(contenders, repeats=repeats, pause_s=pause_s, stopwatch=stopwatch)
        for what, reason in refused.items():
            print(f"  {what}: refused: {reason}")
        found = {name: t.median_us for name, t in timings.items()}
        rows.append({"size": size, "vectors": GRAM_VECTORS, "us": found})
        print(f"gram {size}: " + ", ".join(f"{name} {us:.0f} us" for name, us in found.items()))
    return rows


def time_statistics(
    repeats: int, pause_s: float, stopwatch: Stopwatch | None = None, cubes: Sequence[Any] | None = None
) -> list[dict[str, Any]]:
    """Time the reduction of large tensors beside their copies."""
    cupy, rows = gpu.cupy(), []
    for name, cube, channels in TIMED if cubes is None else cubes:
        for dtype in TYPES:
            plain = np.dtype(np.uint16) if dtype == "bfloat16" else TYPES[dtype]
            rng = np.random.default_rng(0)
            # A few MB drawn, and repeated: drawing takes longer than all the rest.
            drawn = rng.standard_normal(1 << 20).astype(np.float32).astype(TYPES[dtype]).view(plain)
            x = cupy.asarray(np.resize(drawn, cube))
            other = cupy.empty(cube, plain)
            kept: deque[Any] = deque(maxlen=4)  # what a graph writes is not given to others

            def ours(x: Any = x, dtype: str = dtype, channels: bool = channels, kept: Any = kept) -> None:
                kept.append(start_reduction(x, dtype, channels=channels, exponent=2))

            def copy(x: Any = x, other: Any = other) -> None:
                cupy.copyto(other, x)

            contenders = {"statistics": Contender(run=ours), "copy": Contender(run=copy)}
            timings, refused = time_in_turns(
                contenders, repeats=repeats, pause_s=pause_s, stopwatch=stopwatch
            )
            for what, reason in refused.items():
                print(f"  {what}: refused: {reason}")
            if refused:
                continue
            size = int(x.size) * plain.itemsize
            read, copied = (
                size / timings["statistics"].median_us / 1e3,
                2 * size / timings["copy"].median_us / 1e3,
            )
            rows.append(
                {
                    "tensor": name,
                    "dtype": dtype,
                    "us": timings["statistics"].median_us,
                    "copy_us": timings["copy"].median_us,
                    "gb_per_s": read,
                    "copy_gb_per_s": copied,
                    "share_of_copy": read / copied,
                }
            )
            print(
                f"{name} {dtype}: {timings['statistics'].median_us:.1f} us, {read:.0f} GB/s read; "
                f"copy {copied:.0f} GB/s read and written: {read / copied:.0%}"
            )
    return rows

"""One run of gemm_sm90.cu, or of a damaged copy of it, and what it should have given."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from quantkit.kernels.emulator import Swizzle, TensorMap
from quantkit.kernels.epilogue import EpilogueKind, EpilogueValues
from quantkit.kernels.gemm_launch import KERNEL, SOURCE, launch_of
from quantkit.kernels.heuristics import Problem, Tile
from quantkit.kernels.reference import gemm_reference

DTYPES = {
    "int8": np.dtype(np.int8),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "int32": np.dtype(np.int32),
}
SWIZZLES = {64: Swizzle.BYTES_64, 128: Swizzle.BYTES_128}
MULTIPROCESSORS = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """A product and its epilogue, with integers that every format holds, so that all sums are exact."""

    m: int
    n: int
    k: int
    format: str
    output: str
    tile: Tile
    kind: EpilogueKind = field(default_factory=EpilogueKind)
    seed: int = 0
    magnitude: int = 4

    @property
    def problem(self) -> Problem:
        return Problem(m=self.m, n=self.n, k=self.k, format=self.format, output=self.output)

    def __str__(self) -> str:
        t, e = self.tile, self.kind
        words = [f"{self.m}x{self.n}x{self.k}", self.format, self.output, f"{t.tile_m}x{t.tile_n}"]
        words += ["swap"] * t.swap + ["pingpong"] * t.pingpong + ["stream"] * t.stream
        words += [f"split{t.split}"] * (t.split > 1) + [f"cluster{t.cluster}"] * (t.cluster > 1)
        words += [f"{e.row_scale}-{e.column_scale}"] + ["bias"] * e.bias
        words += [f"zero-{e.zero_point}"] * (e.zero_point != "none")
        words += [e.activation] * (e.activation != "none")
        words += [f"residual-{e.residual}-{e.residual_type}"] * (e.residual != "none")
        return " ".join(words)


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """What a case multiplies, and what its epilogue adds."""

    a: np.ndarray
    b: np.ndarray
    row_scale: np.ndarray
    column_scale: np.ndarray
    bias: np.ndarray
    zero_point: np.ndarray
    weight_sum: np.ndarray
    residual: np.ndarray
    values: EpilogueValues


def codes(rng: np.random.Generator, shape: tuple[int, ...], name: str, magnitude: int) -> np.ndarray:
    limits = (-128, 128) if name == "int8" else (-magnitude, magnitude + 1)
    return rng.integers(*limits, shape).astype(np.float32).astype(DTYPES[name])


def tensors_of(case: Case) -> Tensors:
    rng = np.random.default_rng([case.m, case.n, case.k, case.seed])
    m, n, kind = case.m, case.n, case.kind
    a, b = (codes(rng, (rows, case.k), case.format, case.magnitude) for rows in (m, n))
    # Scales that bring the sums into the range of activations and of eight-bit outputs.
    typical = 1 / math.sqrt(case.k) / (3000 if case.format == "int8" else 5)

    def factor(granularity: str, rows: int, size: float) -> np.ndarray:
        count = rows if granularity == "each" else 1
        return ((rng.random(count) + 0.5) * size).astype(np.float32)

    return Tensors(
        a=a,
        b=b,
        row_scale=factor(kind.row_scale, m, typical),
        column_scale=factor(kind.column_scale, n, 1.0),
        bias=rng.standard_normal(n).astype(np.float32),
        zero_point=rng.integers(-128, 128, m if kind.zero_point == "each" else 1).astype(np.int32),
        weight_sum=b.astype(np.float32).sum(1).astype(np.int32),
        residual=codes(rng, (m, n), kind.residual_type, 4),
        values=EpilogueValues(
            low=-0.5,
            high=1.25,
            scale=0.013 if kind.row_scale != "none" else 97.0,
            zero_point=-7 if kind.output_zero_point else 0,
            residual_scale=0.021,
            residual_zero_point=3,
        ),
    )


def run(machine, case: Case, t: Tensors | None = None, *, source: Path = SOURCE, **options) -> np.ndarray:
    """D of the kernel; the rows of a and b start at multiples of 16 bytes, the output held rubbish before."""
    t = t or tensors_of(case)
    launch = launch_of(case.problem, case.tile, case.kind, MULTIPROCESSORS)
    operands = []
    for matrix in (t.a, t.b):
        rows, k = matrix.shape
        padded = np.zeros((rows, math.ceil(k * matrix.itemsize / 16) * 16 // matrix.itemsize), matrix.dtype)
        padded[:, :k] = matrix
        operands.append(padded)
    if launch.swap:
        operands.reverse()
    d = np.full((case.m, case.n), 77, np.float32).astype(DTYPES[case.output])
    maps = [
        TensorMap(
            array=array,
            box=box,
            swizzle=Swizzle.BYTES_128,
            shape=(array.shape[0], case.k),
            strides_bytes=array.strides,
        )
        for array, box in zip(operands, (launch.first_box, launch.second_box), strict=True)
    ]
    stored = maps[0]
    if launch.tma_store:
        stored = TensorMap(array=d, box=launch.output_box, swizzle=SWIZZLES[launch.output_swizzle])
    shared: tuple[Any, ...] = ()
    if launch.shares is not None:
        # Rubbish where sums are left, zeros where arrivals are counted.
        pieces, arrivals = np.full(launch.piece_bytes, 0x7B, np.uint8), np.zeros(launch.arrivals, np.uint32)
        shared = pieces, arrivals, *launch.share_arguments()
    machine.launch(
        source,
        KERNEL,
        *maps,
        stored,
        d,
        np.int32(case.problem.row_bytes),
        *(t.row_scale, t.column_scale, t.bias, t.zero_point, t.weight_sum, t.residual),
        t.values.packed(),
        np.int32(case.m),
        np.int32(case.n),
        *shared,
        defines=launch.defines,
        grid=launch.grid,
        block=launch.block,
        cluster=launch.cluster,
        shared_bytes=launch.shared_bytes,
        multiprocessors=MULTIPROCESSORS,
        **options,
    )
    if shared:
        assert not arrivals.any(), "the next launch finds its counters at zero"
    return d


def oracle(case: Case, t: Tensors | None = None, output: str | None = None) -> np.ndarray:
    t = t or tensors_of(case)
    kind = case.kind
    return gemm_reference(
        t.a,
        t.b,
        row_scale=None if kind.row_scale == "none" else t.row_scale,
        column_scale=None if kind.column_scale == "none" else t.column_scale,
        zero_point=None if kind.zero_point == "none" else t.zero_point,
        bias=t.bias if kind.bias else None,
        activation=kind.activation,
        residual=None if kind.residual == "none" else t.residual,
        residual_place=kind.residual,
        values=t.values,
        output=output or case.output,
    )

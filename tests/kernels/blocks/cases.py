"""One run of gemm_blocks_sm90.cu, or of a damaged copy of it, and what it should have given."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from quantkit.kernels.blocks.heuristics import BlocksProblem, BlocksTile
from quantkit.kernels.blocks.launch import KERNEL, SOURCE, launch_of
from quantkit.kernels.blocks.layout import padded, stored_scales
from quantkit.kernels.blocks.reference import blocks_reference
from quantkit.kernels.emulator import Swizzle, TensorMap
from quantkit.kernels.epilogue import EpilogueKind, EpilogueValues

from ..gemms import DTYPES, SWIZZLES

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
MULTIPROCESSORS = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """A product and its epilogue, with codes that are small integers and scales of few bits: all sums are exact."""

    m: int
    n: int
    k: int
    block: int
    output: str
    tile: BlocksTile
    kind: EpilogueKind = field(default_factory=EpilogueKind)
    seed: int = 0

    @property
    def problem(self) -> BlocksProblem:
        return BlocksProblem(m=self.m, n=self.n, k=self.k, block=self.block, output=self.output)

    def __str__(self) -> str:
        t, e = self.tile, self.kind
        words = [f"{self.m}x{self.n}x{self.k}", f"block{self.block}", self.output, f"{t.tile_m}x{t.tile_n}"]
        words += ["swap"] * t.swap + [f"cluster{t.cluster}"] * (t.cluster > 1) + ["bias"] * e.bias
        words += [e.activation] * (e.activation != "none")
        words += [f"residual-{e.residual}-{e.residual_type}"] * (e.residual != "none")
        return " ".join(words)


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """What a case multiplies, and what its epilogue adds. w_scale: a row for each row of w, or for each 128."""

    a: np.ndarray
    w: np.ndarray
    a_scale: np.ndarray
    w_scale: np.ndarray
    row_scale: np.ndarray
    column_scale: np.ndarray
    bias: np.ndarray
    residual: np.ndarray
    values: EpilogueValues


def tensors_of(case: Case) -> Tensors:
    rng = np.random.default_rng([case.m, case.n, case.k, case.block, case.seed])
    m, n, k, kind = case.m, case.n, case.k, case.kind
    a, w = (rng.integers(-4, 5, (rows, k)).astype(np.float32).astype(E4M3) for rows in (m, n))
    blocks = -(-k // case.block)

    def scales(rows: int) -> np.ndarray:
        powers = np.ldexp(np.float32(1 / 64), rng.integers(-2, 3, (rows, blocks))).astype(np.float32)
        # Two mantissa bits that e8m0 has not.
        return powers if case.block == 32 else powers * rng.choice(np.float32([1, 1.25, 1.5]), powers.shape)

    def factor(granularity: str, rows: int) -> np.ndarray:
        return (rng.random(rows if granularity == "each" else 1) + 0.5).astype(np.float32)

    return Tensors(
        a=a,
        w=w,
        a_scale=scales(m),
        w_scale=scales(n if case.block == 32 else -(-n // 128)),
        row_scale=factor(kind.row_scale, m),
        column_scale=factor(kind.column_scale, n),
        bias=rng.standard_normal(n).astype(np.float32),
        residual=rng.integers(-4, 5, (m, n)).astype(np.float32).astype(DTYPES[kind.residual_type]),
        values=EpilogueValues(
            low=-0.5, high=1.25, scale=0.013, zero_point=-7 if kind.output_zero_point else 0,
            residual_scale=0.021, residual_zero_point=3,
        ),
    )  # fmt: skip


def run(
    machine: Any, case: Case, t: Tensors | None = None, *, source: Path = SOURCE, **options: Any
) -> np.ndarray:
    """D of the kernel; the output held rubbish before, and so did the ends of the rows of scales."""
    t = t or tensors_of(case)
    launch = launch_of(case.problem, case.tile, case.kind, MULTIPROCESSORS)
    codes = [padded(x.view(np.uint8)) for x in (t.a, t.w)]
    scales = []
    for scale in (t.a_scale, t.w_scale):
        stored = stored_scales(scale, case.block)
        stored[:, scale.shape[1] * (1 if case.block == 32 else 4) :] = 0xFF
        scales.append(stored)
    d = np.full((case.m, case.n), 77, np.float32).astype(DTYPES[case.output])
    operands = codes[::-1] if launch.swap else codes
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
    stored_d = maps[0]
    if launch.tma_store:
        stored_d = TensorMap(array=d, box=launch.output_box, swizzle=SWIZZLES[launch.output_swizzle])
    unused = np.zeros(2, np.int32)
    machine.launch(
        source,
        KERNEL,
        *maps,
        stored_d,
        d,
        np.int32(case.k),
        *(x for stored in scales for x in (stored, np.int64(stored.shape[1]))),
        *(t.row_scale, t.column_scale, t.bias, unused, unused, t.residual),
        t.values.packed(),
        np.int32(case.m),
        np.int32(case.n),
        defines=launch.defines,
        grid=launch.grid,
        block=launch.block,
        cluster=launch.cluster,
        shared_bytes=launch.shared_bytes,
        multiprocessors=MULTIPROCESSORS,
        **options,
    )
    return d


def oracle(case: Case, t: Tensors | None = None, output: str | None = None) -> np.ndarray:
    t = t or tensors_of(case)
    kind = case.kind
    return blocks_reference(
        t.a,
        t.a_scale,
        t.w,
        t.w_scale,
        block=case.block,
        row_scale=None if kind.row_scale == "none" else t.row_scale,
        column_scale=None if kind.column_scale == "none" else t.column_scale,
        bias=t.bias if kind.bias else None,
        activation=kind.activation,
        residual=None if kind.residual == "none" else t.residual,
        residual_place=kind.residual,
        values=t.values,
        output=output or case.output,
    )

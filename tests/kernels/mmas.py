"""One run of gemm_mma.cu, or of a damaged copy of it."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantkit.kernels.mma_heuristics import MmaTile
from quantkit.kernels.mma_launch import KERNEL, SOURCE, launch_of

from .gemms import DTYPES, Case, Tensors, tensors_of

MULTIPROCESSORS = 4


@dataclass(frozen=True, kw_only=True)
class MmaCase(Case):
    """A product on gemm_mma. arch: whose way with e4m3 it takes. gap: bytes between the rows of A."""

    tile: MmaTile
    arch: str = "sm_89"
    gap: int = 0

    def __str__(self) -> str:
        t, e = self.tile, self.kind
        words = [f"{self.m}x{self.n}x{self.k}", self.format, self.arch, self.output]
        words += [f"{t.tile_m}x{t.tile_n}r{t.row}s{t.stages}", f"slices{t.slices}", e.activation, e.residual]
        return " ".join(words)


def run_mma(machine, case: MmaCase, t: Tensors | None = None, *, source: Path = SOURCE) -> np.ndarray:
    """D of the kernel. What lies beside the operands, in the output and in the workspace is rubbish before."""
    t = t or tensors_of(case)
    launch = launch_of(case.problem, case.tile, case.kind, case.arch)
    operands = []
    for matrix, gap in ((t.a, case.gap), (t.b, 0)):
        rows, k_bytes = matrix.shape[0], matrix.shape[1] * matrix.itemsize
        padded = np.full((rows, math.ceil(k_bytes / 16) * 16 + gap), 0x55, np.uint8)
        padded[:, :k_bytes] = np.ascontiguousarray(matrix).view(np.uint8)
        operands.append(padded)
    d = np.full((case.m, case.n), 77, np.float32).astype(DTYPES[case.output])
    workspace = np.full(max(16, launch.workspace_bytes), 0x7F, np.uint8)
    arrivals = np.zeros(max(1, launch.arrivals), np.uint32)
    machine.launch(
        source,
        KERNEL,
        *operands,
        d,
        *(t.row_scale, t.column_scale, t.bias, t.zero_point, t.weight_sum, t.residual),
        t.values.packed(),
        np.int32(case.m),
        np.int32(case.n),
        workspace,
        arrivals,
        np.int32(case.k * t.a.itemsize),
        *(np.int64(operand.shape[1]) for operand in operands),
        defines=launch.defines,
        grid=launch.grid,
        block=launch.block,
        shared_bytes=launch.shared_bytes,
        multiprocessors=MULTIPROCESSORS,
    )
    assert not arrivals.any(), "counters are zero again"
    return d

"""One run of gemm_w4_mma.cu, or of a damaged copy of it."""

from pathlib import Path
from typing import Any

import numpy as np

from quantkit.kernels.epilogue import EpilogueKind, EpilogueValues
from quantkit.kernels.w4.layout import Packed4
from quantkit.kernels.w4.mma_heuristics import W4MmaTile
from quantkit.kernels.w4.mma_launch import KERNEL, SOURCE, w4_mma_launch_of

from .weights import DTYPES, problem_of

KIND = EpilogueKind(row_scale="each", column_scale="each", bias=True)


def run_w4_mma(
    machine: Any,
    a: np.ndarray,
    packed: Packed4,
    tile: W4MmaTile,
    *,
    output: str = "float32",
    row_scale: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    activation: str = "none",
    source: Path = SOURCE,
    gap: int = 0,
) -> np.ndarray:
    """D of the kernel. What lies beside the rows of A, in the output and in the workspace is rubbish before.

    gap: bytes between the rows of A.
    """
    m, k = a.shape
    form = packed.layout
    kind = EpilogueKind(
        row_scale="none" if row_scale is None else "each",
        column_scale="each",
        bias=bias is not None,
        activation=activation,
    )
    launch = w4_mma_launch_of(problem_of(packed, m, str(a.dtype), output), tile, kind)
    padded = np.full((m, -(-k * a.itemsize // 16) * 16 + gap), 0x55, np.uint8)
    padded[:, : k * a.itemsize] = np.ascontiguousarray(a).view(np.uint8)
    d = np.full((m, form.n), 77, DTYPES[output])
    unused = np.zeros(16, np.float32)
    weights = [unused if part is None else part for part in (packed.codes, packed.scales, packed.zeros)]
    arrivals = np.zeros(max(1, launch.arrivals), np.uint32)
    machine.launch(
        source,
        KERNEL,
        padded,
        *weights,
        d,
        unused if row_scale is None else row_scale,
        packed.channel_scale,
        unused if bias is None else bias,
        *[unused] * 3,
        EpilogueValues().packed(),
        np.int32(m),
        np.int32(form.n),
        np.full(max(16, launch.partials_bytes), 0x7F, np.uint8),
        arrivals,
        np.int32(k * a.itemsize),
        np.int64(padded.shape[1]),
        np.int32(form.planes),
        defines=launch.defines,
        grid=launch.grid,
        block=launch.block,
        shared_bytes=launch.shared_bytes,
        multiprocessors=4,
    )
    assert not arrivals.any(), "counters are zero again"
    return d

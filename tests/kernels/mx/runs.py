"""One run of gemm_blocks_sm120.cu, or of a damaged copy of it, and operands for it."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from quantkit.formats.format import E8M0, FP4_E2M1, FP8_E4M3
from quantkit.formats.packing import codes_from_bits
from quantkit.formats.qparams import QParams
from quantkit.formats.quantize import QTensor
from quantkit.formats.spec import QuantSpec
from quantkit.kernels.epilogue import EpilogueKind, EpilogueValues
from quantkit.kernels.mx.heuristics import MxProblem, MxTile
from quantkit.kernels.mx.launch import KERNEL, SOURCE, mx_launch_of
from quantkit.kernels.mx.layout import BLOCKS, PackedMx, row_bytes, row_scales

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16)} | {
    name: np.dtype(name) for name in ("float16", "float32", "int8")
}
SPECS = {
    "mxfp8": QuantSpec(format=FP8_E4M3, axis=1, block_size=32, scale_format=E8M0),
    "mxfp4": QuantSpec(format=FP4_E2M1, axis=1, block_size=32, scale_format=E8M0),
    "nvfp4": QuantSpec(format=FP4_E2M1, axis=1, block_size=16, scale_format=FP8_E4M3),
}


def tensor(rng: np.random.Generator, rows: int, k: int, form: str, *, simple: bool = True) -> QTensor:
    """A random tensor [rows, k]. simple: codes and scales of few bits, so that products and sums are exact."""
    spec = SPECS[form]
    count = -(-k // BLOCKS[form])
    spread = 2 if simple else 8
    scale = np.ldexp(1.0, rng.integers(-spread, spread, (rows, count)))
    if form == "nvfp4" and not simple:
        codes = rng.integers(0, 0x7F, (rows, count)).astype(np.uint8)
        scale = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    if form == "mxfp8":
        found = rng.integers(-4, 5, (rows, k)) if simple else rng.standard_normal((rows, k)) * 8
        values = found.astype(np.float32).astype(FP8_E4M3.dtype)
    else:
        values = codes_from_bits(rng.integers(0, 16, (rows, k)).astype(np.uint8), FP4_E2M1)
    held = np.float32(0.5 if simple else 0.0123) if form == "nvfp4" else None
    return QTensor(values, QParams(scale.astype(np.float32), None, held), spec)


def run_mx(
    machine: Any,
    a: PackedMx,
    weight: PackedMx,
    tile: MxTile,
    *,
    output: str = "float32",
    bias: np.ndarray | None = None,
    activation: str = "none",
    source: Path = SOURCE,
    gap: int = 0,
) -> np.ndarray:
    """D of the kernel. What lies beside codes and scales, in the output and in the workspace is rubbish before.

    gap: bytes between the rows of A and of its scales, a multiple of 16.
    """
    m, n, k = a.rows, weight.rows, a.k
    given = a.global_scale is not None
    granularity = "one" if given else "none"
    kind = EpilogueKind(
        row_scale=granularity, column_scale=granularity, bias=bias is not None, activation=activation
    )
    problem = MxProblem(m=m, n=n, k=k, format=a.format, output=output)
    launch = mx_launch_of(problem, tile, kind)
    bytes_of, scales_of = row_bytes(a.format, k), row_scales(a.format, k)

    def beside_rubbish(matrix: np.ndarray, width: int, between: int) -> np.ndarray:
        wide = np.full((len(matrix), matrix.shape[1] + between), 0xFF, np.uint8)
        wide[:, :width] = matrix[:, :width]
        return wide

    operands = [
        beside_rubbish(a.codes, bytes_of, gap),
        beside_rubbish(weight.codes, bytes_of, 0),
        beside_rubbish(a.scales, scales_of, gap),
        beside_rubbish(weight.scales, scales_of, 16),
    ]
    d = np.full((m, n), 77, DTYPES[output])
    unused = np.zeros(4, np.float32)
    factors = [
        unused if operand.global_scale is None else np.array([operand.global_scale], np.float32)
        for operand in (a, weight)
    ]
    arrivals = np.zeros(max(1, launch.arrivals), np.uint32)
    machine.launch(
        source,
        KERNEL,
        *operands,
        d,
        *factors,
        unused if bias is None else bias,
        *[unused] * 3,
        EpilogueValues().packed(),
        np.int32(m),
        np.int32(n),
        np.full(max(16, launch.partials_bytes), 0x7F, np.uint8),
        arrivals,
        np.int32(bytes_of),
        np.int32(scales_of),
        *(np.int64(operand.shape[1]) for operand in operands),
        defines=launch.defines,
        grid=launch.grid,
        block=launch.block,
        shared_bytes=launch.shared_bytes,
        multiprocessors=4,
    )
    assert not arrivals.any(), "counters are zero again"
    return d

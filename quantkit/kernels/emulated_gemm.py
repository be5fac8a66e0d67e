"""gemm_sm90.cu on the CPU: the launch that a GPU would get, in the emulator."""

import math
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantkit.kernels.emulator import Mode, Swizzle, TensorMap, load
from quantkit.kernels.epilogue import EpilogueKind, EpilogueValues
from quantkit.kernels.gemm_launch import KERNEL, SOURCE, launch_of
from quantkit.kernels.heuristics import Problem, Tile

_MULTIPROCESSORS = 4
_SWIZZLES = {64: Swizzle.BYTES_64, 128: Swizzle.BYTES_128}


def emulated_gemm(
    a: NDArray[Any],
    b: NDArray[Any],
    problem: Problem,
    tile: Tile,
    *,
    row_scale: NDArray[np.float32] | None = None,
    column_scale: NDArray[np.float32] | None = None,
    bias: NDArray[np.float32] | None = None,
    relu: bool = False,
    mode: Mode = Mode.EAGER,
) -> NDArray[Any]:
    """Return D[m, n] = relu(a[m, k] @ b[n, k].T · row_scale · column_scale + bias) of the emulated kernel.

    Raises:
        KernelError: no C++ compiler here, or the kernel broke a rule.
    """
    kind = EpilogueKind(
        row_scale=_granularity(row_scale),
        column_scale=_granularity(column_scale),
        bias=bias is not None,
        activation="relu" if relu else "none",
    )
    launch = launch_of(problem, tile, kind, _MULTIPROCESSORS)
    operands = [_padded(a), _padded(b)]
    if launch.swap:
        operands.reverse()
    d: NDArray[Any] = np.empty(
        (problem.m, problem.n), ml_dtypes.bfloat16 if problem.output == "bfloat16" else problem.output
    )
    maps = [
        TensorMap(
            array=array,
            box=box,
            swizzle=Swizzle.BYTES_128,
            shape=(array.shape[0], problem.k),
            strides_bytes=array.strides,
        )
        for array, box in zip(operands, (launch.first_box, launch.second_box), strict=True)
    ]
    stored = (
        TensorMap(array=d, box=launch.output_box, swizzle=_SWIZZLES[launch.output_swizzle])
        if launch.tma_store
        else maps[0]
    )
    unused = np.zeros(2, np.float32)
    factors = [
        unused if v is None else np.ascontiguousarray(v, np.float32).reshape(-1)
        for v in (row_scale, column_scale, bias)
    ]
    shared: tuple[Any, ...] = ()
    if launch.shares is not None:
        shared = np.zeros(launch.piece_bytes, np.uint8), np.zeros(launch.arrivals, np.uint32)
        shared += launch.share_arguments()
    load(SOURCE, KERNEL, launch.defines).launch(
        *maps,
        stored,
        d,
        np.int32(problem.row_bytes),
        *factors,
        unused,
        unused,
        unused,
        EpilogueValues().packed(),
        np.int32(problem.m),
        np.int32(problem.n),
        *shared,
        grid=launch.grid,
        block=launch.block,
        cluster=launch.cluster,
        shared_bytes=launch.shared_bytes,
        mode=mode,
        multiprocessors=_MULTIPROCESSORS,
    )
    return d


def _granularity(scale: NDArray[np.float32] | None) -> str:
    return "none" if scale is None else "one" if scale.size == 1 else "each"


def _padded(matrix: NDArray[Any]) -> NDArray[Any]:
    """Rows that start at multiples of 16 bytes."""
    rows, k = matrix.shape
    pitch = math.ceil(k * matrix.itemsize / 16) * 16 // matrix.itemsize
    padded = np.zeros((rows, pitch), matrix.dtype)
    padded[:, :k] = matrix
    return padded

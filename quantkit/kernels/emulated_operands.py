"""What the emulated launches of all matrix products share: memory as a GPU would have it, maps of it, the epilogue."""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantkit.kernels.emulator import Swizzle, TensorMap
from quantkit.kernels.epilogue import EpilogueKind, EpilogueValues

MULTIPROCESSORS = 4
UNUSED = np.zeros(16, np.float32)  # for arrays that a launch has no use for
_SWIZZLES = {64: Swizzle.BYTES_64, 128: Swizzle.BYTES_128}


def empty_output(m: int, n: int, output: str) -> NDArray[Any]:
    """Return an array [m, n] for D."""
    return np.empty((m, n), ml_dtypes.bfloat16 if output == "bfloat16" else output)


def pitched(matrix: NDArray[Any]) -> NDArray[Any]:
    """Return a matrix with rows that start at multiples of 16 bytes, zeros behind them."""
    rows, k = matrix.shape
    whole = 16 // matrix.itemsize
    padded = np.zeros((rows, -(-k // whole) * whole), matrix.dtype)
    padded[:, :k] = matrix
    return padded


def map_of_rows(array: NDArray[Any], k: int, box: tuple[int, int]) -> TensorMap:
    """Return the tensor map of an operand, of whose rows k elements count."""
    return TensorMap(
        array=array, box=box, swizzle=Swizzle.BYTES_128, shape=(len(array), k), strides_bytes=array.strides
    )


def map_of_output(d: NDArray[Any], box: tuple[int, int], swizzle_bytes: int = 128) -> TensorMap:
    """Return the tensor map by which D is stored."""
    return TensorMap(array=d, box=box, swizzle=_SWIZZLES[swizzle_bytes])


def granularity(scale: NDArray[np.float32] | None) -> str:
    """Return what an epilogue calls a scale: none, one or each."""
    return "none" if scale is None else "one" if scale.size == 1 else "each"


def kind_of(row_scale: str, column_scale: str, bias: NDArray[np.float32] | None, relu: bool) -> EpilogueKind:
    """Return the epilogue that a launch is compiled for."""
    return EpilogueKind(
        row_scale=row_scale,
        column_scale=column_scale,
        bias=bias is not None,
        activation="relu" if relu else "none",
    )


def epilogue_arguments(
    row_scale: NDArray[np.float32] | None,
    column_scale: NDArray[np.float32] | None,
    bias: NDArray[np.float32] | None,
    m: int,
    n: int,
) -> tuple[Any, ...]:
    """Return the arguments that EPILOGUE_PARAMETERS names."""
    factors = (
        UNUSED if v is None else np.ascontiguousarray(v, np.float32).reshape(-1)
        for v in (row_scale, column_scale, bias)
    )
    return *factors, UNUSED, UNUSED, UNUSED, EpilogueValues().packed(), np.int32(m), np.int32(n)

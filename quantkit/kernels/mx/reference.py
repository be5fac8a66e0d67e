"""The NumPy oracle of gemm_blocks_sm120.cu: values of codes times their blocks' scales, summed exactly.

Where float32 does not hold the sums, |D − exact| ≤ (instructions along K) · 2^-21 · Σ |a| |w| before the epilogue, if
the tensor core keeps as many bits of codes with scales as it does of bf16. No GPU has been asked.
"""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantkit.kernels.mx.layout import BLOCKS, PackedMx, row_bytes, row_scales
from quantkit.kernels.reference import gemm_reference


def values_mx(packed: PackedMx) -> NDArray[np.float64]:
    """Return what an operand's codes [rows, k] stand for, without the global scale."""
    form, k = packed.format, packed.k
    codes = packed.codes[:, : row_bytes(form, k)]
    values: NDArray[Any]
    if form == "mxfp8":
        values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    else:
        nibbles = np.stack([codes & np.uint8(15), codes >> np.uint8(4)], axis=-1).reshape(len(codes), -1)
        values = nibbles[:, :k].view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    scales = np.ascontiguousarray(packed.scales[:, : row_scales(form, k)])
    held = scales.view(ml_dtypes.float8_e4m3fn if form == "nvfp4" else ml_dtypes.float8_e8m0fnu)
    found: NDArray[np.float64] = values * np.repeat(held.astype(np.float64), BLOCKS[form], axis=1)[:, :k]
    return found


def mx_reference(a: PackedMx, weight: PackedMx, **epilogue: Any) -> NDArray[np.generic]:
    """Return D[m, n]: the sums rounded once to float32, then `gemm_reference`'s epilogue.

    Global scales multiply the sums, the activations' first, as a row scale and a column scale of one number each.
    """
    row, column = (
        None if operand.global_scale is None else np.array([operand.global_scale], np.float32)
        for operand in (a, weight)
    )
    return gemm_reference(values_mx(a), values_mx(weight), row_scale=row, column_scale=column, **epilogue)

"""NumPy oracles: what each kernel computes, operation for operation, where the sums are exact."""

import ml_dtypes
import numpy as np
from numpy.typing import NDArray


def gemm_reference(
    a: NDArray[np.generic],
    b: NDArray[np.generic],
    *,
    row_scale: NDArray[np.float32] | None = None,
    column_scale: NDArray[np.float32] | None = None,
    bias: NDArray[np.float32] | None = None,
    relu: bool = False,
    output: str = "bfloat16",
) -> NDArray[np.generic]:
    """Return D = relu(a[m, k] @ b[n, k].T · row_scale[m] · column_scale[n] + bias[n]) as `output`.

    The sums are exact for integers (int32 wraps nowhere for k < 2^17) and rounded once to float32 for floats; every
    further operation rounds to float32, in the order of the formula; the result is rounded to `output` once.
    """
    sums: NDArray[np.generic]
    if a.dtype == np.int8:
        # float64 holds every such sum exactly, and multiplies by BLAS.
        sums = (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.int32)
        if output == "int32":
            return sums
    else:
        sums = a.astype(np.float64) @ b.astype(np.float64).T
    x: NDArray[np.float32] = sums.astype(np.float32)
    if row_scale is not None:
        x = x * row_scale.reshape(-1, 1)
    if column_scale is not None:
        x = x * column_scale.reshape(1, -1)
    if bias is not None:
        x = x + bias
    if relu:
        x = np.where(x < 0, np.float32(0), x)
    with np.errstate(over="ignore"):  # beyond float16 lies infinity, as the instruction has it
        return x.astype(ml_dtypes.bfloat16 if output == "bfloat16" else output)

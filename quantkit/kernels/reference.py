"""NumPy oracles: what each kernel computes, operation for operation, where the sums are exact."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from scipy.special import erfc

from quantkit.kernels.epilogue import EpilogueValues

_E4M3_MAX = 448.0


def gemm_reference(
    a: NDArray[np.generic],
    b: NDArray[np.generic],
    *,
    row_scale: NDArray[np.float32] | None = None,
    column_scale: NDArray[np.float32] | None = None,
    zero_point: NDArray[np.int32] | None = None,
    bias: NDArray[np.float32] | None = None,
    activation: str = "none",
    residual: NDArray[np.generic] | None = None,
    residual_place: str = "after",
    values: EpilogueValues | None = None,
    output: str = "bfloat16",
) -> NDArray[np.generic]:
    """Return D[m, n] as `output`, by the operations of cuda/include/epilogue.h.

    D = activation((a[m, k] − zero_point[m]) @ b[n, k].T · row_scale[m] · column_scale[n] + bias[n]) + residual[m, n]

    The residual is added before the activation where `residual_place` is "before". The sums are exact for integers
    (int32 wraps nowhere for k < 2^16) and rounded once to float32 for floats; every further operation rounds to
    float32, in the order of the formula, and the result is rounded to `output` once. Gelu and Silu are the true
    functions, rounded once: kernels lie within 2^-15 of them.
    """
    sums: NDArray[np.generic]
    if a.dtype == np.int8:
        # float64 holds every such sum exactly, and multiplies by BLAS.
        wide = a.astype(np.float64)
        if zero_point is not None:
            wide = wide - zero_point.reshape(-1, 1)
        sums = (wide @ b.astype(np.float64).T).astype(np.int32)
        if output == "int32":
            return sums
    else:
        sums = a.astype(np.float64) @ b.astype(np.float64).T
    return finish_reference(
        sums.astype(np.float32),
        row_scale=row_scale,
        column_scale=column_scale,
        bias=bias,
        activation=activation,
        residual=residual,
        residual_place=residual_place,
        values=values,
        output=output,
    )


def finish_reference(
    x: NDArray[np.float32],
    *,
    row_scale: NDArray[np.float32] | None = None,
    column_scale: NDArray[np.float32] | None = None,
    bias: NDArray[np.float32] | None = None,
    activation: str = "none",
    residual: NDArray[np.generic] | None = None,
    residual_place: str = "after",
    values: EpilogueValues | None = None,
    output: str = "bfloat16",
) -> NDArray[np.generic]:
    """Return D of the sums [m, n]: every operation rounds to float32, the result to `output` once."""
    values = values or EpilogueValues()
    if row_scale is not None:
        x = x * row_scale.reshape(-1, 1)
    if column_scale is not None:
        x = x * column_scale.reshape(1, -1)
    if bias is not None:
        x = x + bias
    added = None if residual is None else residual_reference(residual, values)
    if added is not None and residual_place == "before":
        x = x + added
    x = activation_reference(x, activation, values)
    if added is not None and residual_place == "after":
        x = x + added
    return output_reference(x, output, values)


def residual_reference(residual: NDArray[np.generic], values: EpilogueValues) -> NDArray[np.float32]:
    """Return the residual as float32: 8-bit codes less their zero point, times their scale."""
    x = residual.astype(np.float32)
    if residual.dtype.itemsize > 1:
        return x
    scaled: NDArray[np.float32] = (x - np.float32(values.residual_zero_point)) * np.float32(
        values.residual_scale
    )
    return scaled


def activation_reference(
    x: NDArray[np.float32], activation: str, values: EpilogueValues
) -> NDArray[np.float32]:
    """Return the activation of x; NaN stays NaN."""
    if activation == "relu":
        return np.where(x < 0, np.float32(0), x)
    if activation == "clip":
        low, high = np.float32(values.low), np.float32(values.high)
        x = np.where(x < low, low, x)
        return np.where(x > high, high, x)
    true: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
        "gelu": lambda y: y * 0.5 * erfc(-y / np.sqrt(2)),
        "gelu_tanh": lambda y: y * _sigmoid(np.sqrt(8 / np.pi) * (y + 0.044715 * y**3)),
        "silu": lambda y: y * _sigmoid(y),
    }
    if activation in true:
        found: NDArray[np.float32] = true[activation](x.astype(np.float64)).astype(np.float32)
        return found
    return x


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        result: NDArray[np.float64] = 1 / (1 + np.exp(-x))
    return result


def output_reference(x: NDArray[np.float32], output: str, values: EpilogueValues) -> NDArray[np.generic]:
    """Return x rounded to `output`: int8 and e4m3 after a division by the scale, saturated."""
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # beyond float16 lies infinity, as the instruction has it
        if output == "int8":
            codes = np.rint(x / np.float32(values.scale)) + np.float32(values.zero_point)
            # The instruction gives 0 for NaN.
            clipped: NDArray[np.int8] = np.nan_to_num(np.clip(codes, -128, 127), nan=0.0).astype(np.int8)
            return clipped
        if output == "float8_e4m3fn":
            scaled: NDArray[np.float32] = np.clip(x / np.float32(values.scale), -_E4M3_MAX, _E4M3_MAX)
            return scaled.astype(ml_dtypes.float8_e4m3fn)
        rounded: NDArray[np.generic] = x.astype(ml_dtypes.bfloat16 if output == "bfloat16" else output)
        return rounded

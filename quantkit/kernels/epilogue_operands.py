"""What an `Epilogue` becomes for a launch: the kind that is compiled, arrays on the device, numbers by value."""

from functools import lru_cache
from typing import Any

import numpy as np

from quantkit.kernels import device as gpu
from quantkit.kernels.epilogue import EpilogueKind, EpilogueValues
from quantkit.kernels.gemm_checks import residual_type
from quantkit.kernels.gemm_operands import Epilogue


def kind_of(
    epilogue: Epilogue, *, row_scale: str, column_scale: str = "none", zero_point: str = "none"
) -> EpilogueKind:
    """Return what is compiled for an epilogue whose factors have these granularities."""
    return EpilogueKind(
        row_scale=row_scale,
        column_scale=column_scale,
        zero_point=zero_point,
        bias=epilogue.bias is not None,
        activation=epilogue.activation or "none",
        residual="none" if epilogue.residual is None else "before" if epilogue.residual_first else "after",
        residual_type="bfloat16" if epilogue.residual is None else residual_type(epilogue.residual),
        output_zero_point=epilogue.output_zero_point != 0,
    )


def row_factor(factor: Any, device: int, dtype: str = "float32") -> tuple[Any, str]:
    """Return a factor of rows as an array on the device, and its granularity."""
    if factor is None:
        return None, "none"
    if isinstance(factor, int | float):
        return gpu.scalar(device, factor, dtype), "one"
    return contiguous(factor), "one" if factor.size == 1 else "each"


def contiguous(array: Any) -> Any:
    """Return an array whose elements follow each other from a multiple of 16 bytes on, a copy if they did not."""
    if array is None or (array.flags.c_contiguous and array.data.ptr % 16 == 0):
        return array
    return array.copy(order="C")


def address(array: Any) -> np.uint64:
    """Return where an array starts; 0 for None."""
    return np.uint64(0 if array is None else array.data.ptr)


def numbers_of(epilogue: Epilogue) -> np.void:
    """Return the numbers that a kernel gets by value."""
    low, high = epilogue.clip or (0.0, 0.0)
    return _packed(
        EpilogueValues(
            low=low,
            high=high,
            scale=epilogue.output_scale,
            zero_point=epilogue.output_zero_point,
            residual_scale=epilogue.residual_scale,
            residual_zero_point=epilogue.residual_zero_point,
        )
    )


@lru_cache(maxsize=1024)
def _packed(values: EpilogueValues) -> np.void:
    return values.packed()

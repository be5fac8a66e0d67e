"""What `matmul` refuses at its door, with the mend."""

from typing import Any

import numpy as np

from quantkit.errors import KernelError
from quantkit.kernels.epilogue import ACTIVATIONS, LARGEST_SCALE, OUTPUT_BYTES, SMALLEST_SCALE
from quantkit.kernels.gemm_operands import Epilogue, PackedWeight

# What arrays carry each format on the device: CuPy has no eight-bit floats.
_CARRIERS = {
    "int8": ("int8", "uint8"),
    "float8_e4m3fn": ("uint8",),
    "bfloat16": ("bfloat16", "uint16"),
    "float16": ("float16",),
}
# Sides are int32 in the kernels, and rounded up to whole tiles there.
LARGEST_SIDE = 2**31 - 2**16
_RESIDUALS = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "uint16": "bfloat16",
    "int8": "int8",
    "uint8": "float8_e4m3fn",
}


def residual_type(residual: Any) -> str:
    """Return the element type of a residual that `check_product` has let through."""
    return _RESIDUALS[str(residual.dtype)]


def place_of(array: Any) -> int | None:
    """Return the number of the GPU that an array lies on; None for one of NumPy, or of a library that is not CuPy."""
    number = getattr(getattr(array, "device", None), "id", None)
    return None if number is None else int(number)


def described_place(array: Any) -> str:
    """Return where an array lies, in words."""
    number = place_of(array)
    if number is not None:
        return f"GPU {number}"
    return "the CPU" if isinstance(array, np.ndarray | np.generic) else f"{type(array).__module__}'s side"


def check_product(
    a: Any, weight: PackedWeight, epilogue: Epilogue, out_dtype: str, out: Any, device: int, arch: str
) -> None:
    """Refuse what no kernel computes.

    Raises:
        KernelError: the first thing that does not fit.
    """
    if not hasattr(a, "device"):
        raise KernelError(
            f"matmul: a: is a {type(a).__name__}, not an array on the GPU; make it one with cupy.asarray."
        )
    if a.ndim < 1 or a.shape[-1] != weight.k:
        raise KernelError(f"matmul: a: {a.shape} does not end in the weight's k = {weight.k}.")
    m = int(np.prod(a.shape[:-1], dtype=np.int64))
    complaints = [
        *_complaints_of_operands(a, weight, device, arch),
        *_complaints_of_output(a, weight, epilogue, out_dtype, out, m),
        *_complaints_of_epilogue(weight, epilogue, m),
    ]
    arrays = {
        "the weight": weight.data,
        "row_scale": epilogue.row_scale,
        "zero_point": epilogue.zero_point,
        "bias": epilogue.bias,
        "residual": epilogue.residual,
        "out": out,
        "a": a,
    }
    complaints += [
        (
            hasattr(array, "device") and place_of(array) != device,
            f"{name} lies on {described_place(array)}, not on GPU {device}; move it with cupy.asarray",
        )
        for name, array in arrays.items()
    ]
    for wrong, complaint in complaints:
        if wrong:
            raise KernelError(f"matmul: {complaint}.")


def _complaints_of_operands(a: Any, weight: PackedWeight, device: int, arch: str) -> list[tuple[bool, str]]:
    carriers = _CARRIERS[weight.format]
    return [
        (
            weight.arch != arch,
            f"the weight was packed for {weight.arch}, GPU {device} is {arch}; pack it again",
        ),
        (
            str(a.dtype) not in carriers,
            f"a: {a.dtype} for a weight of {weight.format}; pass {' or '.join(carriers)}",
        ),
        (weight.k == 0, "k = 0: there is nothing to multiply"),
        (
            max(int(np.prod(a.shape[:-1], dtype=np.int64)), weight.n, weight.k * a.itemsize) > LARGEST_SIDE,
            f"a {tuple(a.shape)} by ({weight.n}, {weight.k}): kernels count up to {LARGEST_SIDE} rows, columns and "
            "bytes of k; cut the product into parts",
        ),
    ]


def _complaints_of_output(
    a: Any, weight: PackedWeight, epilogue: Epilogue, out_dtype: str, out: Any, m: int
) -> list[tuple[bool, str]]:
    width = OUTPUT_BYTES.get(out_dtype, 0)
    plain = (
        epilogue.row_scale is None
        and epilogue.bias is None
        and epilogue.residual is None
        and epilogue.activation is None
    )
    eight_bits = out_dtype in ("int8", "float8_e4m3fn")
    return [
        (width == 0, f"out_dtype {out_dtype!r}; one of {', '.join(OUTPUT_BYTES)}"),
        (
            out_dtype == "int32" and (weight.format != "int8" or not plain),
            "int32 holds plain sums of int8 only; leave the epilogue out, or take float32",
        ),
        (
            not SMALLEST_SCALE <= epilogue.output_scale <= LARGEST_SCALE,
            f"output_scale {epilogue.output_scale}: outside of 2^-100 … 2^100; choose another",
        ),
        (
            not eight_bits and (epilogue.output_scale != 1.0 or epilogue.output_zero_point != 0),
            f"output_scale and output_zero_point are for int8 and float8_e4m3fn, not {out_dtype}; leave them out",
        ),
        (
            epilogue.output_zero_point != 0
            and (out_dtype != "int8" or not -128 <= epilogue.output_zero_point <= 127),
            f"output_zero_point {epilogue.output_zero_point}: int8 has them, from -128 to 127",
        ),
        (
            out is not None and (out.size != m * weight.n or out.itemsize != width or not out.flags.c_contiguous),
            f"out: {getattr(out, 'shape', None)} {getattr(out, 'dtype', None)} is not a contiguous "
            f"({m}, {weight.n}) array of {out_dtype}",
        ),
    ]  # fmt: skip


def _complaints_of_epilogue(weight: PackedWeight, epilogue: Epilogue, m: int) -> list[tuple[bool, str]]:
    residual, bias = epilogue.residual, epilogue.bias
    complaints = [
        (
            epilogue.zero_point is not None and weight.code_sums is None,
            f"zero_point: a weight of {weight.format} has no sums of codes to take it off; use int8",
        ),
        (
            epilogue.activation not in (None, *(name for name in ACTIVATIONS if name != "none")),
            f"activation {epilogue.activation!r}; None, {', '.join(name for name in ACTIVATIONS if name != 'none')}",
        ),
        (
            (epilogue.activation == "clip") != (epilogue.clip is not None),
            "clip holds the limits of activation 'clip'; give both or neither",
        ),
        (
            bias is not None and (bias.size != weight.n or bias.dtype != np.float32),
            f"bias: {getattr(bias, 'size', 0)} values of {getattr(bias, 'dtype', None)}; float32, {weight.n}",
        ),
        (
            residual is not None
            and (residual.size != m * weight.n or str(getattr(residual, "dtype", "")) not in _RESIDUALS),
            f"residual: {getattr(residual, 'shape', None)} {getattr(residual, 'dtype', None)}; "
            f"({m}, {weight.n}) of {', '.join(_RESIDUALS)}",
        ),
    ]
    for name, factor, dtype in (
        ("row_scale", epilogue.row_scale, np.float32),
        ("zero_point", epilogue.zero_point, np.int32),
    ):
        if factor is None or isinstance(factor, int | float):
            continue
        complaints.append(
            (
                factor.size not in (1, m) or factor.dtype != dtype,
                f"{name}: {factor.size} values of {factor.dtype}; {np.dtype(dtype)}, one or {m}",
            )
        )
    return complaints

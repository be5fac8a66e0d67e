"""The oracle of the kernels for weights of four bits: what they decode, bit for bit, and D where its sums are exact.

Where they are not, |D − exact| ≤ (number of K-steps of 16) · 2^-21 · Σ |a| |w| before the epilogue: each instruction
keeps at least 21 bits of its largest term. Of e4m3, whose instructions keep 13, and whose sums of 128 of K are added in
float32: 2^-10 · Σ |a| |w|.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.formats.format import FP4_E2M1
from quantkit.formats.packing import codes_from_bits
from quantkit.kernels.reference import gemm_reference
from quantkit.kernels.w4.layout import Packed4, held_scales, unpack4

_FRACTION_BITS = {"bfloat16": 8, "float16": 11}  # with the leading one


def decoded4(packed: Packed4, activations: str) -> NDArray[np.float64]:
    """Return the weight [n, k] that activations of a type (bfloat16, float16, int8, float8_e4m3fn) are multiplied by.

    channel_scale is left out: it multiplies the sums. What remains is rounded to A's type once:

    integers, scales of A's type or of rows: w = round((q − zero) · scale)
    integers, other scales: w = round((q − zero) · s₀ + round((q − zero) · s₁)), s₀ = round(scale),
        s₁ = round(scale − s₀): off by 2^-16 of itself at most before it rounds
    integers times int8: w = (q − zero) · s, whole numbers; sums are exact
    fp4_e2m1: code · scale, which bf16 and e4m3 hold exactly, and fp16 too down to 2^-24 of the row's largest scale
    """
    form = packed.layout
    nibbles, _, zeros = unpack4(packed)
    held = np.ones((form.n, 1)) if packed.scales is None else held_scales(packed)
    size = form.k if form.group is None else form.group

    def spread(values: NDArray[Any]) -> NDArray[np.float64]:
        return np.repeat(values.astype(np.float64), size, axis=1)[:, : form.k]

    half = activations == "float16"
    if form.codes == "fp4_e2m1":
        value = codes_from_bits(nibbles, FP4_E2M1).astype(np.float64)
        if half and form.scales == "e8m0":
            held = np.where(held < 2.0**-29, 0.0, held)
            return _rounded(value * spread(held) * 2, activations) / 2
        return value * spread(held)
    code = nibbles.astype(np.float64)
    if form.codes == "int4":
        code = np.where(code >= 8, code - 16, code)
    middle = 0 if form.codes == "int4" else 8
    if zeros is None:
        code = code - middle
    else:
        zero = zeros.astype(np.float64)
        code = code - spread(np.where(zero >= 8, zero - 16, zero) if form.codes == "int4" else zero)
    if packed.scales is None:
        return code
    if form.activation_bits == 8:
        return code * spread(held)
    # The kernel's own power of two: fp16's scales lie below 2^12, and what is too small for its normals loses bits.
    shift = {"bfloat16": 2.0**11, "float16": 2.0**-4, "float32": 2.0**11}[form.scales] if half else 1.0
    scale = spread(held) * shift
    if form.scales == activations:
        return _rounded(code * _rounded(scale, activations), activations) / shift
    first = _rounded(scale, activations)
    rest = _rounded(scale - first, activations)
    return _rounded(code * first + _rounded(code * rest, activations), activations) / shift


def w4_reference(
    a: NDArray[Any],
    packed: Packed4,
    *,
    row_scale: NDArray[np.float32] | None = None,
    bias: NDArray[np.float32] | None = None,
    activation: str = "none",
    output: str = "bfloat16",
) -> NDArray[np.generic]:
    """Return D[m, n] as `output`: the sums of a @ decoded4.T rounded once to float32, then epilogue.h's operations."""
    weight = decoded4(packed, str(a.dtype))
    operand = a if a.dtype == np.int8 else a.astype(np.float64)
    return gemm_reference(
        operand, weight, row_scale=row_scale, column_scale=packed.channel_scale, bias=bias, activation=activation,
        output=output,
    )  # fmt: skip


def _rounded(x: NDArray[np.float64], activations: str) -> NDArray[np.float64]:
    """Return x to the nearest number of the type, ties to even; of fp16 with its subnormals."""
    bits = _FRACTION_BITS[activations]
    _, exponent = np.frexp(x)
    quantum = exponent - bits
    if activations == "float16":
        quantum = np.maximum(quantum, -24)
    rounded: NDArray[np.float64] = np.ldexp(np.rint(np.ldexp(x, -quantum)), quantum)
    return rounded

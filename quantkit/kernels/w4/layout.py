"""How weights of four bits lie in memory: codes in the order of the kernels' registers, scales by pairs of rows.

K is cut into slabs (as much as 128 bytes of activations hold: 64, or 128 where they have eight bits) and these into
planes of 64, rows into blocks of 64; planes and blocks are filled up at the end. For each plane and block a thread of a
warpgroup has 16 bytes: the codes that it multiplies, in the order in which it decodes them. All of it is a permutation
and can be undone. Scales keep every bit that they have, less a power of two for each row.
"""

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import KernelError
from quantkit.formats.packing import code_bits
from quantkit.formats.quantize import QTensor
from quantkit.kernels.w4.form import BLOCK, Layout4, Packed4
from quantkit.kernels.w4.registers import by_registers, from_registers
from quantkit.kernels.w4.scales import (
    INTEGER_SCALES,
    block_scales,
    by_pairs,
    float_scales,
    from_pairs,
    granularity,
    held_values,
    promoted_scales,
    rebased_scales,
    two_levels,
    whole_scales,
    zero_points,
    zeros_by_pairs,
    zeros_from_pairs,
)

__all__ = [
    "BLOCK",
    "INTEGER_SCALES",
    "Layout4",
    "Packed4",
    "held_scales",
    "pack4",
    "two_levels",
    "unpack4",
]

_INTEGERS = ("int4", "uint4")


def pack4(
    weight: QTensor,
    *,
    scale_type: str | None = None,
    activation_bits: int = 16,
    activations: str | None = None,
) -> Packed4:
    """Return `weight` [n, k] as the kernel reads it.

    Integers of 4 bits have one scale a row, or one for each `block_size` along axis 1 (a power of two from 32 on), with
    or without zero points; fp4_e2m1 is NVFP4 (block 16, e4m3), MXFP4 (block 32, e8m0), or has one scale a row.

    Args:
        weight: the quantized weight.
        scale_type: how an integer's group scales are stored: bfloat16, float16 or float32; None for the first of
            them that holds every scale exactly.
        activation_bits: 16. 8, of integers, for int8 activations: their group scales are whole multiples s of one
            number a row, such that every (q − zero) · s is an int8 (`two_levels` makes scales so). 8, of MXFP4, for
            e4m3 activations: the scales of a row are at most 2^14 apart, but for groups of zeros.
        activations: float8_e4m3fn for integers by e4m3 activations: any scales, symmetric, of rows or of groups from
            128 on, where sums are promoted to float32 anyway; None for what `activation_bits` means by itself.

    Raises:
        KernelError: not a matrix, or a format or granularity that the kernel has not; scales that are negative, not
            finite, or more than `scale_type` holds.
    """
    values, spec = weight.qvalue, weight.spec
    name = spec.format.name
    if name not in (*_INTEGERS, "fp4_e2m1"):
        raise KernelError(f"weight: {name} is no format of four bits; use int4, uint4 or fp4_e2m1.")
    if values.ndim != 2 or values.size == 0:
        raise KernelError(f"weight: shape {values.shape} is not a matrix; reshape it to (outputs, inputs).")
    group, rows = granularity(weight)
    zero = zero_points(weight, rows.shape)
    if name == "fp4_e2m1" and group is not None:
        layout, held, channel = block_scales(weight, rows, group)
    else:
        layout, held, channel = float_scales(weight, rows, group, scale_type, zeros=zero is not None)
    nibbles = code_bits(values, spec.format)
    if activation_bits == 8 and layout.scales == "e8m0":
        layout, held, channel = rebased_scales(layout, rows, nibbles)
    elif activation_bits == 8 and activations == "float8_e4m3fn" and name in _INTEGERS:
        layout = promoted_scales(layout)
    elif activation_bits == 8:
        layout, held, channel = whole_scales(layout, rows, zero)
    if name == "int4":
        nibbles = nibbles ^ np.uint8(8)
    if layout.scales == "e4m3":
        # A code of the kernel's scales has no zero: the weights are made zero instead.
        nibbles = np.where(np.repeat(rows == 0, 16, axis=1)[:, : values.shape[1]], np.uint8(0), nibbles)
    scales = None if held is None else by_pairs(held, layout)
    packed_zeros = None if zero is None else zeros_by_pairs(zero, layout)
    return Packed4(
        layout=layout,
        codes=by_registers(nibbles, layout),
        scales=scales,
        zeros=packed_zeros,
        channel_scale=channel,
    )


def unpack4(packed: Packed4) -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.uint8] | None]:
    """Return what was packed: bit patterns of the codes [n, k], scales [n, groups] in float64, zero points or None.

    Scales include the row's power of two, or NVFP4's global scale: code · scale is the weight's value. Those of groups
    of zeros may be others than were packed, if activations are e4m3.
    """
    layout = packed.layout
    nibbles = from_registers(packed.codes, layout)
    if layout.codes == "int4":
        nibbles = nibbles ^ np.uint8(8)
    channel = packed.channel_scale.astype(np.float64)[:, None]
    scales = channel if packed.scales is None else held_scales(packed) * channel
    zeros = None
    if packed.zeros is not None:
        zeros = zeros_from_pairs(packed.zeros, layout)
        zeros = zeros ^ np.uint8(8) if layout.codes == "int4" else zeros
    return nibbles, scales, zeros


def held_scales(packed: Packed4) -> NDArray[np.float64]:
    """Return the scales of groups [n, groups] as they are stored: without the rows' factors."""
    assert packed.scales is not None
    return held_values(from_pairs(packed.scales, packed.layout), packed.layout)

"""Codes of less than a byte, several to a byte: the order of bits that ONNX, ONNX Runtime and vLLM all use.

The first code lies in the lowest bits: two of 4 bits with the first in the low nibble, four of 2 bits, and codes of
3 bits in one stream that crosses byte boundaries. Only how much is packed at a time differs between files.
"""

import numpy as np
from numpy.typing import NDArray

from quantkit.formats.format import Format


def code_bits(codes: NDArray[np.generic], fmt: Format) -> NDArray[np.uint8]:
    """Return the bit pattern of every code in the low bits of a byte, for formats of up to 8 bits.

    Two's complement for signed integers: −1 of int4 is 0x0F.
    """
    assert fmt.bits <= 8
    pattern: NDArray[np.uint8] = np.ascontiguousarray(codes).view(np.uint8).reshape(codes.shape)
    return pattern & np.uint8(2**fmt.bits - 1)


def codes_from_bits(pattern: NDArray[np.uint8], fmt: Format) -> NDArray[np.generic]:
    """Return the codes, of the format's dtype, that `code_bits` made a pattern of."""
    if fmt.kind == "integer" and fmt.min < 0:
        sign = np.uint8(2 ** (fmt.bits - 1))
        # Extended by hand: ml_dtypes reads the low nibble only, NumPy's int8 all of the byte.
        return ((pattern ^ sign).astype(np.int16) - np.int16(sign)).astype(np.int8).astype(fmt.dtype)
    return pattern.view(fmt.dtype)


def pack_bits(pattern: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack the low `bits` of every element along the last axis, the first element lowest.

    (…, n) → (…, ⌈n · bits / 8⌉); what is left of the last byte is zero.
    """
    if bits == 8:
        return pattern.copy()
    size = pattern.shape[-1]
    if 8 % bits:
        spread = np.unpackbits(pattern[..., None], axis=-1, count=bits, bitorder="little")
        return np.packbits(spread.reshape(*pattern.shape[:-1], size * bits), axis=-1, bitorder="little")
    per_byte = 8 // bits
    packed = np.zeros((*pattern.shape[:-1], -(-size // per_byte)), np.uint8)
    for place in range(per_byte):
        part = pattern[..., place::per_byte]
        packed[..., : part.shape[-1]] |= part << np.uint8(place * bits)
    return packed


def unpack_bits(packed: NDArray[np.uint8], bits: int, size: int) -> NDArray[np.uint8]:
    """Return the first `size` elements along the last axis that `pack_bits` packed: (…, bytes) → (…, size)."""
    if bits == 8:
        return packed[..., :size].copy()
    if 8 % bits:
        spread = np.unpackbits(packed, axis=-1, count=size * bits, bitorder="little")
        grouped = spread.reshape(*packed.shape[:-1], size, bits)
        return np.packbits(grouped, axis=-1, bitorder="little")[..., 0]
    per_byte = 8 // bits
    pattern = np.empty((*packed.shape[:-1], size), np.uint8)
    for place in range(per_byte):
        part = pattern[..., place::per_byte]
        part[...] = packed[..., : part.shape[-1]] >> np.uint8(place * bits) & np.uint8(2**bits - 1)
    return pattern

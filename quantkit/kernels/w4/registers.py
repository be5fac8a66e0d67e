"""Codes of four bits in the order of the kernels' registers: a permutation, and its inverse."""

import numpy as np
from numpy.typing import NDArray

from quantkit.kernels.w4.form import BLOCK, Layout4

# Where register r's code lies in a half-word of 16 bits, as 16-bit activations want it. Integers lie nibble by nibble.
# Of e2m1 a rotation of the whole word brings the sign to bit 15 and the magnitude to bits 8 … 6, where bf16 has its
# lowest exponent bits and its highest mantissa bit: by 0, 6 and 28 bits for three codes. The fourth fills the gaps, and
# takes two rotations, by 2 and 26. A bit that a rotation carries out of its half-word belongs to the other half's code.
_E2M1_ROTATIONS = (
    (0, 0, 0),
    (6, 6, 6),
    (28, 28, 28),
    (2, 26, 2),
)  # of the sign, the upper exponent bit, the rest


def by_registers(nibbles: NDArray[np.uint8], layout: Layout4) -> NDArray[np.uint8]:
    """Return codes [n, k], a byte each, as [planes, blocks, bytes]: a warpgroup's threads one after the other."""
    padded = np.zeros((layout.blocks * BLOCK, layout.slabs * layout.slab), np.uint8)
    if layout.codes != "fp4_e2m1" and not layout.zeros:
        padded[:] = 8  # zero, so that nothing but zeros lies beyond the ends
    padded[: layout.n, : layout.k] = nibbles
    if layout.activation_bits == 8:
        return _by_byte_registers(padded, layout)
    # row = 64 block + 16 warp + 8 h + g, column = 64 slab + 16 word + 8 half + 2 t + e; register r = h + 2 half.
    parts = padded.reshape(layout.blocks, 4, 2, 8, layout.slabs, 4, 2, 4, 2)
    words = np.zeros((layout.slabs, layout.blocks, 4, 8, 4, 4), np.uint32)
    for h in range(2):
        for half in range(2):
            for e in range(2):
                code = parts[:, :, h, :, :, :, half, :, e].transpose(3, 0, 1, 2, 5, 4)
                words |= _placed(code, h + 2 * half, e, layout)
    return words.view(np.uint8).reshape(layout.slabs, layout.blocks, 2048)


def _by_byte_registers(padded: NDArray[np.uint8], layout: Layout4) -> NDArray[np.uint8]:
    # row = 64 block + 16 warp + 8 h + g, column = 128 slab + 64 plane + 32 odd + 16 half + 4 t + byte; register
    # r = h + 2 half lies in word 2 odd + half.
    parts = padded.reshape(layout.blocks, 4, 2, 8, layout.slabs, 2, 2, 2, 4, 4)
    upper, lower = parts[:, :, 0], parts[:, :, 1]  # h = 0 and 1
    joined = _joined(upper, lower, layout)
    planes = np.ascontiguousarray(joined.transpose(3, 4, 0, 1, 2, 7, 5, 6, 8))
    return planes.reshape(2 * layout.slabs, layout.blocks, 2048)[: layout.planes]


def _joined(upper: NDArray[np.uint8], lower: NDArray[np.uint8], layout: Layout4) -> NDArray[np.uint8]:
    if layout.codes == "fp4_e2m1":
        return _selectors(upper, lower)
    return _with_signs(upper, lower) if layout.promoted else upper | lower << np.uint8(4)


def _parted(joined: NDArray[np.uint8], layout: Layout4) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    if layout.codes == "fp4_e2m1":
        return _of_selectors(joined)
    return _of_signs(joined) if layout.promoted else (joined & np.uint8(15), joined >> np.uint8(4))


def _with_signs(upper: NDArray[np.uint8], lower: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return for every four codes q + 8 of each row four bytes, whose signs lie where e4m3 has its own.

    Bits 7 are the signs of the upper row and bits 2 … 0 its q, or −1 − q; so do the lower row's lie once the word is
    turned by four bits: its signs are bits 3, and its numbers bits 6 … 4 of the byte before.
    """
    signs, numbers = zip(*(_of_offset(row) for row in (upper, lower)), strict=True)
    joined: NDArray[np.uint8] = signs[0] << np.uint8(7) | numbers[0] | signs[1] << np.uint8(3)
    joined |= np.roll(numbers[1], -1, axis=-1) << np.uint8(4)
    return joined


def _of_signs(joined: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    upper = _to_offset(joined >> np.uint8(7), joined & np.uint8(7))
    numbers = np.roll(joined >> np.uint8(4) & np.uint8(7), 1, axis=-1)
    return upper, _to_offset(joined >> np.uint8(3) & np.uint8(1), numbers)


def _of_offset(code: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the sign bits of q + 8, and q where it is not negative, else −1 − q: both in three bits."""
    negative = (code < 8).astype(np.uint8)
    return negative, np.where(negative == 1, np.uint8(7) - code, code - np.uint8(8)) & np.uint8(7)


def _to_offset(sign: NDArray[np.uint8], number: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.where(sign == 1, np.uint8(7) - number, number + np.uint8(8)).astype(np.uint8)


def _selectors(upper: NDArray[np.uint8], lower: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return for every four codes of each row four bytes: prmt's selectors, and signs where the results want them.

    Bits 2 … 0 of nibbles 0 … 3 are the magnitudes of the upper row, of nibbles 4 … 7 those of the lower one; bits 7 of
    the bytes are the signs of the upper row, bits 3 those of the lower one.
    """
    joined = (upper & np.uint8(8)) << np.uint8(4) | lower & np.uint8(8)
    for half, row in enumerate((upper, lower)):
        for byte in range(4):
            at = 2 * half + byte // 2
            joined[..., at] |= (row[..., byte] & np.uint8(7)) << np.uint8(byte % 2 * 4)
    return joined


def _of_selectors(joined: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    upper, lower = joined >> np.uint8(4) & np.uint8(8), joined & np.uint8(8)
    for half, row in enumerate((upper, lower)):
        for byte in range(4):
            at = 2 * half + byte // 2
            row[..., byte] |= joined[..., at] >> np.uint8(byte % 2 * 4) & np.uint8(7)
    return upper, lower


def _from_byte_registers(codes: NDArray[np.uint8], layout: Layout4) -> NDArray[np.uint8]:
    # Of the last slab the second plane may be missing.
    whole = np.zeros((2 * layout.slabs, *codes.shape[1:]), np.uint8)
    whole[: layout.planes] = codes
    joined = whole.reshape(layout.slabs, 2, layout.blocks, 4, 8, 4, 2, 2, 4).transpose(
        2, 3, 4, 0, 1, 6, 7, 5, 8
    )
    upper, lower = _parted(joined, layout)
    return np.stack([upper, lower], axis=2).reshape(layout.blocks * BLOCK, -1)[: layout.n, : layout.k].copy()


def from_registers(codes: NDArray[np.uint8], layout: Layout4) -> NDArray[np.uint8]:
    """Undo `by_registers`."""
    if layout.activation_bits == 8:
        return _from_byte_registers(codes, layout)
    words = codes.view(np.uint32).reshape(layout.slabs, layout.blocks, 4, 8, 4, 4)
    parts = np.zeros((layout.blocks, 4, 2, 8, layout.slabs, 4, 2, 4, 2), np.uint8)
    for h in range(2):
        for half in range(2):
            for e in range(2):
                code = _taken(words, h + 2 * half, e, layout)
                parts[:, :, h, :, :, :, half, :, e] = code.transpose(1, 2, 3, 0, 5, 4)
    return parts.reshape(layout.blocks * BLOCK, -1)[: layout.n, : layout.k].copy()


def _placed(code: NDArray[np.uint8], register: int, half: int, layout: Layout4) -> NDArray[np.uint32]:
    """Return words that hold nothing but the code of a register's low (0) or high (1) half."""
    wide = code.astype(np.uint32)
    if layout.codes != "fp4_e2m1":
        return wide << np.uint32(4 * register + 16 * half)
    sign, high, low = _E2M1_ROTATIONS[register]
    return (
        _rotated((wide >> np.uint32(3)) << np.uint32(15 + 16 * half), -sign)
        | _rotated((wide >> np.uint32(2) & np.uint32(1)) << np.uint32(8 + 16 * half), -high)
        | _rotated((wide & np.uint32(3)) << np.uint32(6 + 16 * half), -low)
    )


def _taken(words: NDArray[np.uint32], register: int, half: int, layout: Layout4) -> NDArray[np.uint8]:
    if layout.codes != "fp4_e2m1":
        return (words >> np.uint32(4 * register + 16 * half) & np.uint32(15)).astype(np.uint8)
    turns = _E2M1_ROTATIONS[register]
    sign, high, low = (_rotated(words, turn) >> np.uint32(16 * half) for turn in turns)
    taken: NDArray[np.uint8] = (
        (sign >> np.uint32(12) & 8) | (high >> np.uint32(6) & 4) | (low >> np.uint32(6) & 3)
    ).astype(np.uint8)
    return taken


def _rotated(words: NDArray[np.uint32], left: int) -> NDArray[np.uint32]:
    turn = left % 32
    return words if turn == 0 else words << np.uint32(turn) | words >> np.uint32(32 - turn)

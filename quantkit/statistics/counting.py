"""How float32 values are counted: once, by a key that is fine near the top and coarse below.

The bits of |x| order it, sixteen of them by 1/128 of an octave, twenty by 1/2048. With E the largest
exponent,

    key = max(top 20 bits − top 20 of 2^(E−3), top 16 bits − top 16 of 2^(E−3))

is ≥ 0 and fine in the four octaves from 2^(E−3), and negative and coarse below. Both tables of
`FloatHistogram` are sums over runs of keys: a prefix is 16 fine keys or a coarse one, a linear bin 1 to 8
fine keys or coarse ones.
"""

import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Linear bins per sign: the top octave [2^E, 2^(E+1)) has half of them.
LINEAR = 4096

_FINE = 4 * 2048
# Octaves counted coarsely; what lies below them is next to nothing, and counted by itself. With the least
# E, −100, the last of them still holds normal numbers.
_COARSE = 20 * 128
# Slot 0 of a row is what lies below, zeros too; then coarse keys, then fine keys.
_ROW = 1 + _COARSE + _FINE
# The first coarse key of every trunc(x · 2^(11−E)) from 0 to 255.
_COARSE_STARTS = np.flatnonzero(
    np.diff(np.floor(np.exp2(np.arange(_COARSE) // 128 - 19) * (128 + np.arange(_COARSE) % 128)), prepend=-1)
)
_SIGN = np.uint16(1 << 15)
# Which half of a float32 holds its top bits.
_TOP = 1 if sys.byteorder == "little" else 0
# Elements worked on at a time: a chunk, its keys and their counts stay in a core's cache.
_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class SideCounts:
    """What was counted of one sign.

    `linear[i]` values have trunc(|x| · 2^(11−E)) = i, (4096,); `prefixes[i]` have first + i in their top 16
    bits.
    """

    linear: NDArray[np.int64]
    prefixes: NDArray[np.int64]
    first: int


def count_floats(
    flat: NDArray[np.float32], *, exponent: int, nonnegative: bool
) -> tuple[int, SideCounts, SideCounts]:
    """Return the number of ±0, and the counts of the positive and of the negative values.

    Args:
        flat: finite values, 1-D, C-contiguous.
        exponent: E with |x| < 2^(E+1) for all of them, ≥ −100.
        nonnegative: no value is below 0.
    """
    base = int(np.float32(2.0 ** (exponent - 3)).view(np.int32))
    totals = np.zeros(_ROW if nonnegative else 2 * _ROW, np.int64)
    size = min(_CHUNK, flat.size)
    keys, other = np.empty(size, np.int32), np.empty(size, np.int32)
    zeros, below = 0, []
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        bits, key, spare = chunk.view(np.int32), keys[: chunk.size], other[: chunk.size]
        if nonnegative:
            np.right_shift(bits, 12, out=key)
        else:
            np.bitwise_and(bits, 0x7FFFFFFF, out=key)
            np.right_shift(key, 12, out=key)
        np.right_shift(key, 4, out=spare)
        np.subtract(key, (base >> 12) - 1 - _COARSE, out=key)
        np.subtract(spare, (base >> 16) - 1 - _COARSE, out=spare)
        np.maximum(key, spare, out=key)
        np.maximum(key, 0, out=key)
        if not nonnegative:
            np.right_shift(bits, 31, out=spare)
            np.bitwise_and(spare, _ROW, out=spare)
            np.add(key, spare, out=key)
        counts = np.bincount(key, minlength=totals.size)
        totals += counts
        lowest = int(counts[::_ROW].sum())
        if lowest:
            np.bitwise_and(bits, 0x7FFFFFFF, out=spare)
            found = chunk.size - int(np.count_nonzero(spare))
            zeros += found
            if found < lowest:
                # By the bits: a processor told to flush subnormal numbers would find them equal to 0.
                beyond = ((key == 0) | (key == _ROW)) & (spare != 0)
                # Five times as fast as indexing with the mask.
                below.append(chunk.view(np.uint16)[_TOP::2].compress(beyond))
    low = np.concatenate([*below, np.zeros(0, np.uint16)])
    positive = _side(totals[:_ROW], base >> 16, low.compress(low < _SIGN))
    positive.linear[0] += zeros
    return zeros, positive, _side(totals[_ROW:], base >> 16, low.compress(low >= _SIGN) - _SIGN)


def _side(counts: NDArray[np.int64], base: int, low: NDArray[np.uint16]) -> SideCounts:
    """The counts of one sign from its row and the prefixes of what slot 0 stands for; either may be empty."""
    linear, parts, first = np.zeros(LINEAR, np.int64), [], base
    if counts.size:
        coarse, fine = counts[1 : 1 + _COARSE], counts[1 + _COARSE :]
        linear[: LINEAR // 16] = np.add.reduceat(coarse, _COARSE_STARTS)
        # The top octave has a linear bin for each key, the next for two, …; sixteen keys are a prefix.
        for octave in (3, 2, 1, 0):
            size = fine.size // 4
            linear[size : 2 * size] = fine[octave * size : (octave + 1) * size]
            fine = fine[0::2] + fine[1::2]
        parts, first = [coarse, fine], base - _COARSE
    if low.size:
        linear[0] += low.size
        least = int(low.min())
        parts, first = [np.bincount(low - least, minlength=first - least), *parts], least
    prefixes = np.concatenate([*parts, linear[:0]])
    used = np.flatnonzero(prefixes)
    if used.size == 0:
        return SideCounts(linear=linear, prefixes=prefixes[:0], first=0)
    return SideCounts(linear=linear, prefixes=prefixes[used[0] : used[-1] + 1], first=first + int(used[0]))

"""How float32 values are counted: once, by a key that is fine near the top and coarse below.

The bits of |x| order it, sixteen of them by 1/128 of an octave, twenty by 1/2048. With E the largest
exponent,

    key = max(top 20 bits − top 20 of 2^(E−3), top 16 bits − top 16 of 2^(E−3))

is ≥ 0 and fine in the four octaves from 2^(E−3), and negative and coarse below. Both tables of
`FloatHistogram` are sums over runs of keys: a prefix is 16 fine keys or a coarse one, a linear bin 1 to 8
fine keys or coarse ones.
"""

import math
import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Linear bins per sign: the top octave [2^E, 2^(E+1)) has half of them.
LINEAR = 4096
# The lowest octaves of the count must be those of normal numbers.
LEAST_EXPONENT = -100

_FINE = 4 * 2048
# Octaves counted coarsely; what lies below them is next to nothing, and counted by itself. With the least
# E, −100, the last of them still holds normal numbers.
_COARSE = 20 * 128
# Keys of one sign, from the lowest coarse one on.
_KEYS = _COARSE + _FINE
# While counting, slot 0 of a sign's row is what lies below the keys, zeros too.
_ROW = 1 + _KEYS
# The first coarse key of every trunc(x · 2^(11−E)) from 0 to 255.
_COARSE_STARTS = np.flatnonzero(
    np.diff(np.floor(np.exp2(np.arange(_COARSE) // 128 - 19) * (128 + np.arange(_COARSE) % 128)), prepend=-1)
)
# Which half of a float32 holds its top bits.
_TOP = 1 if sys.byteorder == "little" else 0
# Elements worked on at a time: a chunk, its keys and their counts stay in a core's cache.
_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class SideCounts:
    """What was counted of one sign.

    `linear[i]` values have trunc(|x| · 2^(11−E)) = i, (4096,); `prefixes[i]` have first + i in their top 16
    bits, the sign apart.
    """

    linear: NDArray[np.int64]
    prefixes: NDArray[np.int64]
    first: int


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What was counted of an array.

    Attributes:
        size: values, finite or not.
        zeros: of them, ±0; they are in positive.linear[0] too.
        nans: of them, NaN.
        infinities: of them, ±inf.
        min, max: limits of the finite values, never −0; +inf and −inf where there are none.
        exponent: E of the linear bins.
        positive, negative: the finite values of either sign.
    """

    size: int
    zeros: int
    nans: int
    infinities: int
    min: float
    max: float
    exponent: int
    positive: SideCounts
    negative: SideCounts


def count_floats(
    flat: NDArray[np.float32], *, exponent: int = LEAST_EXPONENT, limits: tuple[float, float] | None = None
) -> Counts:
    """Count values with NumPy.

    Args:
        flat: any values, 1-D, C-contiguous.
        exponent: the least E of the result; it is larger where the values are.
        limits: their minimum and maximum, where they are known already.
    """
    size, nans = flat.size, 0
    lo, hi = limits or (_limits(flat) if size else (math.inf, -math.inf))
    if not (math.isfinite(lo) and math.isfinite(hi)):
        nans = int(np.count_nonzero(np.isnan(flat)))
        flat = flat[np.isfinite(flat)]
        lo, hi = _limits(flat) if flat.size else (math.inf, -math.inf)
    if flat.size:
        exponent = max(exponent, _exponent_of(max(-lo, hi)))
    totals, below, zeros = _count_keys(flat, exponent, nonnegative=lo >= 0)
    base = _base(exponent) >> 16
    # The first half of `below` is that of the positive values.
    positive, negative = (
        _side(totals[sign], base, None if below is None else below[sign << 15 : (sign + 1) << 15])
        for sign in (0, 1)
    )
    positive.linear[0] += zeros
    return Counts(
        size=size,
        zeros=zeros,
        nans=nans,
        infinities=size - flat.size - nans,
        # −0 becomes 0: which of the two a minimum returns depends on their order.
        min=lo + 0.0,
        max=hi + 0.0,
        exponent=exponent,
        positive=positive,
        negative=negative,
    )


def count_weighted(
    bits: NDArray[np.uint32],
    weights: NDArray[np.int64],
    *,
    size: int,
    zeros: int,
    nans: int,
    infinities: int,
    limits: tuple[float, float],
    exponent: int,
) -> Counts:
    """Return the counts of values that were counted elsewhere.

    Args:
        bits: of a value of every key, which stands for all of the key: by keys of `exponent` or a smaller one, or by
            keys as fine everywhere; no zeros, NaN or infinities.
        weights: how many values each stands for.
        size, zeros, nans, infinities: of all the values.
        limits: the least and the largest finite value; +inf and −inf where there are none.
        exponent: the least E of the result; it is larger where the limits are.
    """
    lo, hi = limits
    if lo <= hi:
        exponent = max(exponent, _exponent_of(max(-lo, hi)))
    base = _base(exponent)
    magnitudes = (bits & 0x7FFFFFFF).astype(np.int64)
    keys = np.maximum((magnitudes >> 12) - (base >> 12), (magnitudes >> 16) - (base >> 16)) + _COARSE
    sides = []
    for sign in (0, 1):
        ours = bits >> 31 == sign
        low = ours & (keys < 0)
        sides.append(
            _side(
                _add_up(keys[ours & (keys >= 0)], weights[ours & (keys >= 0)], _KEYS),
                base >> 16,
                _add_up(magnitudes[low] >> 16, weights[low], 1 << 15) if low.any() else None,
            )
        )
    sides[0].linear[0] += zeros
    return Counts(
        size=size,
        zeros=zeros,
        nans=nans,
        infinities=infinities,
        # As above.
        min=lo + 0.0,
        max=hi + 0.0,
        exponent=exponent,
        positive=sides[0],
        negative=sides[1],
    )


def _add_up(keys: NDArray[np.int64], weights: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Sums of weights by key; below 2⁵³ they are exact."""
    return np.bincount(keys, weights, minlength=size).astype(np.int64)


def _count_keys(
    flat: NDArray[np.float32], exponent: int, *, nonnegative: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64] | None, int]:
    """Return counts by sign and key, by the top 16 bits of what lies below (None for nothing), and of zeros."""
    base = _base(exponent)
    totals = np.zeros(_ROW if nonnegative else 2 * _ROW, np.int64)
    size = min(_CHUNK, flat.size)
    keys, other = np.empty(size, np.int32), np.empty(size, np.int32)
    zeros, below = 0, None
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
                low = np.bincount(chunk.view(np.uint16)[_TOP::2].compress(beyond), minlength=1 << 16)
                below = low if below is None else below + low
    by_sign = np.zeros((2, _KEYS), np.int64)
    by_sign[0] = totals[1:_ROW]
    if not nonnegative:
        by_sign[1] = totals[_ROW + 1 :]
    return by_sign, below, zeros


def _side(totals: NDArray[np.int64], base: int, below: NDArray[np.int64] | None) -> SideCounts:
    """The tables of one sign; `base` is the prefix of 2^(E−3)."""
    linear = np.zeros(LINEAR, np.int64)
    coarse, fine = totals[:_COARSE], totals[_COARSE:]
    linear[: LINEAR // 16] = np.add.reduceat(coarse, _COARSE_STARTS)
    # The top octave has a linear bin for each key, the next for two, …; sixteen keys are a prefix.
    for octave in (3, 2, 1, 0):
        size = fine.size // 4
        linear[size : 2 * size] = fine[octave * size : (octave + 1) * size]
        fine = fine[0::2] + fine[1::2]
    parts, first = [coarse, fine], base - _COARSE
    if below is not None:
        linear[0] += below.sum()
        parts, first = [below[:first], *parts], 0
    prefixes = np.concatenate(parts)
    used = np.flatnonzero(prefixes)
    if used.size == 0:
        return SideCounts(linear=linear, prefixes=prefixes[:0], first=0)
    return SideCounts(linear=linear, prefixes=prefixes[used[0] : used[-1] + 1], first=first + int(used[0]))


def _base(exponent: int) -> int:
    """The bits of 2^(E−3)."""
    return int(np.float32(2.0 ** (exponent - 3)).view(np.int32))


def _limits(flat: NDArray[np.float32]) -> tuple[float, float]:
    return float(flat.min()), float(flat.max())


def _exponent_of(amax: float) -> int:
    """floor(log2(amax)), at least LEAST_EXPONENT."""
    if amax == 0:
        return LEAST_EXPONENT
    return max(math.frexp(amax)[1] - 1, LEAST_EXPONENT)

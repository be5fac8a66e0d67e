"""A histogram whose edges are fixed before any data is seen, so that two of them add exactly."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import CacheError

# Linear bins per sign: the top octave [2^E, 2^(E+1)) has half of them.
_LINEAR = 4096
# |x| below 2^(E-3) is read from the prefixes, above from the linear bins; there the two agree in their edges.
_LINEAR_FROM = 256
# Scaling by 2^(11-E) must stay a normal float32.
_LEAST_EXPONENT = -100
_SIGN = 32768
# Elements worked on at a time: a chunk and its bins stay in a core's cache.
_CHUNK = 1 << 16
_PREFIX_CHUNK = 1 << 20


@dataclass(frozen=True)
class Bins:
    """Counts between ascending edges: counts[i] values lie in [edges[i], edges[i + 1]).

    `edges` is float64 of shape (n + 1,), `counts` int64 of shape (n,). On the negative side of zero a bin is closed
    above instead of below: the edges mirror those of the positive side.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]

    @property
    def centers(self) -> NDArray[np.float64]:
        """The middle of every bin, shape (n,)."""
        middles: NDArray[np.float64] = (self.edges[1:] + self.edges[:-1]) / 2
        return middles


class FloatHistogram:
    """Counts of float32 values in bins that depend on nothing but the largest exponent seen.

    With E = floor(log2(amax)) there are two tables per sign:

        prefixes   counts of the top 16 bits (sign, exponent, 7 bits of mantissa): bins at most 2⁻⁷ |x| wide
        linear     counts of trunc(x · 2^(11−E)): bins 2^(E−11) wide, so never wider than amax / 2048

    The first serves |x| < 2^(E−3) and the second the rest, so a bin is never wider than amax / 2048 nor, below
    that octave, than |x| / 128. All edges are dyadic: when a larger value raises E, linear bins are joined in pairs,
    which is exact, and the state is a function of the multiset of values alone. Merging therefore commutes,
    associates, and equals observing everything at once, bit for bit.

    Attributes:
        count: values observed, finite or not.
        zero_count: of them, ±0.
        nan_count: of them, NaN.
        inf_count: of them, ±inf.
        min: smallest finite value; +inf before any is seen.
        max: largest finite value; −inf before any is seen.
    """

    def __init__(self) -> None:
        self.count = 0
        self.zero_count = 0
        self.nan_count = 0
        self.inf_count = 0
        self.min = math.inf
        self.max = -math.inf
        self._exponent = _LEAST_EXPONENT
        # Index _LINEAR - 1 + i counts trunc(x · 2^(11−E)) = i.
        self._linear = np.zeros(2 * _LINEAR - 1, np.int64)
        # Row 0 counts positive prefixes from _first on, row 1 the negative ones (and −0).
        self._prefixes = np.zeros((2, 0), np.int64)
        self._first = 0

    # --- observing -----------------------------------------------------------------------------------------------

    def observe(self, x: NDArray[np.generic]) -> None:
        """Count every element of `x` (any shape; float32, or a float type that is cast to it)."""
        with np.errstate(over="ignore"):
            flat = np.ascontiguousarray(x, np.float32).reshape(-1)
        if flat.size == 0:
            return
        self.count += flat.size
        lo, hi = float(flat.min()), float(flat.max())
        if not (math.isfinite(lo) and math.isfinite(hi)):
            nans = int(np.count_nonzero(np.isnan(flat)))
            finite = flat[np.isfinite(flat)]
            self.nan_count += nans
            self.inf_count += flat.size - finite.size - nans
            flat = finite
            if flat.size == 0:
                return
            lo, hi = float(flat.min()), float(flat.max())
        # −0 becomes 0: which of the two a minimum returns depends on their order.
        self.min, self.max = min(self.min, lo + 0.0), max(self.max, hi + 0.0)
        self._raise_exponent(_exponent_of(max(-lo, hi)))
        self.zero_count += flat.size - int(np.count_nonzero(flat))
        self._count_linear(flat, nonnegative=lo >= 0)
        self._count_prefixes(flat)

    def _count_linear(self, flat: NDArray[np.float32], *, nonnegative: bool) -> None:
        factor = np.float32(2.0 ** (11 - self._exponent))
        scaled = np.empty(min(_CHUNK, flat.size), np.float32)
        index = np.empty(scaled.size, np.int16)
        offset = 0 if nonnegative else _LINEAR - 1
        into = self._linear[_LINEAR - 1 :] if nonnegative else self._linear
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK]
            n = chunk.size
            np.multiply(chunk, factor, out=scaled[:n])
            # The assignment truncates toward zero.
            index[:n] = scaled[:n]
            if offset:
                index[:n] += np.int16(offset)
            into += np.bincount(index[:n], minlength=into.size)

    def _count_prefixes(self, flat: NDArray[np.float32]) -> None:
        prefixes = flat.view(np.uint16)[1::2] if sys.byteorder == "little" else flat.view(np.uint16)[::2]
        for start in range(0, flat.size, _PREFIX_CHUNK):
            counts = np.bincount(prefixes[start : start + _PREFIX_CHUNK])
            for row, part in enumerate((counts[:_SIGN], counts[_SIGN:])):
                used = np.flatnonzero(part)
                if used.size:
                    first, last = int(used[0]), int(used[-1])
                    self._widen(first, last + 1)
                    self._prefixes[row, first - self._first : last + 1 - self._first] += part[first : last + 1]

    def _widen(self, first: int, stop: int) -> None:
        """Make the prefix table reach from `first` to `stop`."""
        width = self._prefixes.shape[1]
        if width == 0:
            self._prefixes, self._first = np.zeros((2, stop - first), np.int64), first
            return
        before, after = max(self._first - first, 0), max(stop - (self._first + width), 0)
        if before or after:
            self._prefixes = np.pad(self._prefixes, ((0, 0), (before, after)))
            self._first -= before

    def _raise_exponent(self, exponent: int) -> None:
        """Join linear bins until the top octave is that of `exponent`."""
        steps = exponent - self._exponent
        if steps <= 0:
            return
        indices = np.arange(-_LINEAR + 1, _LINEAR)
        # int() division truncates toward zero on both sides, as the counting did.
        joined = np.sign(indices) * (np.abs(indices) >> min(steps, 13)) + _LINEAR - 1
        linear = np.zeros_like(self._linear)
        np.add.at(linear, joined, self._linear)
        self._linear, self._exponent = linear, exponent

    # --- merging -------------------------------------------------------------------------------------------------

    def merge(self, other: "FloatHistogram") -> "FloatHistogram":
        """Return the histogram of both multisets together; neither operand changes."""
        merged = FloatHistogram()
        for part in (self, other):
            merged._add(part)
        return merged

    def _add(self, other: "FloatHistogram") -> None:
        self.count += other.count
        self.zero_count += other.zero_count
        self.nan_count += other.nan_count
        self.inf_count += other.inf_count
        self.min, self.max = min(self.min, other.min), max(self.max, other.max)
        aligned = other
        if other._exponent < self._exponent:
            aligned = other._copy_linear()
            aligned._raise_exponent(self._exponent)
        self._raise_exponent(aligned._exponent)
        self._linear += aligned._linear
        width = other._prefixes.shape[1]
        if width:
            self._widen(other._first, other._first + width)
            start = other._first - self._first
            self._prefixes[:, start : start + width] += other._prefixes

    def _copy_linear(self) -> "FloatHistogram":
        copy = FloatHistogram()
        copy._linear, copy._exponent = self._linear.copy(), self._exponent
        return copy

    # --- reading -------------------------------------------------------------------------------------------------

    @property
    def finite_count(self) -> int:
        """Values observed that are neither NaN nor infinite."""
        return self.count - self.nan_count - self.inf_count

    @property
    def amax(self) -> float:
        """The absolute maximum of the finite values; 0 when there are none."""
        return max(abs(self.min), abs(self.max)) if self.finite_count else 0.0

    def bins(self) -> Bins:
        """Return the finest bins kept, over both signs, ascending. Zeros lie in the bin that starts at 0."""
        positive, negative = self._side(0), self._side(1)
        edges = np.concatenate([-negative.edges[:0:-1], positive.edges])
        return Bins(edges, np.concatenate([negative.counts[::-1], positive.counts]))

    def magnitude_bins(self) -> Bins:
        """Return the finest bins kept of |x|, ascending from 0."""
        positive, negative = self._side(0), self._side(1)
        return Bins(positive.edges, positive.counts + negative.counts)

    def linear_magnitudes(self, max_bins: int = 4096) -> Bins:
        """Return counts of |x| in bins of one width 2^k from 0 to just above amax, exact.

        Args:
            max_bins: the most bins to return; the width is the least power of two ≥ amax / 2048 that obeys it, so
                between max_bins / 2 and max_bins bins hold values.
        """
        counts = self._linear[_LINEAR - 1 :].copy()
        counts[1:] += self._linear[: _LINEAR - 1][::-1]
        shift = 0
        while counts.size > max_bins:
            counts = counts[0::2] + counts[1::2]
            shift += 1
        width = 2.0 ** (self._exponent - 11 + shift)
        used = max(int(self.amax / width) + 1, 1)
        return Bins(np.arange(used + 1) * width, counts[:used])

    def _side(self, row: int) -> Bins:
        """Bins of |x| of one sign: prefixes below 2^(E−3), linear bins above; the edges are the same for both signs."""
        split = 2.0 ** (self._exponent - 3)
        until = int(np.float32(split).view(np.uint32)) >> 16
        first = min(self._first, until) if self._prefixes.shape[1] else until
        low = np.zeros(until - first, np.int64)
        if self._prefixes.shape[1]:
            part = self._prefixes[row, : max(until - self._first, 0)]
            low[: part.size] = part
        starts = (np.arange(first, until, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
        high = self._linear[_LINEAR - 1 :] if row == 0 else self._linear[: _LINEAR][::-1]
        linear = np.arange(_LINEAR_FROM, _LINEAR + 1) * 2.0 ** (self._exponent - 11)
        gap = ([0.0], [0]) if first > 0 else ([], [])
        return Bins(
            np.concatenate([gap[0], starts, linear]),
            np.concatenate([np.array(gap[1], np.int64), low, high[_LINEAR_FROM:]]),
        )

    # --- saving --------------------------------------------------------------------------------------------------

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return the state as plain arrays: equal states give equal bytes. `from_arrays` reads them back."""
        prefixes, first = self._trimmed_prefixes()
        linear, start = _trim(self._linear)
        return {
            "counts": np.array([self.count, self.zero_count, self.nan_count, self.inf_count], np.int64),
            "limits": np.array([self.min, self.max], np.float32),
            "places": np.array([self._exponent, start, first], np.int64),
            "linear": _narrow(linear),
            "prefixes": _narrow(prefixes),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Self:
        """Return the histogram that `to_arrays` wrote.

        Raises:
            CacheError: the arrays are not such a state.
        """
        try:
            made = cls()
            made.count, made.zero_count, made.nan_count, made.inf_count = (int(v) for v in arrays["counts"])
            made.min, made.max = (float(v) for v in arrays["limits"])
            made._exponent, start, made._first = (int(v) for v in arrays["places"])
            linear = arrays["linear"].astype(np.int64)
            made._linear[start : start + linear.size] = linear
            made._prefixes = arrays["prefixes"].astype(np.int64)
            if made._prefixes.ndim != 2 or made._linear.sum() != made.finite_count:
                raise ValueError("its counts do not add up")
        except (KeyError, ValueError, TypeError) as error:
            raise CacheError(f"histogram: damaged ({error}); calibrate again.") from error
        return made

    def _trimmed_prefixes(self) -> tuple[NDArray[np.int64], int]:
        used = np.flatnonzero(self._prefixes.any(axis=0))
        if used.size == 0:
            return np.zeros((2, 0), np.int64), 0
        return self._prefixes[:, used[0] : used[-1] + 1], self._first + int(used[0])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FloatHistogram):
            return NotImplemented
        mine, theirs = self.to_arrays(), other.to_arrays()
        return all(np.array_equal(mine[key], theirs[key]) for key in mine)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"FloatHistogram(count={self.count}, min={self.min:.6g}, max={self.max:.6g})"


def _exponent_of(amax: float) -> int:
    """floor(log2(amax)), at least _LEAST_EXPONENT."""
    if amax == 0:
        return _LEAST_EXPONENT
    return max(math.frexp(amax)[1] - 1, _LEAST_EXPONENT)


def _trim(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    used = np.flatnonzero(counts)
    if used.size == 0:
        return counts[:0], 0
    return counts[used[0] : used[-1] + 1], int(used[0])


def _narrow(counts: NDArray[np.int64]) -> NDArray[np.generic]:
    """The same counts in the smallest unsigned type that holds them."""
    most = int(counts.max()) if counts.size else 0
    return counts.astype(next(t for t in (np.uint8, np.uint16, np.uint32, np.uint64) if most <= np.iinfo(t).max))

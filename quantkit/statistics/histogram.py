"""A histogram whose edges are fixed before any data is seen, so that two of them add exactly."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import CacheError
from quantkit.statistics.counting import LEAST_EXPONENT, LINEAR, Counts
from quantkit.statistics.reduction import as_float32, reduce_cube

# |x| below 2^(E-3) is read from the prefixes, above from the linear bins; there the two agree in their edges.
_LINEAR_FROM = 256
# The least float32 above 0.
_SMALLEST = 2.0**-149


@dataclass(frozen=True)
class Bins:
    """Counts between ascending edges: counts[i] values lie in [edges[i], edges[i + 1]).

    `edges` is float64 of shape (n + 1,), `counts` int64 of shape (n,). On the negative side of zero a bin
    is closed above instead of below: the edges mirror those of the positive side.
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

    Zeros have a count of their own. The first serves |x| < 2^(E−3) and the second the rest, so a bin is
    never wider than amax / 2048 nor, below that octave, than |x| / 128. All edges are dyadic: when a larger
    value raises E, linear bins are joined in pairs, which is exact, and the state is a function of the
    multiset of values alone. Merging therefore commutes, associates, and equals observing everything at
    once, bit for bit.

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
        self._exponent = LEAST_EXPONENT
        # Index LINEAR - 1 + i counts trunc(x · 2^(11−E)) = i.
        self._linear = np.zeros(2 * LINEAR - 1, np.int64)
        # Row 0 counts positive prefixes from _first on, row 1 negative ones; zeros stand in zero_count alone.
        self._prefixes = np.zeros((2, 0), np.int64)
        self._first = 0

    # --- observing ------------------------------------------------------------------------------------

    def observe(self, x: NDArray[np.generic]) -> None:
        """Count every element of `x` (any shape; float32, or a float type that is cast to it)."""
        values = as_float32(x)
        if values.size:
            _, counts = reduce_cube(values.reshape(1, 1, -1), channels=False, exponent=self._exponent)
            assert counts is not None
            self.include(counts)

    def include(self, counts: Counts) -> None:
        """Take in what was counted of an array."""
        self.count += counts.size
        self.zero_count += counts.zeros
        self.nan_count += counts.nans
        self.inf_count += counts.infinities
        self.min, self.max = min(self.min, counts.min), max(self.max, counts.max)
        self._raise_exponent(counts.exponent)
        sides = counts.positive, counts.negative
        positive, negative = (_join(side.linear, self._exponent - counts.exponent) for side in sides)
        self._linear[LINEAR - 1 : LINEAR - 1 + positive.size] += positive
        self._linear[LINEAR - negative.size : LINEAR] += negative[::-1]
        for row, side in enumerate(sides):
            if side.prefixes.size:
                self._widen(side.first, side.first + side.prefixes.size)
                start = side.first - self._first
                self._prefixes[row, start : start + side.prefixes.size] += side.prefixes

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
        indices = np.arange(-LINEAR + 1, LINEAR)
        # int() division truncates toward zero on both sides, as the counting did.
        joined = np.sign(indices) * (np.abs(indices) >> min(steps, 13)) + LINEAR - 1
        linear = np.zeros_like(self._linear)
        np.add.at(linear, joined, self._linear)
        self._linear, self._exponent = linear, exponent

    @property
    def exponent(self) -> int:
        """E, or −100 where it would be less."""
        return self._exponent

    # --- merging --------------------------------------------------------------------------------------

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

    # --- reading --------------------------------------------------------------------------------------

    @property
    def finite_count(self) -> int:
        """Values observed that are neither NaN nor infinite."""
        return self.count - self.nan_count - self.inf_count

    @property
    def amax(self) -> float:
        """The absolute maximum of the finite values; 0 when there are none."""
        return max(abs(self.min), abs(self.max)) if self.finite_count else 0.0

    def bins(self) -> Bins:
        """Return the finest bins kept, over both signs, ascending; zeros have a bin of their own, [0, 2⁻¹⁴⁹)."""
        positive, negative = self._side(0), self._side(1)
        edges = np.concatenate([-negative.edges[:0:-1], positive.edges])
        return Bins(edges, np.concatenate([negative.counts[::-1], positive.counts]))

    def magnitude_bins(self) -> Bins:
        """Return the finest bins kept of |x|, ascending; zeros have a bin of their own, [0, 2⁻¹⁴⁹)."""
        positive, negative = self._side(0), self._side(1)
        return Bins(positive.edges, positive.counts + negative.counts)

    def linear_magnitudes(self, max_bins: int = 4096) -> Bins:
        """Return counts of |x| in bins of one width 2^k from 0 to just above amax, exact.

        Args:
            max_bins: the most bins to return, a power of two ≤ 4096. The width is the least 2^k that obeys
                it, so more than half of them reach up to amax (fewer only where amax < 2⁻¹⁰⁰).
        """
        counts = self._linear[LINEAR - 1 :].copy()
        counts[1:] += self._linear[: LINEAR - 1][::-1]
        shift = 0
        while counts.size > max_bins:
            counts = counts[0::2] + counts[1::2]
            shift += 1
        width = 2.0 ** (self._exponent - 11 + shift)
        used = max(int(self.amax / width) + 1, 1)
        return Bins(np.arange(used + 1, dtype=np.float64) * width, counts[:used])

    def _side(self, row: int) -> Bins:
        """Bins of |x| of one sign, prefixes below 2^(E−3) and linear above; the edges do not depend on it."""
        split = 2.0 ** (self._exponent - 3)
        until = int(np.float32(split).view(np.uint32)) >> 16
        first = min(self._first, until) if self._prefixes.shape[1] else until
        low = np.zeros(until - first, np.int64)
        if self._prefixes.shape[1]:
            part = self._prefixes[row, : max(until - self._first, 0)]
            low[: part.size] = part
        starts = (np.arange(first, until, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
        high = self._linear[LINEAR - 1 :] if row == 0 else self._linear[:LINEAR][::-1]
        linear = np.arange(_LINEAR_FROM, LINEAR + 1) * 2.0 ** (self._exponent - 11)
        counts = np.concatenate([low, high[_LINEAR_FROM:]])
        edges = np.concatenate([starts, linear])
        if first == 0:
            edges[0] = _SMALLEST
        else:
            counts, edges = np.append(np.int64(0), counts), np.append(_SMALLEST, edges)
        zeros = self.zero_count if row == 0 else 0
        return Bins(np.append(0.0, edges), np.append(np.int64(zeros), counts))

    # --- saving ---------------------------------------------------------------------------------------

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
            nonzero = made.finite_count - made.zero_count
            sums = (int(made._linear.sum()), int(made._prefixes.sum()))
            if made._prefixes.ndim != 2 or sums != (made.finite_count, nonzero):
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


def _join(linear: NDArray[np.int64], steps: int) -> NDArray[np.int64]:
    """Linear bins of one sign as they are once E is `steps` larger."""
    joined: NDArray[np.int64] = (
        linear if steps == 0 else linear.reshape(-1, min(1 << steps, LINEAR)).sum(axis=1)
    )
    return joined


def _trim(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    used = np.flatnonzero(counts)
    if used.size == 0:
        return counts[:0], 0
    return counts[used[0] : used[-1] + 1], int(used[0])


def _narrow(counts: NDArray[np.int64]) -> NDArray[np.generic]:
    """The same counts in the smallest unsigned type that holds them."""
    most = int(counts.max()) if counts.size else 0
    return counts.astype(
        next(t for t in (np.uint8, np.uint16, np.uint32, np.uint64) if most <= np.iinfo(t).max)
    )

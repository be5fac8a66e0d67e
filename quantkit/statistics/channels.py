"""Per-channel statistics of a tensor that a linear operator reads."""

from collections.abc import Iterator, Mapping
from typing import Self

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import CacheError, DataError

# Elements of a piece of a tensor.
_SLAB = 1 << 16


class ChannelStats:
    """Signed minimum, maximum, Σx, Σ|x| and count along the axis that a linear operator contracts.

    What SmoothQuant (arXiv 2211.10438) reads as max|X_j|, AWQ (arXiv 2306.00978) as mean|X_j|, and bias
    correction (arXiv 1906.04721, section 4.2) as E[x_j]. Sums are kept in float64: float32 sums stall after a
    few thousand batches. NaN and infinities are carried into the channel they appear in.

    Attributes:
        axis: the channel axis of the observed tensors (may be negative).
        min, max: float32, shape (channels,).
        sum, abs_sum: float64, shape (channels,).
        count: elements seen per channel.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.count = 0
        self.min: NDArray[np.float32] = np.zeros(0, np.float32)
        self.max: NDArray[np.float32] = np.zeros(0, np.float32)
        self.sum: NDArray[np.float64] = np.zeros(0)
        self.abs_sum: NDArray[np.float64] = np.zeros(0)

    @property
    def amax(self) -> NDArray[np.float32]:
        """The absolute maximum of every channel, shape (channels,)."""
        return np.maximum(np.abs(self.min), np.abs(self.max))

    @property
    def mean(self) -> NDArray[np.float64]:
        """The mean of every channel, shape (channels,)."""
        mean: NDArray[np.float64] = self.sum / max(self.count, 1)
        return mean

    @property
    def abs_mean(self) -> NDArray[np.float64]:
        """The mean of |x| of every channel, shape (channels,)."""
        mean: NDArray[np.float64] = self.abs_sum / max(self.count, 1)
        return mean

    def observe(self, x: NDArray[np.generic]) -> None:
        """Take in a tensor of any rank whose `axis` holds the channels.

        Raises:
            DataError: it has no such axis, or its number of channels is not that of the tensors before.
        """
        if x.size == 0:
            return
        values = np.asarray(x, np.float32)
        if not -values.ndim <= self.axis < values.ndim:
            raise DataError(
                f"channel statistics: no axis {self.axis} in a tensor of shape {values.shape}; "
                "its rank must not vary between samples."
            )
        axis = self.axis % values.ndim
        before = int(np.prod(values.shape[:axis]))
        cube = np.ascontiguousarray(values).reshape(before, values.shape[axis], -1)
        lo, hi = np.full(cube.shape[1], np.inf, np.float32), np.full(cube.shape[1], -np.inf, np.float32)
        total, absolute = np.zeros(cube.shape[1]), np.zeros(cube.shape[1])
        for rows, channels in _slabs(*cube.shape):
            slab = cube[rows, channels]
            least = slab.min(axis=(0, 2))
            lo[channels] = np.minimum(lo[channels], least)
            hi[channels] = np.maximum(hi[channels], slab.max(axis=(0, 2)))
            # ∞ − ∞ is NaN, and is meant to be.
            with np.errstate(invalid="ignore"):
                summed = _sums(slab)
                total[channels] += summed
                if least.min() < 0 or np.isnan(least).any():
                    negative = _sums(np.minimum(slab, 0))
                    summed = np.where(np.isneginf(negative), np.inf, summed - 2 * negative)
                absolute[channels] += summed
        # −0 becomes 0: which of the two a minimum returns depends on their order.
        lo += np.float32(0)
        hi += np.float32(0)
        self._include(lo, hi, total, absolute, cube.shape[0] * cube.shape[2])

    def merge(self, other: "ChannelStats") -> "ChannelStats":
        """Return the statistics of both together; neither operand changes.

        Raises:
            DataError: the axes or the numbers of channels differ.
        """
        if self.axis != other.axis:
            raise DataError(
                f"channel statistics: axes {self.axis} and {other.axis} differ; merge the same tensor's."
            )
        merged = ChannelStats(self.axis)
        merged.add(self)
        merged.add(other)
        return merged

    def add(self, other: "ChannelStats") -> None:
        """Take in what `other` has seen.

        Raises:
            DataError: the numbers of channels differ.
        """
        if other.count:
            self._include(other.min, other.max, other.sum, other.abs_sum, other.count)

    def _include(
        self,
        lo: NDArray[np.float32],
        hi: NDArray[np.float32],
        total: NDArray[np.float64],
        absolute: NDArray[np.float64],
        count: int,
    ) -> None:
        if self.count == 0:
            self.min, self.max, self.sum, self.abs_sum = lo.copy(), hi.copy(), total.copy(), absolute.copy()
        elif lo.shape != self.min.shape:
            raise DataError(
                f"channel statistics: {lo.size} channels on axis {self.axis} after {self.min.size}; "
                "the channel axis must not vary between samples."
            )
        else:
            self.min, self.max = np.minimum(self.min, lo), np.maximum(self.max, hi)
            with np.errstate(invalid="ignore"):
                self.sum, self.abs_sum = self.sum + total, self.abs_sum + absolute
        self.count += count

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return the state as plain arrays; `from_arrays` reads them back."""
        return {
            "place": np.array([self.axis, self.count], np.int64),
            "min": self.min,
            "max": self.max,
            "sum": self.sum,
            "abs_sum": self.abs_sum,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Self:
        """Return the statistics that `to_arrays` wrote.

        Raises:
            CacheError: the arrays are not such a state.
        """
        try:
            axis, count = (int(v) for v in arrays["place"])
            made = cls(axis)
            made.count = count
            made.min, made.max = arrays["min"].astype(np.float32), arrays["max"].astype(np.float32)
            made.sum, made.abs_sum = arrays["sum"].astype(np.float64), arrays["abs_sum"].astype(np.float64)
            if len({part.shape for part in (made.min, made.max, made.sum, made.abs_sum)}) != 1:
                raise ValueError("its shapes differ")
        except (KeyError, ValueError, TypeError) as error:
            raise CacheError(f"channel statistics: damaged ({error}); calibrate again.") from error
        return made

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChannelStats):
            return NotImplemented
        mine, theirs = self.to_arrays(), other.to_arrays()
        return all(np.array_equal(mine[key], theirs[key], equal_nan=True) for key in mine)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ChannelStats(axis={self.axis}, channels={self.min.size}, count={self.count})"


def _slabs(rows: int, channels: int, inner: int) -> Iterator[tuple[slice, slice]]:
    """Cut (rows, channels, inner) into pieces that stay in a core's cache while they are read several times."""
    if channels * inner <= _SLAB or inner == 1:
        step = max(_SLAB // (channels * inner), 1)
        for start in range(0, rows, step):
            yield slice(start, start + step), slice(None)
    else:
        step = max(_SLAB // inner, 1)
        for row in range(rows):
            for start in range(0, channels, step):
                yield slice(row, row + 1), slice(start, start + step)


def _sums(cube: NDArray[np.float32]) -> NDArray[np.float64]:
    """Σ over the first and last axis in float64, shape (channels,)."""
    runs = cube.sum(axis=2, dtype=np.float64) if cube.shape[2] > 1 else cube[:, :, 0]
    sums: NDArray[np.float64] = runs.sum(axis=0, dtype=np.float64)
    return sums

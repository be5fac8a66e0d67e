"""Per-channel statistics of a tensor that a linear operator reads."""

import math
from collections.abc import Mapping
from typing import Self

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import CacheError, DataError
from quantkit.statistics.reduction import as_float32, reduce_cube
from quantkit.statistics.summing import ChannelSums


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
        cube = self.cube_of(as_float32(x))
        if cube.size:
            sums, _ = reduce_cube(cube, channels=True)
            assert sums is not None
            self.include(sums)

    def cube_of(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return a tensor in the shape (before, channels, behind) the axis.

        Raises:
            DataError: it has no such axis.
        """
        if values.size == 0:
            return np.zeros((0, 0, 0), np.float32)
        if not -values.ndim <= self.axis < values.ndim:
            raise DataError(
                f"channel statistics: no axis {self.axis} in a tensor of shape {values.shape}; "
                "its rank must not vary between samples."
            )
        axis = self.axis % values.ndim
        return values.reshape(math.prod(values.shape[:axis]), values.shape[axis], -1)

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
            self.include(
                ChannelSums(
                    min=other.min, max=other.max, sum=other.sum, abs_sum=other.abs_sum, count=other.count
                )
            )

    def include(self, found: ChannelSums) -> None:
        """Take in what was found in a tensor.

        Raises:
            DataError: the numbers of channels differ.
        """
        if self.count == 0:
            self.min, self.max = found.min.copy(), found.max.copy()
            self.sum, self.abs_sum = found.sum.copy(), found.abs_sum.copy()
        elif found.min.shape != self.min.shape:
            raise DataError(
                f"channel statistics: {found.min.size} channels on axis {self.axis} after {self.min.size}; "
                "the channel axis must not vary between samples."
            )
        else:
            self.min, self.max = np.minimum(self.min, found.min), np.maximum(self.max, found.max)
            # ∞ − ∞ is NaN, and is meant to be.
            with np.errstate(invalid="ignore"):
                self.sum, self.abs_sum = self.sum + found.sum, self.abs_sum + found.abs_sum
        self.count += found.count

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

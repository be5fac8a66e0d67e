"""Limits and sums along one axis of a tensor, with NumPy."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Elements of a piece of a tensor.
_SLAB = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ChannelSums:
    """What was found in a tensor of `count` elements a channel.

    `min` and `max` are float32 of (channels,), never −0, and NaN where the channel holds one; `sum` and
    `abs_sum`, Σx and Σ|x|, are float64.
    """

    min: NDArray[np.float32]
    max: NDArray[np.float32]
    sum: NDArray[np.float64]
    abs_sum: NDArray[np.float64]
    count: int


def sum_channels(cube: NDArray[np.float32]) -> ChannelSums:
    """Reduce an array of shape (before, channels, behind), not empty and C-contiguous."""
    lo, hi = np.full(cube.shape[1], np.inf, np.float32), np.full(cube.shape[1], -np.inf, np.float32)
    total, absolute = np.zeros(cube.shape[1]), np.zeros(cube.shape[1])
    # ∞ − ∞ is NaN, and is meant to be; a signalling NaN is one like the others.
    with np.errstate(invalid="ignore"):
        for rows, channels in _slabs(*cube.shape):
            slab = cube[rows, channels]
            least = slab.min(axis=(0, 2))
            lo[channels] = np.minimum(lo[channels], least)
            hi[channels] = np.maximum(hi[channels], slab.max(axis=(0, 2)))
            summed = _sums(slab)
            total[channels] += summed
            if least.min() < 0 or np.isnan(least).any():
                negative = _sums(np.minimum(slab, 0))
                summed = np.where(np.isneginf(negative), np.inf, summed - 2 * negative)
            absolute[channels] += summed
        for limits in (lo, hi):
            # −0 becomes 0: which of the two a minimum returns depends on their order. So do the bits of NaN.
            limits += np.float32(0)
            limits[np.isnan(limits)] = np.nan
    return ChannelSums(min=lo, max=hi, sum=total, abs_sum=absolute, count=cube.shape[0] * cube.shape[2])


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

"""A weight as the matrix it is: rows for output channels, columns for what is summed over."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class WeightLayout:
    """Where a weight's output channels lie; every other axis is contracted, in order.

    MatMul [K, N]: out_axis 1. Gemm transB [N, K] and W @ X: 0. Conv [O, I / groups, …kernel]: 0, and its groups.
    """

    out_axis: int
    groups: int = 1

    def columns(self, w: NDArray[np.generic]) -> NDArray[np.generic]:
        """Return `w` as (groups, K, N): the vectors' elements by the output channels of a group."""
        rows = np.moveaxis(w, self.out_axis, 0)
        return rows.reshape(self.groups, rows.shape[0] // self.groups, -1).swapaxes(1, 2)

    def weight(self, columns: NDArray[np.generic], shape: tuple[int, ...]) -> NDArray[np.generic]:
        """Return the weight of `shape` whose `columns` are these."""
        axis = self.out_axis % len(shape)
        rows = columns.swapaxes(1, 2).reshape(shape[axis], *shape[:axis], *shape[axis + 1 :])
        return np.moveaxis(rows, 0, axis)

    def size(self, shape: tuple[int, ...]) -> int:
        """Return K of a weight of `shape`."""
        return math.prod(shape) // shape[self.out_axis]

    def importance(self, values: NDArray[np.floating], shape: tuple[int, ...]) -> NDArray[np.floating]:
        """Return one value for every element of a vector, (groups, K), so that it broadcasts against the weight."""
        axis = self.out_axis % len(shape)
        n = shape[axis] if self.groups > 1 else 1
        whole = np.repeat(values[:, None, :], n // self.groups if self.groups > 1 else 1, axis=1)
        return np.moveaxis(whole.reshape(n, *shape[:axis], *shape[axis + 1 :]), 0, axis)

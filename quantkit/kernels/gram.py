"""Gram matrices on the GPU: XᵀX of a layer's inputs where they lie, by cuBLAS.

Where a GPU's tensor cores multiply float64 (A100, H100, H200, B200), that is what cuBLAS runs: products and sums as on
the CPU, to 1e-12. Splitting float32 into three bfloat16 would not pay there: six products for one, at about ten times
the rate, for sums of 24 bits. Elsewhere float64 runs at a sixty-fourth of float32: there, blocks of vectors are
multiplied in float32 and the blocks summed in float64.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import Any

import numpy as np

from quantkit.errors import DataError
from quantkit.kernels import device as gpu
from quantkit.kernels.statistics import DeviceArray
from quantkit.statistics.gram import GramMatrix

# Their tensor cores multiply float64.
_WITH_FLOAT64 = frozenset({"sm_80", "sm_90", "sm_90a", "sm_100", "sm_100a"})
# Vectors that are summed in float32: with n of them an error is below n · 2⁻²⁴ · √(Gᵢᵢ Gⱼⱼ), and near √n · 2⁻²⁴.
FLOAT32_BLOCK = 1024
# Elements of a piece that is cut into patches, or widened to float64.
_PIECE = 1 << 24


class DeviceGram:
    """A `GramMatrix` that grows on the GPU.

    Args:
        size: K, the length of a vector.
        groups: matrices.
        float64: whether products are float64; None for what the current GPU is good at.
    """

    def __init__(self, size: int, groups: int = 1, *, float64: bool | None = None) -> None:
        cupy = gpu.cupy()
        if float64 is None:
            float64 = gpu.architecture(int(cupy.cuda.Device().id)) in _WITH_FLOAT64
        self.size, self.groups, self.count = size, groups, 0
        self._type = np.float64 if float64 else np.float32
        self._products = cupy.zeros((groups, size, size), np.float64)
        self._sums = cupy.zeros((groups, size), np.float64)

    def observe(self, rows: Any) -> None:
        """Take in vectors on the GPU, of shape (groups, vectors, K), without waiting for it.

        Raises:
            DataError: they are not K long, or not of so many groups.
        """
        if rows.ndim != 3 or rows.shape[0] != self.groups or rows.shape[2] != self.size:
            raise DataError(
                f"Gram matrix: vectors of shape {rows.shape} where ({self.groups}, any, {self.size}) belongs; "
                "the channel axis must not vary between samples."
            )
        step = FLOAT32_BLOCK if self._type == np.float32 else max(_PIECE // self.size, 1)
        for group in range(self.groups):
            for start in range(0, rows.shape[1], step):
                x = rows[group, start : start + step].astype(self._type)
                # What the matrix is added to is float64 either way.
                self._products[group] += x.T @ x
                self._sums[group] += x.sum(axis=0, dtype=np.float64)
        self.count += int(rows.shape[1])

    def result(self) -> GramMatrix:
        """Wait for the GPU, and return what was gathered."""
        cupy = gpu.cupy()
        gram = GramMatrix(self.size, self.groups)
        gram.count = self.count
        gram.products, gram.sums = cupy.asnumpy(self._products), cupy.asnumpy(self._sums)
        return gram


def as_floats(x: DeviceArray) -> Any:
    """Return a tensor as CuPy's floats; bfloat16, of which CuPy has two bytes, as float32."""
    if x.dtype != "bfloat16":
        return x.array
    return (x.array.astype(np.uint32) << 16).view(np.float32)


def device_patches(
    x: Any,
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    groups: int = 1,
) -> Iterator[Any]:
    """Yield the patches of an input on the GPU: `quantkit.statistics.patches`, by slices that CuPy has."""
    cupy, spatial = gpu.cupy(), len(kernel)
    width = list(zip(pads[:spatial], pads[spatial:], strict=True))
    sizes = [
        max((length + sum(pad) - (k - 1) * d - 1) // s + 1, 0)
        for length, pad, k, d, s in zip(x.shape[2:], width, kernel, dilations, strides, strict=True)
    ]
    batch, channels, inside = int(x.shape[0]), int(x.shape[1]), prod(kernel)
    step = max(_PIECE // max(channels * inside * prod(sizes), 1), 1)
    for start in range(0, batch, step):
        part = x[start : start + step]
        padded = cupy.pad(part, [(0, 0), (0, 0), *width])
        # [groups, batch, channels / groups, …kernel as one, …places]
        found = cupy.empty((groups, len(part), channels // groups, inside, *sizes), x.dtype)
        for place, offsets in enumerate(product(*map(range, kernel))):
            within = (
                slice(o * d, o * d + (n - 1) * s + 1 if n else 0, s)
                for o, d, n, s in zip(offsets, dilations, sizes, strides, strict=True)
            )
            taken = padded[(slice(None), slice(None), *within)]
            split = taken.reshape(len(part), groups, channels // groups, *sizes)
            found[:, :, :, place] = split.transpose(1, 0, *range(2, split.ndim))
        axes = (0, 1, *range(4, 4 + spatial), 2, 3)
        yield found.transpose(axes).reshape(groups, -1, channels // groups * inside)

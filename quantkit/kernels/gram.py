"""Gram matrices on the GPU: XᵀX of a layer's inputs where they lie.

Vectors of 16-bit floats are multiplied by cuda/gram.cu on the tensor cores: products are exact in float32, sums float32
over blocks of vectors, and blocks are summed in float64. Others, and short ones, by cuBLAS: in float64 where tensor
cores multiply it (A100, H100, H200, B200), as the CPU does to 1e-12; elsewhere, where float64 runs at a sixty-fourth of
float32, in blocks of float32 likewise.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.errors import DataError
from quantkit.kernels import device as gpu
from quantkit.statistics.gram import GramMatrix

SOURCE = Path(__file__).parent / "cuda" / "gram.cu"
KERNEL = "gram"
_STAGES = 3
# Their tensor cores multiply float64.
_WITH_FLOAT64 = frozenset({"sm_80", "sm_90", "sm_90a", "sm_100", "sm_100a"})
# Vectors that are summed in float32: with n of them an error is below n · 2⁻²⁴ · √(Gᵢᵢ Gⱼⱼ), and near √n · 2⁻²⁴. Tensor
# cores cut off instead of rounding, which is twice as much.
FLOAT32_BLOCK, TENSOR_CORE_BLOCK = 1024, 4096
# Vectors shorter than this are no work for a tile of 128 x 128.
TENSOR_CORE_SIZE = 256
# Elements of a piece that is cut into patches, or widened to float64.
_PIECE = 1 << 24


@dataclass(frozen=True, kw_only=True)
class GramLaunch:
    """One launch of cuda/gram.cu."""

    defines: dict[str, str | int]
    grid: int
    block: int
    shared_bytes: int


def gram_launch(size: int, dtype: str) -> GramLaunch:
    """Return the launch that adds the products of 16-bit vectors of this length to a matrix."""
    tiles = -(-size // 128)
    return GramLaunch(
        defines={"TYPE": {"float16": "F16", "bfloat16": "BF16"}[dtype], "STAGES": _STAGES},
        grid=tiles * (tiles + 1) // 2,
        block=256,
        shared_bytes=_STAGES * 2 * 32 * 128 * 2,
    )


class DeviceGram:
    """A `GramMatrix` that grows on the GPU.

    Args:
        size: K, the length of a vector.
        groups: matrices.
        float64: whether products are float64; None for what the current GPU is good at.
    """

    def __init__(self, size: int, groups: int = 1, *, float64: bool | None = None) -> None:
        cupy = gpu.cupy()
        self._device = int(cupy.cuda.Device().id)
        if float64 is None:
            float64 = gpu.architecture(self._device) in _WITH_FLOAT64
        self.size, self.groups, self.count = size, groups, 0
        self._type = np.float64 if float64 else np.float32
        self._products = cupy.zeros((groups, size, size), np.float64)
        self._sums = cupy.zeros((groups, size), np.float64)
        self._upper: Any = None  # what gram.cu makes: one half, in `_products`' shape

    def observe(self, rows: Any) -> None:
        """Take in vectors on the GPU, of shape (groups, vectors, K), without waiting for it. uint16 is bfloat16.

        Raises:
            DataError: they are not K long, or not of so many groups.
        """
        if rows.ndim != 3 or rows.shape[0] != self.groups or rows.shape[2] != self.size:
            raise DataError(
                f"Gram matrix: vectors of shape {rows.shape} where ({self.groups}, any, {self.size}) belongs; "
                "the channel axis must not vary between samples."
            )
        short = _SHORT_FLOATS.get(str(rows.dtype)) if self.size >= TENSOR_CORE_SIZE else None
        step = FLOAT32_BLOCK if self._type == np.float32 else max(_PIECE // self.size, 1)
        step = step if short is None else TENSOR_CORE_BLOCK
        for group in range(self.groups):
            for start in range(0, rows.shape[1], step):
                part = rows[group, start : start + step]
                floats = as_floats(part)
                # What the matrix is added to is float64 either way.
                self._sums[group] += floats.sum(axis=0, dtype=np.float64)
                if short is not None:
                    self._multiply(part, group, short)
                else:
                    x = floats.astype(self._type)
                    self._products[group] += x.T @ x
        self.count += int(rows.shape[1])

    def _multiply(self, part: Any, group: int, dtype: str) -> None:
        """Add the products of 16-bit vectors to the upper half."""
        cupy = gpu.cupy()
        if self._upper is None:
            self._upper = cupy.zeros(self._products.shape, np.float64)
        vectors, pitch = int(part.shape[0]), -(-self.size // 8) * 8
        if pitch != self.size or not part.flags.c_contiguous or part.data.ptr % 16:
            padded = cupy.zeros((vectors, pitch), part.dtype)
            padded[:, : self.size] = part
            part = padded
        launch = gram_launch(self.size, dtype)
        macros = tuple(sorted(launch.defines.items()))
        gpu.function_of(self._device, SOURCE, KERNEL, macros, launch.shared_bytes)(
            (launch.grid,),
            (launch.block,),
            (
                np.uint64(part.data.ptr),
                np.uint64(self._upper.data.ptr + group * self.size * self.size * 8),
                np.int32(vectors),
                np.int32(self.size),
                np.int32(pitch),
            ),
            shared_mem=launch.shared_bytes,
        )

    def result(self) -> GramMatrix:
        """Wait for the GPU, and return what was gathered."""
        cupy = gpu.cupy()
        gram = GramMatrix(self.size, self.groups)
        gram.count = self.count
        gram.products, gram.sums = cupy.asnumpy(self._products), cupy.asnumpy(self._sums)
        if self._upper is not None:
            upper = cupy.asnumpy(self._upper)
            gram.products += upper + np.triu(upper, 1).transpose(0, 2, 1)
        return gram


# Types of which gram.cu multiplies two and has their product exactly.
_SHORT_FLOATS = {"float16": "float16", "uint16": "bfloat16"}


def as_floats(x: Any) -> Any:
    """Return an array as CuPy's floats: bfloat16, for which uint16 stands, as float32."""
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


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

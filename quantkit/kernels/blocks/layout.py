"""How the operands of a block-scaled product lie in memory.

codes    [n, pitch] bytes, a row's e4m3 codes one after the other, padded with zeros to a multiple of 16
scales   [rows, pitch] bytes, rows at multiples of 16: float32 for each 128 of K, or e8m0 for each 32, so that 4 bytes
         belong to each 128 of K either way. A row for each row of codes; for each 128 of them in a weight with
         128 × 128 blocks.

That is what `quantize_activation` writes too.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import KernelError
from quantkit.formats.format import E8M0, FP8_E4M3
from quantkit.formats.quantize import QTensor
from quantkit.formats.spec import QuantSpec


@dataclass(frozen=True, kw_only=True)
class PackedBlocks:
    """A weight [n, k] as gemm_blocks_sm90.cu reads it, on the host. block: along K, 128 or 32."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.uint8]
    n: int
    k: int
    block: int


def block_of(spec: QuantSpec) -> int | None:
    """Return the elements along K that share a scale in a format that the kernel multiplies; None in another."""
    if spec.format != FP8_E4M3:
        return None
    if spec.scale_format is None and (spec.block_shape == (128, 128) or spec.block_size == 128):
        return 128
    return 32 if spec.scale_format == E8M0 and spec.block_size == 32 else None


def pack_blocks(weight: QTensor) -> PackedBlocks:
    """Return `weight` [n, k] in the kernel's layout: e4m3 in blocks of 128 × 128, or MXFP8 along its last axis.

    Raises:
        KernelError: not a matrix, or other blocks.
    """
    spec, values = weight.spec, weight.qvalue
    if values.ndim != 2:
        raise KernelError(f"weight: shape {values.shape} is not a matrix; reshape it to (outputs, inputs).")
    block = block_of(spec)
    along_k = spec.block_shape is not None or spec.axis in (1, -1)
    if block is None or not along_k or (block == 128 and spec.block_shape is None):
        raise KernelError(
            f"weight: {spec} along axis {spec.axis}; block-scaled products take fp8_e4m3 in blocks of 128×128 with "
            "float32 scales, or of 32 along axis 1 with e8m0 ones."
        )
    n, k = values.shape
    return PackedBlocks(
        codes=padded(np.ascontiguousarray(values).view(np.uint8)),
        scales=stored_scales(weight.qparams.scale, block),
        n=n,
        k=k,
        block=block,
    )


def stored_scales(scale: NDArray[np.float32], block: int) -> NDArray[np.uint8]:
    """Return float32 scales [rows, blocks] as bytes in rows of whole 16: e8m0 codes where `block` is 32."""
    held: NDArray[Any] = np.ascontiguousarray(scale, np.float32)
    if block == 32:
        held = held.astype(E8M0.dtype)
    return padded(held.view(np.uint8))


def padded(matrix: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return bytes [rows, …] with zeros up to a multiple of 16 in every row."""
    rows, width = matrix.shape
    wide = np.zeros((rows, -(-width // 16) * 16), np.uint8)
    wide[:, :width] = matrix
    return wide

"""How the operands of a product of MX or NVFP4 codes lie in memory.

codes    [rows, pitch] bytes: e4m3, or e2m1 two to a byte, the first in the low nibble; zeros to a multiple of 16 bytes
scales   [rows, pitch] bytes: e8m0 for each 32 codes, or e4m3 for each 16; zeros to a multiple of 16 bytes

That is what `quantize_activation` writes too, so that both operands of a product are alike.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import KernelError
from quantkit.formats.format import E8M0, FP4_E2M1, FP8_E4M3
from quantkit.formats.packing import code_bits
from quantkit.formats.quantize import QTensor
from quantkit.formats.spec import QuantSpec

# By format: codes that share a scale, and bytes of sixteen codes.
BLOCKS = {"mxfp8": 32, "mxfp4": 32, "nvfp4": 16}
_BYTES_OF_16 = {"mxfp8": 16, "mxfp4": 8, "nvfp4": 8}


@dataclass(frozen=True, kw_only=True)
class PackedMx:
    """An operand [rows, k] as gemm_blocks_sm120.cu reads it, on the host.

    format: mxfp8, mxfp4 or nvfp4. global_scale: what NVFP4's scales are in units of; None where there is none.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.uint8]
    rows: int
    k: int
    format: str
    global_scale: np.float32 | None


def format_of(spec: QuantSpec) -> str | None:
    """Return mxfp8, mxfp4 or nvfp4, whatever the axis; None for anything else."""
    for name, element, scale in (
        ("mxfp8", FP8_E4M3, E8M0),
        ("mxfp4", FP4_E2M1, E8M0),
        ("nvfp4", FP4_E2M1, FP8_E4M3),
    ):
        if (spec.format, spec.scale_format, spec.block_size) == (element, scale, BLOCKS[name]):
            return name
    return None


def row_bytes(format_name: str, k: int) -> int:
    """Return the bytes of k codes."""
    return -(-k * _BYTES_OF_16[format_name] // 16)


def row_scales(format_name: str, k: int) -> int:
    """Return the scales of k codes, a byte each."""
    return -(-k // BLOCKS[format_name])


def pack_mx(tensor: QTensor) -> PackedMx:
    """Return a tensor [rows, k] with blocks along k in the kernel's layout.

    Raises:
        KernelError: not a matrix, or neither MXFP8, MXFP4 nor NVFP4 along its last axis.
    """
    spec, values = tensor.spec, tensor.qvalue
    name = format_of(spec)
    if values.ndim != 2 or values.size == 0:
        raise KernelError(f"weight: shape {values.shape} is not a matrix; reshape it to (outputs, inputs).")
    if name is None or spec.axis not in (1, -1):
        raise KernelError(
            f"weight: {spec.format.name} in blocks of {spec.block_size} along axis {spec.axis}; quantize it to "
            f"{', '.join(BLOCKS)} along axis 1."
        )
    rows, k = values.shape
    bits = code_bits(values, spec.format)
    if name != "mxfp8":
        even = np.zeros((rows, -(-k // 2) * 2), np.uint8)
        even[:, :k] = bits
        bits = even[:, ::2] | even[:, 1::2] << np.uint8(4)
    held = np.asarray(tensor.qparams.scale, np.float32).reshape(rows, -1)
    scale_type = E8M0.dtype if name != "nvfp4" else FP8_E4M3.dtype
    stored = held.astype(scale_type)
    if not np.array_equal(stored.astype(np.float32), held):
        raise KernelError(f"weight: its scales are no values of {scale_type}; quantize it again.")
    found = tensor.qparams.global_scale
    return PackedMx(
        codes=_padded(bits),
        scales=_padded(stored.view(np.uint8)),
        rows=rows,
        k=k,
        format=name,
        global_scale=None if found is None else np.float32(found),
    )


def _padded(matrix: NDArray[np.uint8]) -> NDArray[np.uint8]:
    rows, width = matrix.shape
    wide = np.zeros((rows, -(-width // 16) * 16), np.uint8)
    wide[:, :width] = matrix
    return wide

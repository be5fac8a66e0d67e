"""The weight of ONNX Runtime's MatMulNBits: blocks along K, one blob of bytes each."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import SpecError
from quantkit.formats.format import UINT2, UINT3, UINT4, UINT8
from quantkit.formats.packing import code_bits, pack_bits, unpack_bits
from quantkit.formats.qparams import QParams
from quantkit.formats.quantize import QTensor
from quantkit.formats.spec import QuantSpec

_UNSIGNED = {2: UINT2, 3: UINT3, 4: UINT4, 8: UINT8}


@dataclass(frozen=True, kw_only=True)
class MatMulNBits:
    """The constant inputs and attributes of com.microsoft MatMulNBits, Y = A @ dequantize(B).T.

    Attributes:
        b: uint8 (N, ⌈K / block_size⌉, block_size · bits / 8); unsigned codes, the first in the lowest bits.
        scales: float32 (N, ⌈K / block_size⌉).
        zero_points: uint8 (N, ⌈⌈K / block_size⌉ · bits / 8⌉), packed as `b` is; None where all are 2^(bits − 1), which
            is what the operator takes then.
        k, n, bits, block_size: the attributes.
    """

    b: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None
    k: int
    n: int
    bits: int
    block_size: int


def to_matmul_nbits(weight: QTensor) -> MatMulNBits:
    """Return a weight [K, N] in blocks along axis 0, or [N, K] in blocks along axis 1, as MatMulNBits wants it.

    Signed codes are moved to unsigned ones with their zero points, which changes no value. Beyond K the last block is
    filled up with its zero point.

    Raises:
        SpecError: the operator has no such format, block size or axis.
    """
    spec, codes = weight.spec, weight.qvalue
    if codes.ndim != 2:
        raise SpecError(f"{spec}: MatMulNBits holds matrices, not a weight of shape {codes.shape}.")
    scales, offset = _arranged(weight.qparams, spec)
    bits, size = spec.format.bits, spec.block_size
    assert size is not None and spec.axis is not None
    if spec.axis % 2 == 0:
        codes = codes.T
    n, k = codes.shape
    filled = np.repeat(offset, size, axis=1)
    filled[:, :k] = code_bits(codes, spec.format) ^ _flip(spec)
    return MatMulNBits(
        b=pack_bits(filled.reshape(n, -1, size), bits),
        scales=scales,
        zero_points=_packed_zero_points(offset, bits),
        k=k,
        n=n,
        bits=bits,
        block_size=size,
    )


def matmul_nbits_scales(
    qparams: QParams, spec: QuantSpec
) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
    """Return the `scales` and `zero_points` of a weight's `to_matmul_nbits`, which need no codes.

    Raises:
        SpecError: as there.
    """
    scales, offset = _arranged(qparams, spec)
    return scales, _packed_zero_points(offset, spec.format.bits)


def _arranged(qparams: QParams, spec: QuantSpec) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """The scales and the unsigned zero points, a row an output."""
    bits, size = spec.format.bits, spec.block_size
    if spec.format.kind != "integer" or bits not in _UNSIGNED or spec.scale_format is not None:
        raise SpecError(f"{spec}: MatMulNBits holds integers of 2, 3, 4 or 8 bits; choose another operator.")
    if size is None or size < 16 or size & (size - 1):
        raise SpecError(f"{spec}: MatMulNBits wants blocks of a power of two from 16 up; choose 32 or 128.")
    assert spec.axis is not None and qparams.zero_point is not None
    scale, zero = qparams.scale, qparams.zero_point
    if spec.axis % 2 == 0:
        scale, zero = scale.T, zero.T
    return np.ascontiguousarray(scale), code_bits(zero, spec.format) ^ _flip(spec)


def _flip(spec: QuantSpec) -> np.uint8:
    """The top bit of signed codes: flipping it adds 2^(bits − 1) to a two's complement."""
    return np.uint8(2 ** (spec.format.bits - 1) if spec.format.min < 0 else 0)


def _packed_zero_points(offset: NDArray[np.uint8], bits: int) -> NDArray[np.uint8] | None:
    return None if np.all(offset == 2 ** (bits - 1)) else pack_bits(offset, bits)


def from_matmul_nbits(packed: MatMulNBits) -> QTensor:
    """Return the weight as codes [N, K] in blocks along axis 1, of an unsigned format."""
    fmt, blocks = _UNSIGNED[packed.bits], packed.b.shape[1]
    codes = unpack_bits(packed.b, packed.bits, packed.block_size).reshape(packed.n, -1)[:, : packed.k]
    if packed.zero_points is None:
        zero = np.full((packed.n, blocks), fmt.middle, np.uint8)
    else:
        zero = unpack_bits(packed.zero_points, packed.bits, blocks)
    spec = QuantSpec(
        format=fmt, axis=1, block_size=packed.block_size, symmetric=bool(np.all(zero == fmt.middle))
    )
    return QTensor(
        codes.astype(fmt.dtype), QParams(packed.scales.reshape(packed.n, -1), zero.astype(fmt.dtype)), spec
    )

"""Weights as the safetensors files of compressed-tensors hold them, which vLLM reads: matrices [N, K].

Layouts after compressed-tensors 0.10 and later: `pack-quantized` (integers in int32 words), `int-quantized` (integers a
byte each), `nvfp4-pack-quantized` and `mxfp4-pack-quantized` (two E2M1 codes a byte), `float-quantized` and
`mxfp8-quantized` (float8 as it is).
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import SpecError
from quantkit.formats.format import E8M0, FP4_E2M1, INT2, INT3, INT4, INT8
from quantkit.formats.packing import code_bits, codes_from_bits, pack_bits, unpack_bits
from quantkit.formats.qparams import QParams
from quantkit.formats.quantize import QTensor
from quantkit.formats.spec import QuantSpec

_SIGNED = {2: INT2, 3: INT3, 4: INT4, 8: INT8}


def pack_int32(codes: NDArray[np.integer], bits: int, axis: int = 1) -> NDArray[np.int32]:
    """Pack signed codes of a matrix into int32 words along `axis`: 8 of 4 bits each, the first in the lowest bits.

    Every code is stored as code + 2^(bits − 1). The length becomes ⌈length · bits / 32⌉. Weights are packed along
    axis 1 (`weight_packed`), zero points along axis 0 (`weight_zero_point`).
    """
    lines = codes if axis == 1 else codes.T
    pattern = (lines.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    packed = pack_bits(pattern, bits)
    words = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4))).view("<i4")
    return np.ascontiguousarray(words if axis == 1 else words.T)


def unpack_int32(packed: NDArray[np.int32], bits: int, size: int, axis: int = 1) -> NDArray[np.int8]:
    """Return the `size` signed codes along `axis` that `pack_int32` packed."""
    lines = np.ascontiguousarray(packed if axis == 1 else packed.T, "<i4").view(np.uint8)
    codes = unpack_bits(lines, bits, size).astype(np.int16) - 2 ** (bits - 1)
    return np.ascontiguousarray(codes if axis == 1 else codes.T, np.int8)


def to_compressed_tensors(weight: QTensor, *, packed: bool = True) -> dict[str, NDArray[np.generic]]:
    """Return the tensors that stand for a weight [N, K], by the suffix of their names: its codes and its scales.

    Raises:
        SpecError: compressed-tensors has no such format, or wants another axis or an even K.
    """
    spec, shape = weight.spec, weight.qvalue.shape
    name, _, _ = code_layout(shape, spec, packed=packed)
    found: dict[str, NDArray[np.generic]] = {name: pack_codes(weight.qvalue, spec, packed=packed)}
    return found | pack_qparams(weight.qparams, spec, shape, packed=packed)


def code_layout(
    shape: tuple[int, ...], spec: QuantSpec, *, packed: bool = True
) -> tuple[str, np.dtype, tuple[int, ...]]:
    """Return the suffix, element type and shape under which the codes of a weight [N, K] are stored.

    `weight_packed`: int32 (N, ⌈K · bits / 32⌉) of integers, uint8 (N, K / 2) of E2M1. `weight`: (N, K), of float8
    and of integers that are not packed.

    Raises:
        SpecError: compressed-tensors has no such format, or wants another axis or an even K.
    """
    _check_axis(shape, spec)
    fmt, (rows, columns) = spec.format, shape
    if fmt == FP4_E2M1:
        if columns % 2:
            raise SpecError(f"{spec}: compressed-tensors wants an even K, not {columns}; keep it in float.")
        if spec.scale_format is None:
            raise SpecError(f"{spec}: compressed-tensors has no E2M1 with float scales; use nvfp4 or mxfp4.")
        return "weight_packed", np.dtype(np.uint8), (rows, columns // 2)
    if fmt.kind == "float":
        return "weight", fmt.dtype, (rows, columns)
    if fmt.bits not in _SIGNED:
        raise SpecError(
            f"{spec}: compressed-tensors packs integers of 2, 3, 4 or 8 bits; choose int4 or int8."
        )
    if not packed:
        return "weight", np.dtype(np.int8), (rows, columns)
    return "weight_packed", np.dtype(np.int32), (rows, -(-columns * fmt.bits // 32))


def pack_codes(codes: NDArray[np.generic], spec: QuantSpec, *, packed: bool = True) -> NDArray[np.generic]:
    """Return the codes of a weight, or of some of its rows, as `code_layout` says; integers less their middle."""
    fmt = spec.format
    if fmt == FP4_E2M1:
        return pack_bits(code_bits(codes, fmt), 4)
    if fmt.kind == "float":
        return codes
    signed = codes.astype(np.int16) - fmt.middle
    return pack_int32(signed, fmt.bits) if packed else signed.astype(np.int8)


def pack_qparams(
    qparams: QParams, spec: QuantSpec, shape: tuple[int, ...], *, packed: bool = True
) -> dict[str, NDArray[np.generic]]:
    """Return what is stored beside the codes of a weight of `shape` [N, K], by the suffix of its name.

    `weight_scale`: float32 (N, K / block), (N, 1) per channel and (1,) per tensor; E4M3 of NVFP4; of MX formats
    uint8, the exponent plus 127. `weight_global_scale` of NVFP4: the reciprocal of this package's, 2688 / amax.
    Of integers in words `weight_shape` (int64), and of those with zero points `weight_zero_point`, packed alike.
    """
    fmt, scale = spec.format, qparams.scale
    if spec.axis is not None and spec.block_size is None:
        scale = scale.reshape(-1, 1)
    elif spec.axis is None and spec.block_shape is None:
        scale = scale.reshape(1)
    found: dict[str, NDArray[np.generic]] = {"weight_scale": np.ascontiguousarray(scale)}
    if spec.scale_format == E8M0:
        found["weight_scale"] = np.ascontiguousarray(scale.astype(E8M0.dtype)).view(np.uint8)
    elif spec.scale_format is not None and qparams.global_scale is not None:
        found["weight_scale"] = np.ascontiguousarray(scale.astype(spec.scale_format.dtype))
        found["weight_global_scale"] = (1 / qparams.global_scale).reshape(1)
    if fmt.kind == "float":
        return found
    if packed:
        found["weight_shape"] = np.array(shape, np.int64)
    if not spec.symmetric and qparams.zero_point is not None:
        zero = (qparams.zero_point.astype(np.int16) - fmt.middle).reshape(scale.shape[0], -1)
        found["weight_zero_point"] = pack_int32(zero, fmt.bits, axis=0) if packed else zero.astype(np.int8)
    return found


def unpack_codes(
    stored: NDArray[np.generic], spec: QuantSpec, columns: int, *, packed: bool = True
) -> NDArray[np.generic]:
    """Return the codes, of the format's dtype and shape (rows, `columns`), that `pack_codes` stored."""
    fmt = spec.format
    if fmt == FP4_E2M1:
        return unpack_fp4(stored.astype(np.uint8, copy=False), columns)
    if fmt.kind == "float":
        return stored
    signed = unpack_int32(stored.astype(np.int32, copy=False), fmt.bits, columns) if packed else stored
    return (signed.astype(np.int16) + fmt.middle).astype(fmt.dtype)


def unpack_qparams(
    found: Mapping[str, NDArray[np.generic]], spec: QuantSpec, shape: tuple[int, ...], *, packed: bool = True
) -> QParams:
    """Return the scales and zero points that `pack_qparams` stored for a weight of `shape` [N, K]."""
    stored, fmt = found["weight_scale"], spec.format
    if spec.scale_format == E8M0:
        stored = stored.view(E8M0.dtype)
    scale = stored.astype(np.float32)
    if spec.axis is None and spec.block_shape is None:
        scale = scale.reshape(())
    elif spec.axis is not None and spec.block_size is None:
        scale = scale.reshape(-1)
    if fmt.kind == "float":
        if not spec.has_global_scale:
            return QParams(scale)
        shared = found["weight_global_scale"].astype(np.float32).reshape(())
        return QParams(scale, None, np.asarray(np.reciprocal(shared), np.float32))
    zero: NDArray[np.generic] = np.zeros(scale.shape, np.int8)
    if not spec.symmetric:
        zero = found["weight_zero_point"]
        if packed:
            zero = unpack_int32(zero.astype(np.int32, copy=False), fmt.bits, shape[0], axis=0)
    return QParams(scale, (zero.astype(np.int16).reshape(scale.shape) + fmt.middle).astype(fmt.dtype))


def unpack_fp4(packed: NDArray[np.uint8], size: int) -> NDArray[np.generic]:
    """Return the E2M1 codes (N, size) of a `weight_packed` (N, size / 2)."""
    return codes_from_bits(unpack_bits(packed, 4, size), FP4_E2M1)


def _check_axis(shape: tuple[int, ...], spec: QuantSpec) -> None:
    if len(shape) != 2:
        raise SpecError(f"{spec}: compressed-tensors holds matrices, not a weight of shape {shape}.")
    wanted = 0 if spec.block_size is None else 1
    if spec.axis is not None and spec.axis % 2 != wanted:
        raise SpecError(
            f"{spec}: compressed-tensors wants a weight [N, K] with scales along axis {wanted}, not {spec.axis}; "
            "transpose it."
        )

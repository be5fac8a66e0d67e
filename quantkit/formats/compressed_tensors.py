"""Weights as the safetensors files of compressed-tensors hold them, which vLLM reads: matrices [N, K].

Layouts after compressed-tensors 0.10 and later: `pack-quantized` (integers in int32 words), `nvfp4-pack-quantized` and
`mxfp4-pack-quantized` (two E2M1 codes a byte), `float-quantized` (float8 as it is).
"""

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import SpecError
from quantkit.formats.format import E8M0, FP4_E2M1, INT2, INT3, INT4, INT8
from quantkit.formats.packing import code_bits, codes_from_bits, pack_bits, unpack_bits
from quantkit.formats.quantize import QTensor

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


def to_compressed_tensors(weight: QTensor) -> dict[str, NDArray[np.generic]]:
    """Return the tensors that stand for a weight [N, K], by the suffix of their names.

    Integers: `weight_packed`, `weight_scale`, `weight_shape` (int64) and, where they are not all the middle,
    `weight_zero_point`. NVFP4: `weight_packed` uint8 (N, K / 2), `weight_scale` in E4M3 and `weight_global_scale`, the
    reciprocal of this package's: 2688 / amax. MXFP4: `weight_packed`, and `weight_scale` as uint8, the exponent plus
    127. Float8: `weight` and `weight_scale`. Per channel and per tensor, scales are (N, 1) and (1,).

    Raises:
        SpecError: compressed-tensors has no such format, or wants another axis or an even K.
    """
    spec, qparams = weight.spec, weight.qparams
    codes, fmt = weight.qvalue, spec.format
    _check_axis(weight)
    scale = qparams.scale
    if spec.axis is not None and spec.block_size is None:
        scale = scale.reshape(-1, 1)
    elif spec.axis is None and spec.block_shape is None:
        scale = scale.reshape(1)
    if fmt == FP4_E2M1:
        if codes.shape[1] % 2:
            raise SpecError(
                f"{spec}: compressed-tensors wants an even K, not {codes.shape[1]}; keep it in float."
            )
        found: dict[str, NDArray[np.generic]] = {"weight_packed": pack_bits(code_bits(codes, fmt), 4)}
        if spec.scale_format == E8M0:
            found["weight_scale"] = scale.astype(E8M0.dtype).view(np.uint8)
        elif spec.scale_format is not None and qparams.global_scale is not None:
            found["weight_scale"] = scale.astype(spec.scale_format.dtype)
            found["weight_global_scale"] = (1 / qparams.global_scale).reshape(1)
        else:
            raise SpecError(f"{spec}: compressed-tensors has no E2M1 with float scales; use nvfp4 or mxfp4.")
        return found
    if fmt.kind == "float":
        if spec.scale_format == E8M0:
            return {"weight": codes, "weight_scale": scale.astype(E8M0.dtype).view(np.uint8)}
        return {"weight": codes, "weight_scale": scale}
    if fmt.bits not in _SIGNED or qparams.zero_point is None:
        raise SpecError(
            f"{spec}: compressed-tensors packs integers of 2, 3, 4 or 8 bits; choose int4 or int8."
        )
    signed, zero = (a.astype(np.int16) - fmt.middle for a in (codes, qparams.zero_point))
    found = {
        "weight_packed": pack_int32(signed, fmt.bits),
        "weight_scale": scale,
        "weight_shape": np.array(codes.shape, np.int64),
    }
    if not spec.symmetric:
        found["weight_zero_point"] = pack_int32(zero.reshape(scale.shape[0], -1), fmt.bits, axis=0)
    return found


def unpack_fp4(packed: NDArray[np.uint8], size: int) -> NDArray[np.generic]:
    """Return the E2M1 codes (N, size) of a `weight_packed` (N, size / 2)."""
    return codes_from_bits(unpack_bits(packed, 4, size), FP4_E2M1)


def _check_axis(weight: QTensor) -> None:
    spec = weight.spec
    if weight.qvalue.ndim != 2:
        raise SpecError(
            f"{spec}: compressed-tensors holds matrices, not a weight of shape {weight.qvalue.shape}."
        )
    wanted = 0 if spec.block_size is None else 1
    if spec.axis is not None and spec.axis % 2 != wanted:
        raise SpecError(
            f"{spec}: compressed-tensors wants a weight [N, K] with scales along axis {wanted}, not {spec.axis}; "
            "transpose it."
        )

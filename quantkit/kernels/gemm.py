"""Matrix products of quantized operands on a GPU: pack a weight once, multiply activations by it.

D[m, n] = activation(((A − zero_point) @ W.T)[m, n] · row_scale[m] · weight_scale[n] + bias[n]) + residual[m, n],
summed in int32 or float32, each further operation rounded to float32, D rounded once to its own type.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from quantkit.errors import KernelError
from quantkit.formats.quantize import QTensor
from quantkit.kernels import device as gpu
from quantkit.kernels import gemm_run, tuning
from quantkit.kernels.blocks.heuristics import BlocksTile
from quantkit.kernels.blocks.layout import block_of
from quantkit.kernels.blocks.matmul import PackedBlockWeight, matmul_blocks, pack_block_weight
from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.epilogue_operands import contiguous, kind_of, numbers_of, row_factor
from quantkit.kernels.gemm_checks import check_product
from quantkit.kernels.gemm_operands import Epilogue, PackedWeight
from quantkit.kernels.heuristics import Device, Problem, Tile, rank
from quantkit.kernels.mma_heuristics import ITEM_BYTES, MmaTile, mma_choose, mma_device
from quantkit.kernels.mx.heuristics import MxTile
from quantkit.kernels.mx.layout import format_of
from quantkit.kernels.mx.matmul import ARCH as MX_ARCH
from quantkit.kernels.mx.matmul import PackedMxWeight, matmul_mx, pack_mx_weight
from quantkit.kernels.output import aligned_output, new_output
from quantkit.kernels.w4.choice import Configuration
from quantkit.kernels.w4.matmul import PackedWeight4, Workspace4, matmul_w4, pack_weight4

__all__ = ["Epilogue", "PackedBlockWeight", "PackedWeight", "matmul", "pack_codes", "pack_weight"]

_FORMATS = {
    "int8": "int8",
    "fp8_e4m3": "float8_e4m3fn",
    "e4m3": "float8_e4m3fn",
    "float8_e4m3fn": "float8_e4m3fn",
    "bfloat16": "bfloat16",
    "float16": "float16",
}
# What gemm_sm90.cu multiplies; gemm_mma.cu takes the rest, and every other architecture.
_WGMMA = frozenset({"int8", "float8_e4m3fn", "bfloat16"})


# Four bits: what each type of activations is multiplied by, in bits.
_FOUR_BITS = frozenset({"int4", "uint4", "fp4_e2m1"})
_ACTIVATION_BITS = {"bfloat16": 16, "float16": 16, "int8": 8, "float8_e4m3fn": 8}


def pack_weight(
    weight: QTensor, arch: str | None = None, *, activations: str | None = None
) -> PackedWeight | PackedBlockWeight:
    """Return `weight` [n, k] on the current GPU: quantized per tensor or per row, e4m3 in blocks, or of four bits.

    Blocks of e4m3 are 128 × 128 with float32 scales, or 32 along axis 1 with e8m0 ones (MXFP8; on sm_120a for its own
    block-scaled tensor cores). Of four bits are int4 and uint4 (groups along axis 1, or rows; with zero points or
    without), NVFP4 and MXFP4.

    Args:
        weight: the quantized weight.
        arch: whose layout it gets; that of the current GPU by default.
        activations: the type that will be multiplied by it. Of four-bit weights bfloat16 or float16, which are one, by
            default; int8 for integers with scales of two levels; float8_e4m3fn for MXFP4, and for symmetric
            integers in groups of 128 on sm_90a; fp4_e2m1 for NVFP4 and MXFP4
            by activations of the same format, on sm_120a. Of others their own.

    Raises:
        KernelError: not a matrix, or a format, zero point or granularity that no kernel takes.
    """
    if not isinstance(weight, QTensor):
        kind = type(weight).__name__
        raise KernelError(
            f"weight: is a {kind}, not a QTensor; quantize it with quantkit.formats.quantize first."
        )
    name = weight.spec.format.name
    found = _FORMATS.get(name)
    values, params = weight.qvalue, weight.qparams
    if name == activations == "fp4_e2m1":
        return pack_mx_weight(weight, arch)
    if name in _FOUR_BITS:
        return _pack_four_bits(weight, arch, activations or "bfloat16")
    if found is None:
        raise KernelError(
            f"weight: no kernel multiplies {name}; use int8, fp8_e4m3, int4, uint4 or fp4_e2m1."
        )
    if activations not in (None, found):
        raise KernelError(
            f"weight: {name} is multiplied by its own type, not by {activations}; leave it out."
        )
    if block_of(weight.spec) is not None:
        if format_of(weight.spec) and (arch or gpu.architecture(_device())) == MX_ARCH:
            return pack_mx_weight(weight, arch)
        return pack_block_weight(weight, arch)
    if values.ndim != 2:
        raise KernelError(f"weight: shape {values.shape} is not a matrix; reshape it to (outputs, inputs).")
    if params.zero_point is not None and np.any(params.zero_point):
        raise KernelError("weight: has a zero point; quantize it symmetrically.")
    scale = np.asarray(params.effective_scale, np.float32).reshape(-1)
    per_row = weight.spec.axis in (0, -2) and weight.spec.block_size is None
    if scale.size != 1 and not (per_row and scale.size == values.shape[0]):
        raise KernelError(
            f"weight: {scale.size} scales for {values.shape}; quantize per tensor or along axis 0."
        )
    return pack_codes(values, scale, found, arch)


def _device() -> int:
    return gpu.current()


def _pack_four_bits(weight: QTensor, arch: str | None, activations: str) -> PackedWeight4:
    bits = _ACTIVATION_BITS.get(activations)
    if bits is None:
        raise KernelError(f"activations {activations!r}; one of {', '.join(_ACTIVATION_BITS)}.")
    packed = pack_weight4(weight, activation_bits=bits, activations=activations, arch=arch)
    if activations not in packed.layout.activations:
        raise KernelError(
            f"weight: {weight.spec.format.name} is not multiplied by {activations}; pass "
            f"{' or '.join(packed.layout.activations)}."
        )
    return packed


def pack_codes(
    values: np.ndarray, scale: np.ndarray | None, format_name: str, arch: str | None = None
) -> PackedWeight:
    """Return codes [n, k] of a format and their float32 scales (one, n, or None) on the current GPU."""
    cupy = gpu.cupy()
    device = gpu.current()
    n, k = values.shape
    item = ITEM_BYTES[format_name]
    padded = np.zeros((n, -(-k * item // 16) * 16), np.uint8)
    padded[:, : k * item] = np.ascontiguousarray(values).view(np.uint8)
    sums = values.sum(axis=1, dtype=np.int32) if format_name == "int8" else None
    return PackedWeight(
        data=cupy.asarray(padded),
        scale=None if scale is None else cupy.asarray(np.ascontiguousarray(scale, np.float32)),
        n=n,
        k=k,
        format=format_name,
        arch=arch or gpu.architecture(device),
        code_sums=None if sums is None else cupy.asarray(sums),
    )


def matmul(
    a: Any,
    weight: PackedWeight | PackedBlockWeight,
    *,
    epilogue: Epilogue | None = None,
    out_dtype: str = "bfloat16",
    out: Any = None,
    tile: Tile | MmaTile | BlocksTile | MxTile | Configuration | None = None,
    workspace: Workspace4 | None = None,
) -> Any:
    """Return D = a @ weight.T with its epilogue, on the current stream, without waiting for it.

    On sm_90a the kernel is gemm_sm90.cu, or gemm_blocks_sm90.cu for a weight with block scales; on other architectures,
    and for float16, gemm_mma.cu. On sm_120a gemm_blocks_sm120.cu multiplies MXFP8, and MXFP4 and NVFP4 on both sides.
    Weights of four bits have kernels of their own, which `w4.matmul` tells of. A CUDA graph may capture the call once
    the same call has run plainly (which compiles the kernel, and uploads numbers given as such); what it allocates then
    comes from CuPy's pool, so give it `out`.

    Args:
        a: [..., k] of the weight's format; e4m3 travels as uint8, bfloat16 as bfloat16 or uint16. For an int8 weight
            uint8 codes are taken too, at the price of a pass that moves them to int8. For a weight with block scales,
            what `quantize_activation` gave, codes and scales together. For a weight of four bits, of the type that it
            was packed for.
        weight: what pack_weight gave.
        epilogue: nothing but the weight's scale by default.
        out_dtype: bfloat16, float16, float32, int8, float8_e4m3fn (as uint8), or int32 (sums of int8, less the zero
            point's part, without scales or anything else).
        out: a C-contiguous array to write, of the right shape and item size.
        tile: instead of the chosen one: Tile for gemm_sm90.cu, MmaTile for gemm_mma.cu, BlocksTile for
            gemm_blocks_sm90.cu, MxTile for gemm_blocks_sm120.cu; for weights of four bits what `w4.matmul` takes.
        workspace: of weights of four bits: for blocks that share tiles, in a captured call.

    Raises:
        KernelError: shapes, types or devices that do not fit, or a GPU without this kernel.
    """
    if isinstance(weight, PackedWeight4):
        four = tile if isinstance(tile, Configuration) else None
        return matmul_w4(
            a, weight, epilogue=epilogue, out_dtype=out_dtype, out=out, tile=four, workspace=workspace
        )
    if isinstance(weight, PackedMxWeight):
        mx = tile if isinstance(tile, MxTile) else None
        return matmul_mx(a, weight, epilogue=epilogue, out_dtype=out_dtype, out=out, tile=mx)
    if isinstance(weight, PackedBlockWeight):
        chosen = tile if isinstance(tile, BlocksTile) else None
        return matmul_blocks(a, weight, epilogue=epilogue, out_dtype=out_dtype, out=out, tile=chosen)
    if not isinstance(weight, PackedWeight):
        raise KernelError(f"weight: is a {type(weight).__name__}; pass what pack_weight makes of it.")
    cupy = gpu.cupy()
    epilogue = epilogue or Epilogue()
    device = gpu.current()
    arch = gpu.architecture(device)
    check_product(a, weight, epilogue, out_dtype, out, device, arch)
    lead, n, k = tuple(a.shape[:-1]), weight.n, weight.k
    m = int(np.prod(lead, dtype=np.int64))
    if out is None:
        out = new_output(lead, n, out_dtype)
    if m == 0 or n == 0:
        return out
    # The copy engine stores to multiples of 16 bytes; no allocation starts elsewhere, but a part of one may.
    target = aligned_output(out)
    a = a.reshape(m, k)
    zero_point = epilogue.zero_point
    if weight.format == "int8" and str(a.dtype) == "uint8":
        # The same values by other names: a code and its zero point both move by 128.
        a = (a ^ np.uint8(128)).view(np.int8)
        zero_point = (0 if zero_point is None else zero_point) - 128
    raw = out_dtype == "int32"
    row_scale, row_kind = row_factor(None if raw else epilogue.row_scale, device)
    zeros, zero_kind = row_factor(zero_point, device, "int32")
    scale = None if raw else weight.scale
    kind = kind_of(
        epilogue,
        row_scale=row_kind,
        column_scale="none" if scale is None else "one" if scale.size == 1 else "each",
        zero_point=zero_kind,
    )
    problem = Problem(m=m, n=n, k=k, format=weight.format, output=out_dtype)
    call = gemm_run.Call(
        a=gemm_run.aligned(a, cupy),
        weight=weight.data,
        out=target,
        vectors=(
            row_scale,
            *(contiguous(v) for v in (scale, epilogue.bias)),
            zeros,
            None if zeros is None else weight.code_sums,
            contiguous(epilogue.residual),
        ),
        values=numbers_of(epilogue),
        problem=problem,
        kind=kind,
        device=device,
    )
    if arch == "sm_90a" and weight.format in _WGMMA and not isinstance(tile, MmaTile):
        gemm_run.run_sm90(call, tile if isinstance(tile, Tile) else _tile_now(problem, kind, device))
    else:
        given = tile if isinstance(tile, MmaTile) else _mma_tile(problem, kind, arch, device)
        gemm_run.run_mma(call, given, arch)
    if target is not out:
        out[...] = target
    return out


def _tile_now(problem: Problem, kind: EpilogueKind, device: int) -> Tile:
    """The tile to run with: a CUDA graph cannot have stream-K, so it gets the best of the others."""
    tile = _tile(problem, kind, device)
    if not tile.stream:
        return tile
    whole = _tile(problem, kind, device, stream=False)
    if gpu.cupy().cuda.get_current_stream().is_capturing():
        return whole
    gemm_run.load_sm90(problem, whole, kind, device)
    return tile


@lru_cache(maxsize=4096)
def _tile(problem: Problem, kind: EpilogueKind, device: int, *, stream: bool = True) -> Tile:
    """The tile timed fastest on this GPU, else the one modelled fastest."""
    timed = tuning.best_tile(problem, kind, device)
    ranked = rank(problem, Device(multiprocessors=gpu.multiprocessors(device)))
    return timed or next(tile for tile in ranked if stream or not tile.stream)


@lru_cache(maxsize=4096)
def _mma_tile(problem: Problem, kind: EpilogueKind, arch: str, device: int) -> MmaTile:
    timed = tuning.best_mma_tile(problem, kind, device)
    return timed or mma_choose(problem, mma_device(arch, gpu.multiprocessors(device)))

"""Products of e4m3 codes with block scales on Hopper: pack a weight once, multiply quantized activations by it."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from quantkit.errors import KernelError
from quantkit.formats.quantize import QTensor
from quantkit.kernels import device as gpu
from quantkit.kernels import tuning
from quantkit.kernels.blocks.heuristics import BlocksProblem, BlocksTile, candidates, choose
from quantkit.kernels.blocks.launch import KERNEL, SOURCE, BlocksLaunch, launch_of
from quantkit.kernels.blocks.layout import block_of, pack_blocks
from quantkit.kernels.epilogue import OUTPUT_BYTES, EpilogueKind
from quantkit.kernels.epilogue_operands import address, contiguous, kind_of, numbers_of, row_factor
from quantkit.kernels.gemm_checks import check_product
from quantkit.kernels.gemm_operands import Epilogue, PackedWeight
from quantkit.kernels.gemm_run import aligned
from quantkit.kernels.heuristics import Device
from quantkit.kernels.output import aligned_output, new_output
from quantkit.kernels.quantize import QuantizedActivation
from quantkit.kernels.timing_table import Entry, key_of

_ARCH = "sm_90a"
_CODES = "float8_e4m3fn"


@dataclass(frozen=True, kw_only=True)
class PackedBlockWeight:
    """A weight with block scales laid out for gemm_blocks_sm90.cu, on the device; as in `layout.PackedBlocks`."""

    codes: Any
    scales: Any
    n: int
    k: int
    block: int
    arch: str


def pack_block_weight(weight: QTensor, arch: str | None = None) -> PackedBlockWeight:
    """Return `weight` [n, k] on the current GPU; what is taken is what `layout.pack_blocks` says.

    Raises:
        KernelError: a weight that the kernel has not, or no GPU.
    """
    cupy = gpu.cupy()
    packed = pack_blocks(weight)
    return PackedBlockWeight(
        codes=cupy.asarray(packed.codes),
        scales=cupy.asarray(packed.scales),
        n=packed.n,
        k=packed.k,
        block=packed.block,
        arch=arch or gpu.architecture(gpu.current()),
    )


def matmul_blocks(
    a: QuantizedActivation,
    weight: PackedBlockWeight,
    *,
    epilogue: Epilogue | None = None,
    out_dtype: str = "bfloat16",
    out: Any = None,
    tile: BlocksTile | None = None,
) -> Any:
    """Return D = a @ weight.T with its epilogue, on the current stream, without waiting for it.

    Args:
        a: what `quantize_activation` gave for the weight's format: fp8_e4m3 with dynamic blocks of 128 along the last
            axis, or MXFP8. Codes and scales are read as they lie there.
        weight: what pack_block_weight gave.
        epilogue: nothing by default; its row scale multiplies beside the blocks' own.
        out_dtype: bfloat16, float16, float32, int8 or float8_e4m3fn (as uint8).
        out: a C-contiguous array to write, of the right shape and item size.
        tile: instead of the chosen one.

    Raises:
        KernelError: shapes, formats or devices that do not fit, or a GPU without this kernel.
    """
    cupy = gpu.cupy()
    epilogue = epilogue or Epilogue()
    device = gpu.current()
    _check(a, weight, out_dtype, device)
    codes, n, k = a.codes, weight.n, weight.k
    stands_for = PackedWeight(data=weight.codes, scale=None, n=n, k=k, format=_CODES, arch=weight.arch)
    check_product(codes, stands_for, epilogue, out_dtype, out, device, _ARCH)
    lead = tuple(codes.shape[:-1])
    m = int(np.prod(lead, dtype=np.int64))
    if out is None:
        out = new_output(lead, n, out_dtype)
    if m == 0 or n == 0:
        return out
    problem = BlocksProblem(m=m, n=n, k=k, block=weight.block, output=out_dtype)
    row_scale, granularity = row_factor(epilogue.row_scale, device)
    kind = kind_of(
        epilogue,
        row_scale=granularity,
    )
    tile = tile or _tile(problem, kind, device)
    launch = _launch(problem, tile, kind, gpu.multiprocessors(device))
    target = aligned_output(out)
    rows, pitch = aligned(codes.reshape(m, k), cupy)
    scales, scale_pitch = aligned(a.scale.reshape(m, -1), cupy)
    operands = [(rows.data.ptr, (m, k), pitch), (weight.codes.data.ptr, (n, k), int(weight.codes.shape[1]))]
    if launch.swap:
        operands.reverse()
    maps = [
        gpu.tensor_map(address, _CODES, shape, step, box)
        for (address, shape, step), box in zip(operands, (launch.first_box, launch.second_box), strict=True)
    ]
    stored = maps[0]
    if launch.tma_store:
        step = n * OUTPUT_BYTES[out_dtype]
        stored = gpu.tensor_map(
            target.data.ptr, out_dtype, (m, n), step, launch.output_box, launch.output_swizzle
        )
    vectors = row_scale, None, contiguous(epilogue.bias), None, None, contiguous(epilogue.residual)
    function = gpu.function_of(
        device, SOURCE, KERNEL, tuple(sorted(launch.defines.items())), launch.shared_bytes
    )
    function(
        (launch.grid,),
        (launch.block,),
        (
            *maps,
            stored,
            address(target),
            np.int32(k),
            address(scales),
            np.int64(scale_pitch),
            address(weight.scales),
            np.int64(weight.scales.shape[1]),
            *map(address, vectors),
            numbers_of(epilogue),
            np.int32(m),
            np.int32(n),
        ),
        shared_mem=launch.shared_bytes,
    )
    if target is not out:
        out[...] = target
    return out


def tile_of(entry: Entry, problem: BlocksProblem) -> BlocksTile | None:
    """Return the tile of an entry of the timing cache; None where the kernel no longer has it."""
    try:
        tile = BlocksTile(**entry.configuration)
    except TypeError:
        return None
    return tile if tile in set(candidates(problem)) else None


def _check(a: Any, weight: PackedBlockWeight, out_dtype: str, device: int) -> None:
    arch = gpu.architecture(device)
    if arch != _ARCH:
        raise KernelError(f"matmul: no kernel for block scales on {arch}; it needs {_ARCH}.")
    if not isinstance(a, QuantizedActivation):
        raise KernelError(
            "matmul: a weight with block scales wants activations with theirs; pass what quantize_activation gave."
        )
    if a.spec.dynamic != "block" or block_of(a.spec) != weight.block:
        raise KernelError(
            f"matmul: activations in {a.spec} for a weight in blocks of {weight.block} along K; quantize them alike."
        )
    if out_dtype == "int32":
        raise KernelError("matmul: int32 would hold sums without their scales; take float32.")


@lru_cache(maxsize=4096)
def _tile(problem: BlocksProblem, kind: EpilogueKind, device: int) -> BlocksTile:
    """The tile timed fastest on this GPU, else the one modelled fastest."""
    entry = tuning.best_entry(key_of(KERNEL, problem.as_key(), kind), device)
    timed = None if entry is None else tile_of(entry, problem)
    return timed or choose(problem, Device(multiprocessors=gpu.multiprocessors(device)))


@lru_cache(maxsize=4096)
def _launch(
    problem: BlocksProblem, tile: BlocksTile, kind: EpilogueKind, multiprocessors: int
) -> BlocksLaunch:
    return launch_of(problem, tile, kind, multiprocessors)

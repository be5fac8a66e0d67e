"""Products with weights of four bits on a GPU: pack a weight once, multiply bf16, fp16, int8 or e4m3 by it.

D[m, n] = activation((A @ W.T)[m, n] · row_scale[m] + bias[n]) + residual[m, n]. `reference` says what a weight is
decoded to; sums are float32. Scales of whole rows, and NVFP4's global scale, multiply the sums.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from quantkit.errors import KernelError
from quantkit.kernels import device as gpu
from quantkit.kernels.epilogue import OUTPUT_BYTES, EpilogueKind
from quantkit.kernels.epilogue_operands import address, contiguous, kind_of, numbers_of, row_factor
from quantkit.kernels.gemm_checks import check_product
from quantkit.kernels.gemm_operands import Epilogue
from quantkit.kernels.gemm_run import aligned
from quantkit.kernels.output import aligned_output, new_output
from quantkit.kernels.w4.choice import Configuration, configuration_of
from quantkit.kernels.w4.launch import (
    FEW_KERNEL,
    FEW_SOURCE,
    KERNEL,
    SOURCE,
    W4FewLaunch,
    W4Launch,
    w4_few_launch_of,
    w4_launch_of,
)
from quantkit.kernels.w4.mma_heuristics import W4MmaTile
from quantkit.kernels.w4.mma_launch import KERNEL as MMA_KERNEL
from quantkit.kernels.w4.mma_launch import SOURCE as MMA_SOURCE
from quantkit.kernels.w4.mma_launch import W4MmaLaunch, w4_mma_launch_of
from quantkit.kernels.w4.operands import PackedWeight4, Workspace4, pack_weight4, upload4, workspace_of
from quantkit.kernels.w4.problem import W4Problem
from quantkit.kernels.w4.tiles import W4Few, W4Tile

__all__ = ["PackedWeight4", "Workspace4", "matmul_w4", "pack_weight4", "upload4"]

# What arrays carry each type of activations: CuPy has no eight-bit floats.
_ACTIVATIONS = {
    "bfloat16": "bfloat16",
    "uint16": "bfloat16",
    "float16": "float16",
    "int8": "int8",
    "uint8": "float8_e4m3fn",
}


def matmul_w4(
    a: Any,
    weight: PackedWeight4,
    *,
    epilogue: Epilogue | None = None,
    out_dtype: str = "bfloat16",
    out: Any = None,
    tile: Configuration | None = None,
    workspace: Workspace4 | None = None,
) -> Any:
    """Return D = a @ weight.T with its epilogue, on the current stream, without waiting for it.

    On sm_90a the kernels are gemm_w4_sm90.cu and gemm_w4_few.cu; on other architectures gemm_w4_mma.cu.

    Args:
        a: [..., k], float16, bfloat16, or uint16 that holds bfloat16; where the weight was packed for it int8, or
            uint8 that holds e4m3.
        weight: what pack_weight4 gave.
        epilogue: nothing but the weight's scale by default.
        out_dtype: bfloat16, float16, float32, int8 or float8_e4m3fn (as uint8).
        out: a C-contiguous array to write, of the right shape and item size.
        tile: instead of the chosen one: W4Tile for gemm_w4_sm90.cu, W4Few for gemm_w4_few.cu, W4MmaTile for
            gemm_w4_mma.cu.
        workspace: for blocks that share tiles; by default one that the stream's calls share. A CUDA graph may run
            beside its own stream, so a captured call shares no tiles unless it is given a workspace, which should be
            its graph's own.

    Raises:
        KernelError: shapes, types or devices that do not fit, a GPU without this kernel, or a workspace too small.
    """
    cupy = gpu.cupy()
    epilogue = epilogue or Epilogue()
    device = gpu.current()
    arch = gpu.architecture(device)
    activations = _ACTIVATIONS.get(str(a.dtype))
    form = weight.layout
    if activations not in form.activations:
        raise KernelError(
            f"matmul: a: {a.dtype} for a weight packed for {' or '.join(form.activations)}; pass that, or pack it "
            "again."
        )
    if arch != "sm_90a" and isinstance(tile, W4Tile | W4Few):
        raise KernelError(f"matmul: a {type(tile).__name__} on {arch}; pass a W4MmaTile, or None.")
    if activations == "float8_e4m3fn" and arch in ("sm_80", "sm_86"):
        raise KernelError(f"matmul: {arch} does not multiply e4m3; pack the weight for bfloat16.")
    if form.promoted and arch != "sm_90a":
        raise KernelError(f"matmul: integers by e4m3 on {arch}; pack the weight for bfloat16 or int8.")
    if out_dtype == "int32":
        raise KernelError("matmul: int32 would hold sums without their scales; take float32.")
    check_product(a, weight.as_operand_of(activations), epilogue, out_dtype, out, device, arch)
    lead, n, k = tuple(a.shape[:-1]), form.n, form.k
    m = int(np.prod(lead, dtype=np.int64))
    if out is None:
        out = new_output(lead, n, out_dtype)
    if m == 0:
        return out
    problem = W4Problem.of(form, m=m, activations=activations, output=out_dtype)
    row_scale, granularity = row_factor(epilogue.row_scale, device)
    kind = kind_of(
        epilogue,
        row_scale=granularity,
        column_scale="each",
    )
    stream = cupy.cuda.get_current_stream()
    cut = workspace is not None or not stream.is_capturing()
    launch = _planned(problem, tile, kind, arch, device, cut)
    target = aligned_output(out)
    rows, pitch = aligned(a.reshape(m, k), cupy)
    vectors = row_scale, weight.scale, contiguous(epilogue.bias), None, None, contiguous(epilogue.residual)
    common = (
        *(address(part) for part in (weight.data, weight.group_scales, weight.zeros, target, *vectors)),
        numbers_of(epilogue),
        np.int32(m),
        np.int32(n),
    )
    macros = tuple(sorted(launch.defines.items()))
    if isinstance(launch, W4MmaLaunch):
        function = gpu.function_of(device, MMA_SOURCE, MMA_KERNEL, macros, launch.shared_bytes)
        if launch.arrivals and workspace is None:
            # A CUDA graph runs the whole kernel, and can neither compile nor load it.
            whole = _planned(problem, tile, kind, arch, device, False)
            defines = tuple(sorted(whole.defines.items()))
            gpu.function_of(device, MMA_SOURCE, MMA_KERNEL, defines, whole.shared_bytes)
        held = workspace_of(device, stream.ptr, launch, workspace) if launch.arrivals else None
        pieces = (0, 0) if held is None else (held.partials.data.ptr, held.arrivals.data.ptr)
        row = np.int32(k * a.dtype.itemsize), np.int64(pitch), np.int32(form.planes)
        arguments: tuple[Any, ...] = (address(rows), *common, *map(np.uint64, pieces), *row)
        function(launch.grid, (launch.block,), arguments, shared_mem=launch.shared_bytes)
    elif isinstance(launch, W4FewLaunch):
        function = gpu.function_of(device, FEW_SOURCE, FEW_KERNEL, macros, launch.shared_bytes)
        map_a = gpu.tensor_map(rows.data.ptr, activations, (m, k), pitch, launch.box)
        arguments = (map_a, *common, np.int32(form.planes))
        function(launch.grid, (launch.block,), arguments, shared_mem=launch.shared_bytes)
    else:
        function = gpu.function_of(device, SOURCE, KERNEL, macros, launch.shared_bytes)
        map_a = gpu.tensor_map(rows.data.ptr, activations, (m, k), pitch, launch.box)
        map_d = map_a
        if launch.tma_store:
            width = OUTPUT_BYTES[out_dtype]
            map_d = gpu.tensor_map(target.data.ptr, out_dtype, (m, n), n * width, launch.output_box)
        held = (
            None if launch.share == launch.extra == 0 else workspace_of(device, stream.ptr, launch, workspace)
        )
        pieces = (0, 0) if held is None else (held.partials.data.ptr, held.arrivals.data.ptr)
        schedule = form.planes, launch.whole, launch.share, launch.extra
        arguments = (map_a, map_d, *common, *map(np.uint64, pieces), *map(np.int32, schedule))
        function((launch.grid,), (launch.block,), arguments, shared_mem=launch.shared_bytes)
    if target is not out:
        out[...] = target
    return out


@lru_cache(maxsize=4096)
def _planned(
    problem: W4Problem,
    tile: Configuration | None,
    kind: EpilogueKind,
    arch: str,
    device: int,
    cut: bool,
) -> W4Launch | W4FewLaunch | W4MmaLaunch:
    tile = tile or configuration_of(problem, kind, arch, device)
    if isinstance(tile, W4MmaTile):
        return w4_mma_launch_of(problem, tile if cut else replace(tile, slices=1), kind)
    if isinstance(tile, W4Few):
        return w4_few_launch_of(problem, tile, kind)
    tile = tile if cut else replace(tile, stream=False)
    return w4_launch_of(problem, tile, kind, gpu.multiprocessors(device))

"""Products of codes with block scales on both sides on sm_120: pack a weight once, multiply such activations by it.

The kernel is compiled and emulated; no GPU has run it yet.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from quantkit.errors import KernelError
from quantkit.formats.quantize import QTensor
from quantkit.kernels import device as gpu
from quantkit.kernels import tuning
from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.epilogue_operands import address, contiguous, kind_of, numbers_of
from quantkit.kernels.gemm_checks import check_product
from quantkit.kernels.gemm_operands import Epilogue, PackedWeight
from quantkit.kernels.gemm_run import aligned
from quantkit.kernels.mma_heuristics import mma_device
from quantkit.kernels.mx.heuristics import MxProblem, MxTile, mx_choose, mx_tile_of
from quantkit.kernels.mx.launch import KERNEL, SOURCE, MxLaunch, mx_launch_of
from quantkit.kernels.mx.layout import format_of, pack_mx, row_bytes, row_scales
from quantkit.kernels.output import aligned_output, meeting_place, new_output
from quantkit.kernels.quantize import QuantizedActivation
from quantkit.kernels.timing_table import key_of

ARCH = "sm_120a"


@dataclass(frozen=True, kw_only=True)
class PackedMxWeight(PackedWeight):
    """A weight in MXFP8, MXFP4 or NVFP4 for products of two such, on the device; as in `layout.PackedMx`.

    data: its codes. scale: float32, the one global scale of NVFP4; None without. format: mxfp8, mxfp4 or nvfp4.
    block_scales: uint8 [n, pitch].
    """

    block_scales: Any


def pack_mx_weight(weight: QTensor, arch: str | None = None) -> PackedMxWeight:
    """Return `weight` [n, k] on the current GPU; what is taken is what `layout.pack_mx` says.

    Raises:
        KernelError: a weight that the kernel has not, or no GPU.
    """
    cupy = gpu.cupy()
    packed = pack_mx(weight)
    held = packed.global_scale
    return PackedMxWeight(
        data=cupy.asarray(packed.codes),
        scale=None if held is None else cupy.asarray(np.array([held], np.float32)),
        n=packed.rows,
        k=packed.k,
        format=packed.format,
        arch=arch or gpu.architecture(gpu.current()),
        block_scales=cupy.asarray(packed.scales),
    )


def matmul_mx(
    a: QuantizedActivation,
    weight: PackedMxWeight,
    *,
    epilogue: Epilogue | None = None,
    out_dtype: str = "bfloat16",
    out: Any = None,
    tile: MxTile | None = None,
) -> Any:
    """Return D = a @ weight.T with its epilogue, on the current stream, without waiting for it.

    Args:
        a: what `quantize_activation` gave for the weight's format. Codes and scales are read as they lie there.
        weight: what pack_mx_weight gave.
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
    lead = tuple(codes.shape[:-1])
    # What `check_product` looks at: an array of k one-byte codes a row, and a weight of such.
    rows_of_k = SimpleNamespace(
        ndim=codes.ndim, shape=(*lead, k), dtype=codes.dtype, itemsize=1, device=codes.device
    )
    plain = PackedWeight(data=weight.data, scale=None, n=n, k=k, format="float8_e4m3fn", arch=weight.arch)
    check_product(rows_of_k, plain, epilogue, out_dtype, out, device, ARCH)
    m = int(np.prod(lead, dtype=np.int64))
    if out is None:
        out = new_output(lead, n, out_dtype)
    if m == 0 or n == 0:
        return out
    row_scale, granularity = _rows(epilogue.row_scale, a.global_scale, device)
    kind = kind_of(
        epilogue,
        row_scale=granularity,
        column_scale="none" if weight.scale is None else "one",
    )
    problem = MxProblem(m=m, n=n, k=k, format=weight.format, output=out_dtype)
    stream = cupy.cuda.get_current_stream()
    launch = _launch(problem, tile, kind, device, stream.is_capturing())
    target = aligned_output(out)
    held, pitch = aligned(codes.reshape(m, -1), cupy)
    scales, scale_pitch = aligned(a.scale.reshape(m, -1), cupy)
    vectors = (
        row_scale, weight.scale, contiguous(epilogue.bias), None, None, contiguous(epilogue.residual)
    )  # fmt: skip
    workspace, arrivals = (0, 0)
    if launch.arrivals:
        workspace, arrivals = meeting_place(device, stream.ptr, launch.partials_bytes, launch.arrivals)
        # A CUDA graph runs the whole kernel, and can neither compile nor load it.
        _function(_launch(problem, tile, kind, device, True), device)
    _function(launch, device)(
        launch.grid,
        (launch.block,),
        (
            *map(address, (held, weight.data, scales, weight.block_scales, target, *vectors)),
            numbers_of(epilogue),
            np.int32(m),
            np.int32(n),
            np.uint64(workspace),
            np.uint64(arrivals),
            np.int32(row_bytes(weight.format, k)),
            np.int32(row_scales(weight.format, k)),
            *(np.int64(p) for p in (pitch, weight.data.shape[1], scale_pitch, weight.block_scales.shape[1])),
        ),
        shared_mem=launch.shared_bytes,
    )
    if target is not out:
        out[...] = target
    return out


def _function(launch: MxLaunch, device: int) -> Any:
    return gpu.function_of(device, SOURCE, KERNEL, tuple(sorted(launch.defines.items())), launch.shared_bytes)


def _check(a: Any, weight: PackedMxWeight, out_dtype: str, device: int) -> None:
    arch = gpu.architecture(device)
    if arch != ARCH:
        raise KernelError(f"matmul: no kernel for {weight.format} on both sides on {arch}; it needs {ARCH}.")
    if not isinstance(a, QuantizedActivation):
        raise KernelError(
            "matmul: a weight with block scales wants activations with theirs; pass what quantize_activation gave."
        )
    if a.spec.dynamic != "block" or format_of(a.spec) != weight.format:
        raise KernelError(
            f"matmul: activations in {a.spec} for a weight in {weight.format}; quantize them alike."
        )
    if a.codes.shape[-1] != row_bytes(weight.format, weight.k):
        raise KernelError(
            f"matmul: a: rows of {a.codes.shape[-1]} bytes; the weight's k = {weight.k} takes "
            f"{row_bytes(weight.format, weight.k)}."
        )
    if out_dtype == "int32":
        raise KernelError("matmul: int32 would hold sums without their scales; take float32.")


@lru_cache(maxsize=4096)
def _launch(
    problem: MxProblem, tile: MxTile | None, kind: EpilogueKind, device: int, captured: bool
) -> MxLaunch:
    """With the tile given, or timed fastest, or modelled fastest.

    Slices of K meet in memory that belongs to the stream. A CUDA graph may run beside its own stream, so captured
    launches are not sliced.
    """
    if tile is None:
        model = mma_device(ARCH, gpu.multiprocessors(device))
        entry = tuning.best_entry(key_of(KERNEL, problem.as_key(), kind), device)
        timed = None if entry is None else mx_tile_of(entry.configuration, problem, model)
        tile = timed or mx_choose(problem, model)
    return mx_launch_of(problem, replace(tile, slices=1) if captured else tile, kind)


def _rows(factor: Any, global_scale: Any, device: int) -> tuple[Any, str]:
    """Return what rows are multiplied by, the epilogue's factor times the activations' global scale, on the device."""
    if isinstance(factor, int | float):
        factor = gpu.scalar(device, factor)
    if factor is None or global_scale is None:
        found = factor if global_scale is None else global_scale
    else:
        found = factor * global_scale
    if found is None:
        return None, "none"
    return contiguous(found), "one" if found.size == 1 else "each"

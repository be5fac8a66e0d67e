"""Products with weights of four bits on a GPU: pack a weight once, multiply bf16, fp16 or int8 by it.

D[m, n] = activation((A @ W.T)[m, n] · row_scale[m] + bias[n]) + residual[m, n]. `reference` says what a weight is
decoded to; sums are float32. Scales of whole rows, and NVFP4's global scale, multiply the sums.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from quantkit.errors import KernelError
from quantkit.formats.quantize import QTensor
from quantkit.kernels import device as gpu
from quantkit.kernels.epilogue import OUTPUT_BYTES, EpilogueKind, EpilogueValues
from quantkit.kernels.gemm_checks import check_product, residual_type
from quantkit.kernels.gemm_operands import Epilogue, PackedWeight
from quantkit.kernels.gemm_run import aligned
from quantkit.kernels.heuristics import Device
from quantkit.kernels.mma_heuristics import mma_device
from quantkit.kernels.w4.heuristics import W4Few, W4Problem, W4Tile, w4_choose
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
from quantkit.kernels.w4.layout import Layout4, Packed4, pack4
from quantkit.kernels.w4.mma_heuristics import W4MmaTile, w4_mma_choose
from quantkit.kernels.w4.mma_launch import KERNEL as MMA_KERNEL
from quantkit.kernels.w4.mma_launch import SOURCE as MMA_SOURCE
from quantkit.kernels.w4.mma_launch import W4MmaLaunch, w4_mma_launch_of

_ACTIVATIONS = {"bfloat16": "bfloat16", "uint16": "bfloat16", "float16": "float16", "int8": "int8"}


@dataclass(frozen=True, kw_only=True)
class PackedWeight4:
    """A weight of four bits laid out for the kernels, the same for all of them, on the device.

    codes, scales, zeros, channel_scale: as in `layout.Packed4`.
    """

    layout: Layout4
    codes: Any
    scales: Any
    zeros: Any
    channel_scale: Any
    arch: str

    @property
    def n(self) -> int:
        """Rows: columns of D."""
        return self.layout.n

    @property
    def k(self) -> int:
        """Columns along which products are summed."""
        return self.layout.k


class Workspace4:
    """Memory on the current GPU in which blocks that share a tile leave their sums. One launch at a time may use it.

    size_bytes: for sums; 64 MB are enough for every tile on 132 multiprocessors. counters: one for each tile that is
    shared, and consumer.
    """

    def __init__(self, size_bytes: int = 64 << 20, counters: int = 1 << 14) -> None:
        cupy = gpu.cupy()
        self.partials = cupy.empty(size_bytes, np.uint8)
        self.arrivals = cupy.zeros(counters, np.uint32)

    def holds(self, launch: W4Launch | W4MmaLaunch) -> bool:
        """Return whether a launch fits."""
        return bool(self.partials.nbytes >= launch.partials_bytes and self.arrivals.size >= launch.arrivals)


def pack_weight4(
    weight: QTensor, *, scale_type: str | None = None, activation_bits: int = 16, arch: str | None = None
) -> PackedWeight4:
    """Return `weight` [n, k] on the current GPU; what is taken, and how, is what `layout.pack4` says.

    Raises:
        KernelError: a weight that the kernels have not, or no GPU.
    """
    return upload4(pack4(weight, scale_type=scale_type, activation_bits=activation_bits), arch=arch)


def upload4(packed: Packed4, *, arch: str | None = None) -> PackedWeight4:
    """Return a packed weight on the current GPU."""
    cupy = gpu.cupy()
    scales, zeros = (None if part is None else cupy.asarray(part) for part in (packed.scales, packed.zeros))
    return PackedWeight4(
        layout=packed.layout,
        codes=cupy.asarray(packed.codes),
        scales=scales,
        zeros=zeros,
        channel_scale=cupy.asarray(packed.channel_scale),
        arch=arch or gpu.architecture(int(cupy.cuda.Device().id)),
    )


def matmul_w4(
    a: Any,
    weight: PackedWeight4,
    *,
    epilogue: Epilogue | None = None,
    out_dtype: str = "bfloat16",
    out: Any = None,
    tile: W4Tile | W4Few | W4MmaTile | None = None,
    workspace: Workspace4 | None = None,
) -> Any:
    """Return D = a @ weight.T with its epilogue, on the current stream, without waiting for it.

    On sm_90a the kernels are gemm_w4_sm90.cu and gemm_w4_few.cu; on other architectures gemm_w4_mma.cu.

    Args:
        a: [..., k], float16, bfloat16, uint16 that holds bfloat16, or int8 where the weight was packed for it.
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
    device = int(cupy.cuda.Device().id)
    arch = gpu.architecture(device)
    activations = _ACTIVATIONS.get(str(a.dtype))
    if activations is None:
        raise KernelError(f"matmul_w4: activations of {a.dtype}; pass bfloat16, float16 or int8.")
    if arch != "sm_90a" and isinstance(tile, W4Tile | W4Few):
        raise KernelError(f"matmul_w4: a {type(tile).__name__} on {arch}; pass a W4MmaTile, or None.")
    form = weight.layout
    if 8 * a.dtype.itemsize != form.activation_bits:
        raise KernelError(
            f"matmul_w4: {a.dtype} for a weight packed for activations of {form.activation_bits} bits; pack it again."
        )
    if out_dtype == "int32":
        raise KernelError("matmul_w4: int32 would hold sums without their scales; take float32.")
    stands_for = PackedWeight(
        data=weight.codes, scale=None, n=form.n, k=form.k, format=activations, arch=weight.arch
    )
    check_product(a, stands_for, epilogue, out_dtype, out, device, arch)
    lead, n, k = tuple(a.shape[:-1]), form.n, form.k
    m = int(np.prod(lead, dtype=np.int64))
    if out is None:
        carrier = (
            ml_dtypes.bfloat16 if out_dtype == "bfloat16" else out_dtype.replace("float8_e4m3fn", "uint8")
        )
        out = cupy.empty((*lead, n), np.dtype(carrier))
    if m == 0:
        return out
    problem = W4Problem(
        m=m, n=n, k=k, activations=activations, output=out_dtype, codes=form.codes, group=form.group,
        scales=form.scales, zeros=form.zeros,
    )  # fmt: skip
    row_scale, granularity = _rows(epilogue.row_scale, device)
    kind = EpilogueKind(
        row_scale=granularity,
        column_scale="each",
        bias=epilogue.bias is not None,
        activation=epilogue.activation or "none",
        residual="none" if epilogue.residual is None else "before" if epilogue.residual_first else "after",
        residual_type="bfloat16" if epilogue.residual is None else residual_type(epilogue.residual),
        output_zero_point=epilogue.output_zero_point != 0,
    )
    stream = cupy.cuda.get_current_stream()
    cut = workspace is not None or not stream.is_capturing()
    launch = _planned(problem, tile, kind, arch, gpu.multiprocessors(device), cut)
    target = out if out.data.ptr % 16 == 0 else cupy.empty((*lead, n), out.dtype)
    rows, pitch = aligned(a.reshape(m, k), cupy)
    vectors = (
        row_scale, weight.channel_scale, _plain(epilogue.bias), None, None, _plain(epilogue.residual)
    )  # fmt: skip
    common = (
        *(_address(part) for part in (weight.codes, weight.scales, weight.zeros, target, *vectors)),
        _values(epilogue),
        np.int32(m),
        np.int32(n),
    )
    macros = tuple(sorted(launch.defines.items()))
    if isinstance(launch, W4MmaLaunch):
        function = gpu.function_of(device, MMA_SOURCE, MMA_KERNEL, macros, launch.shared_bytes)
        held = _workspace(device, stream.ptr, launch, workspace) if launch.arrivals else None
        pieces = (0, 0) if held is None else (held.partials.data.ptr, held.arrivals.data.ptr)
        row = np.int32(k * a.dtype.itemsize), np.int64(pitch), np.int32(form.slabs)
        arguments: tuple[Any, ...] = (_address(rows), *common, *map(np.uint64, pieces), *row)
        function(launch.grid, (launch.block,), arguments, shared_mem=launch.shared_bytes)
    elif isinstance(launch, W4FewLaunch):
        function = gpu.function_of(device, FEW_SOURCE, FEW_KERNEL, macros, launch.shared_bytes)
        map_a = gpu.tensor_map(rows.data.ptr, activations, (m, k), pitch, launch.box)
        arguments = (map_a, *common, np.int32(form.slabs))
        function(launch.grid, (launch.block,), arguments, shared_mem=launch.shared_bytes)
    else:
        function = gpu.function_of(device, SOURCE, KERNEL, macros, launch.shared_bytes)
        map_a = gpu.tensor_map(rows.data.ptr, activations, (m, k), pitch, launch.box)
        map_d = map_a
        if launch.tma_store:
            width = OUTPUT_BYTES[out_dtype]
            map_d = gpu.tensor_map(target.data.ptr, out_dtype, (m, n), n * width, launch.output_box)
        held = (
            None if launch.share == launch.extra == 0 else _workspace(device, stream.ptr, launch, workspace)
        )
        pieces = (0, 0) if held is None else (held.partials.data.ptr, held.arrivals.data.ptr)
        schedule = form.slabs, launch.whole, launch.share, launch.extra
        arguments = (map_a, map_d, *common, *map(np.uint64, pieces), *map(np.int32, schedule))
        function((launch.grid,), (launch.block,), arguments, shared_mem=launch.shared_bytes)
    if target is not out:
        out[...] = target
    return out


@lru_cache(maxsize=4096)
def _planned(
    problem: W4Problem,
    tile: W4Tile | W4Few | W4MmaTile | None,
    kind: EpilogueKind,
    arch: str,
    multiprocessors: int,
    cut: bool,
) -> W4Launch | W4FewLaunch | W4MmaLaunch:
    if tile is None and arch != "sm_90a":
        tile = w4_mma_choose(problem, mma_device(arch, multiprocessors))
    tile = tile or w4_choose(problem, Device(multiprocessors=multiprocessors))
    if isinstance(tile, W4MmaTile):
        return w4_mma_launch_of(problem, tile if cut else replace(tile, slices=1), kind)
    if isinstance(tile, W4Few):
        return w4_few_launch_of(problem, tile, kind)
    return w4_launch_of(problem, tile if cut else replace(tile, stream=False), kind, multiprocessors)


# Of each device and stream. The counters of a workspace are zero between launches.
_workspaces: dict[tuple[int, int], Workspace4] = {}


def _workspace(
    device: int, stream: int, launch: W4Launch | W4MmaLaunch, given: Workspace4 | None
) -> Workspace4:
    if given is not None:
        if not given.holds(launch):
            raise KernelError(
                f"workspace: {given.partials.nbytes} bytes and {given.arrivals.size} counters; this product takes "
                f"{launch.partials_bytes} and {launch.arrivals}."
            )
        return given
    held = _workspaces.get((device, stream))
    if held is None or not held.holds(launch):
        # What it replaces goes back to the pool of this stream, whose next use comes after the launches before.
        held = Workspace4(max(launch.partials_bytes, 1 << 20), max(launch.arrivals, 1 << 12))
        _workspaces[device, stream] = held
    return held


def _address(array: Any) -> np.uint64:
    return np.uint64(0 if array is None else array.data.ptr)


@lru_cache(maxsize=1024)
def _packed(values: EpilogueValues) -> np.void:
    return values.packed()


def _values(epilogue: Epilogue) -> np.void:
    low, high = epilogue.clip or (0.0, 0.0)
    return _packed(
        EpilogueValues(
            low=low,
            high=high,
            scale=epilogue.output_scale,
            zero_point=epilogue.output_zero_point,
            residual_scale=epilogue.residual_scale,
            residual_zero_point=epilogue.residual_zero_point,
        )
    )


def _rows(factor: Any, device: int) -> tuple[Any, str]:
    """Return a factor of rows as an array on the device, and its granularity."""
    if factor is None:
        return None, "none"
    if isinstance(factor, int | float):
        return gpu.scalar(device, factor), "one"
    return _plain(factor), "one" if factor.size == 1 else "each"


def _plain(array: Any) -> Any:
    """Return an array whose elements follow each other from a multiple of 16 bytes on, a copy if they did not."""
    if array is None or (array.flags.c_contiguous and array.data.ptr % 16 == 0):
        return array
    return array.copy(order="C")

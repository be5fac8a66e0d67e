"""Products with weights of four bits on a Hopper GPU: pack a weight once, multiply bf16 or fp16 activations by it.

D[m, n] = activation((A @ W.T)[m, n] · row_scale[m] + bias[n]). A weight's value is rounded once, to A's type, where it
is decoded: (q − zero) · scale of integers; values of NVFP4 and MXFP4 are exact (fp16 loses what lies 2^-24 below a
row's largest scale). Sums are float32. Scales of whole rows, and NVFP4's global scale, multiply the sums.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from quantkit.errors import KernelError
from quantkit.formats.quantize import QTensor
from quantkit.kernels import device as gpu
from quantkit.kernels.compile import compile_kernel
from quantkit.kernels.epilogue import OUTPUT_BYTES, EpilogueKind, EpilogueValues
from quantkit.kernels.gemm import Epilogue
from quantkit.kernels.heuristics import Device
from quantkit.kernels.w4_heuristics import W4Few, W4Problem, W4Tile, w4_choose
from quantkit.kernels.w4_launch import (
    FEW_KERNEL,
    FEW_SOURCE,
    KERNEL,
    SOURCE,
    W4FewLaunch,
    W4Launch,
    w4_few_launch_of,
    w4_launch_of,
)
from quantkit.kernels.w4_layout import Layout4, Packed4, pack4

_ACTIVATIONS = {"bfloat16": "bfloat16", "uint16": "bfloat16", "float16": "float16"}
_OUTPUTS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class PackedWeight4:
    """A weight of four bits laid out for gemm_w4_sm90.cu, on the device.

    codes, scales, zeros, channel_scale: as in `w4_layout.Packed4`.
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


def pack_weight4(weight: QTensor, *, scale_type: str | None = None, arch: str | None = None) -> PackedWeight4:
    """Return `weight` [n, k] on the current GPU; what is taken, and `scale_type`, are those of `w4_layout.pack4`.

    Raises:
        KernelError: a weight that the kernel has not, or no GPU.
    """
    return upload4(pack4(weight, scale_type=scale_type), arch=arch)


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
    tile: W4Tile | W4Few | None = None,
) -> Any:
    """Return D = a @ weight.T on the current stream, without waiting for it.

    a: [..., k], float16, bfloat16, or uint16 that holds bfloat16. out_dtype: bfloat16, float16 or float32.
    out: a C-contiguous array to write, of the right shape and item size. tile: instead of the chosen one.
    Calls on one stream share a workspace, and so do all graphs of a device that hold such calls: two of these must not
    run at the same time. A call is captured only after one of its size was made.

    Raises:
        KernelError: shapes, types or devices that do not fit, or a GPU without this kernel.
    """
    cupy = gpu.cupy()
    epilogue = epilogue or Epilogue()
    device = int(cupy.cuda.Device().id)
    _check(a, weight, epilogue, out_dtype, device)
    lead, n, k = tuple(a.shape[:-1]), weight.n, weight.k
    m = int(np.prod(lead, dtype=np.int64))
    if out is None:
        out = cupy.empty((*lead, n), np.dtype(ml_dtypes.bfloat16 if out_dtype == "bfloat16" else out_dtype))
    elif out.size != m * n or out.itemsize != OUTPUT_BYTES[out_dtype] or not out.flags.c_contiguous:
        raise KernelError(f"out: {out.shape} {out.dtype} is not a contiguous ({m}, {n}) array of {out_dtype}.")
    if m == 0:
        return out
    rows, pitch = _aligned(a.reshape(m, k), cupy)
    row_scale, granularity = _vector(epilogue.row_scale, device)
    kind = EpilogueKind(
        row_scale=granularity,
        column_scale="each",
        bias=epilogue.bias is not None,
        activation=epilogue.activation or "none",
    )
    form = weight.layout
    activations = _ACTIVATIONS[str(a.dtype)]
    problem = W4Problem(
        m=m, n=n, k=k, activations=activations, output=out_dtype, codes=form.codes, group=form.group,
        scales=form.scales, zeros=form.zeros,
    )  # fmt: skip
    launch = _planned(problem, tile, kind, gpu.multiprocessors(device))
    map_a = gpu.tensor_map(rows.data.ptr, activations, (m, k), pitch, launch.box)
    pointers = [
        0 if array is None else array.data.ptr for array in (row_scale, weight.channel_scale, epilogue.bias)
    ]
    held = [0 if array is None else array.data.ptr for array in (weight.codes, weight.scales, weight.zeros)]
    common = (
        *map(np.uint64, held),
        np.uint64(out.data.ptr),
        *map(np.uint64, pointers),
        np.uint64(0),
        np.uint64(0),
        np.uint64(0),
        EpilogueValues().packed(),
        np.int32(m),
        np.int32(n),
    )
    if isinstance(launch, W4FewLaunch):
        grid: tuple[int, ...] = launch.grid
        arguments: tuple[Any, ...] = (map_a, *common, np.int32(form.slabs))
    else:
        grid = (launch.grid,)
        map_d = map_a
        if launch.tma_store:
            width = OUTPUT_BYTES[out_dtype]
            map_d = gpu.tensor_map(out.data.ptr, out_dtype, (m, n), n * width, launch.output_box)
        partials, arrivals = _workspace(device, cupy.cuda.get_current_stream().ptr, launch)
        pieces = np.uint64(partials.data.ptr), np.uint64(arrivals.data.ptr)
        shares = launch.whole, launch.share, launch.extra
        arguments = (map_a, map_d, *common, *pieces, np.int32(form.slabs), *map(np.int32, shares))
    function = _function(
        device, isinstance(launch, W4FewLaunch), tuple(sorted(launch.defines.items())), launch.shared_bytes
    )
    function(grid, (launch.block,), arguments, shared_mem=launch.shared_bytes)
    return out


@lru_cache(maxsize=4096)
def _planned(
    problem: W4Problem, tile: W4Tile | W4Few | None, kind: EpilogueKind, multiprocessors: int
) -> W4Launch | W4FewLaunch:
    tile = tile or w4_choose(problem, Device(multiprocessors=multiprocessors))
    if isinstance(tile, W4Few):
        return w4_few_launch_of(problem, tile, kind)
    return w4_launch_of(problem, tile, kind, multiprocessors)


@lru_cache(maxsize=1024)
def _function(device: int, few: bool, defines: tuple[tuple[str, str | int], ...], shared_bytes: int) -> Any:
    source = FEW_SOURCE if few else SOURCE
    built = compile_kernel(source, arch=gpu.architecture(device), defines=dict(defines))
    function = gpu.cupy().RawModule(path=str(built.cubin)).get_function(FEW_KERNEL if few else KERNEL)
    function.max_dynamic_shared_size_bytes = shared_bytes
    return function


# Of each device and stream: room for sums of pieces, and counters that are zero between launches. Nothing can be
# allocated while a graph is captured, so what captures use is made beside what plain calls use. Outgrown ones are kept:
# captured graphs may still use them.
_WORKSPACES: dict[tuple[int, int], list[tuple[Any, Any]]] = {}
_CAPTURES = -1


def _workspace(device: int, stream: int, launch: W4Launch) -> tuple[Any, Any]:
    cupy = gpu.cupy()
    capturing = bool(cupy.cuda.runtime.streamIsCapturing(stream))
    found = _fitting(device, _CAPTURES if capturing else stream, launch)
    if found is not None:
        return found
    if capturing:
        raise KernelError("matmul_w4: no workspace yet for a captured product of this size; call it once before.")
    for key in {stream, _CAPTURES}:
        if _fitting(device, key, launch) is None:
            size, count = max(launch.partials_bytes, 1 << 20), max(launch.arrivals, 1 << 12)
            parts = cupy.empty(size, np.uint8), cupy.zeros(count, np.uint32)
            _WORKSPACES.setdefault((device, key), []).append(parts)
    found = _fitting(device, stream, launch)
    assert found is not None
    return found


def _fitting(device: int, key: int, launch: W4Launch) -> tuple[Any, Any] | None:
    for partials, arrivals in _WORKSPACES.get((device, key), ()):
        if partials.nbytes >= launch.partials_bytes and arrivals.size >= launch.arrivals:
            return partials, arrivals
    return None


def _check(a: Any, weight: PackedWeight4, epilogue: Epilogue, out_dtype: str, device: int) -> None:
    arch = gpu.architecture(device)
    m = int(np.prod(a.shape[:-1], dtype=np.int64))
    scale, bias = epilogue.row_scale, epilogue.bias
    complaints = [
        (arch != "sm_90a", f"GPU {device} is {arch}; this kernel runs on sm_90a"),
        (
            weight.arch != arch,
            f"the weight was packed for {weight.arch}, GPU {device} is {arch}; pack it again",
        ),
        (a.ndim < 1 or a.shape[-1] != weight.k, f"a: {a.shape} does not end in the weight's k = {weight.k}"),
        (str(a.dtype) not in _ACTIVATIONS, f"a: {a.dtype}; pass bfloat16 or float16"),
        (out_dtype not in _OUTPUTS, f"out_dtype {out_dtype!r}; one of {', '.join(_OUTPUTS)}"),
        (
            scale is not None
            and not isinstance(scale, float)
            and (scale.size not in (1, m) or scale.dtype != np.float32),
            f"row_scale: {getattr(scale, 'size', 0)} values; float32, one or {m}",
        ),
        (
            bias is not None and (bias.size != weight.n or bias.dtype != np.float32),
            f"bias: {getattr(bias, 'size', 0)} values; float32, {weight.n}",
        ),
    ]
    for wrong, complaint in complaints:
        if wrong:
            raise KernelError(f"matmul_w4: {complaint}.")


def _aligned(a: Any, cupy: Any) -> tuple[Any, int]:
    """Return `a` with rows that start at multiples of 16 bytes, a copy if they did not, and the pitch in bytes."""
    m, k = a.shape
    pitch = int(a.strides[0]) if m > 1 else -(-k * a.itemsize // 16) * 16
    if int(a.strides[1]) == a.itemsize and pitch % 16 == 0 and a.data.ptr % 16 == 0:
        return a, pitch
    pitch = -(-k * a.itemsize // 16) * 16
    padded = cupy.empty((m, pitch // a.itemsize), a.dtype)
    padded[:, :k] = a
    return padded, pitch


def _vector(scale: Any, device: int) -> tuple[Any, str]:
    if scale is None:
        return None, "none"
    if isinstance(scale, float):
        return gpu.scalar(device, scale), "one"
    return scale, "one" if scale.size == 1 else "each"

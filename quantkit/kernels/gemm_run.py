"""Launch one product on CuPy's current stream: gemm_sm90.cu or gemm_mma.cu with the arguments that they take."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from quantkit.kernels import device as gpu
from quantkit.kernels import mma_launch
from quantkit.kernels.epilogue import OUTPUT_BYTES, EpilogueKind
from quantkit.kernels.gemm_launch import Launch, launch_of
from quantkit.kernels.heuristics import Problem, Tile
from quantkit.kernels.mma_heuristics import MmaTile
from quantkit.kernels.output import meeting_place


@dataclass(frozen=True, kw_only=True)
class Call:
    """A product whose operands are checked and aligned.

    a: [m, k], rows at multiples of 16 bytes, and its pitch in bytes. weight: [n, pitch]. vectors: row scale, column
    scale, bias, zero point, sums of the weight's codes, residual; None where there is none. values: the epilogue's.
    """

    a: tuple[Any, int]
    weight: Any
    out: Any
    vectors: tuple[Any, ...]
    values: np.void
    problem: Problem
    kind: EpilogueKind
    device: int

    def epilogue_arguments(self) -> tuple[Any, ...]:
        """Return what EPILOGUE_PARAMETERS of epilogue.h lists."""
        pointers = (np.uint64(0 if array is None else array.data.ptr) for array in self.vectors)
        return *pointers, self.values, np.int32(self.problem.m), np.int32(self.problem.n)


def aligned(a: Any, cupy: Any) -> tuple[Any, int]:
    """Return `a` with rows that start at multiples of 16 bytes, a copy if they did not, and the pitch in bytes."""
    m, k = a.shape
    pitch = int(a.strides[0]) if m > 1 else -(-k * a.itemsize // 16) * 16
    if int(a.strides[1]) == a.itemsize and pitch > 0 and pitch % 16 == 0 and a.data.ptr % 16 == 0:
        return a, pitch
    pitch = -(-k * a.itemsize // 16) * 16
    padded = cupy.empty((m, pitch // a.itemsize), a.dtype)
    padded[:, :k] = a
    return padded, pitch


@lru_cache(maxsize=4096)
def _launch(problem: Problem, tile: Tile, kind: EpilogueKind, multiprocessors: int) -> Launch:
    return launch_of(problem, tile, kind, multiprocessors)


@lru_cache(maxsize=4096)
def load_sm90(problem: Problem, tile: Tile, kind: EpilogueKind, device: int) -> None:
    """Compile and load a kernel that a CUDA graph may capture later, which allows neither."""
    gpu.kernel_of(_launch(problem, tile, kind, gpu.multiprocessors(device)), device)


@lru_cache(maxsize=4096)
def load_mma(problem: Problem, tile: MmaTile, kind: EpilogueKind, arch: str, device: int) -> None:
    """Compile and load a kernel that a CUDA graph may capture later, which allows neither."""
    _mma_function(mma_launch.launch_of(problem, tile, kind, arch), device)


def run_sm90(call: Call, tile: Tile) -> None:
    """Launch gemm_sm90.cu.

    Shares of stream-K meet in memory that belongs to the stream. A CUDA graph may run beside its own stream, so
    captured launches have none.
    """
    cupy, problem, (a, pitch) = gpu.cupy(), call.problem, call.a
    stream = None
    if tile.stream:
        stream, whole = cupy.cuda.get_current_stream(), replace(tile, stream=False)
        if stream.is_capturing():
            tile = whole
        else:
            load_sm90(problem, whole, call.kind, call.device)
    launch = _launch(problem, tile, call.kind, gpu.multiprocessors(call.device))
    operands = [
        (a.data.ptr, (problem.m, problem.k), pitch),
        (call.weight.data.ptr, (problem.n, problem.k), int(call.weight.shape[1])),
    ]
    if launch.swap:
        operands.reverse()
    maps = [
        gpu.tensor_map(address, problem.format, shape, step, box)
        for (address, shape, step), box in zip(operands, (launch.first_box, launch.second_box), strict=True)
    ]
    to, stored = call.out.data.ptr, maps[0]
    if launch.tma_store:
        row = problem.n * OUTPUT_BYTES[problem.output]
        shape = problem.m, problem.n
        stored = gpu.tensor_map(to, problem.output, shape, row, launch.output_box, launch.output_swizzle)
    arguments = (*maps, stored, np.uint64(to), np.int32(problem.row_bytes), *call.epilogue_arguments())
    if launch.shares is not None and stream is not None:
        places = meeting_place(call.device, stream.ptr, launch.piece_bytes, launch.arrivals)
        arguments += (*map(np.uint64, places), *launch.share_arguments())
    gpu.kernel_of(launch, call.device)(
        (launch.grid,), (launch.block,), arguments, shared_mem=launch.shared_bytes
    )


def run_mma(call: Call, tile: MmaTile, arch: str) -> None:
    """Launch gemm_mma.cu.

    Slices of K meet in memory that belongs to the stream. A CUDA graph may run beside its own stream, so captured
    launches are not sliced.
    """
    cupy, (a, pitch) = gpu.cupy(), call.a
    stream = cupy.cuda.get_current_stream()
    if tile.slices > 1:
        whole = replace(tile, slices=1)
        if stream.is_capturing():
            tile = whole
        else:
            load_mma(call.problem, whole, call.kind, arch, call.device)
    launch = mma_launch.launch_of(call.problem, tile, call.kind, arch)
    workspace, arrivals = 0, 0
    if launch.arrivals:
        workspace, arrivals = meeting_place(call.device, stream.ptr, launch.workspace_bytes, launch.arrivals)
    _mma_function(launch, call.device)(
        launch.grid,
        (launch.block,),
        (
            *(np.uint64(array.data.ptr) for array in (a, call.weight, call.out)),
            *call.epilogue_arguments(),
            np.uint64(workspace),
            np.uint64(arrivals),
            np.int32(call.problem.k * a.itemsize),
            np.int64(pitch),
            np.int64(call.weight.shape[1]),
        ),
        shared_mem=launch.shared_bytes,
    )


def _mma_function(launch: mma_launch.MmaLaunch, device: int) -> Any:
    defines = tuple(sorted(launch.defines.items()))
    return gpu.function_of(device, mma_launch.SOURCE, mma_launch.KERNEL, defines, launch.shared_bytes)

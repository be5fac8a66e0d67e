"""gemm_sm90.cu on the CPU: the launch that a GPU would get, in the emulator."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.kernels.emulated_operands import (
    MULTIPROCESSORS,
    empty_output,
    epilogue_arguments,
    granularity,
    kind_of,
    map_of_output,
    map_of_rows,
    pitched,
)
from quantkit.kernels.emulator import Mode, load
from quantkit.kernels.gemm_launch import KERNEL, SOURCE, launch_of
from quantkit.kernels.heuristics import Problem, Tile


def emulated_gemm(
    a: NDArray[Any],
    b: NDArray[Any],
    problem: Problem,
    tile: Tile,
    *,
    row_scale: NDArray[np.float32] | None = None,
    column_scale: NDArray[np.float32] | None = None,
    bias: NDArray[np.float32] | None = None,
    relu: bool = False,
    mode: Mode = Mode.EAGER,
) -> NDArray[Any]:
    """Return D[m, n] = relu(a[m, k] @ b[n, k].T · row_scale · column_scale + bias) of the emulated kernel.

    Raises:
        KernelError: no C++ compiler here, or the kernel broke a rule.
    """
    kind = kind_of(granularity(row_scale), granularity(column_scale), bias, relu)
    launch = launch_of(problem, tile, kind, MULTIPROCESSORS)
    operands = [pitched(a), pitched(b)]
    if launch.swap:
        operands.reverse()
    d = empty_output(problem.m, problem.n, problem.output)
    boxes = launch.first_box, launch.second_box
    maps = [map_of_rows(array, problem.k, box) for array, box in zip(operands, boxes, strict=True)]
    stored = map_of_output(d, launch.output_box, launch.output_swizzle) if launch.tma_store else maps[0]
    shared: tuple[Any, ...] = ()
    if launch.shares is not None:
        shared = np.zeros(launch.piece_bytes, np.uint8), np.zeros(launch.arrivals, np.uint32)
        shared += launch.share_arguments()
    load(SOURCE, KERNEL, launch.defines).launch(
        *maps,
        stored,
        d,
        np.int32(problem.row_bytes),
        *epilogue_arguments(row_scale, column_scale, bias, problem.m, problem.n),
        *shared,
        grid=launch.grid,
        block=launch.block,
        cluster=launch.cluster,
        shared_bytes=launch.shared_bytes,
        mode=mode,
        multiprocessors=MULTIPROCESSORS,
    )
    return d

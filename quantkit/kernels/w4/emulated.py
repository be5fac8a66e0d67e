"""The kernels for weights of four bits on the CPU: the launch that a GPU would get, in the emulator."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.kernels.emulated_operands import (
    MULTIPROCESSORS,
    UNUSED,
    empty_output,
    epilogue_arguments,
    granularity,
    kind_of,
    map_of_output,
    map_of_rows,
    pitched,
)
from quantkit.kernels.emulator import Mode, load
from quantkit.kernels.w4.launch import (
    FEW_KERNEL,
    FEW_SOURCE,
    KERNEL,
    SOURCE,
    w4_few_launch_of,
    w4_launch_of,
)
from quantkit.kernels.w4.layout import Packed4
from quantkit.kernels.w4.mma_heuristics import W4MmaTile
from quantkit.kernels.w4.mma_launch import KERNEL as MMA_KERNEL
from quantkit.kernels.w4.mma_launch import SOURCE as MMA_SOURCE
from quantkit.kernels.w4.mma_launch import w4_mma_launch_of
from quantkit.kernels.w4.problem import W4Problem
from quantkit.kernels.w4.tiles import W4Few, W4Tile


def emulated_w4(
    a: NDArray[Any],
    packed: Packed4,
    problem: W4Problem,
    tile: W4Tile | W4Few | W4MmaTile,
    *,
    row_scale: NDArray[np.float32] | None = None,
    bias: NDArray[np.float32] | None = None,
    relu: bool = False,
    mode: Mode = Mode.EAGER,
) -> NDArray[Any]:
    """Return D[m, n] = relu(a[m, k] @ W[n, k].T · row_scale + bias) of the emulated kernel that the tile is of.

    Raises:
        KernelError: no C++ compiler here, or the kernel broke a rule.
    """
    m, k = a.shape
    form = packed.layout
    kind = kind_of(granularity(row_scale), "each", bias, relu)
    padded = pitched(a)
    d = empty_output(m, form.n, problem.output)
    weights = [UNUSED if part is None else part for part in (packed.codes, packed.scales, packed.zeros)]
    epilogue = epilogue_arguments(row_scale, packed.channel_scale, bias, m, form.n)
    if isinstance(tile, W4MmaTile):
        universal = w4_mma_launch_of(problem, tile, kind)
        load(MMA_SOURCE, MMA_KERNEL, universal.defines).launch(
            padded,
            *weights,
            d,
            *epilogue,
            np.zeros(max(universal.partials_bytes, 16), np.uint8),
            np.zeros(max(universal.arrivals, 4), np.uint32),
            np.int32(k * a.itemsize),
            np.int64(padded.strides[0]),
            np.int32(form.planes),
            grid=universal.grid,
            block=universal.block,
            shared_bytes=universal.shared_bytes,
            mode=mode,
            multiprocessors=MULTIPROCESSORS,
        )
        return d
    if isinstance(tile, W4Few):
        few = w4_few_launch_of(problem, tile, kind)
        load(FEW_SOURCE, FEW_KERNEL, few.defines).launch(
            map_of_rows(padded, k, few.box),
            *weights,
            d,
            *epilogue,
            np.int32(form.planes),
            grid=few.grid,
            block=few.block,
            cluster=few.cluster,
            shared_bytes=few.shared_bytes,
            mode=mode,
            multiprocessors=MULTIPROCESSORS,
        )
        return d
    launch = w4_launch_of(problem, tile, kind, MULTIPROCESSORS)
    map_a = map_of_rows(padded, k, launch.box)
    stored = map_of_output(d, launch.output_box) if launch.tma_store else map_a
    load(SOURCE, KERNEL, launch.defines).launch(
        map_a,
        stored,
        *weights,
        d,
        *epilogue,
        np.zeros(max(launch.partials_bytes, 16), np.uint8),
        np.zeros(max(launch.arrivals, 4), np.uint32),
        np.int32(form.planes),
        np.int32(launch.whole),
        np.int32(launch.share),
        np.int32(launch.extra),
        grid=launch.grid,
        block=launch.block,
        cluster=launch.cluster,
        shared_bytes=launch.shared_bytes,
        mode=mode,
        multiprocessors=MULTIPROCESSORS,
    )
    return d

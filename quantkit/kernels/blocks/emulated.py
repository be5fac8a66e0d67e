"""gemm_blocks_sm90.cu on the CPU: the launch that a GPU would get, in the emulator."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.kernels.blocks.heuristics import BlocksProblem, BlocksTile
from quantkit.kernels.blocks.launch import KERNEL, SOURCE, launch_of
from quantkit.kernels.blocks.layout import PackedBlocks, padded, stored_scales
from quantkit.kernels.emulated_operands import (
    MULTIPROCESSORS,
    empty_output,
    epilogue_arguments,
    kind_of,
    map_of_output,
    map_of_rows,
)
from quantkit.kernels.emulator import Mode, load


def emulated_blocks(
    a: NDArray[Any],
    a_scale: NDArray[np.float32],
    weight: PackedBlocks,
    tile: BlocksTile,
    *,
    output: str = "bfloat16",
    bias: NDArray[np.float32] | None = None,
    relu: bool = False,
    mode: Mode = Mode.EAGER,
) -> NDArray[Any]:
    """Return D[m, n] = relu(a @ weight.T + bias) of the emulated kernel; a_scale is [m, blocks].

    Raises:
        KernelError: no C++ compiler here, or the kernel broke a rule.
    """
    m, k, n = len(a), weight.k, weight.n
    problem = BlocksProblem(m=m, n=n, k=k, block=weight.block, output=output)
    launch = launch_of(problem, tile, kind_of("none", "none", bias, relu), MULTIPROCESSORS)
    codes = [padded(np.ascontiguousarray(a).view(np.uint8)), weight.codes]
    d = empty_output(m, n, output)
    boxes = launch.first_box, launch.second_box
    maps = [
        map_of_rows(array, k, box)
        for array, box in zip(codes[::-1] if launch.swap else codes, boxes, strict=True)
    ]
    stored = map_of_output(d, launch.output_box, launch.output_swizzle) if launch.tma_store else maps[0]
    scales = stored_scales(a_scale, weight.block)
    load(SOURCE, KERNEL, launch.defines).launch(
        *maps,
        stored,
        d,
        np.int32(k),
        scales,
        np.int64(scales.shape[1]),
        weight.scales,
        np.int64(weight.scales.shape[1]),
        *epilogue_arguments(None, None, bias, m, n),
        grid=launch.grid,
        block=launch.block,
        cluster=launch.cluster,
        shared_bytes=launch.shared_bytes,
        mode=mode,
        multiprocessors=MULTIPROCESSORS,
    )
    return d

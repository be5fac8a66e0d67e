"""gemm_blocks_sm90.cu on the CPU: the launch that a GPU would get, in the emulator."""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantkit.kernels.blocks.heuristics import BlocksProblem, BlocksTile
from quantkit.kernels.blocks.launch import KERNEL, SOURCE, launch_of
from quantkit.kernels.blocks.layout import PackedBlocks, padded, stored_scales
from quantkit.kernels.emulator import Mode, Swizzle, TensorMap, load
from quantkit.kernels.epilogue import EpilogueKind, EpilogueValues

_MULTIPROCESSORS = 4
_SWIZZLES = {64: Swizzle.BYTES_64, 128: Swizzle.BYTES_128}


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
    kind = EpilogueKind(bias=bias is not None, activation="relu" if relu else "none")
    launch = launch_of(problem, tile, kind, _MULTIPROCESSORS)
    codes = [padded(np.ascontiguousarray(a).view(np.uint8)), weight.codes]
    d: NDArray[Any] = np.empty((m, n), ml_dtypes.bfloat16 if output == "bfloat16" else output)
    boxes = launch.first_box, launch.second_box
    maps = [
        TensorMap(
            array=array,
            box=box,
            swizzle=Swizzle.BYTES_128,
            shape=(len(array), k),
            strides_bytes=array.strides,
        )
        for array, box in zip(codes[::-1] if launch.swap else codes, boxes, strict=True)
    ]
    stored = maps[0]
    if launch.tma_store:
        stored = TensorMap(array=d, box=launch.output_box, swizzle=_SWIZZLES[launch.output_swizzle])
    scales = stored_scales(a_scale, weight.block)
    unused = np.zeros(2, np.float32)
    load(SOURCE, KERNEL, launch.defines).launch(
        *maps,
        stored,
        d,
        np.int32(k),
        scales,
        np.int64(scales.shape[1]),
        weight.scales,
        np.int64(weight.scales.shape[1]),
        unused,
        unused,
        unused if bias is None else bias,
        unused,
        unused,
        unused,
        EpilogueValues().packed(),
        np.int32(m),
        np.int32(n),
        grid=launch.grid,
        block=launch.block,
        cluster=launch.cluster,
        shared_bytes=launch.shared_bytes,
        mode=mode,
        multiprocessors=_MULTIPROCESSORS,
    )
    return d

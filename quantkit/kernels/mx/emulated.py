"""gemm_blocks_sm120.cu on the CPU: the launch that a GPU would get, in the emulator."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.kernels.emulated_operands import (
    MULTIPROCESSORS,
    empty_output,
    epilogue_arguments,
    kind_of,
)
from quantkit.kernels.emulator import Mode, load
from quantkit.kernels.mx.heuristics import MxProblem, MxTile
from quantkit.kernels.mx.launch import KERNEL, SOURCE, mx_launch_of
from quantkit.kernels.mx.layout import PackedMx, row_bytes, row_scales


def emulated_mx(
    a: PackedMx,
    weight: PackedMx,
    tile: MxTile,
    *,
    output: str = "bfloat16",
    bias: NDArray[np.float32] | None = None,
    relu: bool = False,
    mode: Mode = Mode.EAGER,
) -> NDArray[Any]:
    """Return D[m, n] = relu(a @ weight.T + bias) of the emulated kernel.

    Raises:
        KernelError: no C++ compiler here, or the kernel broke a rule.
    """
    problem = MxProblem(m=a.rows, n=weight.rows, k=weight.k, format=weight.format, output=output)
    factor = "none" if weight.global_scale is None else "one"
    launch = mx_launch_of(problem, tile, kind_of(factor, factor, bias, relu))
    d = empty_output(problem.m, problem.n, output)
    of_a, of_weight = (
        None if operand.global_scale is None else np.array([operand.global_scale], np.float32)
        for operand in (a, weight)
    )
    operands = a.codes, weight.codes, a.scales, weight.scales
    load(SOURCE, KERNEL, launch.defines).launch(
        *operands,
        d,
        *epilogue_arguments(of_a, of_weight, bias, problem.m, problem.n),
        np.zeros(max(launch.partials_bytes, 16), np.uint8),
        np.zeros(max(launch.arrivals, 4), np.uint32),
        np.int32(row_bytes(weight.format, weight.k)),
        np.int32(row_scales(weight.format, weight.k)),
        *(np.int64(operand.shape[1]) for operand in operands),
        grid=launch.grid,
        block=launch.block,
        shared_bytes=launch.shared_bytes,
        mode=mode,
        multiprocessors=MULTIPROCESSORS,
    )
    return d

"""gemm_w4_sm90.cu and gemm_w4_few.cu as a family: weights of four bits by bf16 activations on sm_90a."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantkit.errors import KernelError
from quantkit.formats.quantize import QTensor, dequantize
from quantkit.kernels import device
from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.family import Family, Operands, Prediction
from quantkit.kernels.gemm_operands import Epilogue
from quantkit.kernels.gpus import Gpu
from quantkit.kernels.reference import gemm_reference
from quantkit.kernels.w4.emulated import emulated_w4
from quantkit.kernels.w4.heuristics import W4Few, W4Problem, w4_choose
from quantkit.kernels.w4.launch import FEW_KERNEL, FEW_SOURCE, KERNEL, SOURCE, w4_few_launch_of, w4_launch_of
from quantkit.kernels.w4.layout import pack4
from quantkit.kernels.w4.matmul import matmul_w4, pack_weight4
from quantkit.kernels.work import FORMATS, Work

# By format: the codes of the packed weight, and what its scales are stored in.
_STORED = {"int4": ("int4", "bfloat16"), "nvfp4": ("fp4_e2m1", "e4m3"), "mxfp4": ("fp4_e2m1", "e8m0")}
_OUTPUTS = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}


class W4Family(Family):
    """The kernel that decodes weights in registers."""

    name = KERNEL
    formats = frozenset(_STORED)
    architectures: tuple[str, ...] = ("sm_90a",)

    def takes(self, work: Work, gpu: Gpu) -> bool:
        """Return whether it computes `work` on `gpu`: groups are powers of two."""
        if not super().takes(work, gpu):
            return False
        group = _group(work)
        return group & (group - 1) == 0 and group >= 16

    def predict(self, work: Work, gpu: Gpu) -> Prediction:
        """Return the configuration that is chosen; how long it takes is not modelled."""
        tile = self.choose(problem_of(work), gpu)
        return Prediction(
            kernel=FEW_KERNEL if isinstance(tile, W4Few) else KERNEL,
            configuration=tile,
            words=self.describe(tile),
            time_us=None,
        )

    def choose(self, problem: W4Problem, gpu: Gpu | None = None) -> Any:
        """Return the configuration chosen on a GPU; on a small one by default, for the emulator."""
        return w4_choose(problem) if gpu is None else w4_choose(problem, gpu.time_model())

    def ranked(self, work: Work, gpu: Gpu) -> Sequence[Any]:
        """Return the configuration that is chosen."""
        return [self.predict(work, gpu).configuration]

    def describe(self, configuration: Any) -> str:
        """Return a tile as 256x16 s6: rows of W by rows of A, and stages."""
        tile = configuration
        rows = 16 * tile.tile if isinstance(tile, W4Few) else tile.tile_w
        return f"{rows}x{tile.tile_n} s{tile.stages}"

    def source(self, work: Work, configuration: Any, gpu: Gpu) -> tuple[Path, Mapping[str, str | int]]:
        """Return the file and its macros."""
        problem, kind = problem_of(work), kind_of(work)
        if isinstance(configuration, W4Few):
            return FEW_SOURCE, w4_few_launch_of(problem, configuration, kind).defines
        return SOURCE, w4_launch_of(problem, configuration, kind, gpu.multiprocessors).defines

    def prepare(self, work: Work, operands: Operands, configuration: Any = None) -> Callable[[], Any]:
        """Return a call of `matmul_w4` that writes into an array of its own."""
        cupy = device.cupy()
        weight = pack_weight4(weight_of(operands))
        form = weight.layout
        stored = replace(
            problem_of(work), codes=form.codes, group=form.group, scales=form.scales, zeros=form.zeros
        )
        tile = configuration if stored == problem_of(work) else None
        small = cupy.asarray(np.ascontiguousarray(operands.activations).view(np.uint16))
        a = small if len(small) == work.m else small[cupy.arange(work.m) % len(small)]
        epilogue = Epilogue(
            bias=None if operands.bias is None else cupy.asarray(operands.bias),
            activation="relu" if work.relu else None,
        )
        out = cupy.empty((work.m, work.n), _OUTPUTS[work.output])
        return lambda: matmul_w4(a, weight, epilogue=epilogue, out_dtype=work.output, out=out, tile=tile)

    def emulate(self, work: Work, operands: Operands, configuration: Any = None) -> NDArray[Any]:
        """Return D of the emulated kernel."""
        packed = pack4(weight_of(operands))
        form = packed.layout
        problem = replace(
            problem_of(work), codes=form.codes, group=form.group, scales=form.scales, zeros=form.zeros
        )
        # A tile fits the layout that it was chosen for.
        tile = configuration if configuration and problem == problem_of(work) else self.choose(problem)
        a = operands.rows(work.m)
        return emulated_w4(a, packed, problem, tile, bias=operands.bias, relu=work.relu)

    def reference(self, work: Work, operands: Operands) -> NDArray[Any]:
        """Return D of the oracle: a weight's value is rounded once, to bf16, as the kernel decodes it."""
        held = weight_of(operands)
        values = dequantize(held)
        return gemm_reference(
            operands.activations,
            values.astype(ml_dtypes.bfloat16) if held.spec.format.kind == "integer" else values,
            bias=operands.bias,
            activation="relu" if work.relu else "none",
            output=work.output,
        )


def weight_of(operands: Operands) -> QTensor:
    """Return the weight.

    Raises:
        KernelError: it is not quantized.
    """
    if not isinstance(operands.weight, QTensor):
        raise KernelError("The weight is not quantized; give a QTensor.")
    return operands.weight


def _group(work: Work) -> int:
    group = work.group or FORMATS[work.format].group
    assert group is not None
    return group


def problem_of(work: Work) -> W4Problem:
    """Return the problem that `matmul_w4` solves for a work."""
    codes, scales = _STORED[work.format]
    return W4Problem(
        m=work.m,
        n=work.n,
        k=work.k,
        activations="bfloat16",
        output=work.output,
        codes=codes,
        group=_group(work),
        scales=scales,
        zeros=False,
    )


def kind_of(work: Work) -> EpilogueKind:
    """Return the epilogue that benchmarks run."""
    return EpilogueKind(column_scale="each", bias=work.bias, activation="relu" if work.relu else "none")

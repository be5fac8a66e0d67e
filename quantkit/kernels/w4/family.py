"""gemm_w4_sm90.cu and gemm_w4_few.cu as a family: weights of four bits by bf16, int8 or e4m3 activations on sm_90a."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import KernelError
from quantkit.formats.quantize import QTensor
from quantkit.kernels import device, tuning
from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.family import Family, Operands, Prediction
from quantkit.kernels.gemm_operands import Epilogue
from quantkit.kernels.gpus import Gpu
from quantkit.kernels.heuristics import H200
from quantkit.kernels.timing import Timing
from quantkit.kernels.w4.choice import kernel_of, timed
from quantkit.kernels.w4.emulated import emulated_w4
from quantkit.kernels.w4.heuristics import w4_rank
from quantkit.kernels.w4.launch import FEW_SOURCE, KERNEL, SOURCE, w4_few_launch_of, w4_launch_of
from quantkit.kernels.w4.layout import pack4
from quantkit.kernels.w4.matmul import matmul_w4
from quantkit.kernels.w4.operands import Workspace4, pack_weight4
from quantkit.kernels.w4.problem import W4Problem
from quantkit.kernels.w4.reference import w4_reference
from quantkit.kernels.w4.tiles import W4Few
from quantkit.kernels.w4.time_model import estimate_us
from quantkit.kernels.work import FORMATS, Work

# By format: the codes of the packed weight, what its scales are stored in, and the activations.
_STORED = {
    "int4": ("int4", "bfloat16", "bfloat16"),
    "nvfp4": ("fp4_e2m1", "e4m3", "bfloat16"),
    "mxfp4": ("fp4_e2m1", "e8m0", "bfloat16"),
    "w4a8": ("int4", "uint8", "int8"),
    "w4a8-fp8": ("int4", "bfloat16", "float8_e4m3fn"),
    "mxfp4-fp8": ("fp4_e2m1", "e8m0", "float8_e4m3fn"),
}
_CARRIERS = {"bfloat16": np.uint16, "int8": np.int8, "float8_e4m3fn": np.uint8}
_OUTPUTS = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}


class W4Family(Family):
    """The kernels that decode weights in registers: of few rows of A by mma.sync, of more by wgmma."""

    name = KERNEL
    formats = frozenset(_STORED)
    architectures: tuple[str, ...] = ("sm_90a",)

    def takes(self, work: Work, gpu: Gpu) -> bool:
        """Return whether it computes `work` on `gpu`: groups are powers of two."""
        if not super().takes(work, gpu):
            return False
        group = _group(work)
        least = 128 if work.format == "w4a8-fp8" else 16
        return group & (group - 1) == 0 and group >= least

    def candidates(self, problem: W4Problem, gpu: Gpu | None) -> Sequence[Any]:
        """Return every configuration, the one modelled fastest first; for the emulator where no GPU is given."""
        return w4_rank(problem, H200 if gpu is None else gpu.time_model())

    def estimate_us(self, problem: W4Problem, configuration: Any, gpu: Gpu) -> float:
        """Return the modelled time."""
        return estimate_us(problem, configuration, gpu.time_model())

    def predict(self, work: Work, gpu: Gpu) -> Prediction:
        """Return what was timed fastest, where something was, else what is modelled fastest."""
        problem, kind = problem_of(work), kind_of(work)
        ranked = self.ranked(work, gpu)
        table = tuning.table(gpu.name, local=tuning.environment())
        found = timed(problem, kind, list(ranked), table.find)
        if found is not None:
            tile, entry = found
            # Timed at another M of the bucket: the time grows with the rows, at most.
            time_us = entry.time_us * max(1.0, work.m / entry.m)
        else:
            tile = ranked[0]
            # The models know architectures; what this very GPU allows, its ceilings know.
            time_us = max(self.estimate_us(problem, tile, gpu), work.roofline(gpu)[0])
        return Prediction(
            kernel=kernel_of(tile),
            configuration=tile,
            words=self.describe(tile),
            time_us=time_us,
            tuned=found is not None,
        )

    def ranked(self, work: Work, gpu: Gpu) -> Sequence[Any]:
        """Return every configuration, the one modelled fastest first."""
        return self.candidates(problem_of(work), gpu)

    def describe(self, configuration: Any) -> str:
        """Return a configuration as 256x16 s6 c2: rows of W by rows of A, stages, cluster, and how warps share them."""
        tile = configuration
        if isinstance(tile, W4Few):
            warps = f"{tile.warps_w}x{tile.warps_k} warps"
            return f"{16 * tile.tile}x{tile.tile_n} s{tile.stages} k{tile.slabs} {warps}"
        words = [f"{tile.tile_w}x{tile.tile_n}", f"s{tile.stages}", f"{tile.consumers} consumers"]
        words += [f"c{tile.cluster}"] if tile.cluster > 1 else []
        return " ".join(words + ([] if tile.stream else ["whole"]))

    def source(self, work: Work, configuration: Any, gpu: Gpu) -> tuple[Path, Mapping[str, str | int]]:
        """Return the file and its macros."""
        problem, kind = problem_of(work), kind_of(work)
        if isinstance(configuration, W4Few):
            return FEW_SOURCE, w4_few_launch_of(problem, configuration, kind).defines
        return SOURCE, w4_launch_of(problem, configuration, kind, gpu.multiprocessors).defines

    def prepare(self, work: Work, operands: Operands, configuration: Any = None) -> Callable[[], Any]:
        """Return a call of `matmul` that writes into an array of its own, with a workspace of its own."""
        cupy = device.cupy()
        problem = problem_of(work)
        weight = pack_weight4(
            weight_of(operands), activation_bits=1024 // problem.slab, activations=problem.activations
        )
        stored = W4Problem.of(weight.layout, m=work.m, activations=problem.activations, output=work.output)
        # A configuration fits the layout that it was chosen for.
        tile = configuration if stored == problem else None
        carrier = _CARRIERS[problem.activations]
        small = cupy.asarray(np.ascontiguousarray(operands.activations).view(carrier))
        a = small if len(small) == work.m else small[cupy.arange(work.m) % len(small)]
        scale = operands.row_scales(work.m)
        epilogue = Epilogue(
            row_scale=None if scale is None else cupy.asarray(scale.reshape(-1)),
            bias=None if operands.bias is None else cupy.asarray(operands.bias),
            activation="relu" if work.relu else None,
        )
        out = cupy.empty((work.m, work.n), _OUTPUTS[work.output])
        # Graphs that capture the call share no memory with it.
        workspace = Workspace4()
        return lambda: matmul_w4(
            a, weight, epilogue=epilogue, out_dtype=work.output, out=out, tile=tile, workspace=workspace
        )

    def remember(self, work: Work, gpu: Gpu, timed: Mapping[Any, Timing]) -> None:
        """Write the fastest configuration into the timing cache of this user."""
        fastest = min(timed, key=lambda configuration: timed[configuration].median_us)
        problem = problem_of(work)
        tuning.remember(gpu.name, kernel_of(fastest), problem.known_as, kind_of(work), timed)

    def emulate(self, work: Work, operands: Operands, configuration: Any = None) -> NDArray[Any]:
        """Return D of the emulated kernel."""
        problem = problem_of(work)
        packed = pack4(
            weight_of(operands), activation_bits=1024 // problem.slab, activations=problem.activations
        )
        stored = W4Problem.of(packed.layout, m=work.m, activations=problem.activations, output=work.output)
        tile = configuration if configuration and stored == problem else self.candidates(stored, None)[0]
        return emulated_w4(
            operands.rows(work.m), packed, stored, tile, row_scale=operands.row_scales(work.m), bias=operands.bias,
            relu=work.relu,
        )  # fmt: skip

    def reference(self, work: Work, operands: Operands) -> NDArray[Any]:
        """Return D of the oracle: weights as the kernels decode them, sums rounded once to float32."""
        problem = problem_of(work)
        packed = pack4(
            weight_of(operands), activation_bits=1024 // problem.slab, activations=problem.activations
        )
        rows = operands.activations
        return w4_reference(
            rows, packed, row_scale=operands.row_scales(len(rows)), bias=operands.bias,
            activation="relu" if work.relu else "none", output=work.output,
        )  # fmt: skip


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
    """Return the problem that `matmul` solves for a work."""
    codes, scales, activations = _STORED[work.format]
    return W4Problem(
        m=work.m,
        n=work.n,
        k=work.k,
        activations=activations,
        output=work.output,
        codes=codes,
        group=_group(work),
        scales=scales,
        zeros=False,
    )


def kind_of(work: Work) -> EpilogueKind:
    """Return the epilogue that benchmarks run: one scale for activations that have any."""
    return EpilogueKind(
        row_scale="none" if _STORED[work.format][2] == "bfloat16" else "one",
        column_scale="each",
        bias=work.bias,
        activation="relu" if work.relu else "none",
    )

"""gemm_blocks_sm120.cu as a family: MXFP8, and MXFP4 and NVFP4 on both sides, on sm_120a."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import KernelError
from quantkit.formats.presets import ACTIVATION_SPECS
from quantkit.formats.qparams import QParams
from quantkit.formats.quantize import QTensor
from quantkit.kernels import device, tuning
from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.family import Family, Operands, Prediction
from quantkit.kernels.gemm_operands import Epilogue
from quantkit.kernels.gpus import Gpu
from quantkit.kernels.mma_heuristics import MmaDevice, mma_device
from quantkit.kernels.mx.emulated import emulated_mx
from quantkit.kernels.mx.heuristics import MxProblem, MxTile, mx_choose, mx_estimate_us, mx_rank, mx_tile_of
from quantkit.kernels.mx.launch import KERNEL, SOURCE, mx_launch_of
from quantkit.kernels.mx.layout import PackedMx, pack_mx, row_bytes, row_scales
from quantkit.kernels.mx.matmul import ARCH, matmul_mx, pack_mx_weight
from quantkit.kernels.mx.reference import mx_reference
from quantkit.kernels.quantize import QuantizedActivation
from quantkit.kernels.timing import Timing
from quantkit.kernels.timing_table import key_of
from quantkit.kernels.work import Work

# By the format of a product: that of both operands.
STORED = {"mxfp8": "mxfp8", "mxfp4-fp4": "mxfp4", "nvfp4-fp4": "nvfp4"}
_OUTPUTS = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}


class MxFamily(Family):
    """The kernel whose tensor core multiplies by the scales. A CUDA graph runs it without slices of K."""

    name = KERNEL
    formats = frozenset(STORED)
    architectures = (ARCH,)

    def predict(self, work: Work, gpu: Gpu) -> Prediction:
        """Return the tile that was timed fastest, where one was, else the one modelled fastest."""
        problem = problem_of(work)
        key = key_of(self.name, problem.as_key(), kind_of(work))
        entry = tuning.table(gpu.name, local=tuning.environment()).find(key)
        tile = None if entry is None else mx_tile_of(entry.configuration, problem, _device(gpu))
        if entry is not None and tile is not None:
            # Timed at another M of the bucket: the time grows with the rows, at most.
            time_us = entry.time_us * max(1.0, work.m / entry.m)
        else:
            tile = self.ranked(work, gpu)[0]
            time_us = max(mx_estimate_us(problem, tile, _device(gpu)), work.roofline(gpu)[0])
            entry = None
        return Prediction(
            kernel=self.name,
            configuration=tile,
            words=self.describe(tile),
            time_us=time_us,
            tuned=entry is not None,
        )

    def ranked(self, work: Work, gpu: Gpu) -> Sequence[MxTile]:
        """Return every tile that a CUDA graph runs as it is, the one modelled fastest first."""
        return [tile for tile in mx_rank(problem_of(work), _device(gpu)) if tile.slices == 1]

    def describe(self, configuration: MxTile) -> str:
        """Return a tile as 128x128 s2 8 warps: its sides, stages, warps, slices."""
        tile = configuration
        words = [f"{tile.tile_m}x{tile.tile_n}", f"s{tile.stages}", f"{tile.threads // 32} warps"]
        return " ".join(words + ([f"{tile.slices} slices"] if tile.slices > 1 else []))

    def source(self, work: Work, configuration: MxTile, gpu: Gpu) -> tuple[Path, Mapping[str, str | int]]:
        """Return gemm_blocks_sm120.cu and its macros."""
        return SOURCE, mx_launch_of(problem_of(work), configuration, kind_of(work)).defines

    def prepare(
        self, work: Work, operands: Operands, configuration: MxTile | None = None
    ) -> Callable[[], Any]:
        """Return a call of `matmul_mx` that writes into an array of its own."""
        cupy = device.cupy()
        weight = pack_mx_weight(_weight(operands))
        packed = _activations(operands, work)
        held = [cupy.asarray(packed.codes), cupy.asarray(packed.scales)]
        if packed.rows != work.m:
            rows = cupy.arange(work.m) % packed.rows
            held = [x[rows] for x in held]
        shared = packed.global_scale
        a = QuantizedActivation(
            codes=held[0][:, : row_bytes(packed.format, work.k)],
            scale=held[1][:, : row_scales(packed.format, work.k)],
            zero_point=0,
            global_scale=None if shared is None else cupy.asarray(np.array([shared], np.float32)),
            spec=ACTIVATION_SPECS[packed.format],
        )
        epilogue = Epilogue(
            bias=None if operands.bias is None else cupy.asarray(operands.bias),
            activation="relu" if work.relu else None,
        )
        out = cupy.empty((work.m, work.n), _OUTPUTS[work.output])
        return lambda: matmul_mx(
            a, weight, epilogue=epilogue, out_dtype=work.output, out=out, tile=configuration
        )

    def remember(self, work: Work, gpu: Gpu, timed: Mapping[Any, Timing]) -> None:
        """Write the fastest tile into the timing cache of this user."""
        tuning.remember(gpu.name, self.name, problem_of(work).as_key(), kind_of(work), timed)

    def emulate(self, work: Work, operands: Operands, configuration: MxTile | None = None) -> NDArray[Any]:
        """Return D of the emulated kernel."""
        a = _activations(operands, work)
        index = np.arange(work.m) % a.rows
        a = replace(a, rows=work.m, codes=a.codes[index], scales=a.scales[index])
        tile = configuration or mx_choose(problem_of(work), mma_device(ARCH, 4))
        return emulated_mx(
            a, pack_mx(_weight(operands)), tile, output=work.output, bias=operands.bias, relu=work.relu
        )

    def reference(self, work: Work, operands: Operands) -> NDArray[Any]:
        """Return D of the oracle: values of codes and scales, sums rounded once to float32."""
        return mx_reference(
            _activations(operands, work),
            pack_mx(_weight(operands)),
            bias=operands.bias,
            activation="relu" if work.relu else "none",
            output=work.output,
        )


def problem_of(work: Work) -> MxProblem:
    """Return the problem that `matmul_mx` solves for a work."""
    return MxProblem(m=work.m, n=work.n, k=work.k, format=STORED[work.format], output=work.output)


def kind_of(work: Work) -> EpilogueKind:
    """Return the epilogue that benchmarks run: no scales beside the blocks' but NVFP4's global ones."""
    factor = "one" if STORED[work.format] == "nvfp4" else "none"
    return EpilogueKind(
        row_scale=factor, column_scale=factor, bias=work.bias, activation="relu" if work.relu else "none"
    )


def _device(gpu: Gpu) -> MmaDevice:
    known = mma_device(gpu.architecture, gpu.multiprocessors)
    return replace(known, dram_bytes_per_us=min(known.dram_bytes_per_us, 0.95e3 * gpu.dram_gb_per_s))


def _weight(operands: Operands) -> QTensor:
    if not isinstance(operands.weight, QTensor):
        raise KernelError(f"{KERNEL}: the weight is not quantized; give a QTensor.")
    return operands.weight


def _activations(operands: Operands, work: Work) -> PackedMx:
    if operands.scale is None or operands.block is None:
        raise KernelError(
            f"{KERNEL}: the activations have no scales in blocks; quantize them in the work's format."
        )
    params = QParams(operands.scale, None, operands.global_scale)
    return pack_mx(QTensor(operands.activations, params, ACTIVATION_SPECS[STORED[work.format]]))

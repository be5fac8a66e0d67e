"""gemm_blocks_sm90.cu as a family: e4m3 in blocks of 128 and MXFP8 on sm_90a."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import KernelError
from quantkit.formats.presets import ACTIVATION_SPECS
from quantkit.formats.quantize import QTensor
from quantkit.kernels import device, tuning
from quantkit.kernels.blocks.emulated import emulated_blocks
from quantkit.kernels.blocks.heuristics import BLOCKS, BlocksProblem, BlocksTile, choose, estimate_us, rank
from quantkit.kernels.blocks.launch import KERNEL, SOURCE, launch_of
from quantkit.kernels.blocks.layout import pack_blocks, stored_scales
from quantkit.kernels.blocks.matmul import matmul_blocks, pack_block_weight, tile_of
from quantkit.kernels.blocks.reference import blocks_reference
from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.family import Family, Operands, Prediction
from quantkit.kernels.gemm_operands import Epilogue
from quantkit.kernels.gpus import Gpu
from quantkit.kernels.quantize import QuantizedActivation
from quantkit.kernels.timing import Timing
from quantkit.kernels.timing_table import key_of
from quantkit.kernels.work import Work

_OUTPUTS = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}


class BlocksFamily(Family):
    """The kernel that promotes block by block."""

    name = KERNEL
    formats = frozenset(BLOCKS)
    architectures = ("sm_90a",)

    def predict(self, work: Work, gpu: Gpu) -> Prediction:
        """Return the tile that was timed fastest, where one was, else the one modelled fastest."""
        problem = problem_of(work)
        key = key_of(self.name, problem.as_key(), kind_of(work))
        entry = tuning.table(gpu.name, local=tuning.environment()).find(key)
        tile = None if entry is None else tile_of(entry, problem)
        if entry is not None and tile is not None:
            # Timed at another M of the bucket: the time grows with the rows, at most.
            time_us = entry.time_us * max(1.0, work.m / entry.m)
        else:
            tile = choose(problem, gpu.time_model())
            time_us = max(estimate_us(problem, tile, gpu.time_model()), work.roofline(gpu)[0])
            entry = None
        return Prediction(
            kernel=self.name,
            configuration=tile,
            words=self.describe(tile),
            time_us=time_us,
            tuned=entry is not None,
        )

    def ranked(self, work: Work, gpu: Gpu) -> Sequence[BlocksTile]:
        """Return every tile, the one modelled fastest first."""
        return rank(problem_of(work), gpu.time_model())

    def describe(self, configuration: BlocksTile) -> str:
        """Return a tile as 256x128 s4 c2 swap: its sides, stages, cluster, split, and if the weight comes first."""
        tile = configuration
        words = [f"{tile.tile_m}x{tile.tile_n}", f"s{tile.stages}"]
        words += [f"c{tile.cluster}"] * (tile.cluster > 1) + [f"split{tile.split}"] * (tile.split > 1)
        return " ".join(words + ["swap"] * tile.swap)

    def source(self, work: Work, configuration: BlocksTile, gpu: Gpu) -> tuple[Path, Mapping[str, str | int]]:
        """Return gemm_blocks_sm90.cu and its macros."""
        return SOURCE, launch_of(problem_of(work), configuration, kind_of(work), gpu.multiprocessors).defines

    def prepare(
        self, work: Work, operands: Operands, configuration: BlocksTile | None = None
    ) -> Callable[[], Any]:
        """Return a call of `matmul_blocks` that writes into an array of its own."""
        cupy = device.cupy()
        block = BLOCKS[work.format]
        weight = pack_block_weight(_weight(operands))
        scale = stored_scales(_scale(operands), block)
        held = [cupy.asarray(np.ascontiguousarray(x)) for x in (operands.activations.view(np.uint8), scale)]
        if len(operands.activations) != work.m:
            rows = cupy.arange(work.m) % len(operands.activations)
            held = [x[rows] for x in held]
        codes, scales = held[0], held[1] if block == 32 else held[1].view(np.float32)
        a = QuantizedActivation(
            codes=codes,
            scale=scales[:, : -(-work.k // block)],
            zero_point=0,
            global_scale=None,
            spec=ACTIVATION_SPECS[work.format],
        )
        epilogue = Epilogue(
            bias=None if operands.bias is None else cupy.asarray(operands.bias),
            activation="relu" if work.relu else None,
        )
        out = cupy.empty((work.m, work.n), _OUTPUTS[work.output])
        return lambda: matmul_blocks(
            a, weight, epilogue=epilogue, out_dtype=work.output, out=out, tile=configuration
        )

    def remember(self, work: Work, gpu: Gpu, timed: Mapping[Any, Timing]) -> None:
        """Write the fastest tile into the timing cache of this user."""
        tuning.remember(gpu.name, self.name, problem_of(work).as_key(), kind_of(work), timed)

    def emulate(
        self, work: Work, operands: Operands, configuration: BlocksTile | None = None
    ) -> NDArray[Any]:
        """Return D of the emulated kernel."""
        scale = operands.row_scales(work.m)
        assert scale is not None
        return emulated_blocks(
            operands.rows(work.m),
            scale,
            pack_blocks(_weight(operands)),
            configuration or choose(problem_of(work)),
            output=work.output,
            bias=operands.bias,
            relu=work.relu,
        )

    def reference(self, work: Work, operands: Operands) -> NDArray[Any]:
        """Return D of the oracle, operation for operation."""
        weight = _weight(operands)
        return blocks_reference(
            operands.activations,
            _scale(operands),
            weight.qvalue,
            weight.qparams.scale,
            block=BLOCKS[work.format],
            bias=operands.bias,
            activation="relu" if work.relu else "none",
            output=work.output,
        )


def problem_of(work: Work) -> BlocksProblem:
    """Return the problem that `matmul_blocks` solves for a work."""
    return BlocksProblem(m=work.m, n=work.n, k=work.k, block=BLOCKS[work.format], output=work.output)


def kind_of(work: Work) -> EpilogueKind:
    """Return the epilogue that benchmarks run: no scales beside the blocks'."""
    return EpilogueKind(bias=work.bias, activation="relu" if work.relu else "none")


def _weight(operands: Operands) -> QTensor:
    if not isinstance(operands.weight, QTensor):
        raise KernelError(f"{KERNEL}: the weight is not quantized; give a QTensor.")
    return operands.weight


def _scale(operands: Operands) -> NDArray[np.float32]:
    if operands.scale is None or operands.block is None:
        raise KernelError(
            f"{KERNEL}: the activations have no scales in blocks; quantize them in the work's format."
        )
    return operands.scale

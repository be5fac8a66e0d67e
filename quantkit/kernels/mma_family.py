"""gemm_mma.cu as a family: int8, fp8 and bf16 on every architecture from sm_80 on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantkit.kernels import tuning
from quantkit.kernels.compile import ARCHITECTURES
from quantkit.kernels.dense_family import DenseFamily, factors_of, kind_of, problem_of
from quantkit.kernels.emulator import load
from quantkit.kernels.epilogue import EpilogueValues
from quantkit.kernels.family import Operands
from quantkit.kernels.gpus import Gpu
from quantkit.kernels.heuristics import Problem
from quantkit.kernels.mma_heuristics import MmaDevice, MmaTile, mma_device, mma_estimate_us, mma_rank
from quantkit.kernels.mma_launch import KERNEL, SOURCE, launch_of
from quantkit.kernels.timing_table import Entry
from quantkit.kernels.work import Work

_EMULATED_ARCH = "sm_80"


class MmaFamily(DenseFamily):
    """The universal kernel. A CUDA graph runs it without slices of K, so tiles with slices are not tuned."""

    name = KERNEL
    architectures = ARCHITECTURES

    def rank(self, problem: Problem, gpu: Gpu) -> Sequence[MmaTile]:
        """Return every tile that a CUDA graph runs as it is."""
        return [tile for tile in mma_rank(problem, _device(gpu)) if tile.slices == 1]

    def estimate_us(self, problem: Problem, tile: MmaTile, gpu: Gpu) -> float:
        """Return the modelled time with a tile."""
        return mma_estimate_us(problem, tile, _device(gpu))

    def tile_of(self, entry: Entry, problem: Problem, gpu: Gpu) -> MmaTile | None:
        """Return the tile of an entry."""
        return tuning.mma_tile_of(entry, problem, _device(gpu))

    def describe(self, configuration: MmaTile) -> str:
        """Return a tile as 128x128 s3 8 warps: its sides, stages, warps, slices."""
        tile = configuration
        words = [f"{tile.tile_m}x{tile.tile_n}", f"s{tile.stages}", f"{tile.warps_m * tile.warps_n} warps"]
        return " ".join(words + ([f"{tile.slices} slices"] if tile.slices > 1 else []))

    def source(self, work: Work, configuration: MmaTile, gpu: Gpu) -> tuple[Path, Mapping[str, str | int]]:
        """Return gemm_mma.cu and its macros."""
        launch = launch_of(problem_of(work), configuration, kind_of(work), gpu.architecture)
        return SOURCE, launch.defines

    def emulate(self, work: Work, operands: Operands, configuration: MmaTile | None = None) -> NDArray[Any]:
        """Return D of the emulated kernel."""
        problem, kind = problem_of(work), kind_of(work)
        tile = configuration or mma_rank(problem, mma_device(_EMULATED_ARCH, 4))[0]
        launch = launch_of(problem, tile, kind, _EMULATED_ARCH)
        row, column, codes = factors_of(operands)
        a, b = _padded(operands.rows(work.m)), _padded(codes)
        d: NDArray[Any] = np.empty(
            (work.m, work.n), ml_dtypes.bfloat16 if work.output == "bfloat16" else work.output
        )
        unused = np.zeros(4, np.float32)
        vectors = [
            unused if v is None else np.ascontiguousarray(v, np.float32).reshape(-1)
            for v in (row, column, operands.bias)
        ]
        load(SOURCE, KERNEL, launch.defines).launch(
            a,
            b,
            d,
            *vectors,
            unused,
            unused,
            unused,
            EpilogueValues().packed(),
            np.int32(work.m),
            np.int32(work.n),
            np.zeros(max(launch.workspace_bytes, 16), np.uint8),
            np.zeros(max(launch.arrivals, 4), np.uint32),
            np.int32(problem.k * a.itemsize),
            np.int64(a.strides[0]),
            np.int64(b.strides[0]),
            grid=launch.grid,
            block=launch.block,
            shared_bytes=launch.shared_bytes,
        )
        return d


def _device(gpu: Gpu) -> MmaDevice:
    known = mma_device(gpu.architecture, gpu.multiprocessors)
    return replace(known, dram_bytes_per_us=min(known.dram_bytes_per_us, 0.95e3 * gpu.dram_gb_per_s))


def _padded(matrix: NDArray[Any]) -> NDArray[Any]:
    """Rows that start at multiples of 16 bytes."""
    rows, k = matrix.shape
    padded = np.zeros((rows, -(-k * matrix.itemsize // 16) * 16 // matrix.itemsize), matrix.dtype)
    padded[:, :k] = matrix
    return padded

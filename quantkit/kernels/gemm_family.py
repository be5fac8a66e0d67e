"""gemm_sm90.cu as a family: int8, fp8 and bf16 on sm_90a."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from quantkit.kernels import tuning
from quantkit.kernels.dense_family import DenseFamily, factors_of, kind_of, problem_of
from quantkit.kernels.emulated_gemm import emulated_gemm
from quantkit.kernels.family import Operands
from quantkit.kernels.gemm_launch import KERNEL, SOURCE, launch_of
from quantkit.kernels.gpus import Gpu
from quantkit.kernels.heuristics import Problem, Tile, choose, estimate_us, rank
from quantkit.kernels.timing_table import Entry
from quantkit.kernels.work import Work


class GemmFamily(DenseFamily):
    """The warp-specialised kernel for Hopper. A CUDA graph runs it without stream-K, which so is not tuned."""

    name = KERNEL
    architectures = ("sm_90a",)

    def rank(self, problem: Problem, gpu: Gpu) -> Sequence[Tile]:
        """Return every tile that a CUDA graph runs as it is, and of the best two large ones other orders of tiles."""
        found = [tile for tile in rank(problem, gpu.time_model()) if not tile.stream]
        if problem.m < 1024:
            return found
        large = [tile for tile in found[:2] if tile.tile_m * tile.tile_n == 32768]
        orders = [replace(tile, group=group) for tile in large for group in (4, 16) if group != tile.group]
        return [*found[:6], *orders, *found[6:]]

    def estimate_us(self, problem: Problem, tile: Tile, gpu: Gpu) -> float:
        """Return the modelled time with a tile."""
        return estimate_us(problem, tile, gpu.time_model())

    def tile_of(self, entry: Entry, problem: Problem, gpu: Gpu) -> Tile | None:
        """Return the tile of an entry."""
        return tuning.tile_of(entry, problem)

    def describe(self, configuration: Tile) -> str:
        """Return a tile as 256x128 s4 c2 pingpong: its sides, stages, cluster, and what else it does."""
        tile = configuration
        words = [f"{tile.tile_m}x{tile.tile_n}", f"s{tile.stages}"]
        words += [f"c{tile.cluster}"] if tile.cluster > 1 else []
        words += [f"split{tile.split}"] if tile.split > 1 else []
        words += ["stream"] if tile.stream else []
        words += ["pingpong"] if tile.pingpong else []
        words += ["swap"] if tile.swap else []
        return " ".join(words)

    def source(self, work: Work, configuration: Tile, gpu: Gpu) -> tuple[Path, Mapping[str, str | int]]:
        """Return gemm_sm90.cu and its macros."""
        launch = launch_of(problem_of(work), configuration, kind_of(work), gpu.multiprocessors)
        return SOURCE, launch.defines

    def emulate(self, work: Work, operands: Operands, configuration: Tile | None = None) -> NDArray[Any]:
        """Return D of the emulated kernel."""
        problem = problem_of(work)
        row, column, codes = factors_of(operands)
        return emulated_gemm(
            operands.rows(work.m),
            codes,
            problem,
            configuration or choose(problem),
            row_scale=row,
            column_scale=column,
            bias=operands.bias,
            relu=work.relu,
        )

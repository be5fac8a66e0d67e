"""gemm_w4_mma.cu as a family: weights of four bits by bf16 activations on every architecture from sm_80 on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from quantkit.kernels.compile import ARCHITECTURES
from quantkit.kernels.family import Prediction
from quantkit.kernels.gpus import Gpu
from quantkit.kernels.mma_heuristics import MmaDevice, mma_device
from quantkit.kernels.w4.family import W4Family, kind_of, problem_of
from quantkit.kernels.w4.heuristics import W4Problem
from quantkit.kernels.w4.mma_heuristics import W4MmaTile, w4_mma_choose, w4_mma_estimate_us, w4_mma_rank
from quantkit.kernels.w4.mma_launch import KERNEL, SOURCE, w4_mma_launch_of
from quantkit.kernels.work import Work


class W4MmaFamily(W4Family):
    """The universal kernel. A CUDA graph runs it without slices of K, so tiles with slices are not tuned."""

    name = KERNEL
    architectures = ARCHITECTURES

    def predict(self, work: Work, gpu: Gpu) -> Prediction:
        """Return the tile modelled fastest, and how fast: never faster than this very GPU's ceilings allow."""
        tile = self.ranked(work, gpu)[0]
        modelled = w4_mma_estimate_us(problem_of(work), tile, _device(gpu))
        return Prediction(
            kernel=KERNEL,
            configuration=tile,
            words=self.describe(tile),
            time_us=max(modelled, work.roofline(gpu)[0]),
        )

    def choose(self, problem: W4Problem, gpu: Gpu | None = None) -> W4MmaTile:
        """Return the tile modelled fastest."""
        return w4_mma_choose(problem, mma_device("sm_80", 4) if gpu is None else _device(gpu))

    def ranked(self, work: Work, gpu: Gpu) -> Sequence[W4MmaTile]:
        """Return every tile that a CUDA graph runs as it is."""
        return [tile for tile in w4_mma_rank(problem_of(work), _device(gpu)) if tile.slices == 1]

    def describe(self, configuration: W4MmaTile) -> str:
        """Return a tile as 128x16 s3 8 warps: rows of W by rows of A, stages, warps, slices."""
        tile = configuration
        words = [f"{tile.tile_w}x{tile.tile_a}", f"s{tile.stages}", f"{tile.threads // 32} warps"]
        return " ".join(words + ([f"{tile.slices} slices"] if tile.slices > 1 else []))

    def source(self, work: Work, configuration: W4MmaTile, gpu: Gpu) -> tuple[Path, Mapping[str, str | int]]:
        """Return gemm_w4_mma.cu and its macros."""
        return SOURCE, w4_mma_launch_of(problem_of(work), configuration, kind_of(work)).defines


def _device(gpu: Gpu) -> MmaDevice:
    known = mma_device(gpu.architecture, gpu.multiprocessors)
    return replace(known, dram_bytes_per_us=min(known.dram_bytes_per_us, 0.95e3 * gpu.dram_gb_per_s))

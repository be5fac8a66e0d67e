"""gemm_w4_mma.cu as a family: weights of four bits by bf16 activations on every architecture from sm_80 on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from quantkit.kernels.compile import ARCHITECTURES
from quantkit.kernels.gpus import Gpu
from quantkit.kernels.mma_heuristics import MmaDevice, mma_device
from quantkit.kernels.w4.family import W4Family, kind_of, problem_of
from quantkit.kernels.w4.heuristics import W4Problem
from quantkit.kernels.w4.mma_heuristics import W4MmaTile, w4_mma_estimate_us, w4_mma_rank
from quantkit.kernels.w4.mma_launch import KERNEL, SOURCE, w4_mma_launch_of
from quantkit.kernels.work import FORMATS, Work


class W4MmaFamily(W4Family):
    """The universal kernel. Slices of K meet in a workspace that each prepared call has for itself."""

    name = KERNEL
    architectures = ARCHITECTURES
    # Integers by e4m3 need their sums promoted, which this kernel does not do.
    formats = W4Family.formats - {"w4a8-fp8"}

    def takes(self, work: Work, gpu: Gpu) -> bool:
        """Return whether it computes `work` on `gpu`: e4m3 is multiplied from sm_89 on."""
        has_e4m3 = gpu.architecture not in ("sm_80", "sm_86")
        return super().takes(work, gpu) and (has_e4m3 or FORMATS[work.format].activations != "e4m3")

    def candidates(self, problem: W4Problem, gpu: Gpu | None) -> Sequence[W4MmaTile]:
        """Return every tile, the one modelled fastest first."""
        return w4_mma_rank(problem, mma_device("sm_80", 4) if gpu is None else _device(gpu))

    def estimate_us(self, problem: W4Problem, configuration: W4MmaTile, gpu: Gpu) -> float:
        """Return the modelled time."""
        return w4_mma_estimate_us(problem, configuration, _device(gpu))

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

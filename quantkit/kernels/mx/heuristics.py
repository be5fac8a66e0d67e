"""Which tile gemm_blocks_sm120.cu takes for a product: enumerate, drop what does not fit, rank by a model of time.

Everything here is a pure function of the problem and of a few numbers that describe the GPU. The model knows its
maker's figures of sm_120 alone: the kernel has run nowhere yet.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantkit.kernels.epilogue import OUTPUT_BYTES
from quantkit.kernels.heuristics import Problem
from quantkit.kernels.mma_heuristics import MmaDevice
from quantkit.kernels.mx.layout import row_bytes, row_scales

_ROW = 128  # bytes of a row of codes in a stage
# Of the rate of bf16, which is half the device's int8 rate: MXFP8 runs at twice bf16's, four bits at eight times.
_RATES = {"mxfp8": 1.0, "mxfp4": 4.0, "nvfp4": 4.0}
_STAGE_SCALES = {"mxfp8": 4, "mxfp4": 8, "nvfp4": 16}  # bytes of a row's scales in a stage
_SLICES = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True, kw_only=True)
class MxProblem:
    """D[m, n] = A[m, k] @ W[n, k].T, both operands of `format` (mxfp8, mxfp4, nvfp4), into `output`."""

    m: int
    n: int
    k: int
    format: str
    output: str

    @property
    def steps(self) -> int:
        """Stages that K fills."""
        return -(-row_bytes(self.format, self.k) // _ROW)

    def as_key(self) -> Problem:
        """Return what the timing cache is asked by."""
        return Problem(m=self.m, n=self.n, k=self.k, format=self.format, output=self.output)

    @property
    def size_bytes(self) -> float:
        """Bytes of both operands and of D."""
        row = row_bytes(self.format, self.k) + row_scales(self.format, self.k)
        return (self.m + self.n) * row + self.m * self.n * OUTPUT_BYTES[self.output]


@dataclass(frozen=True, kw_only=True)
class MxTile:
    """A configuration of gemm_blocks_sm120.cu, whose head says what each part does.

    slices: blocks that share a tile's K. order: tiles along M before the next along N.
    """

    tile_m: int
    tile_n: int
    warps_m: int
    warps_n: int
    stages: int
    slices: int = 1
    order: int = 8

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_m * self.warps_n

    def stage_bytes(self, problem: MxProblem) -> int:
        """Return the bytes of a stage: codes and scales of both operands' rows."""
        return (self.tile_m + self.tile_n) * (_ROW + _STAGE_SCALES[problem.format])

    def shared_bytes(self, problem: MxProblem) -> int:
        """Return the shared memory of a block: the ring, or the piece of a tile that is stored at a time."""
        return max(self.stages * self.stage_bytes(problem), 16 * self.warps_m * (4 * self.tile_n + 16))

    def tiles(self, problem: MxProblem) -> int:
        """Return the number of tiles of D."""
        return -(-problem.m // self.tile_m) * -(-problem.n // self.tile_n)

    def partials_bytes(self, problem: MxProblem) -> int:
        """Return the bytes that the slices leave their sums in: none without slices."""
        return self.tiles(problem) * self.slices * self.tile_m * self.tile_n * 4 if self.slices > 1 else 0

    def residents(self, problem: MxProblem, device: MmaDevice) -> int:
        """Return how many blocks a multiprocessor holds at a time."""
        warp_m, warp_n = self.tile_m // self.warps_m, self.tile_n // self.warps_n
        registers = min(255, (warp_m * warp_n + (warp_m + warp_n) * 16) // 32 + 80)
        by_registers = 65536 // (registers * self.threads)
        return max(1, min(device.shared_bytes // (self.shared_bytes(problem) + 1024), by_registers))


# Sides of the tile, and warps along them. Narrow ones for few rows, where weights are streamed.
_SHAPES = (
    (16, 64, 1, 4),
    (16, 128, 1, 4),
    (32, 64, 1, 4),
    (32, 128, 1, 4),
    (64, 64, 2, 2),
    (64, 128, 2, 2),
    (128, 64, 2, 2),
    (128, 128, 2, 4),
)


def mx_candidates(problem: MxProblem, device: MmaDevice) -> Iterator[MxTile]:
    """Yield the configurations that can run `problem` on `device`."""
    for tile_m, tile_n, warps_m, warps_n in _SHAPES:
        if tile_m < min(problem.m, 32) or (tile_m > 16 and tile_m >= 2 * problem.m):
            continue
        for stages in (2, 3, 4, 6):
            tile = MxTile(
                tile_m=tile_m, tile_n=tile_n, warps_m=warps_m, warps_n=warps_n, stages=stages,
                order=max(1, 1024 // tile_m),
            )  # fmt: skip
            if tile.shared_bytes(problem) > device.shared_limit:
                continue
            room = tile.residents(problem, device) * device.multiprocessors
            for slices in _SLICES:
                fits = slices <= problem.steps // 2 and tile.tiles(problem) * slices <= 2 * room
                if slices == 1 or fits:
                    yield replace(tile, slices=slices)


def mx_estimate_us(problem: MxProblem, tile: MxTile, device: MmaDevice) -> float:
    """Return the modelled time of `problem` with `tile`, in microseconds; not compared with any GPU's yet.

    A step of a block takes the longest of its products, its traffic through shared memory, its share of the L2 cache's
    reads, and its latency over the steps in flight; device memory bounds the whole.
    """
    blocks = tile.tiles(problem) * tile.slices
    busiest = -(-blocks // device.multiprocessors)
    together = min(busiest, tile.residents(problem, device))
    steps = -(-problem.steps // tile.slices)
    cycles = device.cycles_per_us
    warps = tile.threads // 32
    # Codes of 32 bytes are 32 products of e4m3, 64 of e2m1; `macs_per_cycle` are those of int8.
    codes = _ROW if problem.format == "mxfp8" else 2 * _ROW
    rate = device.macs_per_cycle * _RATES[problem.format] * cycles * min(1.0, 0.5 + warps * together / 16)
    products = tile.tile_m * tile.tile_n * codes / rate
    warp_m, warp_n = tile.tile_m / tile.warps_m, tile.tile_n / tile.warps_n
    stage = tile.stage_bytes(problem)
    shared = (warps * (warp_m + warp_n) * _ROW + stage) / 128 / cycles
    loads = stage / min(device.l2_bytes_per_us / min(device.multiprocessors, blocks), 1.0e5)
    latency = 1.2 / ((tile.stages - 1) * together)
    width = OUTPUT_BYTES[problem.output]
    epilogue = 1.0 + tile.tile_m * tile.tile_n * width / 1.5e4
    each = steps * (max(products, shared, loads, latency) + 0.03 / together) + epilogue / together
    slicing = 0.0
    if tile.slices > 1:
        # Sums go out and come back through L2, and the last block of a tile reads all of them alone.
        slicing = 3.0 + 2 * tile.partials_bytes(problem) / device.l2_bytes_per_us
        slicing += tile.slices * tile.tile_m * tile.tile_n * 4 / 1.0e5
    return 2.0 + max(busiest * each, problem.size_bytes / device.dram_bytes_per_us) + slicing


def mx_rank(problem: MxProblem, device: MmaDevice) -> list[MxTile]:
    """Return the configurations that can run `problem`, the one modelled fastest first."""

    def key(tile: MxTile) -> tuple[float, int, int]:
        return mx_estimate_us(problem, tile, device), tile.slices, abs(tile.stages - 4)

    return sorted(mx_candidates(problem, device), key=key)


def mx_choose(problem: MxProblem, device: MmaDevice) -> MxTile:
    """Return the configuration modelled fastest."""
    return mx_rank(problem, device)[0]


def mx_tile_of(configuration: Mapping[str, Any], problem: MxProblem, device: MmaDevice) -> MxTile | None:
    """Return the tile that a timing cache tells of; None where the kernel no longer has it."""
    try:
        tile = MxTile(**configuration)
    except TypeError:
        return None
    return tile if tile in set(mx_candidates(problem, device)) else None

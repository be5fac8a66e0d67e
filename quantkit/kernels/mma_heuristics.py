"""Which tile gemm_mma.cu takes for a product: enumerate, drop what does not fit, rank the rest by a model of time.

Everything here is a pure function of the problem and of a few numbers that describe the GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import MappingProxyType

from quantkit.kernels.epilogue import OUTPUT_BYTES
from quantkit.kernels.heuristics import Problem

ITEM_BYTES = MappingProxyType({"int8": 1, "float8_e4m3fn": 1, "bfloat16": 2, "float16": 2})
_SLICES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


@dataclass(frozen=True, kw_only=True)
class MmaDevice:
    """What the model of time knows of a GPU.

    Attributes:
        arch: what NVRTC calls it.
        shared_bytes: shared memory of a multiprocessor; a block may have all but 1 KB of it.
        macs_per_cycle: products and sums of int8 that mma.sync reaches on one multiprocessor.
        dram_bytes_per_us, l2_bytes_per_us: of the whole GPU.
    """

    arch: str
    multiprocessors: int
    shared_bytes: int
    macs_per_cycle: float
    cycles_per_us: float = 1600.0
    dram_bytes_per_us: float = 1.0e6
    l2_bytes_per_us: float = 4.0e6

    @property
    def shared_limit(self) -> int:
        """Bytes that one block may have."""
        return self.shared_bytes - 1024


# Of one GPU each; multiprocessors are replaced by the actual number. Rates of tensor cores from the makers' papers on
# the architectures, of sm_90 from what mma.sync was seen to reach of them.
_DEVICES = MappingProxyType(
    {
        "sm_80": MmaDevice(
            arch="sm_80", multiprocessors=108, shared_bytes=164 << 10, macs_per_cycle=2048,
            cycles_per_us=1400, dram_bytes_per_us=1.8e6, l2_bytes_per_us=4.5e6,
        ),
        "sm_86": MmaDevice(arch="sm_86", multiprocessors=84, shared_bytes=100 << 10, macs_per_cycle=1024),
        "sm_89": MmaDevice(
            arch="sm_89", multiprocessors=128, shared_bytes=100 << 10, macs_per_cycle=1024, cycles_per_us=2400
        ),
        "sm_90a": MmaDevice(
            arch="sm_90a", multiprocessors=132, shared_bytes=228 << 10, macs_per_cycle=2600,
            dram_bytes_per_us=4.6e6, l2_bytes_per_us=10.5e6,
        ),
        "sm_100a": MmaDevice(
            arch="sm_100a", multiprocessors=148, shared_bytes=228 << 10, macs_per_cycle=2600,
            dram_bytes_per_us=7.5e6, l2_bytes_per_us=12e6,
        ),
        "sm_120a": MmaDevice(
            arch="sm_120a", multiprocessors=170, shared_bytes=100 << 10, macs_per_cycle=1024,
            cycles_per_us=2400, dram_bytes_per_us=1.7e6, l2_bytes_per_us=6e6,
        ),
    }
)  # fmt: skip


def mma_device(arch: str, multiprocessors: int) -> MmaDevice:
    """Return what is known of a GPU; of an unknown architecture, what holds for the least of them."""
    known = _DEVICES.get(arch, _DEVICES["sm_86"])
    return replace(known, arch=arch, multiprocessors=multiprocessors)


# Architectures on which mma.sync multiplies e4m3 as fp16, and how the kernel makes fp16 of it: its macro WIDEN.
_WIDENING = MappingProxyType({"sm_80": 1, "sm_86": 1, "sm_90a": 2, "sm_100a": 2})


def widening(format_name: str, arch: str) -> int:
    """Return how the kernel widens operands of this format: 0 where the tensor core takes them as they are."""
    return _WIDENING.get(arch, 0) if format_name == "float8_e4m3fn" else 0


@dataclass(frozen=True, kw_only=True)
class MmaTile:
    """A configuration of gemm_mma.cu, whose head says what each part does.

    row: bytes of K in a stage. slices: blocks that share a tile's K. group: tiles along M before the next along N.
    """

    tile_m: int
    tile_n: int
    warps_m: int
    warps_n: int
    row: int
    stages: int
    slices: int = 1
    group: int = 8

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_m * self.warps_n

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the ring."""
        return self.stages * (self.tile_m + self.tile_n) * self.row

    def tiles(self, problem: Problem) -> int:
        """Return the number of tiles of D."""
        return -(-problem.m // self.tile_m) * -(-problem.n // self.tile_n)

    def workspace_bytes(self, problem: Problem) -> int:
        """Return the bytes that the slices leave their sums in: none without slices."""
        return self.tiles(problem) * self.slices * self.tile_m * self.tile_n * 4 if self.slices > 1 else 0

    def residents(self, device: MmaDevice) -> int:
        """Return how many blocks a multiprocessor holds at a time."""
        # Sums, two sets of fragments, and the rest for addresses, as compilers were seen to need them.
        warp_m, warp_n = self.tile_m // self.warps_m, self.tile_n // self.warps_n
        copies = (self.tile_m + self.tile_n) * self.row // 16 // self.threads
        registers = (warp_m * warp_n + (warp_m + warp_n) * 16) // 32 + 56 + (copies if self.row == 128 else 0)
        registers = min(255, registers)
        by_registers = 65536 // (registers * self.threads)
        return max(1, min(device.shared_bytes // (self.shared_bytes + 1024), by_registers))


# Sides of the tile, warps along them, bytes of K in a stage. Narrow ones for few rows, where weights are streamed.
_SHAPES = (
    (16, 64, 1, 4, 128),
    (16, 128, 1, 4, 128),
    (32, 64, 1, 4, 128),
    (32, 128, 1, 4, 128),
    (64, 64, 2, 2, 128),
    (64, 128, 2, 2, 128),
    (64, 128, 2, 2, 64),
    (128, 64, 2, 2, 64),
    (128, 128, 2, 2, 64),
    (128, 128, 2, 4, 64),
    (128, 128, 2, 4, 128),
    (128, 256, 2, 4, 64),
    (256, 128, 4, 2, 64),
)


def mma_candidates(problem: Problem, device: MmaDevice) -> Iterator[MmaTile]:
    """Yield the configurations of gemm_mma.cu that can run `problem` on `device`."""
    all_bytes = problem.k * ITEM_BYTES[problem.format]
    for tile_m, tile_n, warps_m, warps_n, row in _SHAPES:
        # Two of e4m3 become four registers of fp16, for which the largest pieces have no room (conversion by moving
        # bits needs less at a time).
        if widening(problem.format, device.arch) == 2 and tile_m * tile_n > 2048 * warps_m * warps_n:
            continue
        for stages in (3, 4, 6):
            tile = MmaTile(
                tile_m=tile_m, tile_n=tile_n, warps_m=warps_m, warps_n=warps_n, row=row, stages=stages,
                group=max(1, 1024 // tile_m),
            )  # fmt: skip
            if tile.shared_bytes > device.shared_limit:
                continue
            steps, room = -(-all_bytes // row), tile.residents(device) * device.multiprocessors
            # The largest pieces leave no registers to add up slices with.
            most = 1 if tile_m * tile_n > 2048 * warps_m * warps_n else steps // 4
            for slices in _SLICES:
                if slices == 1 or (slices <= most and tile.tiles(problem) * slices <= 2 * room):
                    yield replace(tile, slices=slices)


def mma_estimate_us(problem: Problem, tile: MmaTile, device: MmaDevice) -> float:
    """Return the modelled time of `problem` with `tile`, in microseconds.

    A multiprocessor takes its blocks' steps one after the other. A step (`row` bytes of K of one tile) takes the
    longest of its products, its traffic through shared memory, its reads from L2 at a multiprocessor's share, and its
    latency over the steps in flight, and a barrier; device memory bounds the whole. On an H200 it is within 0.8 and
    1.3 of what was measured.
    """
    blocks = tile.tiles(problem) * tile.slices
    busiest = -(-blocks // device.multiprocessors)
    together = min(busiest, tile.residents(device))
    all_bytes = problem.k * ITEM_BYTES[problem.format]
    steps = -(-all_bytes // tile.row // tile.slices) if all_bytes else 0
    rate = device.macs_per_cycle * device.cycles_per_us
    if widening(problem.format, device.arch):
        rate *= 0.35  # two instructions, and their conversions
    # Few warps leave the tensor cores idle while they read fragments.
    rate *= min(1.0, 0.5 + tile.threads / 32 * together / 16)
    products = tile.tile_m * tile.tile_n * tile.row / rate
    warp_m, warp_n = tile.tile_m / tile.warps_m, tile.tile_n / tile.warps_n
    moved = tile.threads / 32 * (warp_m + warp_n) * tile.row + (tile.tile_m + tile.tile_n) * tile.row
    shared = moved / 128 / device.cycles_per_us
    busy = min(device.multiprocessors, blocks)
    loads = (tile.tile_m + tile.tile_n) * tile.row / min(device.l2_bytes_per_us / busy, 1.0e5)
    latency = 1.2 / ((tile.stages - 1) * together)
    epilogue = 1.0 + tile.tile_m * tile.tile_n * OUTPUT_BYTES[problem.output] / 1.5e4
    each = steps * (max(products, shared, loads, latency) + 0.03 / together) + epilogue / together
    streamed = (problem.m + problem.n) * all_bytes + problem.m * problem.n * OUTPUT_BYTES[problem.output]
    slicing = 0.0
    if tile.slices > 1:
        # Sums go out and come back through L2, and the last block of a tile reads all of them alone.
        slicing = 3.0 + 2 * tile.workspace_bytes(problem) / device.l2_bytes_per_us
        slicing += tile.slices * tile.tile_m * tile.tile_n * 4 / 1.0e5
    return 2.0 + max(busiest * each, streamed / device.dram_bytes_per_us) + slicing


def mma_rank(problem: Problem, device: MmaDevice) -> list[MmaTile]:
    """Return the configurations that can run `problem`, the one modelled fastest first."""

    def key(tile: MmaTile) -> tuple[float, int, int]:
        return mma_estimate_us(problem, tile, device), tile.slices, abs(tile.stages - 4)

    return sorted(mma_candidates(problem, device), key=key)


def mma_choose(problem: Problem, device: MmaDevice) -> MmaTile:
    """Return the configuration modelled fastest."""
    return mma_rank(problem, device)[0]

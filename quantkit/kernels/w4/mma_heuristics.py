"""Which tile gemm_w4_mma.cu takes for a product: enumerate, drop what does not fit, rank the rest by a model of time.

Everything here is a pure function of the problem and of a few numbers that describe the GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from quantkit.kernels.epilogue import OUTPUT_BYTES
from quantkit.kernels.mma_heuristics import MmaDevice, widening
from quantkit.kernels.w4.problem import SCALE_BYTES, W4Problem

_ROW = 128  # bytes of a slab's row of activations
_SLICES = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True, kw_only=True)
class W4MmaTile:
    """A configuration of gemm_w4_mma.cu, whose head says what each part does.

    Attributes:
        tile_w, tile_a: rows of W and of A in a tile. warps_w, warps_a: warps along each.
        slabs: of a stage, each as much of K as 128 bytes of A hold. stages: of the ring.
        slices: blocks that share a tile's K. order: tiles along W before the next along A.
    """

    tile_w: int
    tile_a: int
    warps_w: int
    warps_a: int = 1
    slabs: int = 1
    stages: int = 3
    slices: int = 1
    order: int = 8

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_w * self.warps_a

    def stage_bytes(self, problem: W4Problem) -> int:
        """Return the bytes of a stage: rows of A, codes, scales and zero points."""
        group, slab = problem.group, problem.slab
        groups = 1 if group is None or group >= slab else slab // group
        span = self.slabs if group is None else max(1, group // slab)
        sides = 1 if span >= self.slabs else self.slabs // span
        scales = self.tile_w * groups * SCALE_BYTES[problem.scales]
        zeros = self.tile_w // 2 * groups if problem.zeros else 0
        return self.slabs * (self.tile_a * _ROW + self.tile_w * slab // 2) + sides * (scales + zeros)

    def shared_bytes(self, problem: W4Problem) -> int:
        """Return the shared memory of a block: the ring, or the piece of a tile that is stored at a time."""
        piece = min(self.tile_a, 32 * self.warps_a) * (4 * self.tile_w + 16)
        return max(self.stages * self.stage_bytes(problem), piece)

    def steps(self, problem: W4Problem) -> int:
        """Return the stages that K fills."""
        return -(-problem.slabs // self.slabs)

    def tiles(self, problem: W4Problem) -> int:
        """Return the number of tiles of D."""
        return -(-problem.n // self.tile_w) * -(-problem.m // self.tile_a)

    def partials_bytes(self, problem: W4Problem) -> int:
        """Return the bytes that the slices leave their sums in: none without slices."""
        return self.tiles(problem) * self.slices * self.tile_w * self.tile_a * 4 if self.slices > 1 else 0

    def residents(self, problem: W4Problem, device: MmaDevice) -> int:
        """Return how many blocks a multiprocessor holds at a time."""
        # Sums, two sets of fragments of A, codes and what they are decoded with, and the rest for addresses.
        of_w, of_a = self.tile_w // self.warps_w, self.tile_a // self.warps_a
        registers = min(255, of_w * of_a // 32 + of_a // 2 + of_w // 16 * 16 + 48)
        by_registers = 65536 // (registers * self.threads)
        return max(1, min(device.shared_bytes // (self.shared_bytes(problem) + 1024), by_registers))


# Rows of W and of A, warps along W, slabs of a stage. A block of few rows of A streams codes, many bytes at a time.
_SHAPES = (
    (64, 8, 4, 4),
    (128, 8, 8, 4),
    (64, 16, 4, 4),
    (128, 16, 8, 4),
    (64, 32, 4, 2),
    (128, 32, 8, 2),
    (128, 64, 4, 1),
    (256, 64, 8, 1),
    (128, 128, 4, 1),
    (256, 128, 8, 1),
)
# Two of e4m3 become four registers of fp16 where the tensor core lacks them, and large pieces have no room for those.
# Rows of A in a tile that have no room for slices' sums beside zero points and scales in two parts.
_CROWDED_ROWS = 128
_WIDENED_SHAPES = (*(shape for shape in _SHAPES if shape[1] <= 32), (128, 64, 8, 1))


def w4_mma_candidates(problem: W4Problem, device: MmaDevice) -> Iterator[W4MmaTile]:
    """Yield the configurations of gemm_w4_mma.cu that can run `problem` on `device`."""
    widened = widening(problem.activations, device.arch) == 2
    for tile_w, tile_a, warps_w, slabs in _WIDENED_SHAPES if widened else _SHAPES:
        # Few rows of A are one tile, so that codes are read, and decoded, once; no tile is twice as wide as they.
        if tile_a < min(problem.m, 64) or (tile_a > 8 and tile_a >= 2 * problem.m):
            continue
        for stages in (3, 4, 6):
            tile = W4MmaTile(
                tile_w=tile_w, tile_a=tile_a, warps_w=warps_w, slabs=slabs, stages=stages,
                order=max(1, 1024 // tile_w),
            )  # fmt: skip
            if tile.shared_bytes(problem) > device.shared_limit:
                continue
            room = tile.residents(problem, device) * device.multiprocessors
            for slices in _SLICES if tile_a < _CROWDED_ROWS or not _crowded(problem) else (1,):
                fits = slices <= tile.steps(problem) // 2 and tile.tiles(problem) * slices <= 2 * room
                if slices == 1 or fits:
                    yield replace(tile, slices=slices)


def _crowded(problem: W4Problem) -> bool:
    """Return whether codes are decoded with a zero point and a scale of another type, which comes in two parts."""
    return problem.zeros and problem.scales not in ("none", "uint8", problem.activations)


# What eight codes of each of a warp's lanes cost besides mma and ldmatrix, in instructions: those of the loop over K
# for eight rows of A, counted in the machine code of sm_80 (sm_120 has 1 to 3 % fewer).
_DECODED = {"int4": 18.7, "uint4": 24.5, "fp4_e2m1": 18.7, "e4m3": 25.7, "e8m0": 24.7}
_DECODED_TO_EIGHT_BITS = {"e8m0": 17.9, "uint8": 14.2, "none": 14.2}


def instructions_of_eight(problem: W4Problem, rows: int) -> float:
    """Return the instructions a lane needs for eight codes and `rows` rows of A: copies, decoding, ldmatrix, mma."""
    if problem.slab == 128:
        decoded = _DECODED_TO_EIGHT_BITS[problem.scales]
    else:
        decoded = _DECODED[problem.scales if problem.codes == "fp4_e2m1" and problem.group else problem.codes]
    return decoded + -(-rows // 8) * 96 / problem.slab


def w4_mma_estimate_us(problem: W4Problem, tile: W4MmaTile, device: MmaDevice) -> float:
    """Return the modelled time of `problem` with `tile`, in microseconds; not compared with any GPU's yet.

    A step of a block takes the longest of its products on the tensor core, its instructions (four a cycle at best, of
    which seven tenths are reached), its traffic through shared memory, its share of the L2 cache's reads, and its
    latency over the steps in flight; device memory bounds the whole.
    """
    blocks = tile.tiles(problem) * tile.slices
    busiest = -(-blocks // device.multiprocessors)
    together = min(busiest, tile.residents(problem, device))
    steps = -(-tile.steps(problem) // tile.slices)
    stage = tile.stage_bytes(problem)
    warps = tile.threads // 32
    cycles = device.cycles_per_us
    rate = device.macs_per_cycle * cycles * min(1.0, 0.5 + warps * together / 16)
    products = tile.tile_w * tile.tile_a * _ROW * tile.slabs / rate
    codes = tile.tile_w * problem.slab * tile.slabs / 256
    issued = (
        codes * tile.warps_a * instructions_of_eight(problem, tile.tile_a // tile.warps_a) / (2.8 * cycles)
    )
    shared = (stage + (warps // tile.warps_a) * tile.tile_a * _ROW * tile.slabs + stage) / 128 / cycles
    busy = min(device.multiprocessors, blocks)
    loads = stage / min(device.l2_bytes_per_us / busy, 1.0e5)
    latency = 1.2 / ((tile.stages - 1) * together)
    width = OUTPUT_BYTES[problem.output]
    epilogue = 1.0 + tile.tile_w * tile.tile_a * width / 1.5e4
    each = steps * (max(products, issued, shared, loads, latency) + 0.03 / together) + epilogue / together
    read = problem.weight_bytes + 128 // problem.slab * problem.m * problem.k
    streamed = read + width * problem.m * problem.n
    slicing = 0.0
    if tile.slices > 1:
        # Sums go out and come back through L2, and the last block of a tile reads all of them alone.
        slicing = 3.0 + 2 * tile.partials_bytes(problem) / device.l2_bytes_per_us
        slicing += tile.slices * tile.tile_w * tile.tile_a * 4 / 1.0e5
    return 2.0 + max(busiest * each, streamed / device.dram_bytes_per_us) + slicing


def w4_mma_rank(problem: W4Problem, device: MmaDevice) -> list[W4MmaTile]:
    """Return the configurations that can run `problem`, the one modelled fastest first."""

    def key(tile: W4MmaTile) -> tuple[float, int, int]:
        return w4_mma_estimate_us(problem, tile, device), tile.slices, abs(tile.stages - 4)

    return sorted(w4_mma_candidates(problem, device), key=key)


def w4_mma_choose(problem: W4Problem, device: MmaDevice) -> W4MmaTile:
    """Return the configuration modelled fastest."""
    return w4_mma_rank(problem, device)[0]

"""The configurations of gemm_w4_sm90.cu and gemm_w4_few.cu: what a block holds, and how its work is dealt out."""

from dataclasses import dataclass

from quantkit.kernels.epilogue import OUTPUT_BYTES
from quantkit.kernels.w4.problem import SCALE_BYTES, W4Problem

_ROW = 128  # bytes of a slab's row of activations


@dataclass(frozen=True, kw_only=True)
class W4Tile:
    """A configuration of gemm_w4_sm90.cu, whose head says what each part does.

    Attributes:
        tile_n: rows of A in a tile.
        blocks_of_64: blocks of 64 rows of W that a consumer has. consumers: warpgroups that decode and multiply.
        slabs: of 128 bytes of A's K in a stage. grain: instructions deep that a granule is.
        cluster: blocks, 1 or 2, that share rows of A. stages: of the ring.
        order: tiles along W before the next along A.
        stream: tiles are cut along K where they would not fill the GPU evenly.
    """

    tile_n: int
    blocks_of_64: int = 1
    consumers: int = 4
    slabs: int = 2
    grain: int = 4
    stages: int = 6
    order: int = 8
    cluster: int = 1
    stream: bool = True

    @property
    def tile_w(self) -> int:
        """Rows of W in a tile."""
        return 64 * self.blocks_of_64 * self.consumers

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * (self.consumers + 1)

    def piece(self, problem: W4Problem) -> int:
        """Return the rows of D that the epilogue stores at a time."""
        return min(self.tile_n, 32 if OUTPUT_BYTES[problem.output] == 4 else 64)

    def stage_bytes(self, problem: W4Problem) -> int:
        """Return the bytes of a stage: rows of A, codes, scales and zero points."""
        blocks = self.blocks_of_64 * self.consumers
        group = problem.group
        slab = problem.slab
        groups = 1 if group is None or group >= slab else slab // group
        sides = 1 if group is None or group >= slab * self.slabs else self.slabs
        pair = groups * (2 * SCALE_BYTES[problem.scales] + problem.zeros)
        used = self.slabs * (self.tile_n * _ROW + blocks * 32 * slab) + sides * blocks * 32 * pair
        return -(-used // 1024) * 1024

    def shared_bytes(self, problem: W4Problem) -> int:
        """Return the shared memory of a block: the ring, the output's buffers, barriers and flags."""
        piece, width = self.piece(problem), OUTPUT_BYTES[problem.output]
        buffers = 2 if self.blocks_of_64 * self.tile_n > piece else 1
        output = self.consumers * buffers * piece * 64 * width
        return self.stages * (self.stage_bytes(problem) + 16) + output + 8 * self.consumers

    def steps(self, problem: W4Problem) -> int:
        """Return the stages that a tile's K fills."""
        return -(-problem.slabs // self.slabs)

    def tiles(self, problem: W4Problem) -> int:
        """Return the number of tiles of D, a cluster's counted as one."""
        along_w = -(-problem.blocks // (self.blocks_of_64 * self.consumers * self.cluster))
        return along_w * -(-problem.m // self.tile_n)


@dataclass(frozen=True, kw_only=True)
class W4Few:
    """A configuration of gemm_w4_few.cu, whose head says what each part does.

    Attributes:
        tile_n: rows of A in a tile, a multiple of 8, 64 at most.
        warps_w, groups: warps side by side along W, and groups of 16 rows that each has. warps_k: sets that take
            stages in turn.
        slabs: of 128 bytes of K of A in a stage. stages: of the ring, a multiple of warps_k. cluster: blocks that
            fetch rows of A for each other.
    """

    tile_n: int
    warps_w: int
    warps_k: int = 1
    groups: int = 1
    slabs: int = 2
    stages: int = 4
    cluster: int = 1

    @property
    def tile(self) -> int:
        """Groups of 16 rows of W in a tile."""
        return self.warps_w * self.groups

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * (self.warps_w * self.warps_k + 1)

    def blocks(self, problem: W4Problem) -> tuple[int, int]:
        """Return the blocks along W, in whole clusters, and along A."""
        along_w = -(-problem.blocks * 4 // (self.tile * self.cluster)) * self.cluster
        return along_w, -(-problem.m // self.tile_n)

    def stage_bytes(self, problem: W4Problem) -> int:
        """Return the bytes of a stage: rows of A, codes, scales and zero points."""
        group = problem.group
        slab = problem.slab
        groups = 1 if group is None or group >= slab else slab // group
        span = self.slabs if group is None else max(1, group // slab)
        sides = 1 if span >= self.slabs else self.slabs // span
        scales = self.tile * 8 * groups * 2 * SCALE_BYTES[problem.scales]
        zeros = (self.tile + 3) // 2 * 16 * groups if problem.zeros else 0
        used = self.slabs * (self.tile_n * _ROW + self.tile * 8 * slab) + sides * (scales + zeros)
        return -(-used // 1024) * 1024

    def shared_bytes(self, problem: W4Problem) -> int:
        """Return the shared memory of a block: the ring and its barriers, or the sums that sets of warps exchange."""
        sums = (self.warps_k - 1) * self.tile * (self.tile_n // 8) * 512
        return max(self.stages * (self.stage_bytes(problem) + 16), sums)


# Of the multiprocessors' time, what whole tiles must fill at least; below that tiles are cut.
_FILLED = 0.9


def schedule_of(problem: W4Problem, tile: W4Tile, multiprocessors: int) -> tuple[int, int]:
    """Return how many clusters are launched, and how many tiles they take whole before they share the rest."""
    tiles, steps = tile.tiles(problem), tile.steps(problem)
    room = max(1, multiprocessors // tile.cluster)
    waves = -(-tiles // room)
    if not tile.stream or tiles >= _FILLED * waves * room:
        return min(tiles, room), tiles
    # The last wave and one before it are cut together: pieces are then as long as tiles, or longer.
    whole = max(0, tiles // room - 1) * room
    units = (tiles - whole) * steps
    # A share is at least two steps of K, so that its sums are worth their way through memory.
    return (min(room, max(1, units // 2)) if whole == 0 else room), whole

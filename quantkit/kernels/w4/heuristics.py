"""Which tile gemm_w4_sm90.cu takes for a product, by a model of bytes and instructions.

Everything here is a pure function of the problem and of a few numbers that describe the GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from quantkit.kernels.epilogue import OUTPUT_BYTES
from quantkit.kernels.heuristics import H200, SHARED_LIMIT, Device

_ROW = 128  # bytes of a slab's row of activations
_SCALE_BYTES = {"none": 0, "bfloat16": 2, "float16": 2, "float32": 4, "e4m3": 1, "e8m0": 1, "uint8": 1}


@dataclass(frozen=True, kw_only=True)
class W4Problem:
    """D[m, n] = A[m, k] @ W[n, k].T, W of four bits.

    activations: bfloat16, float16 or int8. output: D's type. codes, group, scales, zeros: as in `layout.Layout4`.
    """

    m: int
    n: int
    k: int
    activations: str
    output: str
    codes: str
    group: int | None
    scales: str
    zeros: bool

    @property
    def slab(self) -> int:
        """Columns of a slab: 128 bytes of activations."""
        return 128 if self.activations == "int8" else 64

    @property
    def slabs(self) -> int:
        """Slabs along K."""
        return -(-self.k // self.slab)

    @property
    def blocks(self) -> int:
        """Blocks of 64 rows of W."""
        return -(-self.n // 64)

    @property
    def weight_bytes(self) -> float:
        """Bytes of the packed weight."""
        groups = 1 if self.group is None else -(-self.k // self.group)
        per_row = self.k / 2 + groups * (_SCALE_BYTES[self.scales] + (0.5 if self.zeros else 0)) + 4
        return self.n * per_row


@dataclass(frozen=True, kw_only=True)
class W4Tile:
    """A configuration of gemm_w4_sm90.cu, whose head says what each part does.

    Attributes:
        tile_n: rows of A in a tile.
        blocks_of_64: blocks of 64 rows of W that a consumer has. consumers: warpgroups that decode and multiply.
        slabs: of 64 of K in a stage. grain: instructions deep that a granule is.
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
        pair = groups * (2 * _SCALE_BYTES[problem.scales] + problem.zeros)
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
        tile_n: rows of A in a tile, 8 or 16.
        warps_w, groups: warps side by side along W, and groups of 16 rows that each has. warps_k: sets that share K.
        slabs: of 64 of K in a stage. stages: of the ring. cluster: blocks that fetch rows of A for each other.
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
        scales = self.tile * 8 * groups * 2 * _SCALE_BYTES[problem.scales]
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


# Of gemm_w4_few.cu: warps of a block where each has one group of rows, or more.
_WARPS, _WARPS_OF_MORE = 28, 14


def few_tiles(problem: W4Problem, multiprocessors: int) -> Iterator[W4Few]:
    """Yield the configurations of gemm_w4_few.cu that give each multiprocessor one tile, or nearly, the best first."""
    all_groups = -(-problem.n // 16)
    share = -(-all_groups // multiprocessors)  # of groups, that a block must take
    tile_n = 8 if problem.m <= 8 else 16
    least = max(1, -(-share // _WARPS_OF_MORE))
    for groups in (least, 2 * least):
        warps_w = -(-share // groups)
        room = _WARPS if groups == 1 else _WARPS_OF_MORE
        for warps_k in (16, 8, 4, 2, 1):
            if warps_w * warps_k > max(room, warps_w):
                continue
            for slabs in (8, 4, 16, 2, 1):
                if slabs % warps_k or (
                    slabs > warps_k and -(-problem.slabs // slabs) * slabs > 1.1 * problem.slabs
                ):
                    continue
                tile = deepest_few(
                    problem, tile_n=tile_n, warps_w=warps_w, groups=groups, warps_k=warps_k, slabs=slabs
                )
                if tile.stages >= 3 or (slabs <= 2 * warps_k and tile.stages == 2):
                    yield tile


def tiles(problem: W4Problem) -> Iterator[W4Tile]:
    """Yield the configurations of gemm_w4_sm90.cu for a problem of more than 16 rows."""
    shapes: list[dict[str, int]] = [
        {"tile_n": 32, "blocks_of_64": 2, "slabs": 2, "grain": 2},
        {"tile_n": 64, "blocks_of_64": 2, "slabs": 2, "grain": 2},
        {"tile_n": 128, "slabs": 2, "grain": 4},
        {"tile_n": 256, "slabs": 1, "grain": 2, "cluster": 2},
        {"tile_n": 256, "slabs": 1, "grain": 2},
    ]
    for shape in shapes:
        if shape["tile_n"] < 2 * problem.m or shape["tile_n"] == 32:
            order = 16 if problem.m >= 1024 else 8
            tile = deepest(problem, consumers=2, order=order, **shape)
            if tile.stages >= 2:
                yield tile


# What an H200 was seen to do, in microseconds: a launch between events of an empty graph, the first bytes to come, the
# end of a tile; sums of a shared tile on their way through memory.
_LAUNCH_US, _FIRST_US, _END_US, _SHARED_US = 3.6, 1.3, 1.0, 5.0
# Products and sums that a multiprocessor reaches in a microsecond, by the rows of A in a tile.
_RATES = {32: 1.2e6, 64: 2.0e6, 128: 2.98e6, 256: 3.08e6}
# What eight codes of each of a warp's threads cost with 8 rows of A, by how they are decoded, in instructions; and how
# many of those a multiprocessor issues in a microsecond.
_DECODED = {"int4": 15.0, "uint4": 18.0, "e4m3": 18.8, "e8m0": 16.5, "none": 15.0, "uint8": 11.0}
_ISSUED = 4.2e3


def estimate_us(problem: W4Problem, tile: W4Tile | W4Few, device: Device = H200) -> float:
    """Return the modelled time of `problem` with `tile`, in microseconds, from an empty L2."""
    read = problem.weight_bytes + 128 // problem.slab * problem.m * problem.k
    moved = read + OUTPUT_BYTES[problem.output] * problem.m * problem.n
    fixed = _LAUNCH_US + _FIRST_US + _END_US
    if isinstance(tile, W4Few):
        along_w, along_a = tile.blocks(problem)
        waves = -(-along_w * along_a // device.multiprocessors)
        # Memory gives all that it has only where most multiprocessors ask for it.
        streamed = (
            moved
            / (0.92 * device.dram_bytes_per_us)
            / min(1.0, 1.3 * along_w * along_a / device.multiprocessors)
        )
        kind = problem.scales if problem.codes == "fp4_e2m1" or problem.slab == 128 else problem.codes
        instructions = (
            tile.tile * 16 * problem.k / 256 * (_DECODED[kind] + (1.0 if tile.tile_n == 16 else 0.0))
        )
        # Sixteen rows share the tensor core and shared memory with the decoding.
        decoded = instructions / _ISSUED * (1.25 if tile.tile_n == 16 else 1.0) * waves
        return fixed + max(streamed, decoded)
    clusters, whole = schedule_of(problem, tile, device.multiprocessors)
    count, each = (
        tile.tiles(problem),
        tile.tile_w * tile.tile_n * problem.k / (_RATES[tile.tile_n] * problem.slab / 64),
    )
    products = each * (-(-count // clusters) if whole == count else count / clusters)
    shared = _SHARED_US if whole < count else 0.0
    return fixed + shared + max(products, moved / (0.8 * device.dram_bytes_per_us))


def w4_rank(problem: W4Problem, device: Device = H200) -> list[W4Tile | W4Few]:
    """Return the configurations for a problem, the one modelled fastest first."""
    found: list[W4Tile | W4Few] = []
    if problem.m <= 16:
        found += few_tiles(problem, device.multiprocessors)
    else:
        found += tiles(problem)
    return sorted(
        found, key=lambda tile: estimate_us(problem, tile, device)
    )  # stable: the better first among equals


def w4_choose(problem: W4Problem, device: Device = H200) -> W4Tile | W4Few:
    """Return the configuration modelled fastest."""
    return w4_rank(problem, device)[0]


def deepest(problem: W4Problem, **shape: int) -> W4Tile:
    """Return the tile with as many stages as fit."""
    one, two = (W4Tile(stages=stages, **shape) for stages in (1, 2))  # type: ignore[arg-type]
    stage = two.shared_bytes(problem) - one.shared_bytes(problem)
    stages = min(16, 1 + (SHARED_LIMIT - one.shared_bytes(problem)) // stage)
    return W4Tile(stages=stages, **shape)  # type: ignore[arg-type]


def deepest_few(problem: W4Problem, **shape: int) -> W4Few:
    """Return the tile of gemm_w4_few.cu with as many stages as fit."""
    stage = W4Few(stages=1, **shape).stage_bytes(problem) + 16
    return W4Few(stages=min(16, SHARED_LIMIT // stage), **shape)

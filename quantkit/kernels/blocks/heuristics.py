"""Which tile a block-scaled product gets: what gemm_blocks_sm90.cu can do, ranked by a model of bytes and instructions.

Everything here is a pure function of the problem and of a few numbers that describe the GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from quantkit.kernels.epilogue import OUTPUT_BYTES
from quantkit.kernels.heuristics import H200, SHARED_LIMIT, Device, Problem

_ROW = 128  # codes of K in a stage
_RATE = 1.5e5  # bytes in a microsecond that one multiprocessor draws
_BUFFERS = {2: 8192, 3: 4096}  # bytes of output on their way to memory, by the number of such buffers

# By format of a product: elements along K that share a scale.
BLOCKS = {"fp8-block": 128, "mxfp8": 32}

# Instructions of a warp, counted in the machine code: to promote one sum (a fused multiply-add; MX also reads its two
# scales and multiplies them), for a wave's start and end, for a step's barriers and addresses.
_OF_SUM = {128: 1.0, 32: 2.13}
_OF_WAVE, _OF_STEP = {128: 21.0, 32: 10.0}, 32.0
_WGMMA_LATENCY = 60.0  # cycles beyond those of the products


@dataclass(frozen=True, kw_only=True)
class BlocksProblem:
    """D[m, n] of e4m3 codes A[m, k], W[n, k] with scales for `block` along K (128, or 32 of MX), into `output`."""

    m: int
    n: int
    k: int
    block: int
    output: str

    @property
    def format(self) -> str:
        """The name of the format."""
        return next(name for name, block in BLOCKS.items() if block == self.block)

    @property
    def steps(self) -> int:
        """Stages of a tile."""
        return -(-self.k // _ROW)

    def as_key(self) -> Problem:
        """Return what the timing cache is asked by."""
        return Problem(m=self.m, n=self.n, k=self.k, format=self.format, output=self.output)


@dataclass(frozen=True, kw_only=True)
class BlocksTile:
    """A configuration of gemm_blocks_sm90.cu, whose head says what each part does.

    blocks_of_64: of rows of the first operand that a consumer stacks. cluster: blocks that share a tile of the first
    operand. group: tiles along the first operand before the next along the second. buffers: of output, two of 8 KB or
    three of 4 KB for each consumer. split: blocks that share K.
    """

    blocks_of_64: int
    tile_n: int
    stages: int
    consumers: int = 2
    cluster: int = 1
    group: int = 8
    buffers: int = 2
    swap: bool = False
    split: int = 1

    @property
    def blocks(self) -> int:
        """Blocks of a cluster."""
        return self.cluster * self.split

    @property
    def tile_m(self) -> int:
        """Rows of the first operand in a tile."""
        return 64 * self.blocks_of_64 * self.consumers

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * (self.consumers + 1)

    def scale_bytes(self, block: int) -> int:
        """Return the bytes of a stage's scales in shared memory."""
        if block == 32:
            return 16 * (self.tile_m + self.tile_n)
        return 4 * (max(1, self.tile_m // 128) * self.tile_n if self.swap else self.tile_m)

    def shared_bytes(self, block: int) -> int:
        """Return the shared memory of a block: the ring with its scales and barriers, the output's buffers."""
        stage = (self.tile_m + self.tile_n) * _ROW + self.scale_bytes(block) + 32
        return self.stages * stage + self.consumers * (self.buffers * _BUFFERS[self.buffers] + 16)

    def tiles(self, problem: BlocksProblem) -> tuple[int, int]:
        """Return how many clusters' tiles lie along the first operand, and along the second."""
        first, second = (problem.n, problem.m) if self.swap else (problem.m, problem.n)
        return -(-first // self.tile_m), -(-second // (self.tile_n * self.cluster))

    def clusters(self, problem: BlocksProblem, multiprocessors: int) -> int:
        """Return how many clusters are launched: no more than there is room for, or work."""
        along_first, along_second = self.tiles(problem)
        # The blocks of a cluster share one of the chip's partitions, which are not all of one size.
        usable = multiprocessors if self.blocks <= 2 else max(self.blocks, multiprocessors * 10 // 11)
        return min(along_first * along_second, max(1, usable // self.blocks))


def deepest(block: int, **shape: int | bool) -> BlocksTile | None:
    """Return the tile with as many stages as fit, at most 24, or None where two do not fit.

    With small buffers of output where that makes room for a fourth stage.
    """

    def with_buffers(buffers: int) -> BlocksTile | None:
        one, two = (
            BlocksTile(stages=stages, buffers=buffers, **shape)  # type: ignore[arg-type]
            for stages in (1, 2)
        )
        stage = two.shared_bytes(block) - one.shared_bytes(block)
        stages = min(24, 1 + (SHARED_LIMIT - one.shared_bytes(block)) // stage)
        # Some 2048 rows of the first operand before the next tile of the second: a wave shares what L2 can hold.
        group = max(1, 2048 // two.tile_m)
        return (
            BlocksTile(stages=stages, group=group, buffers=buffers, **shape)  # type: ignore[arg-type]
            if stages >= 2
            else None
        )

    roomy = with_buffers(2)
    if shape.get("swap") or (roomy is not None and roomy.stages >= 4):
        return roomy
    return with_buffers(3) or roomy


def candidates(problem: BlocksProblem) -> Iterator[BlocksTile]:
    """Yield every configuration of gemm_blocks_sm90.cu that can run `problem`."""
    wide = 32 if OUTPUT_BYTES[problem.output] == 4 else 64
    shapes: list[dict[str, int | bool]] = [
        {"blocks_of_64": i, "tile_n": n, "cluster": cluster}
        for cluster in (1, 2)
        for i in (1, 2)
        for n in (64, 128)
        if n % wide == 0
    ]
    shapes += [
        {"blocks_of_64": i, "tile_n": n, "consumers": c, "swap": True}
        for n in (16, 32, 64, 128)
        for i, c in ((1, 1), (1, 2), (2, 2))
        if i == 1 or n == 64
    ]
    shapes += [
        {"blocks_of_64": 1, "tile_n": n, "consumers": c, "swap": True, "split": split}
        for n, split in ((16, 2), (32, 2), (64, 2), (16, 4))
        for c in (1, 2)
        if -(-problem.steps // 4) >= 2 * split  # parts are multiples of four steps, and eight at least
    ]
    for shape in shapes:
        if problem.block == 32 and shape["blocks_of_64"] == 2:
            continue  # instructions bind, so that reading less gains nothing
        tile = deepest(problem.block, **shape)
        if tile is not None:
            yield tile


def estimate_us(problem: BlocksProblem, tile: BlocksTile, device: Device = H200) -> float:
    """Return the modelled time of `problem` with `tile`, in microseconds: `heuristics.estimate_us` with promotion.

    A step takes the longest of its products on the tensor core, its instructions on the ordinary cores, its reads from
    L2, and what one wave takes from start to end, which its consumer's next one waits for.
    """
    along_first, along_second = tile.tiles(problem)
    clusters = tile.clusters(problem, device.multiprocessors)
    waves = -(-along_first * along_second // clusters)
    blocks = clusters * tile.blocks
    steps = -(-problem.steps // (4 * tile.split)) * 4 if tile.split > 1 else problem.steps
    products, instructions, alone = step_cycles(problem, tile, device)
    if tile.tile_n < 128:
        products *= 1.1  # narrow instructions read a byte of shared memory for fewer products
    if tile.cluster > 1 and waves >= 6:
        products *= 0.985  # long products run at the board's power limit, and multicast saves power
    work = max(products, instructions, alone) / device.cycles_per_us
    stage = (tile.tile_m / tile.cluster + tile.tile_n) * _ROW
    loads = stage / min(device.l2_bytes_per_us / blocks, _RATE)
    latency = max(0.1, 1.0 / tile.stages)
    step = max(work, loads, latency)
    output = tile.tile_m * tile.tile_n * OUTPUT_BYTES[problem.output]
    finish = 0.5 + output / 2.6e4 + (0.5 + tile.tile_n / 48 + 0.2 * tile.split if tile.split > 1 else 0.0)
    moved = (problem.m + problem.n) * (problem.k + scale_row_bytes(problem)) + (
        problem.m * problem.n * OUTPUT_BYTES[problem.output]
    )
    tiles = along_first * along_second
    read = tiles * (tile.tile_m + tile.tile_n * tile.cluster) * problem.k
    again = max(0, read - moved) / (2 * device.l2_bytes_per_us)
    streamed = moved / device.dram_bytes_per_us * (1 + 20 / blocks) + again
    last = (tiles - (waves - 1) * clusters) / tiles
    single = steps * max(work, stage / _RATE, latency)
    streamed = streamed * (1 - last) + max(streamed * last, single)
    together = 1.0 if tile.blocks > 1 else 0.0  # the blocks of a cluster start together
    return 3.5 + together + max(waves * steps * step + (waves - 1) * finish, streamed) + finish


def step_instructions(problem: BlocksProblem, tile: BlocksTile) -> float:
    """Return the instructions of a consumer's warp in a step of 128 of K, promotion and all."""
    waves = tile.blocks_of_64 * (_ROW // problem.block)
    return _OF_STEP + waves * (_OF_WAVE[problem.block] + tile.tile_n / 2 * _OF_SUM[problem.block])


def step_cycles(
    problem: BlocksProblem, tile: BlocksTile, device: Device = H200
) -> tuple[float, float, float]:
    """Return the cycles of one step of a tile: on the tensor core, of instructions, and of one consumer by itself.

    The four parts of a multiprocessor each hold one warp of every consumer and issue an instruction a cycle. By itself
    a consumer waits for each wave's products before it promotes them, unless it has registers for two.
    """
    waves = tile.blocks_of_64 * (_ROW // problem.block)
    products = 64 * tile.tile_n * _ROW * tile.blocks_of_64 / device.macs_per_cycle
    instructions = step_instructions(problem, tile)
    two = waves > 1 and tile.blocks_of_64 * tile.tile_n / 2 + tile.tile_n <= 192
    alone = max(products, instructions) if two else products + instructions
    alone += _WGMMA_LATENCY * (1 if two else waves)
    return tile.consumers * products, tile.consumers * instructions, alone


def scale_row_bytes(problem: BlocksProblem) -> int:
    """Return the bytes of a row's scales in memory."""
    return 4 * problem.steps


def rank(problem: BlocksProblem, device: Device = H200) -> list[BlocksTile]:
    """Return the configurations that can run `problem`, the one modelled fastest first."""

    def key(tile: BlocksTile) -> tuple[float, int, bool]:
        along_first, along_second = tile.tiles(problem)
        read = along_first * along_second * (tile.tile_m + tile.tile_n * tile.cluster)
        return estimate_us(problem, tile, device), read, tile.swap

    return sorted(candidates(problem), key=key)


def choose(problem: BlocksProblem, device: Device = H200) -> BlocksTile:
    """Return the configuration modelled fastest."""
    return rank(problem, device)[0]

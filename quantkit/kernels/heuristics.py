"""Which tile a GEMM gets: enumerate what a kernel can do, drop what does not fit, rank the rest by a model of time.

Everything here is a pure function of the problem and of a few numbers that describe the GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from quantkit.kernels.epilogue import OUTPUT_BYTES

SHARED_LIMIT = 232_448  # bytes of shared memory that a block may have on sm_90
_FEW, _RING = 32, 96 << 10  # rows of A in a tile that streams B, and the bytes of its ring
REGISTER_LIMIT = 232  # that a consumer's thread may have beside another consumer and the producer
_ROW = 128  # bytes of K in a stage
_RATE = 1.5e5  # bytes in a microsecond that one multiprocessor draws
_BUFFERS = 2 * 8192  # bytes of output that each consumer has on its way to memory
_SHARED_US = 5.0  # that stream-K was seen to cost the kernels of four-bit weights

ITEM_BYTES = {"int8": 1, "float8_e4m3fn": 1, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the model of time knows of a GPU. Rates were measured on an H200, and hold for its kin roughly.

    macs_per_cycle: of one multiprocessor, int8 or fp8. dram_bytes_per_us, l2_bytes_per_us: of the whole GPU.
    """

    multiprocessors: int = 132
    cycles_per_us: float = 1600.0
    macs_per_cycle: float = 4096.0
    dram_bytes_per_us: float = 4.6e6
    l2_bytes_per_us: float = 10.5e6


H200 = Device()


@dataclass(frozen=True, kw_only=True)
class Problem:
    """D[m, n] = A[m, k] @ B[n, k].T of `format` (int8, float8_e4m3fn, bfloat16) into `output`."""

    m: int
    n: int
    k: int
    format: str
    output: str

    @property
    def row_bytes(self) -> int:
        """Bytes of K in a row of either operand."""
        return self.k * ITEM_BYTES[self.format]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A configuration of gemm_sm90.cu, whose head says what each part does.

    blocks_of_64: wgmma instructions of 64 rows that a consumer stacks. cluster: blocks that share a tile of the second
    operand. split: blocks that share K. stream: tiles that would not fill the last wave are cut into equal shares of K
    (stream-K), whose sums meet in memory. group: tiles along the first operand before the next along the second.
    """

    blocks_of_64: int
    tile_n: int
    stages: int
    consumers: int = 2
    cluster: int = 1
    group: int = 8
    pingpong: bool = False
    swap: bool = False
    split: int = 1
    stream: bool = False

    @property
    def blocks(self) -> int:
        """Blocks of a cluster."""
        return self.cluster * self.split

    @property
    def owned(self) -> int:
        """Columns of a tile that one block finishes."""
        return max(self.tile_n // self.split, 16)

    @property
    def tile_m(self) -> int:
        """Rows of the first operand in a tile."""
        return 64 * self.blocks_of_64 * (1 if self.pingpong else self.consumers)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the ring, the output's buffers, the barriers."""
        ring = self.stages * ((self.tile_m + self.tile_n) * _ROW + 16)
        return ring + self.consumers * (_BUFFERS + 16) + 16

    @property
    def registers(self) -> int:
        """Registers that a consumer's thread needs: its sums, and what all else was seen to take."""
        return self.blocks_of_64 * self.tile_n // 2 + 88

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * (self.consumers + 1)

    def tiles(self, problem: Problem) -> tuple[int, int]:
        """Return how many clusters' tiles lie along the first operand, and tiles along the second."""
        first, second = (problem.n, problem.m) if self.swap else (problem.m, problem.n)
        return -(-first // (self.tile_m * self.cluster)), -(-second // self.tile_n)

    def clusters(self, problem: Problem, multiprocessors: int) -> int:
        """Return how many clusters are launched: no more than there is room for, or work.

        The blocks of a cluster share one of the chip's partitions, which are not all of one size: an H200 has room for
        66 pairs, 30 clusters of 4 and 15 of 8.
        """
        along_first, along_second = self.tiles(problem)
        usable = multiprocessors if self.blocks <= 2 else max(self.blocks, multiprocessors * 10 // 11)
        return min(along_first * along_second, max(1, usable // self.blocks))


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How stream-K deals steps of K out: `whole` tiles one by one, then a share of steps for each of `blocks`.

    The first `extra` shares are one step longer than `share`.
    """

    blocks: int
    whole: int
    share: int
    extra: int


def shares_of(problem: Problem, tile: Tile, multiprocessors: int) -> Shares:
    """Return the shares of a tile that streams: the last wave and one before it are cut together.

    Shares are then as long as tiles, or longer; of fewer tiles than multiprocessors they are two steps at least, so
    that their sums are worth their way through memory.
    """
    along_first, along_second = tile.tiles(problem)
    count, steps = along_first * along_second, -(-problem.row_bytes // _ROW)
    whole = max(0, count // multiprocessors - 1) * multiprocessors
    units = (count - whole) * steps
    blocks = multiprocessors if whole else min(multiprocessors, max(1, units // 2))
    return Shares(blocks=blocks, whole=whole, share=units // blocks, extra=units % blocks)


def _deepest(**shape: int | bool) -> Tile | None:
    """Return the tile with as many stages as fit, at most 24, or None where two do not fit.

    Of few rows of A a ring has less: more on its way at a time came later, by up to half a microsecond.
    """
    one, two = (Tile(stages=stages, **shape) for stages in (1, 2))  # type: ignore[arg-type]
    stage = two.shared_bytes - one.shared_bytes
    stages = min(24, 1 + (SHARED_LIMIT - one.shared_bytes) // stage)
    if two.swap and two.tile_n <= _FEW and two.split == 1:
        stages = min(stages, _RING // stage)
    # Some 2048 rows of the first operand before the next tile of the second: a wave then shares what L2 can hold.
    group = max(1, 2048 // (two.tile_m * two.cluster))
    return Tile(stages=stages, group=group, **shape) if stages >= 2 else None  # type: ignore[arg-type]


def candidates(problem: Problem) -> Iterator[Tile]:
    """Yield every configuration of gemm_sm90.cu that can run `problem` within shared memory and registers."""
    wide = 32 if OUTPUT_BYTES[problem.output] == 4 else 64
    shapes: list[dict[str, int | bool]] = []
    for cluster in (1, 2):
        shapes += [
            {"blocks_of_64": i, "tile_n": n, "cluster": cluster} for i in (1, 2) for n in (64, 128, 192, 256)
        ]
        shapes += [
            {"blocks_of_64": i, "tile_n": n, "cluster": cluster, "pingpong": True}
            for i in (1, 2)
            for n in (128, 192, 256)
        ]
    shapes += [
        {"blocks_of_64": 1, "tile_n": n, "consumers": c, "swap": True}
        for n in (16, 32, 64, 128, 256)
        for c in (1, 2)
    ]
    shapes += [
        {"blocks_of_64": 1, "tile_n": n, "consumers": c, "swap": True, "split": split}
        for n in (16, 32, 64, 128)
        for c in (1, 2)
        for split in (2, 4)
    ]
    shapes += [
        {"blocks_of_64": 1, "tile_n": n, "consumers": c, "swap": True, "stream": True}
        for n in (16, 32, 64, 128)
        for c in (1, 2)
    ]
    steps = -(-problem.row_bytes // _ROW)
    for shape in shapes:
        if not shape.get("swap") and int(shape["tile_n"]) % wide:
            continue
        if shape.get("pingpong") and problem.m <= 64:  # streaming weights leaves no products to hide behind
            continue
        if shape.get("split", 1) > max(1, steps // 2):  # every block has two steps at least
            continue
        tile = _deepest(**shape)
        if tile is not None and tile.registers <= REGISTER_LIMIT:
            yield tile


def estimate_us(problem: Problem, tile: Tile, device: Device = H200) -> float:
    """Return the modelled time of `problem` with `tile`, in microseconds.

    Clusters take tiles in waves. A step of a tile (128 bytes of K) takes the longest of its products, its reads from
    L2 at a multiprocessor's share, and its latency over the stages in flight; a tile ends with an epilogue that
    ping-pong hides, and before which the blocks of a split exchange their partial sums. Device memory bounds the
    whole, and what is read more than once adds to it.
    """
    along_first, along_second = tile.tiles(problem)
    shares = shares_of(problem, tile, device.multiprocessors) if tile.stream else None
    clusters = tile.clusters(problem, device.multiprocessors) if shares is None else shares.blocks
    waves = -(-along_first * along_second // clusters)
    steps = -(-problem.row_bytes // (_ROW * tile.split))
    products = tile.tile_m * tile.tile_n * _ROW / device.macs_per_cycle / device.cycles_per_us
    # What each shape was seen to reach of the best one's rate: narrow instructions read a byte of shared memory for
    # fewer products.
    if tile.consumers == 1 or (tile.pingpong and tile.blocks_of_64 == 1):
        products *= 1.3
    elif tile.pingpong:
        products *= 1.08 * (1 + 0.4 / waves)  # at first and at last one consumer works alone
    elif tile.tile_n < 256:
        products *= 1.015 if tile.tile_m == 256 and tile.tile_n == 128 else 1.1
    if tile.cluster > 1 and waves >= 6:
        products *= 0.985  # long products run at the board's power limit, and multicast saves power
    blocks = clusters * tile.blocks
    stage = (tile.tile_m + tile.tile_n / tile.cluster) * _ROW
    loads = stage / min(device.l2_bytes_per_us / blocks, _RATE)
    latency = max(0.1, 1.0 / tile.stages)  # of four instructions one after the other; of what is on its way
    step = max(products, loads, latency)
    output = tile.tile_m * tile.tile_n * OUTPUT_BYTES[problem.output]
    epilogue = 0.5 + output / 2.6e4
    exchange = 0.5 + tile.tile_n / 48 + 0.2 * tile.split if tile.split > 1 else 0.0
    finish = exchange + (epilogue / tile.split if tile.split > 1 else epilogue)
    # All but the last hide behind products in ping-pong, and behind loads.
    between = 0.0 if tile.pingpong else (waves - 1) * finish
    moved = (problem.m + problem.n) * problem.row_bytes + problem.m * problem.n * OUTPUT_BYTES[problem.output]
    # Few blocks do not keep enough bytes on their way to draw the whole bandwidth; what is read again is in their way.
    tiles = along_first * along_second
    read = tiles * (tile.tile_m * tile.cluster + tile.tile_n) * problem.row_bytes
    again = max(0, read - moved) / (2 * device.l2_bytes_per_us)
    streamed = moved / device.dram_bytes_per_us * (1 + 20 / blocks) + again
    if shares is not None:
        # No wave is rounded up. Sums of cut tiles go through memory, and the last one at a tile adds them.
        each, longest = shares.whole // blocks, shares.share + (shares.extra > 0)
        return (
            3.5 + max((each * steps + longest) * step + (each + 1) * finish, streamed) + finish + _SHARED_US
        )
    # The tiles of a last, smaller wave take their time however little there is to read.
    last = (tiles - (waves - 1) * clusters) / tiles
    alone = steps * max(products, stage / _RATE, latency)
    streamed = streamed * (1 - last) + max(streamed * last, alone) + (waves - 1) * exchange
    together = 1.0 if tile.cluster > 1 else 0.0  # the blocks of a cluster start together
    return 3.5 + together + max(waves * steps * step + between, streamed) + finish


def rank(problem: Problem, device: Device = H200) -> list[Tile]:
    """Return the configurations that can run `problem`, the one modelled fastest first."""

    def key(tile: Tile) -> tuple[float, int, bool]:
        # Among equals, the one that reads least; then a row of tiles along the longer side of D, seen to be faster.
        along_first, along_second = tile.tiles(problem)
        read = along_first * along_second * (tile.tile_m * tile.cluster + tile.tile_n)
        return estimate_us(problem, tile, device), read, tile.swap != (problem.m < 2 * problem.n)

    return sorted(candidates(problem), key=key)


def choose(problem: Problem, device: Device = H200) -> Tile:
    """Return the configuration modelled fastest."""
    return rank(problem, device)[0]

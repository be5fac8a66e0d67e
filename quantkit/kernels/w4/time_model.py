"""How long a product with a weight of four bits takes: bytes over the memory's rate, instructions over the cores' rate.

The constants were fitted to some 1500 configurations that were timed on an H200. For gemm_w4_few.cu the model is within
6 % of the faster ones on average; the configuration that it ranks first took 3 % longer than the fastest of all on
average, 11 % at most, over 75 products of up to 64 rows.
"""

from dataclasses import dataclass

from quantkit.kernels.epilogue import OUTPUT_BYTES
from quantkit.kernels.heuristics import H200, Device
from quantkit.kernels.w4.problem import W4Problem
from quantkit.kernels.w4.tiles import W4Few, W4Tile, schedule_of

# What a lane executes for its codes of 16 rows and a slab, and on top for each scale there, by the type of activations,
# how scales are stored, and whether there are zero points; counted in machine code of sm_90a.
_INTEGERS: dict[tuple[str, str, bool], tuple[float, float]] = {
    ("bfloat16", "none", False): (37.6, 0.0),
    ("bfloat16", "bfloat16", False): (37.6, 2.3),
    ("bfloat16", "float16", False): (70.0, 10.3),
    ("bfloat16", "float32", False): (70.0, 10.3),
    ("bfloat16", "none", True): (54.6, 0.0),
    ("bfloat16", "bfloat16", True): (53.5, 6.5),
    ("bfloat16", "float16", True): (74.0, 14.3),
    ("bfloat16", "float32", True): (74.0, 14.3),
    ("float16", "none", False): (37.6, 0.0),
    ("float16", "float16", False): (54.1, 2.3),
    ("float16", "bfloat16", False): (70.3, 12.2),
    ("float16", "float32", False): (70.3, 12.2),
    ("float16", "none", True): (42.0, 0.0),
    ("float16", "float16", True): (57.6, 6.5),
    ("float16", "bfloat16", True): (74.0, 16.4),
    ("float16", "float32", True): (74.0, 16.4),
    ("int8", "none", False): (58.1, 0.0),
    ("int8", "uint8", False): (57.7, 9.0),
    ("int8", "none", True): (62.0, 0.0),
    ("float8_e4m3fn", "none", False): (82.0, 0.0),
    ("float8_e4m3fn", "bfloat16", False): (82.0, 4.0),
    ("float8_e4m3fn", "float16", False): (82.0, 4.0),
    ("float8_e4m3fn", "float32", False): (82.0, 2.0),
    ("int8", "uint8", True): (57.7, 13.4),
}
_FLOATS = {
    ("bfloat16", "e4m3"): (52.0, 2.1),
    ("bfloat16", "e8m0"): (52.0, 2.6),
    ("bfloat16", "none"): (52.0, 0.0),
    ("float16", "e4m3"): (84.0, 3.1),
    ("float16", "e8m0"): (84.0, 11.7),
    ("float16", "none"): (84.0, 0.0),
    ("float8_e4m3fn", "e8m0"): (77.0, 7.0),
}
_DEEP = 12.0  # more for each scale that may be below e4m3's normals
_LOOP = 16  # of a step: waiting, releasing, counting

_CYCLES = 1980.0  # a microsecond, while the tensor cores are not what binds
# A scheduler's cycles for an instruction, and for one of mma.sync; what each byte of A that a block reads again, from
# L2, takes of a byte from memory.
_INSTRUCTION, _MMA, _AGAIN = 1.11, 8.25, 0.22
# Two streams of work, of which the longer hides the shorter the better, the less they are alike.
_HIDES = 8.5
# A launch, first bytes, the end of a tile; a stage of the ring; of the last one, 8 rows of A by a slab of 16 rows of W.
_FIXED_US, _STEP_US, _LAST_US = 5.8, 0.009, 0.016
_READ = 1.06  # of what a copy moves, that reading alone gets from memory
# What a warp alone takes of a scheduler's cycles for an instruction; how long a stage's bytes are on their way, while
# each set of warps has another.
_ALONE, _LATENCY_US = 2.31, 0.45

# Of gemm_w4_sm90.cu: a launch, the first bytes, a tile's end; sums of a shared tile on their way through memory.
_FIXED_TILES_US, _SHARED_US = 5.9, 13.0
# Those rates are of codes that take so many instructions to decode; what each more takes, for each element of W.
_DECODED, _SLOWER_US = 38.8, 1.67e-7
# What is left of twice the rate of 16 bits where the board's power binds. Assumed: no product of 8-bit activations by
# four-bit weights has been timed.
_SUSTAINED = 0.85
# Products and sums of 16-bit activations that a multiprocessor reaches in a microsecond, by the rows of A in a tile.
_RATES = {8: 0.4e6, 16: 0.8e6, 32: 1.6e6, 64: 2.65e6, 128: 2.98e6, 256: 3.08e6}


@dataclass(frozen=True, kw_only=True)
class W4Cost:
    """What a multiprocessor and the memory do for a product.

    instructions: of a warp for a stage. multiplications: of them, of matrices. bytes: from memory, at least; what
    blocks read again counts with its share. memory_us, work_us: the time of each alone. time_us: of all.
    """

    instructions: float
    multiplications: float
    bytes: float
    memory_us: float
    work_us: float
    time_us: float


def decoding_of(problem: W4Problem) -> float:
    """Return the instructions with which a lane decodes its codes of 16 rows and a slab."""
    if problem.codes == "fp4_e2m1":
        codes, each = _FLOATS[problem.activations, problem.scales]
    else:
        codes, each = _INTEGERS[problem.activations, problem.scales, problem.zeros]
    scales = 0.0 if problem.group is None else problem.slab / problem.group
    return codes + (each + (_DEEP if problem.deep else 0.0)) * scales


def cost(problem: W4Problem, tile: W4Tile | W4Few, device: Device = H200) -> W4Cost:
    """Return what `problem` takes with `tile`, from an empty L2."""
    return _few(problem, tile, device) if isinstance(tile, W4Few) else _tiles(problem, tile, device)


def estimate_us(problem: W4Problem, tile: W4Tile | W4Few, device: Device = H200) -> float:
    """Return the modelled time of `problem` with `tile`, in microseconds, from an empty L2."""
    return cost(problem, tile, device).time_us


def _moved(problem: W4Problem) -> float:
    read = problem.weight_bytes + problem.activation_bytes
    return read + OUTPUT_BYTES[problem.output] * problem.m * problem.n


def _both(memory_us: float, work_us: float) -> float:
    longer, shorter = max(memory_us, work_us), min(memory_us, work_us)
    return float(longer * (1 + (shorter / longer) ** _HIDES) ** (1 / _HIDES))


def few_instructions(problem: W4Problem, tile: W4Few) -> tuple[float, int]:
    """Return what a warp of gemm_w4_few.cu executes for a stage of its own, and how much of it multiplies matrices."""
    columns = tile.tile_n // 8
    multiplications = tile.slabs * tile.groups * 4 * columns
    return _LOOP + tile.slabs * (
        2 * columns + tile.groups * decoding_of(problem)
    ) + multiplications, multiplications


def _few(problem: W4Problem, tile: W4Few, device: Device) -> W4Cost:
    return few_cost(problem, tile, *few_instructions(problem, tile), device)


def few_cost(
    problem: W4Problem, tile: W4Few, instructions: float, multiplications: int, device: Device = H200
) -> W4Cost:
    """Return what gemm_w4_few.cu takes if a warp executes so many instructions for a stage."""
    along_w, along_a = tile.blocks(problem)
    blocks = along_w * along_a
    steps = -(-problem.slabs // tile.slabs)
    waves = -(-blocks // device.multiprocessors)
    # A scheduler has a quarter of the warps. Sets take stages in turn, and each its own time for one.
    issued = tile.warps_w / 4 * (_INSTRUCTION * instructions + (_MMA - _INSTRUCTION) * multiplications)
    alone = _ALONE * instructions / tile.warps_k
    # A warp's fragments of A and its codes come from shared memory, 128 bytes in a cycle.
    fragments = 2 * tile.tile_n // 8 + tile.groups * problem.slab // 64
    shared = tile.warps_w * tile.slabs * fragments * 512 // 128
    work = waves * steps * max(issued, shared, alone) / _CYCLES
    again = (along_w - 1) * problem.activation_bytes
    moved = _moved(problem) + _AGAIN * again
    # Memory gives all that it has only where most multiprocessors ask for it, and for enough.
    share = min(1.0, 1.3 * blocks / device.multiprocessors)
    asked = (
        (tile.stages - tile.warps_k)
        * tile.stage_bytes(problem)
        * min(blocks, device.multiprocessors)
        / _LATENCY_US
    )
    memory = max(moved / (_READ * device.dram_bytes_per_us * share), (_moved(problem) + again) / asked)
    last = _LAST_US * tile.slabs * tile.groups * tile.tile_n / 8
    time = _FIXED_US + _both(memory, work) + waves * steps * _STEP_US + last
    return W4Cost(
        instructions=instructions, multiplications=multiplications, bytes=moved, memory_us=memory, work_us=work,
        time_us=time,
    )  # fmt: skip


def tiles_instructions(problem: W4Problem, tile: W4Tile) -> tuple[float, int]:
    """Return what a warp of gemm_w4_sm90.cu executes for a stage, and how much of it multiplies matrices."""
    promoted = tile.tile_n // 2 * tile.blocks_of_64 if problem.activations == "float8_e4m3fn" else 0
    multiplications = tile.slabs * 4 * tile.blocks_of_64
    decoded = tile.slabs * tile.blocks_of_64 * decoding_of(problem)
    return decoded + multiplications + promoted + 2 * _LOOP, multiplications


def _tiles(problem: W4Problem, tile: W4Tile, device: Device) -> W4Cost:
    clusters, whole = schedule_of(problem, tile, device.multiprocessors)
    count = tile.tiles(problem)
    waves = -(-count // clusters) if whole == count else count / clusters
    instructions, multiplications = tiles_instructions(problem, tile)
    if problem.slab == 64:
        each = (
            tile.tile_w
            * problem.k
            * (tile.tile_n / _RATES[tile.tile_n] + _SLOWER_US * max(0.0, decoding_of(problem) - _DECODED))
        )
    else:
        # A warp of each consumer has each scheduler's slots. An instruction takes as long as one of 16 bits, for twice
        # as much of K.
        issued = tile.consumers * _INSTRUCTION * instructions / _CYCLES
        rate = 2 * _RATES[tile.tile_n] * (_SUSTAINED if tile.tile_n >= 128 else 1.0)
        multiplied = tile.tile_w * tile.tile_n * tile.slabs * problem.slab / rate
        alone = (issued + multiplied) / tile.consumers  # one consumer's work, of which nothing overlaps
        fetched = tile.slabs * (tile.tile_n // tile.cluster * 128 + tile.tile_w * problem.slab // 2)
        loaded = fetched * min(count, clusters) * tile.cluster / device.l2_bytes_per_us
        each = tile.steps(problem) * (max(issued, multiplied, alone, loaded) + _STEP_US)
    work = waves * each
    blocks = clusters * tile.cluster
    moved = _moved(problem) + _AGAIN * (min(count * tile.cluster, blocks) - 1) * min(
        problem.activation_bytes, tile.tile_n * problem.k * 128 // problem.slab
    ) * (problem.m <= tile.tile_n)
    share = min(1.0, 1.3 * blocks / device.multiprocessors)
    memory = moved / (0.87 * device.dram_bytes_per_us * share)
    shared = _SHARED_US if whole < count else 0.0
    return W4Cost(
        instructions=instructions, multiplications=multiplications, bytes=moved, memory_us=memory, work_us=work,
        time_us=_FIXED_TILES_US + shared + max(work, memory),
    )  # fmt: skip

"""Which tile a product with a weight of four bits gets on Hopper: enumerate what fits, rank by the model of time.

Everything here is a pure function of the problem and of a few numbers that describe the GPU.
"""

from collections.abc import Iterator
from dataclasses import replace

from quantkit.kernels.heuristics import H200, SHARED_LIMIT, Device
from quantkit.kernels.w4.problem import W4Problem
from quantkit.kernels.w4.tiles import W4Few, W4Tile, schedule_of
from quantkit.kernels.w4.time_model import estimate_us

__all__ = [
    "W4Few",
    "W4Problem",
    "W4Tile",
    "deepest",
    "deepest_few",
    "estimate_us",
    "few_tiles",
    "schedule_of",
    "tiles",
    "w4_candidates",
    "w4_choose",
    "w4_rank",
]

FEW_ROWS = 64  # of A, that gemm_w4_few.cu takes
# Warps of a block of gemm_w4_few.cu where each has one group of rows and up to 16 rows of A, or more of either: 64
# registers a thread, or twice that. Two groups of more than 32 rows of A leave registers for 8 warps, more than 48 rows
# for 12.
_WARPS, _WARPS_OF_MORE, _NARROW = 28, 14, 16
_WARPS_OF_BOTH, _WARPS_OF_MOST, _WIDE, _WIDEST = 8, 12, 32, 48
# Bytes of a ring that are enough: more of each multiprocessor on their way at a time sometimes came later.
_RING = 100_000


def few_tiles(problem: W4Problem, multiprocessors: int) -> Iterator[W4Few]:
    """Yield the configurations of gemm_w4_few.cu that give each multiprocessor one tile, or nearly, the best first."""
    all_groups = -(-problem.n // 16)
    share = -(-all_groups // multiprocessors)  # of groups, that a block must take
    tile_n = min(-(-problem.m // 8) * 8, FEW_ROWS)
    least = max(1, -(-share // _WARPS_OF_MORE))
    for groups in (least, 2 * least):
        warps_w = -(-share // groups)
        room = _WARPS if groups == 1 and tile_n <= _NARROW else _WARPS_OF_MORE
        room = room if tile_n <= _WIDEST else _WARPS_OF_MOST
        room = room if groups == 1 or tile_n <= _WIDE else _WARPS_OF_BOTH
        for warps_k in (16, 8, 4, 2, 1):
            if warps_w * warps_k > max(room, warps_w if groups == least else 0):
                continue
            for slabs in (4, 8, 2, 1):
                steps = -(-problem.slabs // slabs)
                if (slabs > 1 and steps * slabs > 1.1 * problem.slabs) or steps < warps_k:
                    continue
                full = deepest_few(
                    problem, tile_n=tile_n, warps_w=warps_w, groups=groups, warps_k=warps_k, slabs=slabs
                )
                enough = _RING // (full.stage_bytes(problem) + 16) // warps_k * warps_k
                for stages in dict.fromkeys((full.stages, min(full.stages, enough))):
                    # Each set has a stage on its way while it decodes another, or one set two.
                    if stages >= max(3, 2 * warps_k):
                        yield replace(full, stages=stages)


# Rows of A up to which tiles that do not fill a wave are also taken whole: sums that meet in memory cost 13 µs.
_WHOLE_ROWS = 64
# Rows of A in a tile, and the rest of a W4Tile, for 16-bit activations and int8.
_SHAPES: tuple[dict[str, int], ...] = (
    {"tile_n": 32, "blocks_of_64": 2, "slabs": 2, "grain": 2},
    {"tile_n": 64, "blocks_of_64": 2, "slabs": 2, "grain": 2},
    {"tile_n": 128, "slabs": 2, "grain": 4},
    {"tile_n": 256, "slabs": 1, "grain": 2, "cluster": 2},
    {"tile_n": 256, "slabs": 1, "grain": 2},
)
# For e4m3, whose sums are held twice: 128 of K are summed apart. Few rows of A read W as fast as memory gives it.
_PROMOTED_SHAPES: tuple[dict[str, int], ...] = (
    *({"tile_n": n, "blocks_of_64": 1, "consumers": c} for n in (8, 16) for c in (1, 2, 3, 4)),
    {"tile_n": 32, "blocks_of_64": 1, "consumers": 4},
    {"tile_n": 32, "blocks_of_64": 2, "consumers": 2},
    {"tile_n": 64, "blocks_of_64": 2, "consumers": 2},
    {"tile_n": 128, "blocks_of_64": 1, "consumers": 2, "cluster": 2},
    {"tile_n": 128, "blocks_of_64": 1, "consumers": 2},
)


def tiles(problem: W4Problem) -> Iterator[W4Tile]:
    """Yield the configurations of gemm_w4_sm90.cu; for 16-bit activations and int8 those for many rows."""
    promoted = problem.activations == "float8_e4m3fn"
    smallest = 8 if promoted else 32
    for shape in _PROMOTED_SHAPES if promoted else _SHAPES:
        if shape["tile_n"] > smallest and shape["tile_n"] >= 2 * problem.m:
            continue
        order = 16 if problem.m >= 1024 else 8
        kept = {"slabs": 1, "grain": 2} if promoted else {"consumers": 2}
        tile = deepest(problem, **{**kept, **shape, "order": order})
        if tile.stages >= 2:
            yield tile
            if problem.m <= _WHOLE_ROWS:
                yield replace(tile, stream=False)


def w4_candidates(problem: W4Problem, device: Device = H200) -> list[W4Tile | W4Few]:
    """Return every configuration for a problem. mma.sync has no e4m3 on Hopper: few rows then go by wgmma too."""
    if problem.m > FEW_ROWS or problem.activations == "float8_e4m3fn":
        return list(tiles(problem))
    few: list[W4Tile | W4Few] = list(few_tiles(problem, device.multiprocessors))
    return few if problem.m <= _NARROW else [*few, *tiles(problem)]


def w4_rank(problem: W4Problem, device: Device = H200) -> list[W4Tile | W4Few]:
    """Return the configurations for a problem, the one modelled fastest first."""
    # stable: the better first among equals
    return sorted(w4_candidates(problem, device), key=lambda tile: estimate_us(problem, tile, device))


def w4_choose(problem: W4Problem, device: Device = H200) -> W4Tile | W4Few:
    """Return the configuration modelled fastest."""
    return w4_rank(problem, device)[0]


def deepest(problem: W4Problem, **shape: int) -> W4Tile:
    """Return the tile with as many stages as fit."""
    one, two = (W4Tile(stages=stages, **shape) for stages in (1, 2))  # type: ignore[arg-type]
    stage = two.shared_bytes(problem) - one.shared_bytes(problem)
    stages = min(16, 1 + (SHARED_LIMIT - one.shared_bytes(problem)) // stage)
    return W4Tile(stages=stages, **shape)  # type: ignore[arg-type]


def deepest_few(problem: W4Problem, *, warps_k: int = 1, **shape: int) -> W4Few:
    """Return the tile of gemm_w4_few.cu with as many stages as fit, a multiple of warps_k; of none there is no room."""
    stage = W4Few(stages=1, **shape).stage_bytes(problem) + 16
    return W4Few(stages=min(16, SHARED_LIMIT // stage) // warps_k * warps_k, warps_k=warps_k, **shape)

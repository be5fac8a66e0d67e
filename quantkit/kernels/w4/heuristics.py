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
# registers a thread, or twice that. More than 32 rows of A leave registers for one group, more than 48 for fewer warps.
_WARPS, _WARPS_OF_MORE, _NARROW = 28, 14, 16
_WARPS_OF_MOST, _WIDE, _WIDEST = 12, 32, 48


def few_tiles(problem: W4Problem, multiprocessors: int) -> Iterator[W4Few]:
    """Yield the configurations of gemm_w4_few.cu that give each multiprocessor one tile, or nearly, the best first."""
    all_groups = -(-problem.n // 16)
    share = -(-all_groups // multiprocessors)  # of groups, that a block must take
    tile_n = min(-(-problem.m // 8) * 8, FEW_ROWS)
    least = max(1, -(-share // _WARPS_OF_MORE))
    for groups in (least, 2 * least):
        warps_w = -(-share // groups)
        if groups > 1 and tile_n > _WIDE:
            continue
        room = _WARPS if groups == 1 and tile_n <= _NARROW else _WARPS_OF_MORE
        room = room if tile_n <= _WIDEST else _WARPS_OF_MOST
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
                if tile.stages >= 3 or (slabs <= 4 * warps_k and tile.stages == 2):
                    yield tile


# Rows of A up to which tiles that do not fill a wave are also taken whole: sums that meet in memory cost 5 µs.
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


def deepest_few(problem: W4Problem, **shape: int) -> W4Few:
    """Return the tile of gemm_w4_few.cu with as many stages as fit."""
    stage = W4Few(stages=1, **shape).stage_bytes(problem) + 16
    return W4Few(stages=min(16, SHARED_LIMIT // stage), **shape)

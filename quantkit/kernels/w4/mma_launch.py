"""How gemm_w4_mma.cu is launched for a product and a tile: macros, sizes and workspace, as plain values.

The CuPy launcher and the emulator's tests both launch from this, so what the tests run is what a GPU runs.
"""

from dataclasses import dataclass

from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.mma_launch import SOURCE as _MMA_SOURCE
from quantkit.kernels.w4.heuristics import W4Problem
from quantkit.kernels.w4.launch import decoding
from quantkit.kernels.w4.mma_heuristics import W4MmaTile

SOURCE = _MMA_SOURCE.with_name("gemm_w4_mma.cu")
KERNEL = "gemm_w4_mma"


@dataclass(frozen=True, kw_only=True)
class W4MmaLaunch:
    """One launch of gemm_w4_mma: its macros and sizes.

    partials_bytes: for the slices' sums; what it holds does not matter. arrivals: how many 32-bit counters the slices
    need, zero before the first launch and again after each. Both are 0 without slices, and null pointers then do.
    """

    defines: dict[str, str | int]
    grid: tuple[int, int]
    block: int
    shared_bytes: int
    partials_bytes: int
    arrivals: int


def w4_mma_launch_of(problem: W4Problem, tile: W4MmaTile, kind: EpilogueKind) -> W4MmaLaunch:
    """Return the launch that computes `problem` with `tile`, the same on every architecture.

    Its arguments are, in this order: A, the weight's codes, scales and zero points, D; row_scale, column_scale, bias,
    zero_point, weight_sum, residual, the epilogue's numbers, m, n; workspace, arrivals; the bytes of K in a row of A
    (int32), from one row of A to the next (int64), planes of 64 of K (int32). Rows of A start at multiples of 16
    bytes, rows of D follow each other. Where n is a multiple of 4, D starts at a multiple of 16 bytes and the vectors
    along n at multiples of 8. kind: the epilogue's; its column scale must be `each`, that of the weight's rows.
    """
    tiles = tile.tiles(problem)
    sliced = tile.slices > 1
    return W4MmaLaunch(
        defines={
            **decoding(problem),
            "TILE_W": tile.tile_w,
            "TILE_A": tile.tile_a,
            "WARPS_W": tile.warps_w,
            "WARPS_A": tile.warps_a,
            "SLABS": tile.slabs,
            "STAGES": tile.stages,
            "ORDER": tile.order,
            "SLICED": int(sliced),
            "VECTOR": int(problem.n % 4 == 0),
            **kind.defines(problem.output),
        },
        grid=(tiles, tile.slices),
        block=tile.threads,
        shared_bytes=tile.shared_bytes(problem),
        partials_bytes=tile.partials_bytes(problem),
        arrivals=tiles if sliced else 0,
    )

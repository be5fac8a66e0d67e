"""How gemm_blocks_sm120.cu is launched for a product and a tile: macros, sizes and workspace, as plain values.

The CuPy launcher and the emulator's tests both launch from this, so what the tests run is what a GPU would run.
"""

from dataclasses import dataclass
from pathlib import Path

from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.mx.heuristics import MxProblem, MxTile

SOURCE = Path(__file__).parent.parent / "cuda" / "gemm_blocks_sm120.cu"
KERNEL = "gemm_blocks_sm120"

_TYPES = {"mxfp8": "MXFP8", "mxfp4": "MXFP4", "nvfp4": "NVFP4"}


@dataclass(frozen=True, kw_only=True)
class MxLaunch:
    """One launch of gemm_blocks_sm120: its macros and sizes.

    partials_bytes: for the slices' sums; what it holds does not matter. arrivals: how many 32-bit counters the slices
    need, zero before the first launch and again after each. Both are 0 without slices, and null pointers then do.
    """

    defines: dict[str, str | int]
    grid: tuple[int, int]
    block: int
    shared_bytes: int
    partials_bytes: int
    arrivals: int


def mx_launch_of(problem: MxProblem, tile: MxTile, kind: EpilogueKind) -> MxLaunch:
    """Return the launch that computes `problem` with `tile`.

    Its arguments are, in this order: codes of A and of the weight, scales of A and of the weight, D; row_scale,
    column_scale, bias, zero_point, weight_sum, residual, the epilogue's numbers, m, n; partials, arrivals; bytes of a
    row's codes and of its scales (int32); from one row to the next of the four arrays in their order (int64). Rows
    start at multiples of 16 bytes, rows of D follow each other. Where n is a multiple of 4, D starts at a multiple of
    16 bytes and the vectors along n at multiples of 8.
    """
    tiles = tile.tiles(problem)
    sliced = tile.slices > 1
    return MxLaunch(
        defines={
            "TYPE": _TYPES[problem.format],
            "TILE_M": tile.tile_m,
            "TILE_N": tile.tile_n,
            "WARPS_M": tile.warps_m,
            "WARPS_N": tile.warps_n,
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

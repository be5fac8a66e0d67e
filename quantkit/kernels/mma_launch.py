"""How gemm_mma.cu is launched for a problem and a tile: macros, sizes and workspace, as plain values.

The CuPy launcher and the emulator's tests both launch from this, so what the tests run is what a GPU runs.
"""

from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import KernelError
from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.heuristics import Problem
from quantkit.kernels.mma_heuristics import ITEM_BYTES, MmaTile, widening

SOURCE = Path(__file__).parent / "cuda" / "gemm_mma.cu"
KERNEL = "gemm_mma"

_TYPES = {"int8": "S8", "float8_e4m3fn": "E4M3", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, kw_only=True)
class MmaLaunch:
    """One launch of gemm_mma: its macros and sizes.

    workspace_bytes: for the slices' sums; what it holds does not matter. arrivals: how many 32-bit counters the slices
    need, zero before the first launch and again after each. Launches that may run at the same time need workspaces and
    counters of their own. Both are 0 without slices, and null pointers then do.
    """

    defines: dict[str, str | int]
    grid: tuple[int, int]
    block: int
    shared_bytes: int
    workspace_bytes: int
    arrivals: int


def launch_of(problem: Problem, tile: MmaTile, kind: EpilogueKind, arch: str) -> MmaLaunch:
    """Return the launch that computes `problem` with `tile` on a GPU of `arch`.

    Its arguments are, in this order: A, B and D; row_scale, column_scale, bias, zero_point, weight_sum, residual, the
    epilogue's numbers, m, n; workspace, arrivals; the bytes of K in a row (int32), and from one row of A and of B to
    the next (int64). Rows of A and B start at multiples of 16 bytes, rows of D follow each other. Where n is a multiple
    of 4, D starts at a multiple of 16 bytes and the vectors along n at multiples of 8.

    Raises:
        KernelError: a format that the kernel does not multiply.
    """
    if problem.format not in ITEM_BYTES:
        raise KernelError(f"{problem.format}: gemm_mma does not multiply it; use {', '.join(ITEM_BYTES)}.")
    tiles = tile.tiles(problem)
    sliced = tile.slices > 1
    return MmaLaunch(
        defines={
            "TYPE": _TYPES[problem.format],
            "WIDEN": widening(problem.format, arch),
            "TILE_M": tile.tile_m,
            "TILE_N": tile.tile_n,
            "WARPS_M": tile.warps_m,
            "WARPS_N": tile.warps_n,
            "ROW": tile.row,
            "STAGES": tile.stages,
            "GROUP": tile.group,
            "SPLIT": int(sliced),
            "VECTOR": int(problem.n % 4 == 0),
            **kind.defines(problem.output),
        },
        grid=(tiles, tile.slices),
        block=tile.threads,
        shared_bytes=tile.shared_bytes,
        workspace_bytes=tile.workspace_bytes(problem),
        arrivals=tiles if sliced else 0,
    )

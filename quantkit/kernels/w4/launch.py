"""How gemm_w4_sm90.cu and gemm_w4_few.cu are launched for a product and a tile: macros, sizes, schedule, workspace.

The CuPy launcher and the emulator's tests both launch from this, so what the tests run is what a GPU runs.
"""

from dataclasses import dataclass
from pathlib import Path

from quantkit.kernels.epilogue import OUTPUT_BYTES, EpilogueKind
from quantkit.kernels.w4.problem import W4Problem
from quantkit.kernels.w4.tiles import W4Few, W4Tile, schedule_of

SOURCE = Path(__file__).parent.parent / "cuda" / "gemm_w4_sm90.cu"
KERNEL = "gemm_w4_sm90"
FEW_SOURCE = Path(__file__).parent.parent / "cuda" / "gemm_w4_few.cu"
FEW_KERNEL = "gemm_w4_few"

_TYPES = {"bfloat16": "BF16", "float16": "F16", "int8": "S8", "float8_e4m3fn": "E4M3"}
_CODES = {"int4": "CODES_INT4", "uint4": "CODES_INT4", "fp4_e2m1": "CODES_E2M1"}
_SCALES = {
    "none": "SCALES_NONE",
    "bfloat16": "SCALES_BF16",
    "float16": "SCALES_F16",
    "float32": "SCALES_F32",
    "e4m3": "SCALES_E4M3",
    "e8m0": "SCALES_E8M0",
    "uint8": "SCALES_U8",
}


@dataclass(frozen=True, kw_only=True)
class W4Launch:
    """One launch of gemm_w4_sm90.

    Attributes:
        defines: its macros. grid, block, cluster, shared_bytes: its sizes.
        box: rows and columns of A's tensor map. output_box: of D's, whose rows are whole 16 bytes if `tma_store`.
        whole: tiles that blocks take whole; the steps of the others are cut into a `share` for each block, and one more
            for the first `extra` of them.
        partials_bytes, arrivals: workspace for the sums of pieces, and zeroed counters (32 bits) that are zero again
            when the kernel ends.
    """

    defines: dict[str, str | int]
    grid: int
    block: int
    cluster: int
    shared_bytes: int
    box: tuple[int, int]
    output_box: tuple[int, int]
    tma_store: bool
    whole: int
    share: int
    extra: int
    partials_bytes: int
    arrivals: int


def w4_launch_of(problem: W4Problem, tile: W4Tile, kind: EpilogueKind, multiprocessors: int) -> W4Launch:
    """Return the launch that computes `problem` with `tile` on a GPU of `multiprocessors`.

    kind: the epilogue's; its column scale must be `each`, that of the weight's rows.
    """
    width = OUTPUT_BYTES[problem.output]
    tma_store = width >= 2 and problem.n * width % 16 == 0 and tile.tile_n >= 16
    clusters, whole = schedule_of(problem, tile, multiprocessors)
    tiles = tile.tiles(problem)
    cut = tiles - whole
    share, extra = divmod(cut * tile.steps(problem), clusters)
    return W4Launch(
        defines={
            **decoding(problem),
            "CONSUMERS": tile.consumers,
            "MI": tile.blocks_of_64,
            "TILE_N": tile.tile_n,
            "SLABS": tile.slabs,
            "GRAIN": tile.grain,
            "STAGES": tile.stages,
            "ORDER": tile.order,
            "CLUSTER": tile.cluster,
            "TMA_STORE": int(tma_store),
            **kind.defines(problem.output),
        },
        grid=clusters * tile.cluster,
        block=tile.threads,
        cluster=tile.cluster,
        shared_bytes=tile.shared_bytes(problem),
        box=(tile.tile_n // tile.cluster, problem.slab),
        output_box=(tile.piece(problem), 128 // max(width, 2)),
        tma_store=tma_store,
        whole=whole,
        share=share,
        extra=extra,
        partials_bytes=2 * clusters * tile.cluster * tile.tile_w * tile.tile_n * 4 if cut else 16,
        arrivals=max(1, cut * tile.cluster * tile.consumers),
    )


@dataclass(frozen=True, kw_only=True)
class W4FewLaunch:
    """One launch of gemm_w4_few: macros, sizes, rows and columns of A's tensor map."""

    defines: dict[str, str | int]
    grid: tuple[int, int]
    block: int
    cluster: int
    shared_bytes: int
    box: tuple[int, int]


def w4_few_launch_of(problem: W4Problem, tile: W4Few, kind: EpilogueKind) -> W4FewLaunch:
    """Return the launch that computes `problem` with `tile`; `kind` as in `w4_launch_of`."""
    return W4FewLaunch(
        defines={
            **decoding(problem),
            "WARPS_W": tile.warps_w,
            "WARPS_K": tile.warps_k,
            "MI": tile.groups,
            "TILE_N": tile.tile_n,
            "SLABS": tile.slabs,
            "STAGES": tile.stages,
            "CLUSTER": tile.cluster,
            **kind.defines(problem.output),
        },
        cluster=tile.cluster,
        grid=tile.blocks(problem),
        block=tile.threads,
        shared_bytes=tile.shared_bytes(problem),
        box=(tile.tile_n, problem.slab),
    )


def decoding(problem: W4Problem) -> dict[str, str | int]:
    """Return the macros of w4_decode.h."""
    return {
        "TYPE": _TYPES[problem.activations],
        "CODES": _CODES[problem.codes],
        "SCALES": _SCALES[problem.scales],
        "GROUP": problem.group or 0,
        "ZEROS": int(problem.zeros),
        **({"DEEP": 1} if problem.deep else {}),
    }

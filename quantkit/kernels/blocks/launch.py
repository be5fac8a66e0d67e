"""How gemm_blocks_sm90.cu is launched for a problem and a tile: macros, sizes and tensor maps, as plain values.

The CuPy launcher and the emulator's tests both launch from this, so what the tests run is what a GPU runs.
"""

from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import KernelError
from quantkit.kernels.blocks.heuristics import BlocksProblem, BlocksTile
from quantkit.kernels.epilogue import OUTPUT_BYTES, EpilogueKind

SOURCE = Path(__file__).parent.parent / "cuda" / "gemm_blocks_sm90.cu"
KERNEL = "gemm_blocks_sm90"


@dataclass(frozen=True, kw_only=True)
class BlocksLaunch:
    """One launch: its macros, its sizes, and the boxes of its three tensor maps (rows, columns).

    Its arguments are, in this order: the maps of the first operand, the second, and D; D, k (int32); the scales of the
    activations and their pitch in bytes (int64), those of the weight and theirs; the epilogue's.

    swap: the first tensor map is the weight's. tma_store: D's rows can be a tensor map's; else threads store elements.
    output_swizzle: of the third map, in bytes.
    """

    defines: dict[str, str | int]
    grid: int
    block: int
    cluster: int
    shared_bytes: int
    first_box: tuple[int, int]
    second_box: tuple[int, int]
    output_box: tuple[int, int]
    output_swizzle: int
    swap: bool
    tma_store: bool


def launch_of(
    problem: BlocksProblem, tile: BlocksTile, kind: EpilogueKind, multiprocessors: int
) -> BlocksLaunch:
    """Return the launch that computes `problem` with `tile` on a GPU of `multiprocessors`.

    Raises:
        KernelError: K has fewer groups of four steps than the tile has parts.
    """
    fours = -(-problem.steps // 4)
    if tile.split > fours:
        raise KernelError(f"tile: {tile.split} parts of a K of {problem.k}; split into {fours} at most.")
    width = OUTPUT_BYTES[problem.output]
    tma_store = problem.n * width % 16 == 0
    piece = min(tile.tile_n, 32 if width == 4 else 64)
    if tile.buffers == 3:
        piece = min(piece, 64 // width)
    return BlocksLaunch(
        defines={
            "BLOCK": problem.block,
            "MI": tile.blocks_of_64,
            "TILE_N": tile.tile_n,
            "STAGES": tile.stages,
            "CONSUMERS": tile.consumers,
            "CLUSTER": tile.cluster,
            "SPLIT": tile.split,
            "GROUP": tile.group,
            "BUFFERS": tile.buffers,
            "SWAP": int(tile.swap),
            "TMA_STORE": int(tma_store),
            **kind.defines(problem.output),
        },
        grid=tile.clusters(problem, multiprocessors) * tile.blocks,
        block=tile.threads,
        cluster=tile.blocks,
        shared_bytes=tile.shared_bytes(problem.block),
        first_box=(tile.tile_m // tile.cluster, 128),
        second_box=(tile.tile_n, 128),
        output_box=(piece, 32 if width == 4 else 64) if tile.swap else (64, piece),
        output_swizzle=64 if width == 1 or tile.buffers == 3 else 128,
        swap=tile.swap,
        tma_store=tma_store,
    )

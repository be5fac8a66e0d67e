"""How gemm_sm90.cu is launched for a problem and a tile: macros, sizes and tensor maps, as plain values.

The CuPy launcher and the emulator's tests both launch from this, so what the tests run is what a GPU runs.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantkit.errors import KernelError
from quantkit.kernels.epilogue import OUTPUT_BYTES, EpilogueKind
from quantkit.kernels.heuristics import ITEM_BYTES, Problem, Shares, Tile, shares_of

SOURCE = Path(__file__).parent / "cuda" / "gemm_sm90.cu"
KERNEL = "gemm_sm90"

_TYPES = {"int8": "S8", "float8_e4m3fn": "E4M3", "bfloat16": "BF16"}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of gemm_sm90: its macros, its sizes, and the boxes of its three tensor maps (rows, columns).

    swap: the first tensor map is B's. tma_store: D's rows can be a tensor map's; else threads store elements.
    output_swizzle: of the third map, in bytes. shares: of stream-K; with them the kernel also gets memory for sums,
    piece_bytes, and counters that are zero between launches, arrivals of uint32.
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
    shares: Shares | None = None
    piece_bytes: int = 0
    arrivals: int = 0

    def share_arguments(self) -> tuple[np.int32, ...]:
        """Return the last arguments of a kernel that streams, behind pieces and arrivals."""
        assert self.shares is not None
        return np.int32(self.shares.whole), np.int32(self.shares.share), np.int32(self.shares.extra)


def launch_of(problem: Problem, tile: Tile, kind: EpilogueKind, multiprocessors: int) -> Launch:
    """Return the launch that computes `problem` with `tile` on a GPU of `multiprocessors`.

    Raises:
        KernelError: K has fewer steps of 128 bytes than the tile has parts.
    """
    steps = -(-problem.row_bytes // 128)
    if tile.split > steps:
        raise KernelError(f"tile: {tile.split} parts of a K of {steps} steps; split into {steps} at most.")
    shares = shares_of(problem, tile, multiprocessors) if tile.stream else None
    along_first, along_second = tile.tiles(problem)
    width = OUTPUT_BYTES[problem.output]
    tma_store = problem.n * width % 16 == 0
    k = 128 // ITEM_BYTES[problem.format]
    piece = min(tile.owned, 32 if width == 4 else 64)
    output_box = (piece, 32 if width == 4 else 64) if tile.swap else (64, piece)
    return Launch(
        defines={
            "TYPE": _TYPES[problem.format],
            "MI": tile.blocks_of_64,
            "TILE_N": tile.tile_n,
            "STAGES": tile.stages,
            "CONSUMERS": tile.consumers,
            "CLUSTER": tile.cluster,
            "SPLIT": tile.split,
            "STREAM": int(tile.stream),
            "GROUP": tile.group,
            "PINGPONG": int(tile.pingpong),
            "SWAP": int(tile.swap),
            "TMA_STORE": int(tma_store),
            **kind.defines(problem.output),
        },
        grid=tile.clusters(problem, multiprocessors) * tile.blocks if shares is None else shares.blocks,
        block=tile.threads,
        cluster=tile.blocks,
        shared_bytes=tile.shared_bytes,
        first_box=(tile.tile_m, k),
        second_box=(tile.tile_n // tile.cluster, k),
        output_box=output_box,
        output_swizzle=64 if width == 1 else 128,
        swap=tile.swap,
        tma_store=tma_store,
        shares=shares,
        # Two pieces a block at most, each of a tile's sums.
        piece_bytes=0 if shares is None else shares.blocks * 2 * tile.tile_m * tile.tile_n * 4,
        arrivals=0 if shares is None else (along_first * along_second - shares.whole) * tile.consumers,
    )

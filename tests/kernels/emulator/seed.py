"""How the two seed kernels are launched; shared by their own tests and by those that damage them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.kernels.emulator import Swizzle, TensorMap

from ..layouts import accumulator

MMA = Path(__file__).with_name("mma_tile.cu")
WGMMA = Path(__file__).with_name("wgmma_tile.cu")


def mma_tile(
    machine: Any, type_name: str, a: np.ndarray, b: np.ndarray, *, source: Path = MMA, stages: int = 3
):
    """D[m, n] = a[m, k] @ b[n, k].T, whose rows are multiples of 16 bytes."""
    m, n = a.shape[0], b.shape[0]
    d = np.full((m, n), -7, accumulator(type_name))
    sizes = np.int32(m), np.int32(n), np.int32(a.nbytes // m)
    machine.launch(
        source,
        "mma_tile",
        a.view(np.uint8),
        b.view(np.uint8),
        d,
        *sizes,
        defines={"TYPE": type_name, "STAGES": stages},
        grid=(-(-n // 64), -(-m // 64)),
        block=128,
        shared_bytes=stages * 128 * 64,
    )
    return d


def wgmma_tile(
    machine: Any,
    type_name: str,
    a: np.ndarray,
    b: np.ndarray,
    *,
    source: Path = WGMMA,
    tile_n: int = 64,
    stages: int = 3,
    cluster: int = 1,
    grid: int = 4,
    defines: Mapping[str, Any] | None = None,
):
    """The same with TMA and wgmma, on `grid` persistent blocks."""
    m, n = a.shape[0], b.shape[0]
    d = np.full((m, n), -7, accumulator(type_name))
    row = 128 // a.itemsize
    sizes = np.int32(m), np.int32(n), np.int32(a.nbytes // m)
    machine.launch(
        source,
        "wgmma_tile",
        TensorMap(array=a, box=(128, row), swizzle=Swizzle.BYTES_128),
        TensorMap(array=b, box=(tile_n // cluster, row), swizzle=Swizzle.BYTES_128),
        d,
        *sizes,
        defines={"TYPE": type_name, "TILE_N": tile_n, "STAGES": stages, "CLUSTER": cluster}
        | dict(defines or {}),
        grid=grid,
        block=384,
        cluster=cluster,
        shared_bytes=stages * (128 + tile_n) * 128 + 16 * stages,
    )
    return d

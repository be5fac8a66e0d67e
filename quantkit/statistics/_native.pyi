import numpy as np
from numpy.typing import NDArray

def reduce(
    x: NDArray[np.float32],
    shape: tuple[int, int, int],
    channels: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]
    | None,
    linear: NDArray[np.int64] | None,
    exponent: int,
    /,
) -> tuple[int, int, int, int, float, float, tuple[int, bytes], tuple[int, bytes]] | None: ...

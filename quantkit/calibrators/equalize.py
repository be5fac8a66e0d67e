"""Cross-layer equalization: make the channels between two layers equally large in the weights of both."""

import numpy as np
from numpy.typing import NDArray


def equalizing_scale(
    producer: NDArray[np.floating], reader: NDArray[np.floating], *, least: float = 1e-3
) -> NDArray[np.float64]:
    """Return s = √(r1 / r2) of every channel, float64 (arXiv 1906.04721, equation 11).

    Dividing what computes a channel by s and multiplying what reads it leaves both with the range √(r1 · r2), so
    that one scale per tensor, or few bits per channel, serves all channels alike. No data is needed.

    Args:
        producer: r1, the largest magnitude of the weights that compute a channel, shape (channels,).
        reader: r2, that of the weights that read it.
        least: the smallest range taken for true, in parts of the largest: dead channels stay as they are.
    """
    r1, r2 = np.asarray(producer, np.float64), np.asarray(reader, np.float64)
    alive = (r1 > least * r1.max(initial=0)) & (r2 > least * r2.max(initial=0))
    return np.where(alive, np.sqrt(np.where(alive, r1, 1) / np.where(alive, r2, 1)), 1.0)

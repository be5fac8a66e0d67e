"""Small linear layers with inputs that depend on each other, for the methods that look at outputs."""

import numpy as np
from numpy.typing import NDArray

from quantkit.statistics import GramMatrix


def correlated(vectors: int, size: int, *, seed: int = 0, outliers: int = 0) -> NDArray[np.float32]:
    """Return vectors (vectors, size) whose elements are mixtures of fewer sources, some of them much larger."""
    rng = np.random.default_rng(seed)
    sources = rng.normal(size=(vectors, max(size // 2, 1)))
    x = sources @ rng.normal(size=(sources.shape[1], size)) + 0.3 * rng.normal(size=(vectors, size)) + 0.2
    x[:, rng.permutation(size)[:outliers]] *= 30
    return x.astype(np.float32)


def gram_of(x: NDArray[np.float32]) -> GramMatrix:
    """Return the Gram matrix of vectors (vectors, size) or (groups, vectors, size)."""
    gram = GramMatrix(x.shape[-1], 1 if x.ndim == 2 else x.shape[0])
    gram.observe(x)
    return gram


def weights(*shape: int, seed: int = 1) -> NDArray[np.float32]:
    """Return N(0, 1) weights."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def output_loss(x: NDArray[np.float32], w: NDArray[np.floating], rounded: NDArray[np.floating]) -> float:
    """Return the mean over vectors of ‖x (w − rounded)‖², for weights [K, N]."""
    lost = x.astype(np.float64) @ (w.astype(np.float64) - rounded)
    return float(np.square(lost).sum() / len(x))

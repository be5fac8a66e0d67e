"""Bias correction: what rounding a weight adds to the mean of an output is taken off the bias."""

import numpy as np
from numpy.typing import NDArray

from quantkit.calibrators.weight_layout import WeightLayout
from quantkit.errors import SpecError


def bias_correction(
    w: NDArray[np.floating],
    rounded: NDArray[np.floating],
    mean: NDArray[np.floating],
    layout: WeightLayout,
    *,
    name: str = "weight",
) -> NDArray[np.float64]:
    """Return (W − Ŵ) E[x], to be added to the bias: shape (output channels,), float64 (arXiv 1906.04721, 4.2).

    Args:
        w: the weight.
        rounded: what its codes stand for.
        mean: E[x] of its vectors, (groups, K): `GramMatrix.mean`, exact at a convolution's edges too; or of its input
            channels alone, (channels,): `ChannelStats.mean`, as if there were no padding.
        layout: where the output channels lie.
        name: what errors call the weight.

    Raises:
        SpecError: the mean is not that of this weight's inputs, or not finite.
    """
    groups, size = layout.groups, layout.size(w.shape)
    given = np.asarray(mean, np.float64)
    if given.ndim == 1 and given.size % groups == 0 and size % max(given.size // groups, 1) == 0:
        given = np.repeat(given.reshape(groups, -1), size // max(given.size // groups, 1), axis=1)
    if given.shape != (groups, size) or not np.isfinite(given).all():
        raise SpecError(
            f"{name}: a mean of shape {np.shape(mean)} for vectors of {groups} × {size}, or one that is not finite; "
            "give that of this weight's inputs."
        )
    change = layout.columns(w).astype(np.float64) - layout.columns(rounded).astype(np.float64)
    found: NDArray[np.float64] = np.einsum("gk,gkn->gn", given, change).reshape(-1)
    return found

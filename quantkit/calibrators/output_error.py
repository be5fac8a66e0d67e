"""What a change of a weight does to the layer's output, from the Gram matrix of its inputs."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.calibrators.weight_layout import WeightLayout
from quantkit.errors import SpecError
from quantkit.statistics import GramMatrix


def output_error(change: Any, moment: Any) -> Any:
    """Return the mean of ‖ΔW x‖² by output channel: δₙᵀ E[x xᵀ] δₙ, shape (groups, N).

    Args:
        change: ΔW in columns, shape (groups, K, N), an array of NumPy or CuPy.
        moment: E[x xᵀ], or the covariance where a bias takes up the mean; shape (groups, K, K).
    """
    # Rounding can leave the covariance of a constant input a little below zero.
    return ((moment @ change) * change).sum(axis=1).clip(0)


def check_gram(w: NDArray[np.floating], gram: GramMatrix, layout: WeightLayout, name: str) -> None:
    """Raise `SpecError` unless `gram` is that of a weight's inputs, not empty and finite."""
    wanted = layout.groups, layout.size(w.shape)
    if (gram.groups, gram.size) != wanted:
        raise SpecError(
            f"{name}: a Gram matrix of {gram.groups} × {gram.size} for a weight of shape {w.shape}, "
            f"which multiplies vectors of {wanted[0]} × {wanted[1]}; collect it from this model."
        )
    if gram.count == 0:
        raise SpecError(f"{name}: its Gram matrix has seen no input; calibrate with data that reaches it.")
    if not gram.is_finite:
        raise SpecError(f"{name}: NaN or infinity among its inputs; keep this layer in float.")
    if not np.isfinite(w.astype(np.float32)).all():
        raise SpecError(f"{name}: NaN or infinity in it; mend the model or keep it in float.")

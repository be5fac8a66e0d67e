"""Ranges of weights: they are known whole, so nothing has to be estimated from a histogram."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quantkit.formats import QuantSpec, Range


def weight_range(
    w: NDArray[np.floating], spec: QuantSpec, *, method: Literal["amax", "mse"] = "amax", name: str = "weight"
) -> Range:
    """Return the range of a weight per channel, or per tensor where `spec.axis` is None."""
    rows = np.asarray(w, np.float32)
    rows = (
        rows.reshape(1, -1)
        if spec.axis is None
        else np.moveaxis(rows, spec.axis, 0).reshape(w.shape[spec.axis], -1)
    )
    lo, hi = rows.min(axis=1), rows.max(axis=1)
    shape = () if spec.axis is None else (-1,)
    return Range(lo.reshape(shape), hi.reshape(shape))

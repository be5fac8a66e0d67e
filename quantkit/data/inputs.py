"""What a model wants to be fed, and along which axis of each input samples are stacked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Dtype: TypeAlias = np.dtype[Any]
Dim: TypeAlias = int | str | None
Sample: TypeAlias = dict[str, Array]
"""One sample by input name; an input that has a batch axis has length 1 along it."""


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: as in the model.
        dtype: NumPy's or ml_dtypes' element type.
        shape: a number for a static dimension; its symbol, or None where it has no name, for a free one.
        masks: −inf has a meaning in it, as in an additive attention mask; else only finite values are taken.
    """

    name: str
    dtype: Dtype
    shape: tuple[Dim, ...]
    masks: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        object.__setattr__(self, "shape", tuple(self.shape))

    def __str__(self) -> str:
        return f"{self.name}: {array_type(self.dtype, self.shape)}"


def array_type(dtype: Dtype, shape: Sequence[Dim]) -> str:
    """Return how a type is written in messages: float32[batch, 3, ?, 32]."""
    return f"{dtype.name}[{', '.join('?' if d is None else str(d) for d in shape)}]"


def batch_axes(inputs: Sequence[InputSpec]) -> dict[str, int | None]:
    """Return the axis along which samples of each input are stacked; None where an input has none.

    A free first dimension is the batch. Beside such an input, one with a static first dimension belongs to
    the model, not to a sample (a state, a table), unless the batch's symbol stands at a later axis: the state
    [layers, batch, hidden] of a recurrent network. When no first dimension is free, the first input's is the
    batch, and every input that has the same one is batched. Scalars have no batch axis.
    """
    free = [s for s in inputs if s.shape and not isinstance(s.shape[0], int)]
    if free:
        symbol = free[0].shape[0]
        return {s.name: _axis_beside_free(s, symbol) for s in inputs}
    size = fixed_batch_size(inputs)
    return {s.name: 0 if s.shape and s.shape[0] == size else None for s in inputs}


def fixed_batch_size(inputs: Sequence[InputSpec]) -> int | None:
    """Return the number of samples that the model takes at a time, None when that is free."""
    first = [s.shape[0] for s in inputs if s.shape]
    if not first or not all(isinstance(d, int) for d in first):
        return None
    return first[0] if isinstance(first[0], int) else None


def _axis_beside_free(spec: InputSpec, symbol: Dim) -> int | None:
    if not spec.shape:
        return None
    if not isinstance(spec.shape[0], int):
        return 0
    return spec.shape.index(symbol) if symbol is not None and symbol in spec.shape else None

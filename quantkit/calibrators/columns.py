"""A weight's rounding, column by column of its matrix: the step and zero of every element, and how scales share."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.calibrators.weight_layout import WeightLayout
from quantkit.formats import Format, QParams, QuantSpec
from quantkit.formats.layout import spread
from quantkit.formats.rounding import nearest_values

# Of NumPy or of CuPy, as `xp` says.
Array = Any


@dataclass
class Steps:
    """With what every element of a weight (groups, K, N) is rounded: x ≈ code · step.

    Attributes:
        format: of the codes.
        step: float32, of the weight's shape, may be negative.
        zero: zero points of that shape, 0 where codes are signed; None for float formats.
    """

    format: Format
    step: Array
    zero: Array | None

    def nearest(self, x: Array, rows: Any, xp: ModuleType) -> Array:
        """Return `x` rounded with the steps of `rows`, an index into the weight's shape."""
        step = self.step[rows]
        ratio = x / step
        if self.zero is None:
            return nearest_values(ratio, self.format) * step
        zero = self.zero[rows]
        return xp.clip(xp.rint(ratio), self.format.min - zero, self.format.max - zero) * step

    def ordered(self, order: Array, xp: ModuleType) -> "Steps":
        """Return the steps with the elements of every group in `order`, shape (groups, K)."""
        return Steps(
            self.format,
            xp.take_along_axis(self.step, order[:, :, None], axis=1),
            None if self.zero is None else xp.take_along_axis(self.zero, order[:, :, None], axis=1),
        )


def steps_of(
    qparams: QParams, spec: QuantSpec, shape: tuple[int, ...], layout: WeightLayout, xp: ModuleType
) -> Steps:
    """Return the steps of a weight of `shape`, as arrays of `xp`."""

    def whole(values: NDArray[np.generic]) -> Array:
        full = np.broadcast_to(spread(values.astype(np.float32), shape, spec), shape)
        # A copy: scales are replaced as better ones are found.
        return xp.asarray(np.array(layout.columns(full), order="C"))

    zero = None
    if spec.format.kind == "integer":
        assert qparams.zero_point is not None
        zero = whole(qparams.zero_point)
    return Steps(spec.format, whole(qparams.effective_scale), zero)


def rows_per_scale(spec: QuantSpec, shape: tuple[int, ...], layout: WeightLayout) -> int | None:
    """Return how many elements of a column share a scale, where every column has scales of its own, stored as floats.

    None where scales are shared across columns or stored in few bits: they cannot be chosen one by one.
    """
    if spec.axis is None or spec.scale_format is not None:
        return None
    if spec.block_size is None:
        return layout.size(shape) if spec.axis % len(shape) == layout.out_axis % len(shape) else None
    return spec.block_size if len(shape) == 2 and spec.axis % 2 != layout.out_axis % 2 else None


def with_steps(
    qparams: QParams, step: NDArray[np.float32], spec: QuantSpec, shape: tuple[int, ...], layout: WeightLayout
) -> QParams:
    """Return `qparams` with the scales that `step` (groups, K, N) repeats; see `rows_per_scale`."""
    rows = rows_per_scale(spec, shape, layout)
    assert rows is not None
    scale = step[:, ::rows]
    if spec.block_size is None:
        return QParams(np.ascontiguousarray(scale.reshape(-1)), qparams.zero_point)
    found = layout.weight(scale, qparams.scale.shape)
    return QParams(np.ascontiguousarray(found), qparams.zero_point)

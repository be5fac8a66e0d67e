"""GPTQ: round a weight so that its layer's output keeps, rather than its own values."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.calibrators.columns import Array, Steps, rows_per_scale, steps_of, with_steps
from quantkit.calibrators.output_error import check_gram
from quantkit.calibrators.weight_layout import WeightLayout
from quantkit.calibrators.weight_scales import weight_qparams
from quantkit.errors import SpecError
from quantkit.formats import QParams, QTensor, QuantSpec, quantize
from quantkit.formats.scales import SMALLEST_SCALE
from quantkit.statistics import GramMatrix


@dataclass(frozen=True, kw_only=True)
class GptqOptions:
    """How weights are rounded.

    Attributes:
        damping: what is added to every element of the Gram matrix's diagonal, in parts of itself. In parts of the
            diagonal's mean, as published, a few outlier channels would damp all others.
        act_order: round the inputs of the largest Σ x² first, while all others can still make up for them.
        block: inputs rounded before those of other blocks learn of it; the result depends on it by rounding alone.
        sweeps: how often, afterwards, scales are fitted to the codes, where they are free, and every code is chosen
            anew with all others as they are. Each lowers the layer's error, most in few bits. 0 is GPTQ alone.
    """

    damping: float = 0.01
    act_order: bool = True
    block: int = 128
    sweeps: int = 4

    def __post_init__(self) -> None:
        if not (self.damping > 0 and self.block >= 1 and self.sweeps >= 0):
            raise SpecError(
                f"gptq: damping {self.damping}, block {self.block}, sweeps {self.sweeps}; "
                "give damping > 0, block ≥ 1 and sweeps ≥ 0."
            )


def gptq(
    w: NDArray[np.floating],
    gram: GramMatrix,
    spec: QuantSpec,
    layout: WeightLayout,
    *,
    options: GptqOptions | None = None,
    qparams: QParams | None = None,
    centred: bool = False,
    signed_scales: bool = False,
    scale_dtype: np.dtype | None = None,
    name: str = "weight",
    xp: ModuleType = np,
) -> QTensor:
    """Return a weight rounded for the least error of its layer's output (arXiv 2210.17323).

    Inputs are rounded one after the other, and those still to come take up the error: with U the upper Cholesky
    factor of the inverse of H = E[x xᵀ],

        w_j ← w_j − (w_i − q_i) · U_ij / U_ii    for every j after i.

    Scales are those of least squared error, chosen before (so that groups stay whole under act-order). Then come
    the sweeps of `GptqOptions`: a code is best where the error's gradient is zero, at w_i − (H ΔW)_i / H_ii. Inputs
    that are always zero get zero weights.

    Args:
        w: the weight, any float type, finite.
        gram: that of its inputs.
        spec: how the weight is quantized, whatever the format and the lie of its scales.
        layout: where its output channels lie.
        options: see there.
        qparams: scales to use; None for those of `weight_qparams`.
        centred: a bias will take up the mean of the error, so what varies alone counts; see `bias_correction`.
        signed_scales, scale_dtype: as for `weight_qparams`.
        name: what errors call the weight.
        xp: NumPy, or CuPy to work on a GPU.

    Raises:
        SpecError: the Gram matrix is not this weight's, or something is not finite.
    """
    options = options or GptqOptions()
    check_gram(w, gram, layout, name)
    moment = gram.covariance if centred else gram.second_moment
    diagonal = np.diagonal(moment, axis1=1, axis2=2)
    alive = diagonal > 1e-12 * np.maximum(gram.importance, diagonal.max(axis=1, keepdims=True, initial=0))
    if qparams is None:
        # What is never seen must not widen a range.
        counts = None if alive.all() else layout.importance(alive.astype(np.float32), w.shape)
        qparams = weight_qparams(
            w, spec, importance=counts, signed_scales=signed_scales, scale_dtype=scale_dtype, name=name
        )
    steps = steps_of(qparams, spec, w.shape, layout, xp)
    target = xp.asarray(np.ascontiguousarray(layout.columns(w), np.float32))
    # In a row and a column of zeros nothing depends on the input any more.
    moment = moment * alive[:, :, None] * alive[:, None, :]
    h = xp.asarray(moment)
    order = xp.argsort(-xp.asarray(diagonal * alive), axis=1, kind="stable")
    if not options.act_order:
        order = xp.broadcast_to(xp.arange(gram.size), order.shape)
    # Dead inputs carry nothing, but a mean that the bias of a centred error takes up.
    goal = target if centred else target * xp.asarray(alive, np.float32)[:, :, None]
    rounded = _round(goal, h, steps, order, options, xp)
    rows = rows_per_scale(spec, w.shape, layout)
    h = h.astype(np.float32)
    for _ in range(options.sweeps):
        if rows is not None:
            rounded = _fit_scales(goal, rounded, h, steps, rows, scale_dtype, xp)
        rounded = _sweep(goal, rounded, h, steps, order, options.block, xp)
    if rows is not None:
        qparams = with_steps(qparams, as_numpy(steps.step), spec, w.shape, layout)
    values: NDArray[np.float32] = layout.weight(as_numpy(rounded), w.shape).astype(np.float32)
    return quantize(values, qparams, spec)


def as_numpy(array: Array) -> NDArray[Any]:
    """Return an array of NumPy or CuPy as NumPy's."""
    return np.asarray(array.get() if hasattr(array, "get") else array)


def _round(w: Array, h: Array, steps: Steps, order: Array, options: GptqOptions, xp: ModuleType) -> Array:
    """GPTQ: `w` (groups, K, N) rounded, with its inputs taken in `order`."""
    size = w.shape[1]
    ordered = _reordered(h, order, xp)
    index = xp.arange(size)
    diagonal = ordered[:, index, index]
    # 1 where the input is dead: it then takes up nothing and passes nothing on.
    ordered[:, index, index] = xp.where(diagonal > 0, diagonal * (1 + options.damping), 1.0)
    upper = xp.linalg.cholesky(xp.linalg.inv(ordered)).swapaxes(1, 2).astype(np.float32)
    left = xp.take_along_axis(w, order[:, :, None], axis=1)
    steps = steps.ordered(order, xp)
    rounded = xp.empty_like(left)
    for start in range(0, size, options.block):
        stop = min(start + options.block, size)
        errors = xp.empty_like(left[:, start:stop])
        for i in range(start, stop):
            rounded[:, i] = steps.nearest(left[:, i], (slice(None), i), xp)
            error = (left[:, i] - rounded[:, i]) / upper[:, i, i, None]
            errors[:, i - start] = error
            left[:, i + 1 : stop] -= upper[:, i, i + 1 : stop, None] * error[:, None]
        left[:, stop:] -= upper[:, start:stop, stop:].swapaxes(1, 2) @ errors
    return _restored(rounded, order, xp)


def _sweep(
    w: Array, rounded: Array, h: Array, steps: Steps, order: Array, block: int, xp: ModuleType
) -> Array:
    """Choose every code anew, the others as they are: coordinate descent on tr(ΔW H ΔWᵀ)."""
    size = w.shape[1]
    h = _reordered(h, order, xp)
    index = xp.arange(size)
    # A dead input has no gradient either.
    curvature = xp.where(h[:, index, index] > 0, h[:, index, index], 1)
    rounded = xp.take_along_axis(rounded, order[:, :, None], axis=1)
    steps = steps.ordered(order, xp)
    gradient = h @ (rounded - xp.take_along_axis(w, order[:, :, None], axis=1))
    for start in range(0, size, block):
        stop = min(start + block, size)
        before = rounded[:, start:stop].copy()
        inner = gradient[:, start:stop]
        for i in range(start, stop):
            at = rounded[:, i] - inner[:, i - start] / curvature[:, i, None]
            found = steps.nearest(at, (slice(None), i), xp)
            inner += h[:, start:stop, i, None] * (found - rounded[:, i])[:, None]
            rounded[:, i] = found
        change = rounded[:, start:stop] - before
        gradient[:, :start] += h[:, :start, start:stop] @ change
        gradient[:, stop:] += h[:, stop:, start:stop] @ change
    return _restored(rounded, order, xp)


def _fit_scales(
    w: Array, rounded: Array, h: Array, steps: Steps, rows: int, dtype: np.dtype | None, xp: ModuleType
) -> Array:
    """Fit the scales of every column to its codes by least squares; set `steps`, return the new values.

    With c_b the codes of block b, zero elsewhere, the scales s of a column solve A s = b, A_ab = c_aᵀ H c_b and
    b_a = c_aᵀ H w. A little of A's trace draws scales that nothing decides to what they were.
    """
    groups, size, n = w.shape
    starts = np.arange(0, size, rows)
    codes = rounded / steps.step
    products = xp.empty((groups, n, len(starts), len(starts)), np.float64)
    for a, start in enumerate(starts):
        block = slice(start, start + rows)
        reached = codes * (h[:, :, block] @ codes[:, block])
        products[..., a] = xp.stack([reached[:, s : s + rows].sum(axis=1) for s in starts], axis=-1)
    wanted = codes * (h @ w)
    wanted = xp.stack([wanted[:, s : s + rows].sum(axis=1) for s in starts], axis=-1)
    old = steps.step[:, ::rows].swapaxes(1, 2)
    pull = 1e-4 * xp.trace(products, axis1=2, axis2=3)[..., None] / len(starts)
    # Nothing at all decides the scales of a column of zeros.
    pull = xp.where(pull > 0, pull, 1.0)
    products = products + pull[..., None] * xp.eye(len(starts))
    found = xp.linalg.solve(products, (wanted + pull * old)[..., None])[..., 0].astype(np.float32)
    if dtype is not None:
        found = found.astype(dtype).astype(np.float32)
    usable = xp.isfinite(found) & (found * old > 0) & (xp.abs(found) >= SMALLEST_SCALE)
    found = xp.where(usable, found, old).swapaxes(1, 2)
    steps.step = xp.repeat(found, rows, axis=1)[:, :size]
    return codes * steps.step


def _reordered(h: Array, order: Array, xp: ModuleType) -> Array:
    rows = xp.take_along_axis(h, order[:, :, None], axis=1)
    return xp.take_along_axis(rows, order[:, None, :], axis=2)


def _restored(values: Array, order: Array, xp: ModuleType) -> Array:
    back = xp.argsort(order, axis=1)
    return xp.take_along_axis(values, back[:, :, None], axis=1)

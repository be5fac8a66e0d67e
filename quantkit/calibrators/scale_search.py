"""Scales of a weight chosen by what rounding with them does to the layer's output."""

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.calibrators.columns import Array, Steps, rows_per_scale, steps_of, with_steps
from quantkit.calibrators.gptq import as_numpy
from quantkit.calibrators.output_error import check_gram
from quantkit.calibrators.weight_layout import WeightLayout
from quantkit.calibrators.weight_scales import weight_qparams
from quantkit.formats import QParams, QuantSpec
from quantkit.formats.scales import SMALLEST_SCALE
from quantkit.statistics import GramMatrix

# Factors on the scales of least weighted error, of the first pass and of the next: an eighth of an octave apart at
# first, within half an octave; then as fine as still changes a code here and there.
_WIDE = np.exp2(np.arange(-6, 7) / 12)
_NEAR = np.exp2(np.array([-2, -1, 1, 2]) / 48)


def search_scales(
    w: NDArray[np.floating],
    gram: GramMatrix,
    spec: QuantSpec,
    layout: WeightLayout,
    *,
    centred: bool = False,
    signed_scales: bool = False,
    scale_dtype: np.dtype | None = None,
    name: str = "weight",
    xp: ModuleType = np,
) -> QParams:
    """Return the scales with which rounding to nearest loses least of the layer's output.

    AWQ's clip search (arXiv 2306.00978, section 3.2) with the exact error of all samples in place of some tokens':
    from the scales of least error weighted by E[x²], block after block of the input tries scales around its own,
    every column for itself, and keeps that of the least

        δᵀ G_bb δ + 2 δᵀ Σ_{c ≠ b} G_bc Δ_c,

    δ being the block's error and Δ_c that of the other blocks as they are. A second pass does so in finer steps.
    Scales that columns share or that have few bits stay those of least weighted error.

    Args:
        w: the weight, any float type, finite.
        gram: that of its inputs.
        spec: how the weight is quantized.
        layout: where its output channels lie.
        centred: a bias will take up the mean of the error.
        signed_scales, scale_dtype: as for `weight_qparams`.
        name: what errors call the weight.
        xp: NumPy, or CuPy to work on a GPU.

    Raises:
        SpecError: the Gram matrix is not this weight's, or something is not finite.
    """
    check_gram(w, gram, layout, name)
    moment = gram.covariance if centred else gram.second_moment
    diagonal = np.diagonal(moment, axis1=1, axis2=2).clip(0)
    qparams = weight_qparams(
        w,
        spec,
        importance=layout.importance(diagonal, w.shape),
        signed_scales=signed_scales,
        scale_dtype=scale_dtype,
        name=name,
    )
    rows = rows_per_scale(spec, w.shape, layout)
    if rows is None:
        return qparams
    target = xp.asarray(np.ascontiguousarray(layout.columns(w), np.float32))
    steps = steps_of(qparams, spec, w.shape, layout, xp)
    both = signed_scales and bool((qparams.scale < 0).any())
    h = xp.asarray(moment, np.float32)
    for factors in (np.concatenate([_WIDE, -_WIDE]) if both else _WIDE, _NEAR):
        _improve(target, h, steps, rows, factors, scale_dtype, xp)
    return with_steps(qparams, as_numpy(steps.step), spec, w.shape, layout)


def _improve(
    w: Array, h: Array, steps: Steps, rows: int, factors: NDArray[Any], dtype: np.dtype | None, xp: ModuleType
) -> None:
    """One pass over the blocks; sets `steps.step` where another scale loses less."""
    change = steps.nearest(w, ..., xp) - w
    for start in range(0, w.shape[1], rows):
        block = slice(start, min(start + rows, w.shape[1]))
        own, part = h[:, block, block], w[:, block]
        # What the other blocks' errors pull at.
        pull = 2 * (h[:, block] @ change - own @ change[:, block])
        base = steps.step[:, start : start + 1]
        zero = None if steps.zero is None else steps.zero[:, block]
        best, kept = base, change[:, block]
        least = ((own @ kept + pull) * kept).sum(axis=1)
        for factor in factors:
            scale = base * np.float32(factor)
            if dtype is not None:
                scale = scale.astype(dtype).astype(np.float32)
            scale = xp.where(xp.abs(scale) >= SMALLEST_SCALE, scale, base)
            lost = Steps(steps.format, scale, zero).nearest(part, ..., xp) - part
            error = ((own @ lost + pull) * lost).sum(axis=1)
            better = error < least
            least = xp.where(better, error, least)
            best = xp.where(better[:, None], scale, best)
            kept = xp.where(better[:, None], lost, kept)
        steps.step[:, block] = best
        change[:, block] = kept

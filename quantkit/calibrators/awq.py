"""AWQ: scale the channels of an input so that the weights that matter most are rounded finest."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.calibrators.columns import rows_per_scale
from quantkit.calibrators.layer import Layer, tied, weight_amax
from quantkit.calibrators.output_error import check_gram, output_error
from quantkit.calibrators.weight_scales import weight_qparams
from quantkit.errors import SpecError
from quantkit.formats import fake_quantize
from quantkit.formats.rounding import nearest_values

# Exponents tried at first, and how far from the best of them afterwards.
_RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
_NEARER = (0.125, 0.0625)
# How much of a block's largest magnitude its scale covers while ratios are compared.
_CLIPS = (1.0, 0.92, 0.84, 0.76)
# Channels that are hardly ever anything, in parts of the largest: a scale must not follow their noise.
_LEAST = 1e-4


@dataclass(frozen=True, kw_only=True)
class AwqScale:
    """What AWQ found for the layers that read one tensor.

    Attributes:
        scale: of every input channel, float64, > 0: x is divided by it and W multiplied.
        ratio, balance: the exponents of x and of the weight; both 0 leave everything as it is.
        error: E ‖ΔW x‖² of all layers together, as the search saw it.
        error_unscaled: the same without a scale.
    """

    scale: NDArray[np.float64]
    ratio: float
    balance: float
    error: float
    error_unscaled: float


def awq_scale(
    layers: Sequence[Layer], channels: int, *, ties: Sequence[int] | None = None, xp: ModuleType = np
) -> AwqScale:
    """Return the scale of least output error (arXiv 2306.00978, section 3.2), from Gram matrices alone.

        s = x^r / w^b, over √(max s · min s)

    with x the root mean square of every channel, w the largest weight that reads it, r in [0, 1], and b either 0
    (the published form) or r (as in AutoAWQ: what is left is even in x · w). r is searched in steps of 1/4, then of
    1/8 and 1/16 around the best. The error of a candidate is exact, Σ tr(ΔW G ΔWᵀ) over all layers and all samples;
    rounding is to nearest, each scale the best of four clips.

    Args:
        layers: those that read the tensor, each with its Gram matrix.
        channels: of the tensor.
        ties: for every channel the first that must have the same scale.
        xp: NumPy, or CuPy to work on a GPU.

    Raises:
        SpecError: a layer has no Gram matrix or not its own, or something is not finite.
    """
    for layer in layers:
        if layer.gram is None:
            raise SpecError(f"{layer.name}: AWQ needs its Gram matrix; collect it with the calibration.")
        check_gram(layer.w, layer.gram, layer.layout, layer.name)
    x = tied(_magnitude(layers, channels), ties)
    w = tied(weight_amax(layers, channels), ties)
    moments = [xp.asarray(layer.gram.second_moment, np.float32) for layer in layers if layer.gram is not None]
    seen: dict[tuple[float, float], float] = {}

    def error(ratio: float, balance: float) -> float:
        if (ratio, balance) not in seen:
            scale = _scale(x, w, ratio, balance)
            seen[ratio, balance] = sum(
                _error(layer, moment, scale, xp) for layer, moment in zip(layers, moments, strict=True)
            )
        return seen[ratio, balance]

    for ratio in _RATIOS:
        error(ratio, 0.0)
        error(ratio, ratio)
    for step in _NEARER:
        ratio, balance = min(seen, key=lambda key: seen[key])
        for near in (ratio - step, ratio + step):
            if 0 <= near <= 1:
                error(near, near if balance else 0.0)
                if ratio == 0:
                    error(near, near)
    ratio, balance = min(seen, key=lambda key: seen[key])
    return AwqScale(
        scale=_scale(x, w, ratio, balance),
        ratio=ratio,
        balance=balance,
        error=seen[ratio, balance],
        error_unscaled=seen[0.0, 0.0],
    )


def _magnitude(layers: Sequence[Layer], channels: int) -> NDArray[np.float64]:
    """The root mean square of every channel: over all its kernel elements, and all layers."""
    squares = [
        layer.input_channels(layer.gram.importance, channels).mean(axis=1)
        for layer in layers
        if layer.gram is not None
    ]
    found: NDArray[np.float64] = np.sqrt(np.mean(squares, axis=0))
    return found


def _scale(
    x: NDArray[np.float64], w: NDArray[np.float64], ratio: float, balance: float
) -> NDArray[np.float64]:
    if ratio == 0:
        return np.ones_like(x)
    grown = np.maximum(x, _LEAST * max(x.max(), 1e-30)) ** ratio
    shrunk = np.maximum(w, _LEAST * max(w.max(), 1e-30)) ** balance
    scale = grown / shrunk
    found: NDArray[np.float64] = scale / np.sqrt(scale.max() * scale.min())
    return found


def _error(layer: Layer, moment: Any, scale: NDArray[np.float64], xp: ModuleType) -> float:
    factor = layer.along_inputs(scale)
    scaled = layer.columns * factor
    assert layer.gram is not None
    importance = layer.gram.importance[:, :, None] / np.square(factor, dtype=np.float64)
    rounded = _rounded(layer, scaled, importance.astype(np.float32), xp)
    change = (rounded - xp.asarray(scaled)) / xp.asarray(factor)
    return float(output_error(change, moment).sum())


def _rounded(
    layer: Layer, columns: NDArray[np.float32], importance: NDArray[np.float32], xp: ModuleType
) -> Any:
    """Round a scaled weight to nearest, with scales good enough to compare others by."""
    spec, shape = layer.spec, layer.w.shape
    rows = rows_per_scale(spec, shape, layer.layout)
    if rows is None or not spec.symmetric:
        w = layer.layout.weight(columns, shape)
        h = layer.layout.importance(importance[:, :, 0], shape)
        qparams = weight_qparams(w.astype(np.float32), spec, importance=h, name=layer.name)
        rounded = fake_quantize(w.astype(np.float32), qparams, spec)
        return xp.asarray(np.ascontiguousarray(layer.layout.columns(rounded)))
    fmt = spec.format
    groups, size, n = columns.shape
    filled = np.pad(columns, [(0, 0), (0, -size % rows), (0, 0)])
    blocks = xp.asarray(filled.reshape(groups, -1, rows, n))
    counts = np.pad(importance, [(0, 0), (0, -size % rows), (0, 0)]).reshape(groups, -1, rows, 1)
    h = xp.asarray(counts)
    amax = xp.abs(blocks).max(axis=2, keepdims=True)
    base = xp.where(amax > 0, amax, 1) / np.float32(fmt.symmetric_max)
    best, least = blocks, None
    for clip in _CLIPS:
        step = base * np.float32(clip)
        ratio = blocks / step
        if fmt.kind == "float":
            tried = nearest_values(ratio, fmt) * step
        else:
            tried = xp.clip(xp.rint(ratio), fmt.min - fmt.middle, fmt.max - fmt.middle) * step
        error = (h * xp.square(tried - blocks)).sum(axis=2, keepdims=True)
        if least is None:
            best, least = tried, error
        else:
            best = xp.where(error < least, tried, best)
            least = xp.minimum(error, least)
    return best.reshape(groups, -1, n)[:, :size]

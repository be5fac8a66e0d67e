"""SmoothQuant: move what is hard to quantize from activations to weights, channel by channel."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quantkit.calibrators.layer import Layer, tied, weight_amax
from quantkit.calibrators.output_error import output_error
from quantkit.calibrators.weight_scales import weight_qparams
from quantkit.errors import SpecError
from quantkit.formats import QuantSpec, Range, fake_quantize, qparams_from_range
from quantkit.statistics import ChannelStats

# Least scale, as published: channels that are zero stay as they are.
_LEAST = 1e-5
# Not to 1, though the error on what calibration saw falls up to there: the largest value of every channel would lie on
# the edge of the range, and whatever is larger in new data is clipped, in all of them. On a small Llama 0.7 and 0.8
# gave a KL of 4.8 milli-nats, 0.5 gave 5.6, and 1 gave 5.7.
ALPHAS = tuple(float(alpha) for alpha in np.arange(0, 17) / 20)


def smooth_scale(
    stats: ChannelStats, layers: Sequence[Layer], alpha: float = 0.5, *, ties: Sequence[int] | None = None
) -> NDArray[np.float64]:
    """Return s = max|X_j|^α / max|W_j|^(1−α) of every channel, float64 (arXiv 2211.10438, section 4.1).

    max|W_j| is taken over all layers that read the tensor. Channels without input or without weight have s = 1.

    Args:
        stats: the tensor's statistics.
        layers: those that read it.
        alpha: how much of the difficulty moves: 0 none of it, 1 all. 0.5 in the paper, 0.85 for Llama-2.
        ties: for every channel the first that must have the same scale.

    Raises:
        SpecError: alpha is not in [0, 1], or the statistics are not those of this input, or not finite.
    """
    if not 0 <= alpha <= 1:
        raise SpecError(f"smoothquant: alpha {alpha}; give a number from 0 to 1, or auto.")
    if stats.count == 0 or not np.isfinite(stats.amax).all():
        raise SpecError(
            f"{layers[0].name}: its input was never seen, or holds NaN or infinity; keep it in float."
        )
    x, w = tied(stats.amax, ties), tied(weight_amax(layers, stats.amax.size), ties)
    scale = np.maximum(x, _LEAST) ** alpha / np.maximum(w, _LEAST) ** (1 - alpha)
    return np.where((x > 0) & (w > 0), np.maximum(scale, _LEAST), 1.0)


def best_smooth_scale(
    stats: ChannelStats,
    layers: Sequence[Layer],
    activation: QuantSpec,
    *,
    ties: Sequence[int] | None = None,
    alphas: Sequence[float] = ALPHAS,
) -> tuple[NDArray[np.float64], float]:
    """Return the smoothing scale of the least error of the layers' outputs, and its α (`--alpha auto`).

    The error is that of the weights, exact from the Gram matrices, plus that of the activation: quantized per tensor
    to the smoothed minimum and maximum, every channel gets noise of step² / 12, or loses itself where that is less,

        Σ_layers [ tr(ΔW G' ΔWᵀ) + Σ_j min(step² / 12, E[x'_j²]) · ‖W'_j‖² ],   x' = x / s, W' = W · diag(s).

    Args:
        stats, layers, ties: as for `smooth_scale`; every layer with its Gram matrix.
        activation: how the tensor is quantized; per tensor.
        alphas: those to try; of equal ones the first.

    Raises:
        SpecError: as `smooth_scale`, or a layer has no Gram matrix.
    """
    best: tuple[float, NDArray[np.float64], float] | None = None
    for alpha in alphas:
        scale = smooth_scale(stats, layers, alpha, ties=ties)
        error = _error(stats, layers, activation, scale)
        if best is None or error < best[0]:
            best = error, scale, alpha
    if best is None:
        raise SpecError("smoothquant: no alpha to try; give at least one.")
    return best[1], best[2]


def smoothed_range(stats: ChannelStats, scale: NDArray[np.floating]) -> Range:
    """Return the range of a tensor once its channels are divided: all that channel statistics can tell of it."""
    return Range(float((stats.min / scale).min()), float((stats.max / scale).max()))


def _error(
    stats: ChannelStats, layers: Sequence[Layer], activation: QuantSpec, scale: NDArray[np.float64]
) -> float:
    qparams = qparams_from_range(smoothed_range(stats, scale), activation)
    step = float(qparams.scale)
    total = 0.0
    for layer in layers:
        if layer.gram is None:
            raise SpecError(
                f"{layer.name}: --alpha auto needs its Gram matrix; collect it, or give a number."
            )
        factor = layer.along_inputs(scale)
        columns = layer.columns * factor
        gram = layer.gram.divided(factor[:, :, 0])
        w = layer.layout.weight(columns, layer.w.shape).astype(np.float32)
        rounded = fake_quantize(w, weight_qparams(w, layer.spec, method="amax", name=layer.name), layer.spec)
        change = layer.layout.columns(rounded).astype(np.float32) - columns
        total += float(output_error(change, gram.second_moment).sum())
        noise = np.minimum(step * step / 12, gram.importance)
        total += float((noise[:, :, None] * np.square(columns, dtype=np.float64)).sum())
    return total

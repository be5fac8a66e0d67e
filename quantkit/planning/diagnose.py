"""What a plan's own numbers say about it, before any data is run."""

from collections.abc import Mapping

import numpy as np

from quantkit.formats import QParams, QuantSpec, Range, fake_quantize, qparams_from_range
from quantkit.planning.methods import protecting_parts
from quantkit.planning.plan import Plan
from quantkit.statistics import FloatHistogram

# Clipping that loses this much against the whole observed range is worth a word.
_WORTH_A_WORD_DB = 6.0
# What usually clips less; the first two that are not the method taken are named.
_CLIP_LESS = ("mse", "percentile", "minmax")


def expected_sqnr_db(histogram: FloatHistogram, qparams: QParams, spec: QuantSpec) -> float:
    """Return 10·log10(Σ x² / Σ (x − x̂)²) over a histogram, each value at the middle of its bin.

    Infinite where nothing is lost, as of a tensor that is zero throughout.
    """
    bins = histogram.bins()
    values = bins.centers
    lost = fake_quantize(values.astype(np.float32), qparams, spec).astype(np.float64) - values
    signal, noise = float(bins.counts @ values**2), float(bins.counts @ lost**2)
    return float("inf") if noise == 0 else 10 * float(np.log10(signal / noise))


def clipping_warnings(plan: Plan, histograms: Mapping[str, FloatHistogram]) -> list[str]:
    """Return a line if the method clips tensors by more than finer steps win back; KL does, of heavy tails."""
    worst: tuple[float, str, float, float] | None = None
    count = 0
    for activation in plan.activations.values():
        if activation.qparams is None or activation.name not in histograms:
            continue
        name = activation.name
        histogram = histograms[name]
        whole = qparams_from_range(Range(histogram.min, histogram.max), activation.spec)
        kept = expected_sqnr_db(histogram, whole, activation.spec)
        chosen = expected_sqnr_db(histogram, activation.qparams, activation.spec)
        loss = kept - chosen
        if np.isfinite(loss) and loss >= _WORTH_A_WORD_DB:
            count += 1
            if worst is None or loss > worst[0]:
                worst = (loss, name, chosen, kept)
    if worst is None:
        return []
    _, name, chosen, kept = worst
    taken, rest = plan.method.split("+"), protecting_parts(plan.method)
    others = " or ".join(["+".join([*rest, method]) for method in _CLIP_LESS if method not in taken][:2])
    tensors = "1 tensor" if count == 1 else f"{count} tensors"
    return [
        f"{plan.method} clips {tensors} by more than finer steps win back (worst {name}: {chosen:.1f} dB, where its "
        f"whole range has {kept:.1f}); compare with --method {others}: no new calibration is needed"
    ]

"""How far a quantized model's values are from the float model's, gathered batch by batch.

Everything is a sum, so memory does not grow with the number of samples, and a batch is worked on in chunks,
so that a language model's logits never stand in memory twice.

Values that are not finite. −inf is legal (a masked logit), so what is equal in both models is left out of the
sums and spoils nothing. Where only the float model's value is infinite, the quantized one was saturated: it
is left out too. Where the float value is finite and the quantized one is not, or the two are not finite in
different ways, the quantized model is broken: the noise is infinite, and `broken_count` says at how many
places.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.data.labels import check_labels
from quantkit.errors import DataError
from quantkit.metrics.classes import ClassSums

# Elements worked on at a time: a few float64 copies of a chunk stay below 10 MB.
_CHUNK = 1 << 17


@dataclass(frozen=True, kw_only=True)
class OutputMetrics:
    """What one output of a quantized model lost; None where a measure has no meaning for that output.

    Attributes:
        sqnr_db: 10·log10(Σ ref² / Σ (q − ref)²) over all elements; inf where the two are identical.
        cosine: Σ ref·q / √(Σ ref² · Σ q²) over all elements.
        top1_agreement: fraction of rows whose largest element is at the same place in both.
        kl_mnat: mean over rows of KL(softmax(ref) ‖ softmax(q)) in milli-nats.
        accuracy_float, accuracy_quantized: fraction of labelled rows whose largest element is at the label.
        perplexity_float, perplexity_quantized: exp of the mean cross-entropy of the labels (next tokens).
        broken_count: elements that are not finite in the quantized model, and not so in the float model.
    """

    sqnr_db: float | None
    cosine: float | None
    top1_agreement: float | None = None
    kl_mnat: float | None = None
    accuracy_float: float | None = None
    accuracy_quantized: float | None = None
    perplexity_float: float | None = None
    perplexity_quantized: float | None = None
    broken_count: int = 0


class SignalToNoise:
    """SQNR and cosine of a tensor, from Σ ref², Σ q², Σ ref·q and Σ (q − ref)² in float64.

    Σ (q − ref)² is a sum of its own: taken from the other three it would drown in their rounding.
    """

    def __init__(self) -> None:
        self.count = 0
        self.broken_count = 0
        self._reference = 0.0
        self._quantized = 0.0
        self._product = 0.0
        self._noise = 0.0

    def update(self, reference: NDArray[Any], quantized: NDArray[Any]) -> None:
        """Take in one tensor of both models; real numbers of any type and one shape.

        Raises:
            DataError: the shapes differ.
        """
        _check_shapes(reference, quantized)
        ref, quant = reference.reshape(-1), quantized.reshape(-1)
        for start in range(0, ref.size, _CHUNK):
            self._update_chunk(
                ref[start : start + _CHUNK].astype(np.float64),
                quant[start : start + _CHUNK].astype(np.float64),
            )

    def _update_chunk(self, ref: NDArray[np.float64], quant: NDArray[np.float64]) -> None:
        self.count += ref.size
        with np.errstate(invalid="ignore"):
            noise = quant - ref
        if not np.isfinite(noise).all():
            finite = np.isfinite(ref) & np.isfinite(quant)
            self.broken_count += int(np.count_nonzero(_broken(ref, quant)))
            ref, quant, noise = ref[finite], quant[finite], noise[finite]
        self._reference += _dot(ref, ref)
        self._quantized += _dot(quant, quant)
        self._product += _dot(ref, quant)
        self._noise += _dot(noise, noise)

    @property
    def sqnr_db(self) -> float | None:
        """10·log10(Σ ref² / Σ (q − ref)²) in dB, None before any element.

        inf when identical, −inf when broken or when there is noise without a signal.
        """
        if self.count == 0:
            return None
        if self.broken_count:
            return -math.inf
        if self._noise == 0:
            return math.inf
        return 10 * math.log10(self._reference / self._noise) if self._reference else -math.inf

    @property
    def cosine(self) -> float | None:
        """Σ ref·q / √(Σ ref² · Σ q²), None before any element.

        1 when both tensors are zero, 0 when one of them is, NaN when broken.
        """
        if self.count == 0:
            return None
        if self.broken_count:
            return math.nan
        if self._reference == 0 or self._quantized == 0:
            return 1.0 if self._reference == self._quantized else 0.0
        return max(-1.0, min(1.0, self._product / (math.sqrt(self._reference) * math.sqrt(self._quantized))))


class OutputComparison:
    """All measures of one output, batch by batch.

    The last axis is taken for classes (or the vocabulary) when the output has rank 2 or 3 and two classes or
    more, or when labels come with it; other outputs (boxes, images, integers) get SQNR and cosine only.
    """

    def __init__(self, name: str = "output") -> None:
        self.name = name
        self._signal = SignalToNoise()
        self._classes = ClassSums()
        self._are_tokens = False

    def update(
        self, reference: NDArray[Any], quantized: NDArray[Any], labels: NDArray[Any] | None = None
    ) -> None:
        """Take in one batch of both models.

        Args:
            reference: the float model's output, shape (..., classes).
            quantized: the quantized model's, of the same shape.
            labels: integers of shape (...): the right class, or the next token where the output has rank 3.
                −100 is ignored, as by PyTorch.

        Raises:
            DataError: the shapes do not fit, or a label is no class.
        """
        _check_shapes(reference, quantized, self.name)
        if labels is not None:
            self._check_labels(reference, labels)
        self._signal.update(reference, quantized)
        has_classes = (
            reference.ndim in (2, 3) and reference.shape[-1] > 1 and reference.dtype.kind not in "biu"
        )
        if reference.size == 0 or not (has_classes or labels is not None):
            return
        self._are_tokens = reference.ndim == 3
        self._classes.update(reference, quantized, labels)

    @property
    def sqnr_db(self) -> float | None:
        """See `SignalToNoise.sqnr_db`."""
        return self._signal.sqnr_db

    def result(self) -> OutputMetrics:
        """Return what has been found so far."""
        found = self._classes
        tokens = self._are_tokens
        return OutputMetrics(
            sqnr_db=self._signal.sqnr_db,
            cosine=self._signal.cosine,
            top1_agreement=found.top1_agreement,
            kl_mnat=found.kl_mnat,
            accuracy_float=found.float_model.accuracy,
            accuracy_quantized=found.quantized_model.accuracy,
            perplexity_float=found.float_model.perplexity if tokens else None,
            perplexity_quantized=found.quantized_model.perplexity if tokens else None,
            broken_count=self._signal.broken_count,
        )

    def _check_labels(self, reference: NDArray[Any], labels: NDArray[Any]) -> None:
        wanted = reference.shape[:-1]
        if labels.dtype.kind not in "iu" or labels.shape != wanted or reference.ndim == 0:
            raise DataError(
                f"labels of {self.name}: {labels.dtype} of shape {labels.shape}, where the output of shape "
                f"{reference.shape} wants integers of shape {wanted}; give one label for every row."
            )
        check_labels(labels, f"labels of {self.name}")
        if labels.size and labels.max() >= reference.shape[-1]:
            raise DataError(
                f"labels of {self.name}: {labels.max()} is not among its {reference.shape[-1]} classes; "
                "count classes from 0, as the model does."
            )


def _dot(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    # Not a @ b: that wakes BLAS's threads for every chunk, and on a busy machine waits milliseconds for them.
    return float(np.einsum("i,i->", a, b))


def _broken(ref: NDArray[np.float64], quant: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where the quantized value is not finite and not what the reference is."""
    same = (ref == quant) | (np.isnan(ref) & np.isnan(quant))
    broken: NDArray[np.bool_] = ~np.isfinite(quant) & ~same
    return broken


def _check_shapes(reference: NDArray[Any], quantized: NDArray[Any], name: str = "outputs to compare") -> None:
    if reference.shape != quantized.shape:
        raise DataError(
            f"{name}: shape {reference.shape} in the float model, {quantized.shape} in the quantized one; "
            "compare models of the same outputs on the same data."
        )

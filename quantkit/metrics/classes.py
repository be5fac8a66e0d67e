"""Sums over rows of logits: same top-1, KL divergence, accuracy and perplexity of two models."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Elements worked on at a time: a few float64 copies of a chunk stay below 10 MB.
_CHUNK = 1 << 17


class LabelScore:
    """How well one model's logits meet the labels."""

    def __init__(self) -> None:
        self.count = 0
        self._right = 0
        self._nats = 0.0

    def update(
        self, logits: NDArray[np.float64], log_softmax: NDArray[np.float64], labels: NDArray[np.int64]
    ) -> None:
        """Take in rows, shape (rows, classes), and their labels, shape (rows,)."""
        chosen = log_softmax[np.arange(labels.size), labels]
        undefined = np.isnan(chosen)
        self.count += labels.size
        # A row without a distribution is wrong, however its NaN compares.
        self._right += int(np.count_nonzero((logits.argmax(axis=1) == labels) & ~undefined))
        self._nats += float(np.where(undefined, np.inf, -chosen).sum())

    @property
    def accuracy(self) -> float | None:
        """Fraction of rows whose largest element is at the label; None without labels."""
        return self._right / self.count if self.count else None

    @property
    def perplexity(self) -> float | None:
        """exp of the mean cross-entropy of the labels; None without labels."""
        if not self.count:
            return None
        nats = self._nats / self.count
        # math.exp raises above 709.78 instead of saying inf.
        return math.exp(nats) if nats < 709 else math.inf


class ClassSums:
    """What two models say of the same rows, and of their labels.

    A row counts where the float model gives a distribution (no NaN, no +inf, not all −inf). If the quantized
    model then gives none, the row disagrees and its KL is infinite.
    """

    def __init__(self) -> None:
        self.count = 0
        self.float_model = LabelScore()
        self.quantized_model = LabelScore()
        self._agreeing = 0
        self._kl = 0.0

    def update(self, reference: NDArray[Any], quantized: NDArray[Any], labels: NDArray[Any] | None) -> None:
        """Take in logits of shape (..., classes), and labels of shape (...); negative ones are left out."""
        classes = reference.shape[-1]
        refs, quants = reference.reshape(-1, classes), quantized.reshape(-1, classes)
        step = max(_CHUNK // classes, 1)
        for start in range(0, refs.shape[0], step):
            part = slice(start, start + step)
            ref, quant = refs[part].astype(np.float64), quants[part].astype(np.float64)
            log_p, log_q = _log_softmax(ref), _log_softmax(quant)
            self._compare(ref, quant, log_p, log_q)
            if labels is not None:
                label = labels.reshape(-1)[part]
                kept = label >= 0
                label = label[kept].astype(np.int64)
                self.float_model.update(ref[kept], log_p[kept], label)
                self.quantized_model.update(quant[kept], log_q[kept], label)

    def _compare(
        self,
        ref: NDArray[np.float64],
        quant: NDArray[np.float64],
        log_p: NDArray[np.float64],
        log_q: NDArray[np.float64],
    ) -> None:
        defined, lost = ~np.isnan(log_p[:, 0]), np.isnan(log_q[:, 0])
        self.count += int(np.count_nonzero(defined))
        agreeing = (ref.argmax(axis=1) == quant.argmax(axis=1)) & defined & ~lost
        self._agreeing += int(np.count_nonzero(agreeing))
        p = np.exp(log_p)
        # 0 · log 0 is 0: a masked class costs nothing.
        difference = np.subtract(log_p, log_q, out=np.zeros_like(p), where=p > 0)
        kl = np.where(lost, np.inf, (p * difference).sum(axis=1))
        # Rounding may leave a row of two equal distributions just below 0.
        self._kl += float(np.maximum(kl, 0)[defined].sum())

    @property
    def top1_agreement(self) -> float | None:
        """Fraction of rows whose largest element is at the same place in both; None before any row."""
        return self._agreeing / self.count if self.count else None

    @property
    def kl_mnat(self) -> float | None:
        """Mean of KL(softmax(ref) ‖ softmax(q)) in milli-nats; None before any row."""
        return 1000 * self._kl / self.count if self.count else None


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """log softmax over the last axis; a row that has NaN or +inf, or nothing but −inf, becomes NaN."""
    top = logits.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        shifted = logits - top
        shifted[~np.isfinite(top[:, 0])] = np.nan
        result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result

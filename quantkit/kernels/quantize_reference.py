"""The NumPy oracle of quantize.cu: a norm in the kernel's order of additions, then `quantkit.formats`."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quantkit.formats.qparams import QParams, dynamic_qparams
from quantkit.formats.quantize import QTensor, quantize
from quantkit.formats.spec import QuantSpec
from quantkit.kernels.quantize_launch import CHUNK

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class NormReference:
    """A norm over the last axis, with weights of one a column or None."""

    kind: Literal["rms", "layer"]
    weight: Floats | None = None
    bias: Floats | None = None
    epsilon: float = 1e-5


def quantize_reference(
    x: NDArray[np.generic],
    spec: QuantSpec,
    qparams: QParams | None = None,
    *,
    global_scale: NDArray[np.float32] | None = None,
    norm: NormReference | None = None,
    multiplier: Floats | None = None,
    row_threads: int = 32,
) -> QTensor:
    """Return the codes of norm(x) · multiplier, x a matrix; every operation rounds to float32.

    qparams: of a fixed scale; computed from the values where `spec` is dynamic. row_threads: that of the launch.
    """
    y: Floats = np.asarray(x).astype(np.float32)
    if norm is not None:
        y = _normed(y, norm, row_threads)
    if multiplier is not None:
        y = y * multiplier
    return quantize(y, qparams or dynamic_qparams(y, spec, global_scale=global_scale), spec)


def _normed(x: Floats, norm: NormReference, row_threads: int) -> Floats:
    """Return (x − mean) / sqrt(var + ε) · weight + bias, or x / sqrt(mean(x²) + ε) · weight.

    1 / sqrt is rounded before it is multiplied.
    """
    if norm.kind == "layer":
        x = x - row_means(x, row_threads)
    inverse = np.float32(1) / np.sqrt(row_means(x * x, row_threads) + np.float32(norm.epsilon))
    y: Floats = x * inverse
    if norm.weight is not None:
        y = y * norm.weight
    if norm.bias is not None:
        y = y + norm.bias
    return y


def row_means(terms: Floats, row_threads: int) -> Floats:
    """Return each row's sum over its number of elements, [rows, 1], added in the order of the kernel.

    Eight neighbours pairwise; a thread's chunks one after the other; the threads of a warp, and then the warps, by
    butterflies.
    """
    rows, columns = terms.shape
    length = -(-columns // (CHUNK * row_threads)) * CHUNK * row_threads
    padded = np.zeros((rows, length), np.float32)
    padded[:, :columns] = terms
    chunks = padded.reshape(rows, -1, row_threads, CHUNK)
    for _ in range(3):
        chunks = chunks[..., 0::2] + chunks[..., 1::2]
    threads = np.zeros((rows, row_threads), np.float32)
    for i in range(chunks.shape[1]):
        threads = threads + chunks[:, i, :, 0]
    lanes = threads.reshape(rows, -1, min(row_threads, 32))
    total = _butterfly(_butterfly(lanes)[..., 0])
    mean: Floats = total / np.float32(columns)
    return mean


def _butterfly(parts: Floats) -> Floats:
    """Return sums over the last axis, [..., 1], halves added to halves."""
    while parts.shape[-1] > 1:
        half = parts.shape[-1] // 2
        parts = parts[..., :half] + parts[..., half:]
    return parts

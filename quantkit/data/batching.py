"""Samples into batches, and the fingerprint by which a sample is known again."""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from quantkit.data.inputs import InputSpec, Sample, batch_axes, fixed_batch_size
from quantkit.errors import DataError

# Bytes of the pieces that a fingerprint folds.
_PIECE = 1 << 16
# 2^64 / the golden ratio: its bits follow no pattern, and it has an inverse.
_ODD = np.uint64(0x9E3779B97F4A7C15)


def batches(source: Iterable[Sample], inputs: Sequence[InputSpec], batch_size: int) -> Iterator[Sample]:
    """Stack consecutive samples, up to `batch_size`, along each input's batch axis.

    Samples of different shapes, or with different values of an input without a batch axis, are not stacked:
    the order is kept and a new batch begins. A model with a fixed batch size gets exactly that many at a
    time, whatever `batch_size` is; samples that do not fill a batch are left out with a warning.

    Raises:
        DataError: `batch_size` < 1, or not one batch of a fixed size is filled.
    """
    if batch_size < 1:
        raise DataError(f"batch size {batch_size}: a batch holds at least one sample; give a number ≥ 1.")
    axes, fixed = batch_axes(inputs), fixed_batch_size(inputs)
    size = fixed or (batch_size if any(a is not None for a in axes.values()) else 1)
    filled = left_out = 0
    for group in _groups(source, axes, size):
        if fixed is not None and len(group) < fixed:
            left_out += len(group)
            continue
        filled += 1
        yield _stack(group, axes)
    if left_out == 0:
        return
    if filled == 0:
        raise DataError(
            f"{left_out} samples: the model takes exactly {fixed} of one shape at a time, and no batch is "
            f"full; give at least {fixed}, or a model with a free batch dimension."
        )
    warnings.warn(
        f"{left_out} samples were left out: the model takes exactly {fixed} of one shape at a time.",
        stacklevel=2,
    )


def peek(source: Iterable[Sample]) -> tuple[Sample, Iterator[Sample]]:
    """Return the first sample, and all of them from the start: a source is gone through only once.

    Raises:
        DataError: there is none.
    """
    samples = iter(source)
    first = next(samples, None)
    if first is None:
        raise DataError("data: no samples; give real inputs of the model, at least one.")
    return first, chain([first], samples)


def batch_length(batch: Sample, axes: dict[str, int | None]) -> int:
    """Return the number of samples in a batch, `axes` being the model's `batch_axes`."""
    return next((batch[name].shape[axis] for name, axis in axes.items() if axis is not None), 1)


def fill_batch(sample: Sample, inputs: Sequence[InputSpec]) -> Sample:
    """Return a batch that the model takes: the sample, repeated where the model's batch size is fixed."""
    size = fixed_batch_size(inputs)
    if size is None:
        return sample
    axes = batch_axes(inputs)
    return {
        name: array if axes[name] is None else np.repeat(array, size, axis=axes[name])
        for name, array in sample.items()
    }


def sample_fingerprint(sample: Sample) -> bytes:
    """Return 8 bytes by which a sample is known again.

    They are the first of SHA-256 over the names, types, shapes and contents of its arrays. Of the contents,
    whole pieces of 64 KiB are folded into one before (`_fold`): SHA-256 alone takes a tenth of what running
    a network on them takes.
    """
    digest = hashlib.sha256()
    for name in sorted(sample):
        array = np.ascontiguousarray(sample[name])
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        # ascontiguousarray makes scalars one-dimensional: the shape is that of the sample's own.
        digest.update(repr((name, array.dtype.name, sample[name].shape)).encode())
        if array.dtype.hasobject:
            digest.update(repr(array.tolist()).encode())
        else:
            content = array.reshape(-1).view(np.uint8)
            whole = content.size - content.size % _PIECE
            digest.update(_fold(content[:whole]).data)
            digest.update(content[whole:].data)
    return digest.digest()[:8]


def _fold(content: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Fold pieces into one, each of its 8-byte words w apart: h ← (h ⊕ h >> 32) · 0x9E3779B97F4A7C15 + w mod 2⁶⁴.

    A step loses nothing of h or of w, so words that differ in one piece alone never meet; the shift spreads the
    upper bits, where a product keeps the sign of a float.
    """
    folded = np.zeros(_PIECE // 8 if content.size else 0, np.uint64)
    shifted = np.empty_like(folded)
    for piece in content.view("<u8").reshape(-1, _PIECE // 8):
        np.right_shift(folded, 32, out=shifted)
        np.bitwise_xor(folded, shifted, out=folded)
        np.multiply(folded, _ODD, out=folded)
        np.add(folded, piece, out=folded)
    return folded.astype("<u8", copy=False).view(np.uint8)


def _groups(source: Iterable[Sample], axes: dict[str, int | None], size: int) -> Iterator[list[Sample]]:
    group: list[Sample] = []
    for sample in source:
        if group and not _stackable(group[0], sample, axes):
            yield group
            group = []
        group.append(sample)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _stackable(a: Sample, b: Sample, axes: dict[str, int | None]) -> bool:
    return all(
        a[name].shape == b[name].shape and (axis is not None or np.array_equal(a[name], b[name]))
        for name, axis in axes.items()
    )


def _stack(group: Sequence[Sample], axes: dict[str, int | None]) -> Sample:
    if len(group) == 1:
        return group[0]
    return {
        name: group[0][name] if axis is None else np.concatenate([s[name] for s in group], axis)
        for name, axis in axes.items()
    }

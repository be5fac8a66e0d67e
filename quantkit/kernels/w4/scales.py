"""Scales and zero points of four-bit weights: which a weight has, how they are stored, and in what order."""

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantkit.errors import KernelError
from quantkit.formats.format import E8M0, FP8_E4M3
from quantkit.formats.packing import code_bits
from quantkit.formats.quantize import QTensor
from quantkit.kernels.w4.form import BLOCK, Layout4

_PROMOTED = 128  # of K, that a product by e4m3 adds in the tensor core before it goes on in float32
INTEGER_SCALES = {"bfloat16": 2, "float16": 2, "float32": 4}  # bytes of one
_HELD = {name: np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for name in INTEGER_SCALES}


def granularity(weight: QTensor) -> tuple[int | None, NDArray[np.float32]]:
    """Return the group and the scales as [n, groups], as they are stored: without the global scale."""
    spec, scale = weight.spec, np.asarray(weight.qparams.scale, np.float32)
    n, k = weight.qvalue.shape
    if spec.block_size is not None and spec.axis in (1, -1):
        group = spec.block_size
        smallest = 16 if spec.format.name == "fp4_e2m1" else 32
        if group < k and (group < smallest or group & (group - 1)):
            raise KernelError(f"weight: groups of {group}; the kernel has powers of two from {smallest} on.")
        return (None if group >= k and spec.scale_format is None else group), scale.reshape(n, -1)
    if spec.block_size is not None or spec.block_shape is not None or spec.axis in (1, -1):
        raise KernelError(
            "weight: its scales are not those of rows; quantize along axis 1, in blocks, or axis 0."
        )
    return None, np.broadcast_to(scale.reshape(-1, 1), (n, 1))


def zero_points(weight: QTensor, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """Return zero points as the codes are stored, or None where all are the middle."""
    fmt, zero = weight.spec.format, weight.qparams.zero_point
    if fmt.kind == "float" or zero is None:
        return None
    found = np.broadcast_to(code_bits(zero, fmt).reshape(-1, shape[1] if zero.size > 1 else 1), shape)
    stored = found ^ np.uint8(8) if fmt.name == "int4" else found
    return None if np.all(stored == 8) else np.ascontiguousarray(stored)


def _checked(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.all(np.isfinite(rows)) or np.any(rows < 0):
        raise KernelError("weight: has scales that are negative or not finite; quantize it again.")
    return rows


def float_scales(
    weight: QTensor, rows: NDArray[np.float32], group: int | None, scale_type: str | None, *, zeros: bool
) -> tuple[Layout4, NDArray[Any] | None, NDArray[np.float32]]:
    """Return the layout, the scales as they are stored [n, groups], and the rows' factors."""
    rows = _checked(rows)
    n, k = weight.qvalue.shape
    name = weight.spec.format.name
    if group is None:
        held = weight.qparams.global_scale
        channel = rows[:, 0] * np.float32(1 if held is None else held)
        return Layout4(n=n, k=k, codes=name, group=None, scales="none", zeros=zeros), None, channel
    if scale_type is not None and scale_type not in INTEGER_SCALES:
        raise KernelError(f"scale_type {scale_type!r}; one of {', '.join(INTEGER_SCALES)}.")
    for candidate in [scale_type] if scale_type else list(INTEGER_SCALES):
        assert candidate is not None
        stored, channel = _normalized(rows, candidate)
        if np.array_equal(stored.astype(np.float32) * channel[:, None], rows):
            return Layout4(n=n, k=k, codes=name, group=group, scales=candidate, zeros=zeros), stored, channel
    raise KernelError(
        f"weight: {scale_type} does not hold its scales exactly; give another scale_type, or None."
    )


def _normalized(rows: NDArray[np.float32], name: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Return the scales in their type, the largest of a row in [1, 2), or fp16's last binade, and a factor a row."""
    _, exponent = np.frexp(rows.max(axis=1))  # largest = f · 2^exponent, 0.5 ≤ f < 1
    shift = exponent - (16 if name == "float16" else 1)
    shift = np.where(rows.max(axis=1) == 0, 0, np.clip(shift, -126, 127))
    channel = np.ldexp(np.float32(1), shift).astype(np.float32)
    with np.errstate(over="ignore"):
        return (rows.astype(np.float64) / channel[:, None].astype(np.float64)).astype(_HELD[name]), channel


def block_scales(
    weight: QTensor, rows: NDArray[np.float32], group: int
) -> tuple[Layout4, NDArray[Any] | None, NDArray[np.float32]]:
    """The same of NVFP4 and MXFP4."""
    n, k = weight.qvalue.shape
    form = weight.spec.scale_format
    rows = _checked(rows)
    if form == FP8_E4M3 and group == 16:
        found = rows.astype(ml_dtypes.float8_e4m3fn)
        if not np.array_equal(found.astype(np.float32), rows):
            raise KernelError("weight: its scales are no values of e4m3; quantize it again.")
        held = weight.qparams.global_scale
        channel = np.full(n, 1 if held is None else held, np.float32)
        layout = Layout4(n=n, k=k, codes="fp4_e2m1", group=16, scales="e4m3", zeros=False)
        return layout, _E4M3_CODES[found.view(np.uint8)], channel
    if form == E8M0 and group == 32:
        mantissa, exponent = np.frexp(rows)
        if not np.all(mantissa == 0.5):
            raise KernelError("weight: its scales are no powers of two; quantize it again.")
        largest = exponent.max(axis=1)
        held_exponents = np.maximum(exponent - largest[:, None] + 254, 0).astype(np.uint8)
        layout = Layout4(n=n, k=k, codes="fp4_e2m1", group=32, scales="e8m0", zeros=False)
        return layout, held_exponents, np.ldexp(np.float32(1), largest - 1).astype(np.float32)
    raise KernelError(
        f"weight: fp4_e2m1 in groups of {group} with scales of {form and form.name}; NVFP4 has 16 and fp8_e4m3, "
        "MXFP4 32 and e8m0."
    )


def two_levels(scale: NDArray[np.float32], largest: int = 16) -> NDArray[np.float32]:
    """Return the scales [n, groups] nearest to `scale` that are s · (a row's largest / `largest`), s whole and ≥ 1.

    With `largest` 16, (q − 8) · s fits an int8 for every code of four bits.
    """
    unit = scale.max(axis=1, keepdims=True) / np.float32(largest)
    return np.where(unit == 0, scale, np.maximum(np.rint(scale / np.where(unit == 0, 1, unit)), 1) * unit)


def whole_scales(
    layout: Layout4, rows: NDArray[np.float32], zero: NDArray[np.uint8] | None
) -> tuple[Layout4, NDArray[Any] | None, NDArray[np.float32]]:
    """The same for int8 activations: the smallest whole numbers that the scales of a row are in proportion to."""
    if layout.codes == "fp4_e2m1":
        raise KernelError(
            "weight: only fp4_e2m1 with scales of e8m0 (MXFP4) is multiplied by e4m3; pack it for 16 bits."
        )
    n, k = layout.n, layout.k
    whole = Layout4(
        n=n, k=k, codes=layout.codes, group=layout.group, scales="none" if layout.group is None else "uint8",
        zeros=layout.zeros, activation_bits=8,
    )  # fmt: skip
    if layout.group is None:
        return whole, None, rows[:, 0]
    largest = rows.max(axis=1, keepdims=True)
    held, units = np.ones(rows.shape, np.uint8), np.where(largest == 0, 0, np.float32(0))
    missing = np.ones(n, bool)
    for count in range(1, 17):
        unit = (largest / np.float32(count)).astype(np.float32)
        multiple = np.rint(rows / np.where(unit == 0, 1, unit)).astype(np.float32)
        fits = missing & np.all((multiple * unit == rows) & (multiple >= 1), axis=1)
        held[fits], units[fits], missing = multiple[fits].astype(np.uint8), unit[fits], missing & ~fits
    middle = 8 if zero is None else zero
    steps = held.astype(np.int64)
    beyond = (middle * steps > 128) | ((15 - middle) * steps > 127)
    if np.any(missing) or np.any(beyond):
        raise KernelError(
            "weight: its scales are not whole multiples, up to 16, of one number a row; make them so with two_levels "
            "and quantize again."
        )
    return whole, held, units[:, 0].astype(np.float32)


def promoted_scales(layout: Layout4) -> Layout4:
    """Return the layout of integers for e4m3 activations, whose sums are multiplied by the scales of groups.

    e4m3 holds every integer of four bits, and 128 of K are summed apart and added in float32 whatever the weight is:
    there a factor costs nothing.
    """
    if layout.zeros:
        raise KernelError(
            "weight: has zero points, which no product by e4m3 takes; quantize it symmetrically."
        )
    if layout.group is not None and layout.group < _PROMOTED:
        raise KernelError(
            f"weight: groups of {layout.group} by e4m3, whose sums of {_PROMOTED} are added at once; use groups of "
            f"{_PROMOTED}, or pack it for activations of 16 bits."
        )
    return replace(layout, activation_bits=8, promoted=True)


def _e4m3_codes() -> NDArray[np.uint8]:
    """Return for each e4m3 code ≥ 0 the kernel's: five bits of exponent + 22, three of mantissa, never subnormal."""
    values = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    mantissa, exponent = np.frexp(values)
    codes = np.zeros(256, np.uint8)
    codes[1:0x7F] = ((exponent[1:] - 1 + 22) << 3 | (mantissa[1:] * 16).astype(np.int64) & 7).astype(np.uint8)
    return codes


_E4M3_CODES = _e4m3_codes()


# e4m3 holds e2m1 codes times 2^-8 … 2^6: eight magnitudes from 2^-9 to 1.5 · 2^8. From 2^-5 on none is subnormal.
_E4M3_LOWEST, _E4M3_HIGHEST, _E4M3_NORMAL = -8, 6, -5


def rebased_scales(
    layout: Layout4, rows: NDArray[np.float32], nibbles: NDArray[np.uint8]
) -> tuple[Layout4, NDArray[np.uint8], NDArray[np.float32]]:
    """The same of MXFP4 for e4m3 activations: 8 + the power of two that a group's codes times it are e4m3 numbers with.

    A row's largest scale becomes 2^6, and the rest goes to the row's factor. Scales of groups that are all zero mean
    nothing, and are moved where others of the row can stay.
    """
    exponent = np.frexp(rows)[1] - 1
    n, groups = rows.shape
    padded = np.zeros((n, groups * 32), np.uint8)
    padded[:, : nibbles.shape[1]] = nibbles & np.uint8(7)
    counts = padded.reshape(n, groups, 32).any(axis=2)
    lowest = np.iinfo(np.int32).min
    largest = np.where(counts, exponent, lowest).max(axis=1)
    largest = np.where(largest == lowest, exponent.max(axis=1), largest)
    factor = np.maximum(largest - _E4M3_HIGHEST, -126)  # what float32 has without subnormals
    power = exponent - factor[:, None]
    power = np.where(counts, power, np.clip(power, _E4M3_NORMAL, _E4M3_HIGHEST))
    if np.any(power < _E4M3_LOWEST):
        row, group = np.argwhere(power < _E4M3_LOWEST)[0]
        raise KernelError(
            f"weight: row {row} has scales 2^{largest[row]} and 2^{exponent[row, group]}, too far apart for e4m3 "
            "(2^14 at most); pack it for activations of 16 bits."
        )
    rebased = replace(layout, activation_bits=8, deep=bool(np.any(power < _E4M3_NORMAL)))
    return (
        rebased,
        (power - _E4M3_LOWEST).astype(np.uint8),
        np.ldexp(np.float32(1), factor).astype(np.float32),
    )


def held_values(held: NDArray[Any], layout: Layout4) -> NDArray[np.float64]:
    """Return the values of scales as they are stored."""
    if layout.scales == "e4m3":
        value = np.ldexp(1 + (held & 7) / 8, (held >> 3).astype(np.int64) - 22)
        return np.where(held == 0, 0.0, value)
    if layout.scales == "e8m0" and layout.activation_bits == 8:
        return np.ldexp(1.0, held.astype(np.int64) + _E4M3_LOWEST)
    if layout.scales == "e8m0":
        return np.ldexp(1.0, held.astype(np.int64) - 254)
    return held.astype(np.float64)


# bf16 scales are stored times what the kernel multiplies codes by, for upper and for lower rows of a pair.
_STORED_TIMES = np.ldexp(np.float32(1), [126, 122]).reshape(2, 1, 1, 1)


def by_pairs(held: NDArray[Any], layout: Layout4) -> NDArray[np.uint8]:
    """[n, groups] to [sides, blocks, 32 pairs, bytes]: pair 8 warp + g has rows 16 warp + g and + 8, row by row."""
    padded = np.zeros((layout.blocks * BLOCK, layout.sides * layout.groups_in_slab), held.dtype)
    padded[: layout.n, : held.shape[1]] = held
    parts = padded.reshape(layout.blocks, 4, 2, 8, layout.sides, layout.groups_in_slab)
    if held.dtype == _HELD["bfloat16"] and not layout.promoted:
        parts = (parts.astype(np.float32) * _STORED_TIMES).astype(held.dtype)
    ordered = np.ascontiguousarray(parts.transpose(4, 0, 1, 3, 2, 5)).view(np.uint8)
    return into_fields(ordered, layout).reshape(layout.sides, layout.blocks, 32, -1)


# Where scales of eight bits begin in a half of a word, for activations of 16 bits: their exponents then stand where
# those of bf16 do.
_FIELDS = {"e4m3": 4, "e8m0": 7}


def into_fields(scales: NDArray[np.uint8], layout: Layout4) -> NDArray[np.uint8]:
    """Return scales of eight bits as w4_decode.h takes them from a word; others, and those for e4m3, as they are.

    Of four bytes the first and third go to their place in either half, and the others beside them: a turn by eight
    bits brings those to the same place.
    """
    at = None if layout.activation_bits == 8 else _FIELDS.get(layout.scales)
    if at is None:
        return scales
    four = scales.reshape(-1, 4).astype(np.uint32)
    even, odd = ((four[:, i] | four[:, i + 2] << np.uint32(16)) << np.uint32(at) for i in (0, 1))
    turned = odd << np.uint32(8) | odd >> np.uint32(24)
    return (even | turned).view(np.uint8).reshape(scales.shape)


def _from_fields(scales: NDArray[np.uint8], layout: Layout4) -> NDArray[np.uint8]:
    """Undo `into_fields`."""
    at = None if layout.activation_bits == 8 else _FIELDS.get(layout.scales)
    if at is None:
        return scales
    word = np.ascontiguousarray(scales).view(np.uint32).reshape(-1)
    turned = word >> np.uint32(8) | word << np.uint32(24)
    four = [x >> np.uint32(at + half) & np.uint32(255) for half in (0, 16) for x in (word, turned)]
    return np.stack(four, axis=-1).astype(np.uint8).reshape(scales.shape)


def from_pairs(scales: NDArray[np.uint8], layout: Layout4) -> NDArray[Any]:
    """Undo `by_pairs`."""
    held = _from_fields(scales, layout).reshape(-1).view(_HELD.get(layout.scales, np.dtype(np.uint8)))
    parts = held.reshape(layout.sides, layout.blocks, 4, 8, 2, layout.groups_in_slab).transpose(
        1, 2, 4, 3, 0, 5
    )
    if layout.scales == "bfloat16" and not layout.promoted:
        parts = (parts.astype(np.float32) / _STORED_TIMES).astype(held.dtype)
    padded = parts.reshape(layout.blocks * BLOCK, -1)
    assert layout.group is not None
    return padded[: layout.n, : -(-layout.k // layout.group)]


def zeros_by_pairs(zero: NDArray[np.uint8], layout: Layout4) -> NDArray[np.uint8]:
    """[n, groups] to [sides, blocks, 32 pairs, groups in a slab]: the upper row's in the low nibble."""
    bare = by_pairs(zero, layout).reshape(layout.sides, layout.blocks, 32, 2, layout.groups_in_slab)
    both: NDArray[np.uint8] = bare[..., 0, :] | bare[..., 1, :] << np.uint8(4)
    return both


def zeros_from_pairs(zeros: NDArray[np.uint8], layout: Layout4) -> NDArray[np.uint8]:
    """Undo `zeros_by_pairs`."""
    both = np.stack([zeros & 15, zeros >> 4], axis=-2)
    parts = both.reshape(layout.sides, layout.blocks, 4, 8, 2, layout.groups_in_slab)
    padded = parts.transpose(1, 2, 4, 3, 0, 5).reshape(layout.blocks * BLOCK, -1)
    groups = 1 if layout.group is None else -(-layout.k // layout.group)
    return np.ascontiguousarray(padded[: layout.n, :groups])

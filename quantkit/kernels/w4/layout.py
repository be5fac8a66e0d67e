"""How weights of four bits lie in memory: codes in the order of the kernels' registers, scales by pairs of rows.

K is cut into slabs (as much as 128 bytes of activations hold: 64, or 128 for int8), rows into blocks of 64; both are
filled up at the end. For each slab and block a thread of a warpgroup has 16 or 32 bytes: the codes that it multiplies,
in the order in which it decodes them. All of it is a permutation and can be undone. Scales keep every bit that they
have, less a power of two for each row.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantkit.errors import KernelError
from quantkit.formats.format import E8M0, FP8_E4M3
from quantkit.formats.packing import code_bits
from quantkit.formats.quantize import QTensor

BLOCK = 64  # rows

INTEGER_SCALES = {"bfloat16": 2, "float16": 2, "float32": 4}  # bytes of one
_INTEGERS = ("int4", "uint4")
_HELD = {name: np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for name in INTEGER_SCALES}


@dataclass(frozen=True, kw_only=True)
class Layout4:
    """What a packed weight is made of.

    Attributes:
        n, k: rows, and columns along which products are summed.
        codes: int4 (stored as q + 8), uint4 or fp4_e2m1.
        group: columns that share a scale, a power of two from 16 on; None where a row has one.
        scales: none (a row has one, kept apart), bfloat16, float16, float32, e4m3, e8m0, or uint8 for int8 activations.
        zeros: whether there are zero points.
        activation_bits: 16, or 8 for int8 activations.
    """

    n: int
    k: int
    codes: str
    group: int | None
    scales: str
    zeros: bool
    activation_bits: int = 16

    @property
    def slab(self) -> int:
        """Columns of a slab."""
        return 1024 // self.activation_bits

    @property
    def slabs(self) -> int:
        """Slabs of K."""
        return -(-self.k // self.slab)

    @property
    def blocks(self) -> int:
        """Blocks of rows."""
        return -(-self.n // BLOCK)

    @property
    def groups_in_slab(self) -> int:
        """Scales that a row has in a slab."""
        return 1 if self.group is None else max(1, self.slab // self.group)

    @property
    def sides(self) -> int:
        """Runs of scales along K: one a slab, or one a group of several slabs."""
        return 1 if self.group is None else -(-self.k // max(self.slab, self.group))


@dataclass(frozen=True, kw_only=True)
class Packed4:
    """A weight as the kernel reads it, on the host.

    Attributes:
        codes: uint8 [slabs, blocks, 2048], or 4096 for int8 activations.
        scales: uint8 [sides, blocks, 32 pairs of rows, 2 rows · scales in a slab · bytes of one]; None without groups.
        zeros: uint8 [sides, blocks, 32, scales in a slab], the upper row's in the low nibble; None without.
        channel_scale: float32 [n], what the sums of a row are multiplied by.
    """

    layout: Layout4
    codes: NDArray[np.uint8]
    scales: NDArray[np.uint8] | None
    zeros: NDArray[np.uint8] | None
    channel_scale: NDArray[np.float32]

    @property
    def size_bytes(self) -> int:
        """All bytes together."""
        return sum(
            part.nbytes
            for part in (self.codes, self.scales, self.zeros, self.channel_scale)
            if part is not None
        )


def pack4(weight: QTensor, *, scale_type: str | None = None, activation_bits: int = 16) -> Packed4:
    """Return `weight` [n, k] as the kernel reads it.

    Integers of 4 bits have one scale a row, or one for each `block_size` along axis 1 (a power of two from 32 on), with
    or without zero points; fp4_e2m1 is NVFP4 (block 16, e4m3), MXFP4 (block 32, e8m0), or has one scale a row.

    Args:
        weight: the quantized weight.
        scale_type: how an integer's group scales are stored: bfloat16, float16 or float32; None for the first of
            them that holds every scale exactly.
        activation_bits: 16, or 8 for int8 activations: integers whose group scales are whole multiples s of one number
            a row, such that every (q − zero) · s is an int8 (`two_levels` makes scales so).

    Raises:
        KernelError: not a matrix, or a format or granularity that the kernel has not; scales that are negative, not
            finite, or more than `scale_type` holds.
    """
    values, spec = weight.qvalue, weight.spec
    name = spec.format.name
    if name not in (*_INTEGERS, "fp4_e2m1"):
        raise KernelError(f"weight: {name} is no format of four bits; use int4, uint4 or fp4_e2m1.")
    if values.ndim != 2 or values.size == 0:
        raise KernelError(f"weight: shape {values.shape} is not a matrix; reshape it to (outputs, inputs).")
    group, rows = _granularity(weight)
    zero = _zero_points(weight, rows.shape)
    if name == "fp4_e2m1" and group is not None:
        layout, held, channel = _block_scales(weight, rows, group)
    else:
        layout, held, channel = _float_scales(weight, rows, group, scale_type, zeros=zero is not None)
    if activation_bits == 8:
        layout, held, channel = _whole_scales(layout, rows, zero)
    nibbles = code_bits(values, spec.format)
    if name == "int4":
        nibbles = nibbles ^ np.uint8(8)
    if layout.scales == "e4m3":
        # A code of the kernel's scales has no zero: the weights are made zero instead.
        nibbles = np.where(np.repeat(rows == 0, 16, axis=1)[:, : values.shape[1]], np.uint8(0), nibbles)
    scales = None if held is None else _by_pairs(held, layout)
    packed_zeros = None if zero is None else _zeros_by_pairs(zero, layout)
    return Packed4(
        layout=layout,
        codes=_by_registers(nibbles, layout),
        scales=scales,
        zeros=packed_zeros,
        channel_scale=channel,
    )


def unpack4(packed: Packed4) -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.uint8] | None]:
    """Return what was packed: bit patterns of the codes [n, k], scales [n, groups] in float64, zero points or None.

    Scales include the row's power of two, or NVFP4's global scale: code · scale is the weight's value.
    """
    layout = packed.layout
    nibbles = _from_registers(packed.codes, layout)
    if layout.codes == "int4":
        nibbles = nibbles ^ np.uint8(8)
    channel = packed.channel_scale.astype(np.float64)[:, None]
    scales = channel if packed.scales is None else held_scales(packed) * channel
    zeros = None
    if packed.zeros is not None:
        zeros = _zeros_from_pairs(packed.zeros, layout)
        zeros = zeros ^ np.uint8(8) if layout.codes == "int4" else zeros
    return nibbles, scales, zeros


def held_scales(packed: Packed4) -> NDArray[np.float64]:
    """Return the scales of groups [n, groups] as they are stored: without the rows' factors."""
    assert packed.scales is not None
    return _held_values(_from_pairs(packed.scales, packed.layout), packed.layout)


# ---- codes -------------------------------------------------------------------------------------------------------

# Shifts of register r's code, low half-word: integers lie nibble by nibble. Of e2m1 the sign comes to bit 15 and the
# magnitude to bits 8 … 6 by one shift; the fourth code fills the gaps.
_E2M1_SIGN = (15, 12, 9, 14)
_E2M1_HIGH = (8, 5, 2, 13)  # the upper exponent bit
_E2M1_LOW = (6, 3, 0, 10)  # the lower exponent bit and the mantissa


def _by_registers(nibbles: NDArray[np.uint8], layout: Layout4) -> NDArray[np.uint8]:
    padded = np.zeros((layout.blocks * BLOCK, layout.slabs * layout.slab), np.uint8)
    if layout.codes != "fp4_e2m1" and not layout.zeros:
        padded[:] = 8  # zero, so that nothing but zeros lies beyond the ends
    padded[: layout.n, : layout.k] = nibbles
    if layout.activation_bits == 8:
        return _by_byte_registers(padded, layout)
    # row = 64 block + 16 warp + 8 h + g, column = 64 slab + 16 word + 8 half + 2 t + e; register r = h + 2 half.
    parts = padded.reshape(layout.blocks, 4, 2, 8, layout.slabs, 4, 2, 4, 2)
    words = np.zeros((layout.slabs, layout.blocks, 4, 8, 4, 4), np.uint32)
    for h in range(2):
        for half in range(2):
            for e in range(2):
                code = parts[:, :, h, :, :, :, half, :, e].transpose(3, 0, 1, 2, 5, 4)
                words |= _placed(code, h + 2 * half, layout) << np.uint32(16 * e)
    return words.view(np.uint8).reshape(layout.slabs, layout.blocks, 2048)


def _by_byte_registers(padded: NDArray[np.uint8], layout: Layout4) -> NDArray[np.uint8]:
    # row = 64 block + 16 warp + 8 h + g, column = 128 slab + 64 plane + 32 odd + 16 half + 4 t + byte; register
    # r = h + 2 half lies in word 2 odd + half, in the low nibbles where h is 0.
    parts = padded.reshape(layout.blocks, 4, 2, 8, layout.slabs, 2, 2, 2, 4, 4)
    joined = parts[:, :, 0] | parts[:, :, 1] << np.uint8(4)
    return np.ascontiguousarray(joined.transpose(3, 0, 1, 4, 2, 7, 5, 6, 8)).reshape(
        layout.slabs, layout.blocks, 4096
    )


def _from_byte_registers(codes: NDArray[np.uint8], layout: Layout4) -> NDArray[np.uint8]:
    joined = codes.reshape(layout.slabs, layout.blocks, 4, 2, 8, 4, 2, 2, 4).transpose(
        1, 2, 4, 0, 3, 6, 7, 5, 8
    )
    parts = np.stack([joined & np.uint8(15), joined >> np.uint8(4)], axis=2)
    return parts.reshape(layout.blocks * BLOCK, -1)[: layout.n, : layout.k].copy()


def _from_registers(codes: NDArray[np.uint8], layout: Layout4) -> NDArray[np.uint8]:
    if layout.activation_bits == 8:
        return _from_byte_registers(codes, layout)
    words = codes.view(np.uint32).reshape(layout.slabs, layout.blocks, 4, 8, 4, 4)
    parts = np.zeros((layout.blocks, 4, 2, 8, layout.slabs, 4, 2, 4, 2), np.uint8)
    for h in range(2):
        for half in range(2):
            for e in range(2):
                code = _taken(words >> np.uint32(16 * e), h + 2 * half, layout)
                parts[:, :, h, :, :, :, half, :, e] = code.transpose(1, 2, 3, 0, 5, 4)
    return parts.reshape(layout.blocks * BLOCK, -1)[: layout.n, : layout.k].copy()


def _placed(code: NDArray[np.uint8], register: int, layout: Layout4) -> NDArray[np.uint32]:
    wide = code.astype(np.uint32)
    if layout.codes != "fp4_e2m1":
        return wide << np.uint32(4 * register)
    sign, high, low = wide >> np.uint32(3), wide >> np.uint32(2) & np.uint32(1), wide & np.uint32(3)
    placed: NDArray[np.uint32] = (
        sign << np.uint32(_E2M1_SIGN[register])
        | high << np.uint32(_E2M1_HIGH[register])
        | low << np.uint32(_E2M1_LOW[register])
    )
    return placed


def _taken(words: NDArray[np.uint32], register: int, layout: Layout4) -> NDArray[np.uint8]:
    if layout.codes != "fp4_e2m1":
        return (words >> np.uint32(4 * register) & np.uint32(15)).astype(np.uint8)
    sign = words >> np.uint32(_E2M1_SIGN[register]) & 1
    high = words >> np.uint32(_E2M1_HIGH[register]) & 1
    low = words >> np.uint32(_E2M1_LOW[register]) & 3
    taken: NDArray[np.uint8] = (sign << 3 | high << 2 | low).astype(np.uint8)
    return taken


# ---- scales ------------------------------------------------------------------------------------------------------


def _granularity(weight: QTensor) -> tuple[int | None, NDArray[np.float32]]:
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


def _zero_points(weight: QTensor, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
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


def _float_scales(
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


def _block_scales(
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


def _whole_scales(
    layout: Layout4, rows: NDArray[np.float32], zero: NDArray[np.uint8] | None
) -> tuple[Layout4, NDArray[Any] | None, NDArray[np.float32]]:
    """The same for int8 activations: the smallest whole numbers that the scales of a row are in proportion to."""
    if layout.codes == "fp4_e2m1":
        raise KernelError("weight: fp4_e2m1 is not multiplied by int8; pack it for activations of 16 bits.")
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


def _e4m3_codes() -> NDArray[np.uint8]:
    """Return for each e4m3 code ≥ 0 the kernel's: five bits of exponent + 10, three of mantissa, never subnormal."""
    values = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    mantissa, exponent = np.frexp(values)
    codes = np.zeros(256, np.uint8)
    codes[1:0x7F] = ((exponent[1:] - 1 + 10) << 3 | (mantissa[1:] * 16).astype(np.int64) & 7).astype(np.uint8)
    return codes


_E4M3_CODES = _e4m3_codes()


def _held_values(held: NDArray[Any], layout: Layout4) -> NDArray[np.float64]:
    if layout.scales == "e4m3":
        value = np.ldexp(1 + (held & 7) / 8, (held >> 3).astype(np.int64) - 10)
        return np.where(held == 0, 0.0, value)
    if layout.scales == "e8m0":
        return np.ldexp(1.0, held.astype(np.int64) - 254)
    return held.astype(np.float64)


def _by_pairs(held: NDArray[Any], layout: Layout4) -> NDArray[np.uint8]:
    """[n, groups] to [sides, blocks, 32 pairs, bytes]: pair 8 warp + g has rows 16 warp + g and + 8, row by row."""
    padded = np.zeros((layout.blocks * BLOCK, layout.sides * layout.groups_in_slab), held.dtype)
    padded[: layout.n, : held.shape[1]] = held
    parts = padded.reshape(layout.blocks, 4, 2, 8, layout.sides, layout.groups_in_slab)
    ordered = np.ascontiguousarray(parts.transpose(4, 0, 1, 3, 2, 5))
    return ordered.view(np.uint8).reshape(layout.sides, layout.blocks, 32, -1)


def _from_pairs(scales: NDArray[np.uint8], layout: Layout4) -> NDArray[Any]:
    held = scales.reshape(-1).view(_HELD.get(layout.scales, np.dtype(np.uint8)))
    parts = held.reshape(layout.sides, layout.blocks, 4, 8, 2, layout.groups_in_slab)
    padded = parts.transpose(1, 2, 4, 3, 0, 5).reshape(layout.blocks * BLOCK, -1)
    assert layout.group is not None
    return padded[: layout.n, : -(-layout.k // layout.group)]


def _zeros_by_pairs(zero: NDArray[np.uint8], layout: Layout4) -> NDArray[np.uint8]:
    bare = _by_pairs(zero, layout).reshape(layout.sides, layout.blocks, 32, 2, layout.groups_in_slab)
    both: NDArray[np.uint8] = bare[..., 0, :] | bare[..., 1, :] << np.uint8(4)
    return both


def _zeros_from_pairs(zeros: NDArray[np.uint8], layout: Layout4) -> NDArray[np.uint8]:
    both = np.stack([zeros & 15, zeros >> 4], axis=-2)
    parts = both.reshape(layout.sides, layout.blocks, 4, 8, 2, layout.groups_in_slab)
    padded = parts.transpose(1, 2, 4, 3, 0, 5).reshape(layout.blocks * BLOCK, -1)
    groups = 1 if layout.group is None else -(-layout.k // layout.group)
    return np.ascontiguousarray(padded[: layout.n, :groups])

"""Tensor maps for the emulator: cuTensorMapEncodeTiled's arguments, checked as the driver checks them."""

import struct
from dataclasses import dataclass
from enum import IntEnum

import ml_dtypes
import numpy as np

from quantkit.errors import KernelError

_MAGIC = 0x70616D726F736E74
_FORMAT = "<QQ5Q4Q5H5B"


class Swizzle(IntEnum):
    """CUtensorMapSwizzle: how 16-byte chunks are exchanged within rows of that many bytes."""

    NONE = 0
    BYTES_32 = 1
    BYTES_64 = 2
    BYTES_128 = 3


# CUtensorMapDataType. 8-bit floats travel as bytes.
_DATA_TYPES: dict[np.dtype, int] = {
    np.dtype(np.uint8): 0,
    np.dtype(np.int8): 0,
    np.dtype(ml_dtypes.float8_e4m3fn): 0,
    np.dtype(ml_dtypes.float8_e5m2): 0,
    np.dtype(np.uint16): 1,
    np.dtype(np.uint32): 2,
    np.dtype(np.int32): 3,
    np.dtype(np.uint64): 4,
    np.dtype(np.int64): 5,
    np.dtype(np.float16): 6,
    np.dtype(np.float32): 7,
    np.dtype(np.float64): 8,
    np.dtype(ml_dtypes.bfloat16): 9,
}


@dataclass(frozen=True, kw_only=True)
class TensorMap:
    """A box-shaped window onto `array`, for TMA.

    box: elements of one copy, in `array`'s axis order (outermost first, as the array's shape).
    shape, strides_bytes: of the tensor inside `array`; by default the array's own. The innermost stride is the
        element's size, the others are multiples of 16 bytes.
    fill_nan: what lies out of bounds is NaN instead of zero.
    KernelError: what the driver would refuse.
    """

    array: np.ndarray
    box: tuple[int, ...]
    swizzle: Swizzle = Swizzle.NONE
    shape: tuple[int, ...] | None = None
    strides_bytes: tuple[int, ...] | None = None
    fill_nan: bool = False

    def __post_init__(self) -> None:
        shape, strides = self.tensor_shape, self.tensor_strides
        size = self.array.dtype.itemsize
        inner_bytes = self.box[-1] * size if self.box else 0
        span = {Swizzle.NONE: 0, Swizzle.BYTES_32: 32, Swizzle.BYTES_64: 64, Swizzle.BYTES_128: 128}[
            self.swizzle
        ]
        extent = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + size if shape else 0
        complaints = [
            (
                self.array.dtype not in _DATA_TYPES,
                f"no tensor map holds {self.array.dtype}; view it as uint8 or uint16",
            ),
            (not 1 <= len(shape) <= 5, f"{len(shape)} dimensions; 1 to 5 are possible"),
            (
                len(self.box) != len(shape),
                f"a box of {len(self.box)} dimensions for a tensor of {len(shape)}",
            ),
            (any(not 1 <= n <= 256 for n in self.box), f"box {self.box}; each side is 1 to 256 elements"),
            (any(not 1 <= n <= 1 << 32 for n in shape), f"shape {shape}; each dimension is 1 to 2^32"),
            (
                strides[-1:] != (size,),
                f"the innermost stride is {strides[-1:]} bytes, not the element's {size}",
            ),
            (
                any(s % 16 or s >= 1 << 40 for s in strides[:-1]),
                f"strides {strides}: not multiples of 16 bytes",
            ),
            (
                inner_bytes % 16 != 0,
                f"a box row of {inner_bytes} bytes is not a multiple of 16; widen the box",
            ),
            # The driver takes narrower rows too, but then lays them out a span apart, and nothing here wants that.
            (
                span not in (0, inner_bytes),
                f"a box row of {inner_bytes} bytes with a {span}-byte swizzle; make it {span}",
            ),
            (
                not self.array.flags.c_contiguous,
                "the array is not contiguous; copy it, or give strides_bytes",
            ),
            (
                extent > self.array.nbytes,
                f"the tensor spans {extent} bytes of an array of {self.array.nbytes}",
            ),
        ]
        for wrong, complaint in complaints:
            if wrong:
                raise KernelError(f"tensor map: {complaint}.")

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The tensor's shape, outermost first."""
        return self.shape if self.shape is not None else self.array.shape

    @property
    def tensor_strides(self) -> tuple[int, ...]:
        """The tensor's strides in bytes, outermost first."""
        return self.strides_bytes if self.strides_bytes is not None else self.array.strides

    @property
    def data_type(self) -> int:
        """The array's CUtensorMapDataType."""
        return _DATA_TYPES[self.array.dtype]

    def encode(self, address: int) -> bytes:
        """Return the 128 bytes that a kernel takes by value, for an array that lies at `address`."""

        def innermost_first(values: tuple[int, ...], count: int) -> list[int]:
            return [*reversed(values), *([0] * (count - len(values)))]

        packed = struct.pack(
            _FORMAT,
            _MAGIC,
            address,
            *innermost_first(self.tensor_shape, 5),
            *innermost_first(self.tensor_strides[:-1], 4),
            *innermost_first(self.box, 5),
            self.data_type,
            self.array.dtype.itemsize,
            len(self.box),
            self.swizzle,
            self.fill_nan,
        )
        return packed.ljust(128, b"\0")

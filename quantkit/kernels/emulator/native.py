"""The emulator's C interface (launch.cpp) in ctypes, and the device memory of a launch."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.errors import KernelError


class Buffer(ctypes.Structure):
    """QkBuffer: a device buffer."""

    _fields_ = (("start", ctypes.c_void_p), ("bytes", ctypes.c_uint64))


class Launch(ctypes.Structure):
    """QkLaunch: what to run."""

    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("mode", ctypes.c_int32),
        ("resident_clusters", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("timeout_s", ctypes.c_double),
        ("buffers", ctypes.POINTER(Buffer)),
        ("buffer_count", ctypes.c_uint64),
    )


class Report(ctypes.Structure):
    """QkReport: how it went."""

    _fields_ = (
        ("failed", ctypes.c_int32),
        ("line", ctypes.c_int32),
        ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3),
        ("switches", ctypes.c_uint64),
        ("kind", ctypes.c_char * 32),
        ("file", ctypes.c_char * 512),
        ("message", ctypes.c_char * 4096),
    )


class ParameterSizes(ctypes.Structure):
    """The bytes of each kernel parameter, as QK_EXPORT writes them."""

    _fields_ = (("count", ctypes.c_uint64), ("bytes", ctypes.c_uint64 * 64))


@cache
def open_library(path: Path) -> Any:
    """Load the emulator's library and declare its functions."""
    library = ctypes.CDLL(str(path))
    library.qk_allocate.restype = ctypes.c_void_p
    library.qk_allocate.argtypes = (ctypes.c_uint64,)
    library.qk_is_intact.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
    library.qk_free.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
    library.qk_free.restype = None
    library.qk_launch.argtypes = (ctypes.POINTER(Launch), ctypes.POINTER(Report))
    library.qk_launch.restype = None
    return library


class Memory:
    """The launch's device memory: one guarded copy of every array, written back when the launch succeeds."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._copies: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def address_of(self, array: np.ndarray) -> int:
        """Return where the copy of `array` lies; the same array is copied once."""
        if not array.flags.c_contiguous:
            raise KernelError(
                "emulator: an array argument is not contiguous; pass numpy.ascontiguousarray of it."
            )
        host = array.ctypes.data
        for start, nbytes in self._copies:
            if (
                (start, nbytes) != (host, array.nbytes)
                and start < host + array.nbytes
                and host < start + nbytes
            ):
                raise KernelError(
                    "emulator: two array arguments overlap; pass the whole array and an offset."
                )
        key = (host, array.nbytes)
        if key not in self._copies:
            address = self._library.qk_allocate(array.nbytes)
            if not address:
                raise KernelError(f"emulator: no memory for an argument of {array.nbytes} bytes.")
            ctypes.memmove(address, host, array.nbytes)
            self._copies[key] = (address, array)
        return self._copies[key][0]

    def buffers(self) -> list[Buffer]:
        """Return every copy, for the emulator to check accesses against."""
        return [Buffer(address, array.nbytes) for address, array in self._copies.values()]

    def write_back(self) -> None:
        """Copy results into the writeable arrays.

        KernelError: bytes around a copy have changed.
        """
        for number, (address, array) in enumerate(self._copies.values()):
            if not self._library.qk_is_intact(address, array.nbytes):
                raise KernelError(
                    f"emulator: the kernel wrote past an end of buffer {number} ({array.nbytes} bytes)."
                )
            if array.flags.writeable:
                ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def free(self) -> None:
        """Return the copies to the operating system."""
        for address, array in self._copies.values():
            self._library.qk_free(address, array.nbytes)

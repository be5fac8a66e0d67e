"""The array that D is written to, and memory in which blocks that share a tile of it meet."""

from typing import Any

import ml_dtypes
import numpy as np

from quantkit.kernels import device as gpu


def output_dtype(name: str) -> np.dtype[Any]:
    """Return what carries D's type on the device: CuPy has no eight-bit floats."""
    if name == "float8_e4m3fn":
        return np.dtype(np.uint8)
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def new_output(lead: tuple[int, ...], n: int, name: str) -> Any:
    """Return an empty D of shape (*lead, n)."""
    return gpu.cupy().empty((*lead, n), output_dtype(name))


def aligned_output(out: Any) -> Any:
    """Return `out`, or another array of its shape where it does not start at a multiple of 16 bytes."""
    return out if out.data.ptr % 16 == 0 else gpu.cupy().empty(out.shape, out.dtype)


# Of each device and stream: memory for partial sums, and counters that are zero between launches.
_meeting_places: dict[tuple[int, int], tuple[Any, Any]] = {}


def meeting_place(device: int, stream: int, size: int, count: int) -> tuple[int, int]:
    """Return addresses of `size` bytes and `count` counters that only this stream uses, grown when they must be."""
    held = _meeting_places.get((device, stream))
    if held is None or held[0].nbytes < size or held[1].size < count:
        cupy = gpu.cupy()
        # What it replaces goes back to the pool of this stream, whose next use comes after the launches before.
        held = cupy.empty(max(size, 1 << 20), np.uint8), cupy.zeros(max(count, 4096), np.uint32)
        _meeting_places[device, stream] = held
    return int(held[0].data.ptr), int(held[1].data.ptr)

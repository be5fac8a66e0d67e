"""Statistics of tensors on the GPU, where they lie: one pass each, and only counts come back.

counts = observe_device_tensor(device_array(value), channels, exponent=histogram.exponent)
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from quantkit.errors import KernelError
from quantkit.kernels import device as gpu
from quantkit.kernels.present import why_no_gpu
from quantkit.kernels.statistics_launch import (
    ABOVE,
    FOLD_KERNEL,
    INPUTS,
    KERNEL,
    SOURCE,
    StatisticsLaunch,
    counts_of,
    cube_of,
    launch_of,
    needs_above,
    needs_below,
    sums_of,
    table_words,
)
from quantkit.statistics import ChannelStats
from quantkit.statistics.counting import Counts
from quantkit.statistics.summing import ChannelSums


@dataclass(frozen=True, kw_only=True)
class DeviceArray:
    """A tensor on the GPU.

    Attributes:
        array: CuPy's, C-contiguous; uint16 where CuPy lacks the type.
        dtype: the elements' type, by NumPy's name.
        owner: whose memory it is, if it is not CuPy's own.
    """

    array: Any
    dtype: str
    owner: Any = None


def require_gpu(what: str) -> None:
    """Raise KernelError, saying why, unless kernels can run here."""
    reason = why_no_gpu()
    if reason is not None:
        raise KernelError(f"{what}: no GPU here ({reason}); leave it out to run on the CPU.")


def device_array(value: Any) -> DeviceArray:
    """Return what an OrtValue on the GPU holds, without a copy: by DLPack, else by its address.

    Raises:
        KernelError: CuPy cannot read it.
    """
    cupy, dtype = gpu.cupy(), _TYPES.get(value.data_type())
    if dtype is None:
        raise KernelError(f"statistics: a {value.data_type()} is no tensor of floats; leave it to the CPU.")
    plain, shape = np.dtype(np.uint16 if dtype == "bfloat16" else dtype), tuple(value.shape())
    size = plain.itemsize * int(np.prod(shape, dtype=np.int64))
    if size == 0:
        return DeviceArray(array=cupy.empty(shape, plain), dtype=dtype)
    try:
        array = cupy.from_dlpack(value)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError):
        # CuPy has no bfloat16, for which two bytes stand, and older OrtValues speak no DLPack.
        memory = cupy.cuda.UnownedMemory(value.data_ptr(), size, owner=value)
        array = cupy.ndarray(shape, plain, memptr=cupy.cuda.MemoryPointer(memory, 0))
    return DeviceArray(array=array, dtype=dtype, owner=value)


# What ONNX Runtime calls floats.
_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(double)": "float64",
}


def observe_device_tensor(x: DeviceArray, channels: ChannelStats | None, *, exponent: int) -> Counts | None:
    """Take a tensor into `channels` and return its counts: `observe_tensor`, on the GPU and bit for bit the same.

    Sums are float64, added in an order that the shape and the GPU alone decide. Waits for the GPU.

    Args:
        x: any shape; float32, float16, bfloat16, or a type that is cast to float32.
        channels: where its channels are reduced, if at all.
        exponent: the histogram's, as it is or was.

    Raises:
        DataError: it does not fit `channels`.
        KernelError: it cannot be launched.
    """
    if x.array.size == 0:
        return None
    if x.dtype not in INPUTS:
        x = DeviceArray(array=x.array.astype(np.float32), dtype="float32")
    values = gpu.cupy().ascontiguousarray(x.array)
    cube = values.reshape(1, 1, -1) if channels is None else channels.cube_of(values)
    sums, counts = reduce_device_cube(cube, x.dtype, channels=channels is not None, exponent=exponent)
    if channels is not None and sums is not None:
        channels.include(sums)
    return counts


def reduce_device_cube(
    cube: Any, dtype: str, *, channels: bool, exponent: int
) -> tuple[ChannelSums | None, Counts]:
    """Return the sums of channels, if asked for, and the counts of values: `reduce_cube`, on the GPU.

    Args:
        cube: (before, channels, behind) on the current GPU, not empty, C-contiguous.
        dtype: the elements' type.
        channels: whether to return the sums of the middle axis.
        exponent: the least E of the counts.

    Raises:
        KernelError: it cannot be launched.
    """
    reduction = start_reduction(cube, dtype, channels=channels, exponent=exponent)
    return reduction.result()


def start_reduction(cube: Any, dtype: str, *, channels: bool, exponent: int) -> "Reduction":
    """Launch the reduction of a cube on the current stream, and do not wait; see `reduce_device_cube`.

    Only one may be under way at a time on a GPU: they share what counts values that lie above all keys.
    """
    cupy = gpu.cupy()
    device = int(cupy.cuda.Device().id)
    shape = tuple(int(n) for n in cube.shape)
    address = int(cube.data.ptr)
    launch = launch_of(
        (shape[0], shape[1], shape[2]),
        dtype,
        channels=channels,
        aligned=address % 16 == 0,
        multiprocessors=gpu.multiprocessors(device),
    )
    before, count, behind = cube_of((shape[0], shape[1], shape[2]), launch)
    out = cupy.zeros(launch.out_words, np.uint32)
    parts = max(launch.parts, 1)
    sums, limits = cupy.empty(2 * parts, np.float64), cupy.empty(2 * parts, np.int32)
    above = _above(device)
    macros = tuple(sorted(launch.defines.items()))
    kernel = gpu.function_of(device, SOURCE, KERNEL, macros, launch.shared_bytes)
    # All that is not L1's: two blocks a multiprocessor.
    kernel.preferred_shared_memory_carveout = 100
    kernel(
        (launch.grid,),
        (launch.block,),
        (
            np.uint64(address - address % 16),
            np.int64(address % 16 // int(cube.itemsize)),
            np.uint64(out.data.ptr),
            np.uint64(above.data.ptr),
            np.uint64(sums.data.ptr),
            np.uint64(limits.data.ptr),
            np.int32(exponent),
            np.int64(before),
            np.int32(count),
            np.int64(behind),
            np.int32(launch.items),
            np.int32(launch.pieces),
            np.int64(launch.piece),
            np.int64(launch.rows),
            np.int32(launch.width),
        ),
        shared_mem=launch.shared_bytes,
    )
    found = cupy.empty(3 * max(launch.channels, 1), np.float64)
    if launch.channels:
        gpu.function_of(device, SOURCE, FOLD_KERNEL, macros, 0)(
            (launch.fold_grid,),
            (256,),
            (
                np.uint64(sums.data.ptr),
                np.uint64(limits.data.ptr),
                np.uint64(found.data.ptr),
                np.int32(launch.channels),
                np.int32(launch.groups),
                np.int32(launch.pieces),
            ),
            shared_mem=0,
        )
    return Reduction(
        launch=launch,
        dtype=dtype,
        size=int(cube.size),
        out=out,
        above=above,
        found=found,
        held=(cube, sums, limits),
    )


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """A reduction under way.

    Attributes:
        launch: how it was launched.
        dtype, size: type and number of the elements.
        out, above, found: what the kernels write.
        held: what they read, kept until they have.
    """

    launch: StatisticsLaunch
    dtype: str
    size: int
    out: Any
    above: Any
    found: Any
    held: tuple[Any, ...]

    def result(self) -> tuple[ChannelSums | None, Counts]:
        """Wait for it, and return what was found; once."""
        cupy, words = gpu.cupy(), table_words(self.dtype)
        table = cupy.asnumpy(self.out[:words])
        below = cupy.asnumpy(self.out[words:]) if needs_below(table) else None
        above = None
        if needs_above(table):
            above = cupy.asnumpy(self.above)
            self.above.fill(0)
        counts = counts_of(table, below, above, size=self.size, dtype=self.dtype)
        if not self.launch.channels:
            return None, counts
        return sums_of(cupy.asnumpy(self.found), self.launch, self.size), counts


@lru_cache(maxsize=16)
def _above(device: int) -> Any:
    """Of the current GPU, `device`: zeros that every reduction leaves zeros, unless it says otherwise."""
    return gpu.cupy().zeros(ABOVE, np.int32)

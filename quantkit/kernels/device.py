"""What CuPy leaves out: tensor maps by value, cubins for the exact GPU, one number on the device once."""

import importlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.errors import KernelError
from quantkit.kernels.compile import compile_kernel
from quantkit.kernels.gemm_launch import KERNEL, SOURCE, Launch

# CUtensorMapDataType.
DATA_TYPES = {
    "int8": 0,
    "float8_e4m3fn": 0,
    "int32": 3,
    "float16": 6,
    "float32": 7,
    "bfloat16": 9,
}


def cupy() -> Any:
    """Return the module cupy.

    Raises:
        KernelError: CuPy is not installed.
    """
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise KernelError(f"CuPy cannot be imported ({error}); pip install 'quantkit[gpu]'.") from error


def current() -> int:
    """Return the number of the current GPU.

    Raises:
        KernelError: CuPy is not installed, or finds no GPU.
    """
    try:
        return int(cupy().cuda.Device().id)
    except KernelError:
        raise
    except Exception as error:
        # Each version of CUDA has its own way to say that there is no driver.
        reason = str(error).strip().splitlines()[0]
        raise KernelError(f"no GPU here ({reason}); run this on a machine with an NVIDIA GPU.") from error


@lru_cache(maxsize=64)
def architecture(device: int) -> str:
    """Return what NVRTC calls GPU `device`: sm_90a, say."""
    capability = int(cupy().cuda.Device(device).compute_capability)
    return f"sm_{capability}{'a' if capability >= 90 else ''}"


@lru_cache(maxsize=64)
def multiprocessors(device: int) -> int:
    """Return the number of GPU `device`'s multiprocessors."""
    return int(cupy().cuda.Device(device).attributes["MultiProcessorCount"])


@lru_cache(maxsize=4096)
def tensor_map(
    address: int,
    data_type: str,
    shape: tuple[int, int],
    pitch_bytes: int,
    box: tuple[int, int],
    swizzle_bytes: int = 128,
) -> np.ndarray:
    """Return the driver's tensor map of a matrix (rows, columns), to pass by value.

    pitch_bytes: from one row to the next, a multiple of 16. `address` too. swizzle_bytes: 64 or 128.
    """
    driver = importlib.import_module("cuda.bindings.driver")
    u32, u64 = driver.cuuint32_t, driver.cuuint64_t
    error, encoded = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType(DATA_TYPES[data_type]),
        2,
        address,
        [u64(shape[1]), u64(shape[0])],
        [u64(pitch_bytes)],
        [u32(box[1]), u32(box[0])],
        [u32(1), u32(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        _swizzle(driver, swizzle_bytes),
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if int(error):
        raise KernelError(
            f"cuTensorMapEncodeTiled refuses a {shape} {data_type} matrix in boxes of {box}: {error}."
        )
    words = np.array([int(word) for word in encoded.opaque], np.uint64)
    by_value: np.ndarray = words.view("V128")[0]
    return by_value


def _swizzle(driver: Any, size: int) -> Any:
    kinds = driver.CUtensorMapSwizzle
    return kinds.CU_TENSOR_MAP_SWIZZLE_64B if size == 64 else kinds.CU_TENSOR_MAP_SWIZZLE_128B


@lru_cache(maxsize=1024)
def function_of(
    device: int, source: Path, name: str, defines: tuple[tuple[str, str | int], ...], shared_bytes: int
) -> Any:
    """Return kernel `name` of a source, compiled for GPU `device` with these macros, and loaded."""
    built = compile_kernel(source, arch=architecture(device), defines=dict(defines))
    function = cupy().RawModule(path=str(built.cubin)).get_function(name)
    function.max_dynamic_shared_size_bytes = shared_bytes
    return function


def kernel_of(launch: Launch, device: int) -> Any:
    """Return the compiled and loaded kernel of a launch."""
    return function_of(device, SOURCE, KERNEL, tuple(sorted(launch.defines.items())), launch.shared_bytes)


@lru_cache(maxsize=4096)
def scalar(device: int, value: float, dtype: str = "float32") -> Any:
    """Return an array of one element on GPU `device`, uploaded once for each value."""
    with cupy().cuda.Device(device):
        return cupy().array([value], dtype)

"""Where a test's kernel runs: the emulator in each of its modes, and a GPU where there is one.

Every instruction test runs on all of them with the same operands and the same oracle, so a GPU confirms or refutes
the emulator's reading of PTX.
"""

import importlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.errors import KernelError
from quantkit.kernels.compile import compile_kernel
from quantkit.kernels.emulator import Mode, TensorMap, load


class EmulatorBackend:
    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.arch = (9, 0)

    def launch(
        self,
        source: Path,
        name: str,
        *arguments: Any,
        defines: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        return load(source, name, defines).launch(*arguments, mode=self.mode, **options)


class GpuBackend:
    """The same call on GPU 0, through CuPy. Clusters are compiled into the kernel."""

    def __init__(self) -> None:
        self._cupy = importlib.import_module("cupy")
        major, minor = divmod(int(self._cupy.cuda.Device(0).compute_capability), 10)
        self.arch = (major, minor)
        self._name = f"sm_{major}{minor}{'a' if major >= 9 else ''}"

    def launch(
        self,
        source: Path,
        name: str,
        *arguments: Any,
        defines: Mapping[str, Any] | None = None,
        grid: Any,
        block: Any,
        shared_bytes: int = 0,
        cluster: int = 1,
        multiprocessors: int = 0,
    ) -> None:
        cupy = self._cupy
        compiled = compile_kernel(source, arch=self._name, defines=defines)
        kernel = cupy.RawModule(path=str(compiled.cubin)).get_function(name)
        kernel.max_dynamic_shared_size_bytes = shared_bytes
        copies: dict[int, tuple[np.ndarray, Any]] = {}

        def on_device(array: np.ndarray) -> Any:
            if array.ctypes.data not in copies:
                raw = cupy.asarray(array.reshape(-1).view(np.uint8))
                copies[array.ctypes.data] = (array, raw)
            return copies[array.ctypes.data][1]

        parameters = []
        for argument in arguments:
            if isinstance(argument, TensorMap):
                parameters.append(_encode(argument, on_device(argument.array).data.ptr))
            else:
                parameters.append(on_device(argument) if isinstance(argument, np.ndarray) else argument)
        as_three = [(n,) if isinstance(n, int) else tuple(n) for n in (grid, block)]
        kernel(*as_three, tuple(parameters), shared_mem=shared_bytes)
        cupy.cuda.Device(0).synchronize()
        for array, raw in copies.values():
            if array.flags.writeable:
                array.reshape(-1).view(np.uint8)[:] = cupy.asnumpy(raw)


def _encode(tensor_map: TensorMap, address: int) -> np.ndarray:
    """The driver's own tensor map, as the 128 opaque bytes that CuPy passes by value."""
    driver = importlib.import_module("cuda.bindings.driver")
    u32, u64 = driver.cuuint32_t, driver.cuuint64_t
    shape, strides, box = (
        tuple(reversed(v)) for v in (tensor_map.tensor_shape, tensor_map.tensor_strides, tensor_map.box)
    )
    error, encoded = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType(tensor_map.data_type),
        len(box),
        address,
        [u64(n) for n in shape],
        # The driver wants a pointer even for the no strides of one dimension.
        [u64(n) for n in strides[1:]] or [u64(0)],
        [u32(n) for n in box],
        [u32(1)] * len(box),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle(int(tensor_map.swizzle)),
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,
        driver.CUtensorMapFloatOOBfill(int(tensor_map.fill_nan)),
    )
    if int(error):
        raise KernelError(f"cuTensorMapEncodeTiled refuses the map: {error}")
    return np.array([int(word) for word in encoded.opaque], np.uint64).view("V128")[0]


@cache
def gpu() -> GpuBackend | None:
    """GPU 0 with CuPy and NVRTC, or None where there is none."""
    try:
        cupy = importlib.import_module("cupy")
        return GpuBackend() if cupy.cuda.runtime.getDeviceCount() else None
    except Exception:  # no CuPy, no driver, no device: each has its own exception
        return None

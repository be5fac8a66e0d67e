"""Arrays that only look like CuPy's, on a GPU that is the emulator: launchers run from their door to their launch.

Whatever would make the host wait for a GPU (reading an element, a synchronisation) is an error here.
"""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantkit.kernels import device as gpu
from quantkit.kernels import gemm, gemm_run, output, tuning
from quantkit.kernels import quantize as quantizing
from quantkit.kernels.emulator import Swizzle, TensorMap, load

MULTIPROCESSORS = 4
_SWIZZLES = {64: Swizzle.BYTES_64, 128: Swizzle.BYTES_128}


class Memory:
    """What lies where: every allocation by its first address."""

    def __init__(self) -> None:
        self._held: dict[int, np.ndarray] = {}

    def new(self, values: Any) -> "Array":
        """A copy of the values at a multiple of 16 bytes, as every allocation on a GPU."""
        whole = np.ascontiguousarray(values)
        room = np.empty(whole.nbytes + 16, np.uint8)
        start = -room.ctypes.data % 16
        array = room[start : start + whole.nbytes].view(whole.dtype).reshape(whole.shape)
        array[...] = whole
        self._held[array.ctypes.data] = array
        return self.shown(array)

    def shown(self, array: np.ndarray) -> "Array":
        found = array.view(Array)
        found.memory = self
        return found

    def address(self, array: np.ndarray) -> int:
        """Where an array starts; what NumPy computed from others is an allocation of its own."""
        at = int(array.ctypes.data)
        if self._around(at) is None:
            assert array.flags.c_contiguous
            self._held[at] = np.asarray(array)
        return at

    def bytes_from(self, address: int) -> np.ndarray:
        """All bytes from an address to the end of its allocation."""
        start = self._around(address)
        assert start is not None, "an address that nothing lies at"
        return self._held[start].reshape(-1).view(np.uint8)[address - start :]

    def _around(self, at: int) -> int | None:
        return next((s for s, held in self._held.items() if s <= at < s + max(held.nbytes, 1)), None)


class Array(np.ndarray):
    """A NumPy array with an address and a device where CuPy has them."""

    memory: Memory

    def __array_finalize__(self, parent: Any) -> None:
        if isinstance(parent, Array):
            self.memory = parent.memory

    @property
    def data(self):  # type: ignore[override]
        return SimpleNamespace(ptr=self.memory.address(self))

    @property
    def device(self):  # type: ignore[override]
        return SimpleNamespace(id=0)

    def _wait(self, *_: Any) -> Any:
        raise AssertionError("this would wait for the GPU")

    item = tolist = get = __float__ = __int__ = __bool__ = __index__ = _wait  # type: ignore[assignment]


class FakeCupy:
    """What launchers use of CuPy. It has nothing that synchronises."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.capturing = False
        self.allocations = 0
        self.loaded: set[tuple[Any, ...]] = set()
        self.launches: list[tuple[str, dict[str, Any], tuple[int, ...]]] = []
        stream = SimpleNamespace(ptr=0, is_capturing=lambda: self.capturing)
        self.cuda = SimpleNamespace(Device=lambda: SimpleNamespace(id=0), get_current_stream=lambda: stream)

    def asarray(self, values: Any) -> Array:
        return self.memory.new(values)

    ascontiguousarray = asarray

    @staticmethod
    def asnumpy(array: Array) -> np.ndarray:
        """For tests to look at results; no launcher may."""
        return np.array(array, copy=True).view(np.ndarray)

    def empty(self, shape: Any, dtype: Any) -> Array:
        self.allocations += 1
        found = self.memory.new(np.zeros(shape, dtype))
        found.view(np.uint8)[...] = 0x55
        return found

    def zeros(self, shape: Any, dtype: Any) -> Array:
        self.allocations += 1
        return self.memory.new(np.zeros(shape, dtype))

    def scalar(self, device: int, value: float, dtype: str = "float32") -> Array:
        return self.memory.new(np.array([value], dtype))

    def tensor_map(
        self, address: int, data_type: str, shape: Any, pitch: int, box: Any, swizzle_bytes: int = 128
    ) -> TensorMap:
        dtype = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float8_e4m3fn": np.dtype(np.uint8)}.get(data_type)
        dtype = np.dtype(data_type) if dtype is None else dtype
        return TensorMap(
            array=self.memory.bytes_from(address).view(dtype),
            box=box,
            swizzle=_SWIZZLES[swizzle_bytes],
            shape=shape,
            strides_bytes=(pitch, dtype.itemsize),
        )

    def function_of(
        self, device: int, source: Path, name: str, defines: Any, shared_bytes: int | None = None
    ) -> Any:
        macros: Mapping[str, Any] = dict(defines)
        key = name, tuple(sorted(defines))
        assert not self.capturing or key in self.loaded, "a capture cannot compile and load a kernel"
        self.loaded.add(key)

        def launch(grid: Any, block: Any, arguments: Any, shared_mem: int) -> None:
            assert shared_bytes in (None, shared_mem)
            self.launches.append((name, dict(macros), tuple(grid)))
            held = [
                self.memory.bytes_from(int(a)) if isinstance(a, np.uint64) and int(a) else a
                for a in arguments
            ]
            load(source, name, macros).launch(
                *held,
                grid=grid,
                block=block[0],
                shared_bytes=shared_mem,
                cluster=macros["CLUSTER"] * macros.get("SPLIT", 1) if "CLUSTER" in macros else 1,
                multiprocessors=MULTIPROCESSORS,
            )

        return launch


def install(monkeypatch: pytest.MonkeyPatch, arch: str) -> FakeCupy:
    """Put a machine with one emulated GPU of this architecture where launchers look for CuPy's."""
    fake = FakeCupy()
    for name in ("scalar", "tensor_map", "function_of"):
        monkeypatch.setattr(gpu, name, getattr(fake, name))
    monkeypatch.setattr(gpu, "cupy", lambda: fake)
    monkeypatch.setattr(gpu, "architecture", lambda device: arch)
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: MULTIPROCESSORS)
    monkeypatch.setattr(
        quantizing,
        "_function",
        lambda device, defines: fake.function_of(device, quantizing.SOURCE, quantizing.KERNEL, defines),
    )
    for name in ("best_tile", "best_mma_tile"):
        monkeypatch.setattr(tuning, name, lambda problem, kind, device: None)
    monkeypatch.setattr(output, "_meeting_places", {})
    # What another test chose for another GPU is no choice here, and this one's is none elsewhere.
    for module, remembered in (
        (gemm, gemm._tile),
        (gemm, gemm._mma_tile),
        (gemm_run, gemm_run.load_sm90),
        (gemm_run, gemm_run.load_mma),
    ):
        monkeypatch.setattr(module, remembered.__name__, remembered.__wrapped__)
    return fake

"""Run a CUDA kernel source on the CPU: `load` it once, `launch` it on NumPy arrays."""

import ctypes
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.errors import KernelError
from quantkit.kernels.emulator.build import DEFAULT_CACHE, build_kernel, build_library
from quantkit.kernels.emulator.native import Buffer, Launch, Memory, ParameterSizes, Report, open_library
from quantkit.kernels.emulator.tensor_map import TensorMap

Argument = np.ndarray | np.generic | TensorMap
Dim = tuple[int, ...]


class Mode(IntEnum):
    """In which of the legal orders things happen.

    EAGER: asynchronous operations finish at once and threads take turns. LAZY: they finish as late as is legal, the
    latest first, and their destinations hold garbage until then. SHUFFLED: threads, and the moments at which
    operations finish, are drawn from the seed. BOTH: shuffled and late.
    """

    EAGER = 0
    LAZY = 1
    SHUFFLED = 2
    BOTH = 3


class EmulatorError(KernelError):
    """A kernel that did what no GPU promises to do right.

    kind: 'out of range', 'misaligned', 'unfinished copy', 'overwrite', 'proxy', 'mbarrier', 'barrier', 'wgmma',
        'registers', 'divergence', 'deadlock', 'timeout', 'tensor map', 'unfinished store',
        'stack overflow', 'resources'.
    block, thread: coordinates (x, y, z) of the thread that was caught. file, line: the instruction it was at.
    """

    def __init__(self, message: str, *, kind: str, block: Dim, thread: Dim, file: str, line: int) -> None:
        super().__init__(message)
        self.kind = kind
        self.block = block
        self.thread = thread
        self.file = file
        self.line = line


# The library emulates one launch at a time.
_lock = threading.Lock()


def _three(dim: int | Sequence[int]) -> tuple[int, int, int]:
    values = (dim,) if isinstance(dim, int) else tuple(dim)
    x, y, z = (*values, 1, 1, 1)[:3]
    return x, y, z


@dataclass(frozen=True, kw_only=True)
class LaunchReport:
    """What a launch did: how often the emulator turned from one thread to another."""

    switches: int


class Kernel:
    """A kernel built for the emulator. Make one with `load`."""

    def __init__(self, name: str, kernel_path: Path, library_path: Path) -> None:
        self.name = name
        self._library = open_library(library_path)
        self._module = ctypes.CDLL(str(kernel_path))
        try:
            self._entry = ctypes.cast(getattr(self._module, f"qk_entry_{name}"), ctypes.c_void_p)
            sizes = ParameterSizes.in_dll(self._module, f"qk_parameters_{name}")
        except (AttributeError, ValueError) as error:
            raise KernelError(
                f"{kernel_path.name}: no kernel {name}; end the source with QK_EXPORT({name})."
            ) from error
        self.parameter_bytes = tuple(sizes.bytes[: sizes.count])

    def _pack(self, arguments: Sequence[Argument], memory: Memory) -> list[bytes]:
        if len(arguments) != len(self.parameter_bytes):
            raise KernelError(
                f"{self.name}: {len(arguments)} arguments for {len(self.parameter_bytes)} parameters."
            )
        packed = []
        for i, (argument, size) in enumerate(zip(arguments, self.parameter_bytes, strict=True)):
            if isinstance(argument, TensorMap):
                data = argument.encode(memory.address_of(argument.array))
            elif isinstance(argument, np.ndarray):
                data = memory.address_of(argument).to_bytes(8, "little")
            elif isinstance(argument, np.generic):
                data = argument.tobytes()
            else:
                raise KernelError(
                    f"{self.name}: argument {i} is a {type(argument).__name__}; pass an array, a NumPy scalar or a "
                    "TensorMap, whose sizes are certain."
                )
            if len(data) != size:
                raise KernelError(f"{self.name}: argument {i} has {len(data)} bytes, its parameter {size}.")
            packed.append(data)
        return packed

    def launch(
        self,
        *arguments: Argument,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        shared_bytes: int = 0,
        cluster: int = 1,
        mode: Mode = Mode.EAGER,
        seed: int = 0,
        multiprocessors: int = 4,
        timeout_s: float = 120.0,
    ) -> LaunchReport:
        """Run the kernel over a grid of blocks; arrays that are writeable hold its results afterwards.

        cluster: blocks in a cluster, along x. multiprocessors: how many blocks run at the same time (at least one
        cluster); a kernel whose blocks wait for each other needs as many as its grid.
        EmulatorError: the kernel broke a rule. KernelError: the launch itself makes no sense.
        """
        grid3, block3 = _three(grid), _three(block)
        threads = block3[0] * block3[1] * block3[2]
        complaints = [
            (min(grid3) < 1 or min(block3) < 1, f"a grid of {grid3} blocks of {block3} threads is empty"),
            (threads % 32 or threads > 1024, f"{threads} threads a block; use a multiple of 32 up to 1024"),
            (
                not 0 <= shared_bytes <= 227 * 1024,
                f"{shared_bytes} bytes of shared memory; the limit is {227 * 1024}",
            ),
            (
                not 1 <= cluster <= 16 or grid3[0] % cluster,
                f"a grid of {grid3} does not divide into clusters of {cluster}",
            ),
        ]
        for wrong, complaint in complaints:
            if wrong:
                raise KernelError(f"{self.name}: {complaint}.")
        memory = Memory(self._library)
        try:
            packed = self._pack(arguments, memory)
            parameters = [ctypes.create_string_buffer(data, len(data)) for data in packed]
            pointers = (ctypes.c_void_p * max(1, len(parameters)))(*map(ctypes.addressof, parameters))
            buffers = memory.buffers()
            launch = Launch(
                self._entry,
                ctypes.cast(pointers, ctypes.POINTER(ctypes.c_void_p)),
                (ctypes.c_uint32 * 3)(*grid3),
                (ctypes.c_uint32 * 3)(*block3),
                cluster,
                shared_bytes,
                mode,
                max(1, multiprocessors // cluster),
                seed,
                timeout_s,
                (Buffer * max(1, len(buffers)))(*buffers),
                len(buffers),
            )
            report = Report()
            with _lock:
                self._library.qk_launch(ctypes.byref(launch), ctypes.byref(report))
            if report.failed:
                raise self._error(report)
            memory.write_back()
        finally:
            memory.free()
        return LaunchReport(switches=report.switches)

    def _error(self, report: Report) -> EmulatorError:
        kind, message = report.kind.decode(), report.message.decode(errors="replace")
        file, line = report.file.decode(), int(report.line)
        block, thread = tuple(report.block), tuple(report.thread)
        place = f"{Path(file).name}:{line}" if file else "the start"
        text = f"{self.name}: block {block} thread {thread} at {place}: {kind}: {message}"
        return EmulatorError(text, kind=kind, block=block, thread=thread, file=file, line=line)


def load(
    source: Path,
    name: str,
    defines: Mapping[str, str | int] | None = None,
    *,
    cache: Path = DEFAULT_CACHE,
    include: Path | None = None,
) -> Kernel:
    """Build kernel `name` of a .cu file for the emulator, with its configuration as macros.

    KernelError: no C++ compiler, the source does not compile, or it has no such kernel.
    """
    # One library for both: sources may be edited at any time, and a launch belongs to the build it is linked with.
    library = build_library(cache)
    return Kernel(name, build_kernel(source, defines, cache, include, library=library), library)


def launch(
    source: Path,
    name: str,
    *arguments: Argument,
    defines: Mapping[str, str | int] | None = None,
    **options: Any,
) -> LaunchReport:
    """`load` and `Kernel.launch` in one: options are those of `Kernel.launch`."""
    return load(source, name, defines).launch(*arguments, **options)

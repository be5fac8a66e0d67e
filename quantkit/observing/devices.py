"""Where a model is run and its tensors are reduced: the processors here, or a GPU, which they do not leave."""

import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from quantkit.data import Sample
from quantkit.errors import UnknownNameError
from quantkit.memory import DEFAULT_DEVICE_MEMORY, DEFAULT_MAX_MEMORY
from quantkit.runtime import CPU, CUDA, Session, host_array, require_provider, upload
from quantkit.statistics import ChannelStats, GramMatrix
from quantkit.statistics.counting import Counts
from quantkit.statistics.patches import patches
from quantkit.statistics.tensor import observe_tensor


class Processors:
    """The CPU.

    Attributes:
        provider: ONNX Runtime's, for sessions.
        memory: bytes that fetched tensors may take unless told otherwise.
    """

    provider = CPU
    memory = DEFAULT_MAX_MEMORY

    @property
    def workers(self) -> int:
        """Batches that may be run at a time: processors that this process may use."""
        try:
            return len(os.sched_getaffinity(0))
        except AttributeError:  # not on this system
            return os.cpu_count() or 1

    def threads(self, workers: int) -> int:
        """Return how many threads a session has where so many run side by side; 0 for ONNX Runtime's own choice."""
        return max(1, self.workers // workers)

    def feeds(self, batch: Sample) -> dict[str, Any]:
        """Return what a session is fed."""
        return dict(batch)

    def run(self, session: Session, feeds: dict[str, Any]) -> dict[str, Any]:
        """Return the session's outputs, where they were made.

        Raises:
            ModelError: the model fails on this input.
        """
        return dict(session.run(feeds))

    def observe(self, tensor: Any, channels: ChannelStats | None, *, exponent: int) -> Counts | None:
        """Take a tensor, fed or run, into `channels` and return its counts, as `observe_tensor` does.

        Raises:
            DataError: it does not fit `channels`.
        """
        return observe_tensor(tensor, channels, exponent=exponent)

    def array(self, tensor: Any) -> Any:
        """Return a tensor, fed or run, as an array of floats. It must outlive what is done with the array."""
        return tensor

    def wait(self) -> None:
        """Return when all is done that was begun with tensors: they may be dropped then."""

    def patches(self, x: Any, **window: Any) -> Iterator[Any]:
        """Cut such an array into patches, as `quantkit.statistics.patches` does."""
        return patches(x, **window)

    def gram(self, size: int, groups: int) -> "Collects":
        """Return a Gram matrix that takes in such arrays."""
        return _Here(size, groups)


class Collects(Protocol):
    """Takes in vectors, and gives their Gram matrix when asked."""

    def observe(self, rows: Any) -> None:
        """Take in vectors of shape (groups, vectors, K)."""

    def result(self) -> GramMatrix:
        """Return the matrix of all of them."""


class _Here(GramMatrix):
    def result(self) -> GramMatrix:
        return self


class Gpu(Processors):
    """A GPU: ONNX Runtime's CUDA provider hands tensors to CuPy without a copy, one batch at a time.

    Raises:
        KernelError: there is no GPU, or no CuPy.
        ModelError: ONNX Runtime has no CUDA provider.
    """

    provider = CUDA
    memory = DEFAULT_DEVICE_MEMORY

    def __init__(self) -> None:
        from quantkit.kernels.statistics import require_gpu

        require_gpu("--device cuda")
        require_provider(self.provider, "--device cuda")

    @property
    def workers(self) -> int:
        """One: the GPU itself is what works side by side."""
        return 1

    def threads(self, workers: int) -> int:
        """What the provider lacks runs on the CPU, alone."""
        return 0

    def feeds(self, batch: Sample) -> dict[str, Any]:
        """Return the batch in the GPU's memory."""
        return upload(batch, self.provider)

    def run(self, session: Session, feeds: dict[str, Any]) -> dict[str, Any]:
        """Return the session's outputs in the GPU's memory."""
        return session.run_there(feeds)

    def observe(self, tensor: Any, channels: ChannelStats | None, *, exponent: int) -> Counts | None:
        """The same where the tensor lies."""
        from quantkit.kernels.statistics import device_array, observe_device_tensor

        if tensor.device_name() != self.provider.device:  # of a type that has no way there
            return observe_tensor(host_array(tensor), channels, exponent=exponent)
        return observe_device_tensor(device_array(tensor), channels, exponent=exponent)

    def array(self, tensor: Any) -> Any:
        """Return a tensor as CuPy's, without a copy where it lies on the GPU; uint16 stands for bfloat16."""
        from quantkit.kernels.device import cupy
        from quantkit.kernels.statistics import device_array

        if tensor.device_name() != self.provider.device:
            return cupy().asarray(host_array(tensor).astype(np.float32))
        return device_array(tensor).array

    def patches(self, x: Any, **window: Any) -> Iterator[Any]:
        """The same on the GPU."""
        from quantkit.kernels.gram import device_patches

        return device_patches(x, **window)

    def wait(self) -> None:
        """ONNX Runtime gives memory to its next run as soon as it is dropped, whatever CuPy still has to do."""
        from quantkit.kernels.device import cupy

        cupy().cuda.get_current_stream().synchronize()

    def gram(self, size: int, groups: int) -> Collects:
        """Return a Gram matrix on the GPU."""
        from quantkit.kernels.gram import DeviceGram

        return DeviceGram(size, groups)


def array_module(device: str) -> ModuleType:
    """Return what searches over arrays work with: NumPy for "cpu", CuPy for "cuda".

    Raises:
        UnknownNameError: there is no such device.
        KernelError: device is "cuda", and there is no GPU or no CuPy.
    """
    if device == "cpu":
        return np
    if device != "cuda":
        raise UnknownNameError(f"--device {device}: there are cpu and cuda.")
    from quantkit.kernels.device import cupy
    from quantkit.kernels.statistics import require_gpu

    require_gpu("--device cuda")
    found: ModuleType = cupy()
    return found


def device_of(name: str) -> Processors:
    """Return "cpu" or "cuda".

    Raises:
        UnknownNameError: there is no such device.
        KernelError, ModelError: see `Gpu`.
    """
    if name == "cpu":
        return Processors()
    if name == "cuda":
        return Gpu()
    raise UnknownNameError(f"--device {name}: there are cpu and cuda.")

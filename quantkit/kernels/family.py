"""What benchmarks, tuning and building ahead need to know of a kernel: a family, one source with its configurations."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantkit.errors import KernelError
from quantkit.formats.quantize import QTensor, dequantize
from quantkit.kernels.gpus import Gpu
from quantkit.kernels.work import Work


@dataclass(frozen=True, kw_only=True)
class Operands:
    """What a product multiplies, on the host.

    Attributes:
        activations: codes [rows, k] of the format's type (int8, float8_e4m3fn, bfloat16). There may be fewer rows than
            the work has: they are repeated then.
        scale: of the activations: one float32, or one a row, or [rows, blocks]; None for bf16.
        weight: the weight [n, k]; plain bfloat16 codes where nothing is quantized.
        bias: float32 [n], or None.
        origin: where the activations came from, in words.
        block: activations along K that share a scale, where there are blocks.
        global_scale: what the activations' scales are in units of; None without.
    """

    activations: NDArray[Any]
    scale: NDArray[np.float32] | None
    weight: QTensor | NDArray[Any]
    bias: NDArray[np.float32] | None = None
    origin: str = ""
    block: int | None = None
    global_scale: NDArray[np.float32] | None = None

    def rows(self, m: int) -> NDArray[Any]:
        """Return the codes of m rows."""
        return np.resize(self.activations, (m, self.activations.shape[1]))

    def row_scales(self, m: int) -> NDArray[np.float32] | None:
        """Return one scale, or one for each of m rows, or those of their blocks."""
        if self.scale is None or (self.scale.size == 1 and self.block is None):
            return self.scale
        return np.resize(self.scale, m if self.block is None else (m, self.scale.shape[1]))

    def values(self) -> NDArray[np.float32]:
        """Return what the activations stand for, float32 [rows, k]."""
        x: NDArray[np.float32] = self.activations.astype(np.float32)
        if self.scale is None:
            return x
        if self.block is not None:
            scale = self.scale if self.global_scale is None else self.scale * self.global_scale
            return x * np.repeat(scale, self.block, axis=1)[:, : x.shape[1]]
        return x * self.scale.reshape(-1, 1)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a family would do with a work: its best configuration, in words too, and the time, None without a model.

    tuned: the configuration was timed, not modelled, and so was the time.
    """

    kernel: str
    configuration: Any
    words: str
    time_us: float | None
    tuned: bool = False


class Family(ABC):
    """A kernel with its configurations.

    Attributes:
        name: the kernel's.
        formats: the names of the formats it multiplies.
        architectures: those that it can be compiled for.
    """

    name: str
    formats: frozenset[str]
    architectures: tuple[str, ...]

    @property
    def can_emulate(self) -> bool:
        """Whether `emulate` is there."""
        return type(self).emulate is not Family.emulate

    def takes(self, work: Work, gpu: Gpu) -> bool:
        """Return whether it computes `work` on `gpu`."""
        return work.format in self.formats and gpu.architecture in self.architectures

    @abstractmethod
    def predict(self, work: Work, gpu: Gpu) -> Prediction:
        """Return what it would do with a work that it takes."""

    def ranked(self, work: Work, gpu: Gpu) -> Sequence[Any]:
        """Return every configuration that can run the work, the one modelled fastest first."""
        return [self.predict(work, gpu).configuration]

    def describe(self, configuration: Any) -> str:
        """Return a configuration in a few words."""
        return str(configuration)

    def source(self, work: Work, configuration: Any, gpu: Gpu) -> tuple[Path, Mapping[str, str | int]]:
        """Return the file and the macros that this configuration is compiled from.

        Raises:
            KernelError: there is nothing to compile ahead.
        """
        raise KernelError(f"{self.name}: says nothing of its sources; it is compiled when it first runs.")

    def prepare(self, work: Work, operands: Operands, configuration: Any = None) -> Callable[[], Any]:
        """Return a call that computes D on the current GPU and stream and returns it; operands are uploaded here.

        Raises:
            KernelError: it cannot be launched.
        """
        raise KernelError(f"{self.name}: cannot be launched yet.")

    def emulate(self, work: Work, operands: Operands, configuration: Any = None) -> NDArray[Any]:
        """Return D as the emulator computes it.

        Raises:
            KernelError: no C++ compiler, or the kernel broke a rule.
        """
        raise KernelError(f"{self.name}: cannot be emulated yet.")

    def remember(self, work: Work, gpu: Gpu, timed: Mapping[Any, Any]) -> None:
        """Write timings of configurations, as `kernels.timing` has them, into the timing cache."""
        raise KernelError(f"{self.name}: keeps no timings.")

    def reference(self, work: Work, operands: Operands) -> NDArray[Any]:
        """Return D as the oracle has it: here the product of the dequantized operands, rounded once."""
        a = operands.values().astype(np.float64)
        held = operands.weight
        w = (dequantize(held) if isinstance(held, QTensor) else held).astype(np.float64)
        d = a @ w.T + (0 if operands.bias is None else operands.bias)
        d = np.maximum(d, 0) if work.relu else d
        return d.astype(ml_dtypes.bfloat16 if work.output == "bfloat16" else work.output)

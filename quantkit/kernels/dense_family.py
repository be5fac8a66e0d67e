"""What the families of `matmul` share: operands, oracle, epilogue, and the timing cache."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.formats.quantize import QTensor
from quantkit.kernels import device, tuning
from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.family import Family, Operands, Prediction
from quantkit.kernels.gemm import Epilogue, matmul, pack_codes, pack_weight
from quantkit.kernels.gpus import Gpu
from quantkit.kernels.heuristics import Problem
from quantkit.kernels.reference import gemm_reference
from quantkit.kernels.timing import Timing
from quantkit.kernels.timing_table import Entry, key_of
from quantkit.kernels.work import Work

FORMATS = {"int8": "int8", "fp8": "float8_e4m3fn", "bf16": "bfloat16"}
_CARRIERS = {"int8": np.int8, "float8_e4m3fn": np.uint8, "bfloat16": np.uint16}
_OUTPUTS = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}


class DenseFamily(Family):
    """A kernel that `matmul` launches: int8, fp8 and bf16 operands of one type."""

    formats = frozenset(FORMATS)

    @abstractmethod
    def rank(self, problem: Problem, gpu: Gpu) -> Sequence[Any]:
        """Return every tile, the one modelled fastest first."""

    @abstractmethod
    def estimate_us(self, problem: Problem, tile: Any, gpu: Gpu) -> float:
        """Return the modelled time with a tile."""

    @abstractmethod
    def tile_of(self, entry: Entry, problem: Problem, gpu: Gpu) -> Any:
        """Return the tile of an entry of the timing cache; None where the kernel no longer has it."""

    def predict(self, work: Work, gpu: Gpu) -> Prediction:
        """Return the tile that was timed fastest, where one was, else the one modelled fastest."""
        problem = problem_of(work)
        key = key_of(self.name, problem, kind_of(work))
        entry = tuning.table(gpu.name, local=tuning.environment()).find(key)
        tile = None if entry is None else self.tile_of(entry, problem, gpu)
        if entry is not None and tile is not None:
            # Timed at another M of the bucket: the time grows with the rows, at most.
            time_us = entry.time_us * max(1.0, work.m / entry.m)
        else:
            tile = self.rank(problem, gpu)[0]
            # The models know architectures; what this very GPU allows, its ceilings know.
            time_us = max(self.estimate_us(problem, tile, gpu), work.roofline(gpu)[0])
            entry = None
        return Prediction(
            kernel=self.name,
            configuration=tile,
            words=self.describe(tile),
            time_us=time_us,
            tuned=entry is not None,
        )

    def ranked(self, work: Work, gpu: Gpu) -> Sequence[Any]:
        """Return every tile, the one modelled fastest first."""
        return self.rank(problem_of(work), gpu)

    def prepare(self, work: Work, operands: Operands, configuration: Any = None) -> Callable[[], Any]:
        """Return a call of `matmul` that writes into an array of its own."""
        cupy = device.cupy()
        form = FORMATS[work.format]
        held = operands.weight
        weight = pack_weight(held) if isinstance(held, QTensor) else pack_codes(held, None, form)
        codes = np.ascontiguousarray(operands.activations).view(_CARRIERS[form])
        small = cupy.asarray(codes)
        a = small if len(codes) == work.m else small[cupy.arange(work.m) % len(codes)]
        scale = operands.row_scales(work.m)
        epilogue = Epilogue(
            row_scale=None if scale is None else cupy.asarray(scale.reshape(-1)),
            bias=None if operands.bias is None else cupy.asarray(operands.bias),
            activation="relu" if work.relu else None,
        )
        # CuPy has no bfloat16 of its own to count on: two bytes are two bytes.
        out = cupy.empty((work.m, work.n), _OUTPUTS[work.output])
        return lambda: matmul(
            a, weight, epilogue=epilogue, out_dtype=work.output, out=out, tile=configuration
        )

    def remember(self, work: Work, gpu: Gpu, timed: Mapping[Any, Timing]) -> None:
        """Write the fastest tile into the timing cache of this user."""
        tuning.remember(gpu.name, self.name, problem_of(work), kind_of(work), timed)

    def reference(self, work: Work, operands: Operands) -> NDArray[Any]:
        """Return D of the oracle, operation for operation."""
        row, column, codes = factors_of(operands)
        return gemm_reference(
            operands.activations,
            codes,
            row_scale=row,
            column_scale=column,
            bias=operands.bias,
            activation="relu" if work.relu else "none",
            output=work.output,
        )


def factors_of(operands: Operands) -> tuple[Any, Any, NDArray[Any]]:
    """Return the scales of rows and of columns, each an array or None, and the weight's codes."""
    held = operands.weight
    if not isinstance(held, QTensor):
        return operands.scale, None, held
    return operands.scale, np.asarray(held.qparams.effective_scale, np.float32).reshape(-1), held.qvalue


def problem_of(work: Work) -> Problem:
    """Return the problem that `matmul` solves for a work."""
    return Problem(m=work.m, n=work.n, k=work.k, format=FORMATS[work.format], output=work.output)


def kind_of(work: Work) -> EpilogueKind:
    """Return the epilogue that benchmarks run: one scale for the activations, one for each output channel."""
    activation = "relu" if work.relu else "none"
    if work.format == "bf16":
        return EpilogueKind(bias=work.bias, activation=activation)
    return EpilogueKind(row_scale="one", column_scale="each", bias=work.bias, activation=activation)

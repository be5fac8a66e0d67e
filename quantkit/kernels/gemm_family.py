"""gemm_sm90.cu as a family: int8, fp8 and bf16 on sm_90a."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.formats.quantize import QTensor
from quantkit.kernels import device, tuning
from quantkit.kernels.emulated_gemm import emulated_gemm
from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.family import Family, Operands, Prediction
from quantkit.kernels.gemm import Epilogue, PackedWeight, matmul, pack_codes, pack_weight
from quantkit.kernels.gemm_launch import KERNEL, SOURCE, launch_of
from quantkit.kernels.gpus import Gpu
from quantkit.kernels.heuristics import Problem, Tile, estimate_us, rank
from quantkit.kernels.reference import gemm_reference
from quantkit.kernels.timing import Timing
from quantkit.kernels.work import Work

_FORMATS = {"int8": "int8", "fp8": "float8_e4m3fn", "bf16": "bfloat16"}
_CARRIERS = {"int8": np.int8, "float8_e4m3fn": np.uint8, "bfloat16": np.uint16}


class GemmFamily(Family):
    """The warp-specialised kernel for Hopper."""

    name = KERNEL
    formats = frozenset(_FORMATS)
    architectures = ("sm_90a",)

    def predict(self, work: Work, gpu: Gpu) -> Prediction:
        """Return the tuned tile where its time is known, else the one modelled fastest."""
        problem, kind = _problem(work), _kind(work)
        entry = tuning.table(gpu.name, local=tuning.environment()).find(
            tuning.key_of(self.name, problem, kind)
        )
        tile = tuning.tile_of(entry, problem) if entry is not None else None
        if entry is not None and tile is not None:
            return self._prediction(tile, entry.time_us, tuned=True)
        model = gpu.time_model()
        tile = rank(problem, model)[0]
        return self._prediction(tile, estimate_us(problem, tile, model), tuned=False)

    def _prediction(self, tile: Tile, time_us: float, *, tuned: bool) -> Prediction:
        return Prediction(
            kernel=self.name, configuration=tile, words=self.describe(tile), time_us=time_us, tuned=tuned
        )

    def ranked(self, work: Work, gpu: Gpu) -> Sequence[Tile]:
        """Return every tile, and of the best two large ones other orders of tiles."""
        found = rank(_problem(work), gpu.time_model())
        if work.m < 1024:
            return found
        large = [tile for tile in found[:2] if tile.tile_m * tile.tile_n == 32768]
        orders = [replace(tile, group=group) for tile in large for group in (4, 16) if group != tile.group]
        return [*found[:6], *orders, *found[6:]]

    def describe(self, configuration: Tile) -> str:
        """Return a tile as 256x128 s4 c2 pingpong: its sides, stages, cluster, and what else it does."""
        tile = configuration
        words = [f"{tile.tile_m}x{tile.tile_n}", f"s{tile.stages}"]
        words += [f"c{tile.cluster}"] if tile.cluster > 1 else []
        words += ["pingpong"] if tile.pingpong else []
        words += ["swap"] if tile.swap else []
        return " ".join(words)

    def source(self, work: Work, configuration: Tile, gpu: Gpu) -> tuple[Path, Mapping[str, str | int]]:
        """Return gemm_sm90.cu and its macros."""
        launch = launch_of(_problem(work), configuration, _kind(work), gpu.multiprocessors)
        return SOURCE, launch.defines

    def prepare(self, work: Work, operands: Operands, configuration: Tile | None = None) -> Callable[[], Any]:
        """Return a call of `matmul` that writes into an array of its own."""
        cupy = device.cupy()
        form = _FORMATS[work.format]
        held = operands.weight
        weight: PackedWeight = (
            pack_weight(held) if isinstance(held, QTensor) else pack_codes(held, None, form)
        )
        codes = np.ascontiguousarray(operands.activations).view(_CARRIERS[form])
        small = cupy.asarray(codes)
        a = small if len(codes) == work.m else cupy.resize(small, (work.m, work.k))
        scale = operands.row_scales(work.m)
        epilogue = Epilogue(
            row_scale=None if scale is None else cupy.asarray(scale.reshape(-1)),
            bias=None if operands.bias is None else cupy.asarray(operands.bias),
            activation="relu" if work.relu else None,
        )
        # CuPy has no bfloat16 of its own to count on: two bytes are two bytes.
        wide = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}[work.output]
        out = cupy.empty((work.m, work.n), wide)
        return lambda: matmul(
            a, weight, epilogue=epilogue, out_dtype=work.output, out=out, tile=configuration
        )

    def emulate(self, work: Work, operands: Operands, configuration: Tile | None = None) -> NDArray[Any]:
        """Return D of the emulated kernel."""
        problem = _problem(work)
        row, column, codes = _factors(operands)
        return emulated_gemm(
            operands.rows(work.m),
            codes,
            problem,
            configuration or rank(problem)[0],
            row_scale=row,
            column_scale=column,
            bias=operands.bias,
            relu=work.relu,
        )

    def remember(self, work: Work, gpu: Gpu, timed: Mapping[Tile, Timing]) -> None:
        """Write the fastest tile into the timing cache of this user."""
        tuning.remember(gpu.name, self.name, _problem(work), _kind(work), timed)

    def reference(self, work: Work, operands: Operands) -> NDArray[Any]:
        """Return D of the oracle, operation for operation."""
        row, column, codes = _factors(operands)
        return gemm_reference(
            operands.activations,
            codes,
            row_scale=row,
            column_scale=column,
            bias=operands.bias,
            activation="relu" if work.relu else "none",
            output=work.output,
        )


def _factors(operands: Operands) -> tuple[Any, Any, NDArray[Any]]:
    held = operands.weight
    if not isinstance(held, QTensor):
        return operands.scale, None, held
    return operands.scale, np.asarray(held.qparams.effective_scale, np.float32).reshape(-1), held.qvalue


def _problem(work: Work) -> Problem:
    return Problem(m=work.m, n=work.n, k=work.k, format=_FORMATS[work.format], output=work.output)


def _kind(work: Work) -> EpilogueKind:
    """The epilogue that benchmarks run: one scale for the activations, one for each output channel."""
    activation = "relu" if work.relu else "none"
    if work.format == "bf16":
        return EpilogueKind(bias=work.bias, activation=activation)
    return EpilogueKind(row_scale="one", column_scale="each", bias=work.bias, activation=activation)

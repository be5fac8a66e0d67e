"""gemm_w4_sm90.cu and gemm_w4_few.cu on a test's machine, and weights for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from quantkit.formats.format import E8M0, FP4_E2M1, FP8_E4M3, INT4, UINT4
from quantkit.formats.packing import codes_from_bits
from quantkit.formats.qparams import QParams
from quantkit.formats.quantize import QTensor
from quantkit.formats.spec import QuantSpec
from quantkit.kernels.emulator import Mode, Swizzle, TensorMap
from quantkit.kernels.epilogue import EpilogueKind, EpilogueValues
from quantkit.kernels.w4.heuristics import W4Few, W4Problem, W4Tile
from quantkit.kernels.w4.launch import FEW_KERNEL, FEW_SOURCE, KERNEL, SOURCE, w4_few_launch_of, w4_launch_of
from quantkit.kernels.w4.layout import Packed4, pack4
from quantkit.kernels.w4.reference import decoded4

from ..backends import EmulatorBackend

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "int8": np.dtype(np.int8),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}
KINDS = [
    *[(form, group) for form in ("int4", "uint4") for group in (32, 64, 128, None)],
    ("nvfp4", 16),
    ("mxfp4", 32),
]
MULTIPROCESSORS = 4


def weight(
    rng: np.random.Generator,
    n: int,
    k: int,
    kind: str,
    group: int | None = None,
    *,
    zeros: bool = False,
    middling: bool = False,
    scale_type: str = "bfloat16",
    simple: bool = True,
) -> QTensor:
    """A random weight [n, k]: int4, uint4, nvfp4, mxfp4.

    simple: scales of few bits, so that products are exact. middling: zero points near the middle.
    """
    groups = 1 if group is None else -(-k // group)
    if kind == "nvfp4":
        top = 0x40 if simple else 0x7F
        codes = rng.integers(0x28 if simple else 0, top, (n, groups)).astype(np.uint8)
        codes = codes & 0xF8 if simple else codes
        scale = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        spec = QuantSpec(format=FP4_E2M1, axis=1, block_size=16, scale_format=FP8_E4M3)
        params = QParams(scale, None, np.float32(0.5) if simple else np.float32(0.0123))
    elif kind == "mxfp4":
        spread = 2 if simple else 12
        scale = np.ldexp(1.0, rng.integers(-spread, spread, (n, groups))).astype(np.float32)
        spec = QuantSpec(format=FP4_E2M1, axis=1, block_size=32, scale_format=E8M0)
        params = QParams(scale)
    else:
        fmt = INT4 if kind == "int4" else UINT4
        scale = rng.integers(1, 5, (n, groups)) / 4 if simple else rng.uniform(0.01, 0.02, (n, groups))
        scale = scale.astype(DTYPES[scale_type]).astype(np.float32)
        low, high = (6, 11) if middling else (0, 16)
        zero = rng.integers(low, high, (n, groups)) if zeros else np.full((n, groups), 8)
        zero = zero - 8 if kind == "int4" else zero
        if group is None:
            scale, zero = scale[:, 0], zero[:, 0]
        spec = QuantSpec(format=fmt, axis=0 if group is None else 1, block_size=group, symmetric=not zeros)
        params = QParams(scale, zero.astype(fmt.dtype))
    bits = rng.integers(0, 16, (n, k)).astype(np.uint8)
    return QTensor(codes_from_bits(bits, spec.format), params, spec)


def problem_of(packed: Packed4, m: int, activations: str, output: str) -> W4Problem:
    return W4Problem.of(packed.layout, m=m, activations=activations, output=output)


def run_w4(
    machine: Any,
    a: np.ndarray,
    packed: Packed4,
    tile: W4Tile | W4Few,
    *,
    output: str = "float32",
    row_scale: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    activation: str = "none",
    source: Path | None = None,
) -> np.ndarray:
    """D of the kernel that the tile is of; the output held rubbish before."""
    m, k = a.shape
    form = packed.layout
    problem = problem_of(packed, m, str(a.dtype), output)
    kind = EpilogueKind(
        row_scale="none" if row_scale is None else "each",
        column_scale="each",
        bias=bias is not None,
        activation=activation,
    )
    padded = np.zeros((m, -(-k // 16) * 16), a.dtype)
    padded[:, :k] = a
    d = np.full((m, form.n), 77, DTYPES[output])
    unused = np.zeros(16, np.float32)
    weights = [unused if part is None else part for part in (packed.codes, packed.scales, packed.zeros)]
    epilogue = [
        unused if row_scale is None else row_scale,
        packed.channel_scale,
        unused if bias is None else bias,
        *[unused] * 3,
        EpilogueValues().packed(),
        np.int32(m),
        np.int32(form.n),
    ]

    def map_of(box: tuple[int, int]) -> TensorMap:
        return TensorMap(
            array=padded, box=box, swizzle=Swizzle.BYTES_128, shape=(m, k), strides_bytes=padded.strides
        )

    if isinstance(tile, W4Few):
        few = w4_few_launch_of(problem, tile, kind)
        machine.launch(
            source or FEW_SOURCE, FEW_KERNEL, map_of(few.box), *weights, d, *epilogue, np.int32(form.planes),
            defines=few.defines, grid=few.grid, block=few.block, cluster=few.cluster, shared_bytes=few.shared_bytes,
            multiprocessors=MULTIPROCESSORS,
        )  # fmt: skip
        return d
    launch = w4_launch_of(problem, tile, kind, MULTIPROCESSORS)
    map_a = map_of(launch.box)
    map_d = (
        TensorMap(array=d, box=launch.output_box, swizzle=Swizzle.BYTES_128) if launch.tma_store else map_a
    )
    arrivals = np.zeros(launch.arrivals, np.uint32)
    machine.launch(
        source or SOURCE,
        KERNEL,
        map_a,
        map_d,
        *weights,
        d,
        *epilogue,
        np.zeros(launch.partials_bytes, np.uint8),
        arrivals,
        np.int32(form.planes),
        np.int32(launch.whole),
        np.int32(launch.share),
        np.int32(launch.extra),
        defines=launch.defines,
        grid=launch.grid,
        block=launch.block,
        cluster=launch.cluster,
        shared_bytes=launch.shared_bytes,
        multiprocessors=MULTIPROCESSORS,
    )
    assert not arrivals.any(), "the next launch counts from zero"
    return d


Run = Callable[[Any, np.ndarray, Packed4], np.ndarray]  # machine, activations, weight


def assert_only_the_accumulator_loses(run: Run, machine: Any, form: str, k: int) -> None:
    """Of real values: each instruction adds sixteen products with at least 21 bits of the largest."""
    rng = np.random.default_rng(5)
    m, n = 14, 130
    packed = pack4(weight(rng, n, k, form, 128 if form == "int4" else 16, simple=False))
    a = rng.standard_normal((m, k)).astype(DTYPES["bfloat16"])
    d = run(machine, a, packed)
    w = decoded4(packed, "bfloat16") * packed.channel_scale.astype(np.float64)[:, None]
    wide = a.astype(np.float64)
    assert np.all(np.abs(d - wide @ w.T) <= k / 16 * 2.0**-21 * (np.abs(wide) @ np.abs(w).T))


def assert_no_schedule_changes_the_sums(run: Run, n: int) -> None:
    """Shuffled schedules end in another order; sums of real values would show it."""
    rng = np.random.default_rng(2)
    packed = pack4(weight(rng, n, 1500, "int4", 128, simple=False))
    a = rng.standard_normal((9, 1500)).astype(DTYPES["bfloat16"])

    class Seeded(EmulatorBackend):
        def __init__(self, seed: int) -> None:
            super().__init__(Mode.SHUFFLED)
            self.seed = seed

        def launch(self, *arguments, **options):
            return super().launch(*arguments, seed=self.seed, **options)

    found = [run(Seeded(seed), a, packed) for seed in range(4)]
    for d in found[1:]:
        np.testing.assert_array_equal(d, found[0])

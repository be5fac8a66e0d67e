"""gemm_sm90.cu against its oracle, in every mode of the emulator and on a GPU where there is one."""

import math

import ml_dtypes
import numpy as np
import pytest

from quantkit.kernels.compile import compile_kernel, is_available
from quantkit.kernels.emulator import Swizzle, TensorMap
from quantkit.kernels.gemm_launch import KERNEL, SOURCE, EpilogueKind, launch_of
from quantkit.kernels.heuristics import (
    ITEM_BYTES,
    OUTPUT_BYTES,
    SHARED_LIMIT,
    Problem,
    Tile,
    candidates,
    choose,
)
from quantkit.kernels.reference import gemm_reference

from .sass import opcodes, tools

DTYPES = {
    "int8": np.dtype(np.int8),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "int32": np.dtype(np.int32),
}
FULL = EpilogueKind(row_scale="each", column_scale="each", bias=True, relu=True)
EACH = EpilogueKind(row_scale="each", column_scale="each")
ONE = EpilogueKind(row_scale="one", column_scale="one", bias=True)
NONE = EpilogueKind()

WIDE = Tile(blocks_of_64=1, tile_n=256, stages=4)
PAIR = Tile(blocks_of_64=1, tile_n=128, stages=3, cluster=2)
TALL = Tile(blocks_of_64=2, tile_n=128, stages=3)
TURNS = Tile(blocks_of_64=2, tile_n=128, stages=4, cluster=2, pingpong=True)
SMALL_TURNS = Tile(blocks_of_64=1, tile_n=128, stages=3, group=2, pingpong=True)
FEW = Tile(blocks_of_64=1, tile_n=16, stages=6, consumers=1, swap=True)
SOME = Tile(blocks_of_64=1, tile_n=64, stages=5, swap=True)
SWAPPED = Tile(blocks_of_64=1, tile_n=128, stages=3, swap=True)

# Ragged shapes, formats, outputs, epilogues and tiles, so that every pair of format and output, of tile and kind of
# store (rows of D that are whole 16 bytes, or not), and of tile and epilogue occurs.
CASES = [
    (1, 8, 16, "int8", "bfloat16", EACH, FEW),
    (1, 130, 48, "float8_e4m3fn", "float32", FULL, FEW),
    (3, 288, 272, "int8", "int32", NONE, FEW),
    (3, 130, 272, "bfloat16", "float16", ONE, SOME),
    (17, 288, 48, "float8_e4m3fn", "bfloat16", FULL, SOME),
    (17, 8, 272, "int8", "float32", EACH, SWAPPED),
    (64, 130, 16, "bfloat16", "bfloat16", FULL, SWAPPED),
    (130, 288, 48, "int8", "float16", FULL, SWAPPED),
    (64, 288, 272, "float8_e4m3fn", "float16", EACH, PAIR),
    (130, 130, 272, "int8", "int32", NONE, PAIR),
    (300, 288, 48, "bfloat16", "float32", ONE, PAIR),
    (130, 288, 272, "int8", "bfloat16", FULL, WIDE),
    (64, 130, 48, "bfloat16", "float32", EACH, WIDE),
    (130, 8, 272, "float8_e4m3fn", "bfloat16", ONE, TALL),
    (17, 130, 272, "int8", "float16", FULL, TALL),
    (300, 264, 400, "int8", "bfloat16", EACH, TURNS),
    (130, 130, 48, "float8_e4m3fn", "bfloat16", FULL, TURNS),
    (300, 288, 272, "float8_e4m3fn", "float32", FULL, SMALL_TURNS),
    (130, 136, 700, "bfloat16", "bfloat16", NONE, SMALL_TURNS),
]


def gemm(machine, a: np.ndarray, b: np.ndarray, problem: Problem, kind: EpilogueKind, tile: Tile, factors):
    """D of the kernel; the rows of a and b start at multiples of 16 bytes, the output held rubbish before."""
    multiprocessors = 4
    launch = launch_of(problem, tile, kind, multiprocessors)
    operands = []
    for matrix in (a, b):
        rows, k = matrix.shape
        padded = np.zeros((rows, math.ceil(k * matrix.itemsize / 16) * 16 // matrix.itemsize), matrix.dtype)
        padded[:, :k] = matrix
        operands.append(padded)
    if launch.swap:
        operands.reverse()
    d = np.full((problem.m, problem.n), 77, DTYPES[problem.output])
    maps = [
        TensorMap(
            array=array,
            box=box,
            swizzle=Swizzle.BYTES_128,
            shape=(array.shape[0], problem.k),
            strides_bytes=array.strides,
        )
        for array, box in zip(operands, (launch.first_box, launch.second_box), strict=True)
    ]
    stored = (
        TensorMap(array=d, box=launch.output_box, swizzle=Swizzle.BYTES_128) if launch.tma_store else maps[0]
    )
    machine.launch(
        SOURCE,
        KERNEL,
        *maps,
        stored,
        d,
        *factors,
        np.int32(problem.m),
        np.int32(problem.n),
        np.int32(problem.row_bytes),
        defines=launch.defines,
        grid=launch.grid,
        block=launch.block,
        cluster=launch.cluster,
        shared_bytes=launch.shared_bytes,
        multiprocessors=multiprocessors,
    )
    return d


def factors_of(rng: np.random.Generator, m: int, n: int, kind: EpilogueKind):
    row = rng.random(m if kind.row_scale == "each" else 1, np.float32) + np.float32(0.5)
    column = rng.random(n if kind.column_scale == "each" else 1, np.float32) + np.float32(0.5)
    return row, column, rng.standard_normal(n, np.float32)


def oracle(a, b, factors, kind: EpilogueKind, output: str) -> np.ndarray:
    row, column, bias = factors
    return gemm_reference(
        a,
        b,
        row_scale=None if kind.row_scale == "none" else row,
        column_scale=None if kind.column_scale == "none" else column,
        bias=bias if kind.bias else None,
        relu=kind.relu,
        output=output,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[:5])))
def test_integers_come_out_exact_in_every_format_on_ragged_shapes(machine, case):
    m, n, k, form, output, kind, tile = case
    rng = np.random.default_rng(m + n + k)
    limit = (-128, 128) if form == "int8" else (-4, 5)
    a, b = (rng.integers(*limit, (rows, k)).astype(np.float32).astype(DTYPES[form]) for rows in (m, n))
    factors = factors_of(rng, m, n, kind)
    d = gemm(machine, a, b, Problem(m=m, n=n, k=k, format=form, output=output), kind, tile, factors)
    np.testing.assert_array_equal(d, oracle(a, b, factors, kind, output))


@pytest.mark.parametrize(("form", "bits"), [("bfloat16", 21), ("float8_e4m3fn", 12)])
def test_real_values_stay_within_what_the_accumulator_loses(machine, form, bits):
    """Each instruction adds its products with at least `bits` of the largest one: K / depth roundings of the sum."""
    m, n, k = 70, 136, 512
    rng = np.random.default_rng(5)
    a, b = (rng.standard_normal((rows, k)).astype(DTYPES[form]) for rows in (m, n))
    problem = Problem(m=m, n=n, k=k, format=form, output="float32")
    d = gemm(machine, a, b, problem, NONE, PAIR, factors_of(rng, m, n, NONE))
    wide = a.astype(np.float64), b.astype(np.float64)
    magnitude = np.abs(wide[0]) @ np.abs(wide[1]).T
    instructions = k * ITEM_BYTES[form] / 32
    assert np.all(np.abs(d - wide[0] @ wide[1].T) <= instructions * magnitude * 2.0**-bits)


def test_a_nan_survives_relu(machine):
    a, b = np.ones((4, 32), DTYPES["bfloat16"]), np.ones((8, 32), DTYPES["bfloat16"])
    a[1, 3] = np.nan
    kind = EpilogueKind(relu=True)
    problem = Problem(m=4, n=8, k=32, format="bfloat16", output="float32")
    d = gemm(machine, a, b, problem, kind, FEW, factors_of(np.random.default_rng(0), 4, 8, kind))
    assert np.isnan(d[1]).all()
    np.testing.assert_array_equal(d[[0, 2, 3]], 32)


# ---- what is built -----------------------------------------------------------------------------------------------

SHIPPED = [
    (Problem(m=m, n=8192, k=8192, format=form, output="bfloat16"), kind)
    for form, kind in (("int8", FULL), ("float8_e4m3fn", EACH), ("bfloat16", NONE))
    for m in (16, 64, 256, 8192)
]
OPCODES = {"int8": "IGMMA", "float8_e4m3fn": "QGMMA", "bfloat16": "HGMMA"}


@pytest.mark.skipif(
    not is_available() or tools() is None, reason="NVRTC or its disassembler is not installed"
)
@pytest.mark.parametrize(("problem", "kind"), SHIPPED, ids=str)
def test_chosen_configurations_run_on_the_tensor_core_and_keep_to_registers(problem, kind, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "gemm-cubins"
    built = compile_kernel(
        SOURCE, arch="sm_90a", defines=launch_of(problem, choose(problem), kind, 132).defines, cache=cache
    )
    found = opcodes(built.cubin)
    assert {name for name in found if name.endswith("MMA")} == {OPCODES[problem.format]}
    assert found["LDL"] == found["STL"] == built.spill_bytes == 0
    assert not built.warnings


# ---- which tile --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", OUTPUT_BYTES)
def test_every_candidate_fits_shared_memory_and_wgmma(output):
    for tile in candidates(Problem(m=100, n=100, k=100, format="int8", output=output)):
        assert tile.shared_bytes <= SHARED_LIMIT
        assert tile.stages >= 2
        assert tile.tile_m <= 256  # a box of TMA
        assert tile.tile_n % 16 == 0 and tile.tile_n <= 256


def test_few_rows_put_the_weights_on_the_side_of_64():
    for m in (1, 16, 64):
        assert choose(Problem(m=m, n=8192, k=8192, format="int8", output="bfloat16")).swap


def test_every_shape_gets_a_tile():
    for m, n, k in [(1, 1, 1), (1, 100000, 7), (100000, 1, 7), (5, 5, 100000)]:
        tile = choose(Problem(m=m, n=n, k=k, format="bfloat16", output="float32"))
        assert tile.clusters(Problem(m=m, n=n, k=k, format="bfloat16", output="float32"), 132) >= 1

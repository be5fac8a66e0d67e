"""gemm_blocks_sm90.cu against its oracle, in every mode of the emulator and on a GPU where there is one."""

from dataclasses import asdict, replace
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import KernelError
from quantkit.formats import FP8_E4M3, QParams, QTensor, QuantSpec, qparams_from_range, quantize, range_of
from quantkit.formats.format import E8M0
from quantkit.formats.presets import ACTIVATION_SPECS, weight_spec
from quantkit.kernels.blocks.heuristics import (
    BLOCKS,
    BlocksProblem,
    BlocksTile,
    candidates,
    choose,
    estimate_us,
)
from quantkit.kernels.blocks.launch import launch_of
from quantkit.kernels.blocks.layout import pack_blocks, stored_scales
from quantkit.kernels.blocks.matmul import tile_of
from quantkit.kernels.blocks.reference import fused_multiply_add
from quantkit.kernels.emulator import Mode
from quantkit.kernels.epilogue import OUTPUT_BYTES, EpilogueKind
from quantkit.kernels.heuristics import SHARED_LIMIT, Tile
from quantkit.kernels.timing_table import Entry

from .. import gemms
from ..backends import EmulatorBackend, gpu
from ..pairs import pairwise
from .cases import E4M3, Case, Tensors, oracle, run, tensors_of

KINDS = {
    "nothing": EpilogueKind(),
    "relu": EpilogueKind(row_scale="each", column_scale="each", bias=True, activation="relu"),
    "resnet": EpilogueKind(
        column_scale="each", bias=True, residual="before", residual_type="int8", activation="clip"
    ),
    "transformer": EpilogueKind(row_scale="one", residual="after", residual_type="bfloat16"),
    "float residual": EpilogueKind(bias=True, residual="after", residual_type="float32"),
}
TILES = {
    "tall": BlocksTile(blocks_of_64=2, tile_n=128, stages=3, buffers=3),
    "tall pair": BlocksTile(blocks_of_64=2, tile_n=128, stages=2, cluster=2, buffers=3),
    "square": BlocksTile(blocks_of_64=1, tile_n=128, stages=3),
    "narrow pair": BlocksTile(blocks_of_64=1, tile_n=64, stages=3, cluster=2, group=1),
    "few": BlocksTile(blocks_of_64=1, tile_n=16, stages=5, consumers=1, swap=True),
    "some": BlocksTile(blocks_of_64=1, tile_n=64, stages=4, swap=True),
    "few of two": BlocksTile(blocks_of_64=1, tile_n=16, stages=3, consumers=1, swap=True, split=2),
    "some of two": BlocksTile(blocks_of_64=1, tile_n=64, stages=3, swap=True, split=2),
    "few of four": BlocksTile(blocks_of_64=1, tile_n=16, stages=3, swap=True, split=4),
    "swapped": BlocksTile(blocks_of_64=2, tile_n=128, stages=3, swap=True),
}
FACTORS: dict[str, list[Any]] = {
    "m": [1, 17, 130, 257],
    "n": [1, 8, 130, 520],
    "k": [16, 130, 272, 1040, 1700],
    "block": [128, 32],
    "output": ["float32", "bfloat16", "float16", "int8", "float8_e4m3fn"],
    "kind": list(KINDS),
    "tile": list(TILES),
    "mode": list(Mode),
}


def legal(chosen: Any) -> bool:
    """Whether the emulator multiplies it in a tenth of a second, and a stored row of the tile is whole."""
    if "tile" not in chosen:
        return True
    tile = TILES[chosen["tile"]]
    m, n, k = chosen.get("m", 1), chosen.get("n", 1), chosen.get("k", 16)
    first, second = (n, m) if tile.swap else (m, n)
    area = -(-first // tile.tile_m) * tile.tile_m * -(-second // tile.tile_n) * tile.tile_n
    if chosen.get("k", 9999) <= 512 * (tile.split - 1):
        return False
    return area * k <= 70e6


def case_of(row: dict[str, Any]) -> Case:
    chosen = {**row, "kind": KINDS[row["kind"]], "tile": TILES[row["tile"]]}
    return Case(**{name: value for name, value in chosen.items() if name != "mode"})


CASES = [(row["mode"], case_of(row)) for row in pairwise(FACTORS, legal)]
IDS = [f"{mode.name.lower()} {case}" for mode, case in CASES]


def check(case: Case, d: np.ndarray) -> None:
    np.testing.assert_array_equal(d.view(np.uint8), oracle(case).view(np.uint8))


@pytest.mark.parametrize(("mode", "case"), CASES, ids=IDS)
def test_every_pair_of_shape_block_output_epilogue_tile_and_mode_is_exact(compiler, mode, case):
    check(case, run(EmulatorBackend(mode), case))


@pytest.mark.skipif(gpu() is None, reason="no GPU")
@pytest.mark.parametrize("case", [case for _, case in CASES], ids=str)
def test_a_gpu_gives_what_the_emulator_gives(case):
    check(case, run(gpu(), case))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for _, case in CASES], ids=str)
def test_every_case_is_exact_in_every_mode(machine, case):
    check(case, run(machine, case))


@pytest.mark.slow
@pytest.mark.parametrize("block", [128, 32])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", [(70, 200, 2880), (3, 1, 4096), (257, 130, 1), (129, 513, 640)])
def test_long_and_odd_k_are_exact(machine, block, tile, shape):
    m, n, k = shape
    if k <= 512 * (TILES[tile].split - 1):
        pytest.skip("no part of K without a step")
    case = Case(m=m, n=n, k=k, block=block, output="float32", tile=TILES[tile])
    check(case, run(machine, case))


# ---- what the numbers are ----------------------------------------------------------------------------------------


def real(case: Case) -> Tensors:
    """Normal numbers, quantized in blocks."""
    rng = np.random.default_rng(case.seed)
    name = case.problem.format
    t = tensors_of(case)
    a, w = (rng.standard_normal((rows, case.k)).astype(np.float32) for rows in (case.m, case.n))
    a[:, ::7] *= 50  # blocks with an outlier
    specs = ACTIVATION_SPECS[name], weight_spec(name, channel_axis=0, contraction_axis=1)
    qa, qw = (
        quantize(x, qparams_from_range(range_of(x, spec), spec), spec)
        for x, spec in zip((a, w), specs, strict=True)
    )
    return replace(t, a=qa.qvalue, w=qw.qvalue, a_scale=qa.qparams.scale, w_scale=qw.qparams.scale)


@pytest.mark.parametrize("block", [128, 32])
@pytest.mark.parametrize("tile", ["tall pair", "some"])
def test_real_values_stay_within_what_a_block_loses(compiler, block, tile):
    """fp8's accumulator cuts 13 bits below the largest of what it adds, in every instruction."""
    case = Case(m=40, n=136, k=2048, block=block, output="float32", tile=TILES[tile])
    t = real(case)
    d = run(EmulatorBackend(Mode.EAGER), case, t).astype(np.float64)
    wide_a, wide_w = t.a.astype(np.float64), t.w.astype(np.float64)
    spread_w = t.w_scale if block == 32 else np.repeat(t.w_scale, 128, axis=0)[: case.n]
    want, bound = np.zeros((case.m, case.n)), np.zeros((case.m, case.n))
    for b in range(case.k // block):
        part = slice(b * block, (b + 1) * block)
        scale = t.a_scale[:, b, None].astype(np.float64) * spread_w[None, :, b]
        size = np.abs(wide_a[:, part]) @ np.abs(wide_w[:, part]).T
        want += scale * (wide_a[:, part] @ wide_w[:, part].T)
        # 33 terms of each of the instructions, each cut below 2^-13 of the largest, which is at most their sum.
        bound += scale * size * (block // 32) * 33 * 2.0**-13
    error = np.abs(d - want)
    assert np.all(error <= bound + np.abs(want) * 2.0**-20)


def test_promotion_keeps_what_one_long_sum_loses(compiler):
    case = Case(m=64, n=64, k=2048, block=128, output="float32", tile=TILES["square"])
    t = real(case)
    t = replace(t, a_scale=np.ones_like(t.a_scale), w_scale=np.ones_like(t.w_scale))
    long = gemms.Case(
        m=64, n=64, k=2048, format="float8_e4m3fn", output="float32",
        tile=Tile(blocks_of_64=1, tile_n=128, stages=3),
    )  # fmt: skip
    machine, want = EmulatorBackend(Mode.EAGER), oracle(case, t).astype(np.float64)
    promoted = np.linalg.norm(run(machine, case, t) - want)
    unpromoted = np.linalg.norm(
        gemms.run(machine, long, replace(gemms.tensors_of(long), a=t.a, b=t.w)) - want
    )
    assert promoted < unpromoted / 4


def test_every_scale_of_mx_is_decoded_as_the_format_says(compiler):
    """2^-127 … 2^127, of which the least is no normal number; the other operand's scale brings the product back."""
    codes = np.arange(255, dtype=np.uint8)
    scale = np.resize(codes, (16, 255))[:, ::-1].copy().view(E8M0.dtype).astype(np.float32)
    case = Case(m=1, n=16, k=255 * 32, block=32, output="float32", tile=TILES["few"])
    t = tensors_of(case)
    a_scale = codes.reshape(1, -1).copy().view(E8M0.dtype).astype(np.float32)
    t = replace(t, a_scale=a_scale, w_scale=scale)
    np.testing.assert_array_equal(run(EmulatorBackend(Mode.EAGER), case, t), oracle(case, t))


def test_nan_scales_and_codes_give_nan_in_their_row_alone(compiler):
    case = Case(m=20, n=40, k=256, block=32, output="float32", tile=TILES["square"])
    t = tensors_of(case)
    a_scale, w = t.a_scale.copy(), t.w.copy()
    a_scale[3, 5], w[7, 100] = np.nan, np.nan
    d = run(EmulatorBackend(Mode.EAGER), case, replace(t, a_scale=a_scale, w=w))
    expected = np.zeros((20, 40), bool)
    expected[3, :] = expected[:, 7] = True
    np.testing.assert_array_equal(np.isnan(d), expected)
    np.testing.assert_array_equal(d[~expected], oracle(case)[~expected])


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_the_oracles_multiply_add_rounds_once(seed):
    rng = np.random.default_rng(seed)
    x, y, z = (
        np.ldexp(rng.standard_normal(64), rng.integers(-20, 20, 64)).astype(np.float32) for _ in range(3)
    )
    z[:8] = -(x * y)[:8]  # what cancels shows every bit
    for got, *abc in zip(fused_multiply_add(x, y, z), x, y, z, strict=True):
        a, b, c = (Fraction(float(v)) for v in abc)
        true = a * b + c
        near = (np.nextafter(got, np.float32(side)) for side in (-np.inf, np.inf))
        assert all(abs(Fraction(float(got)) - true) <= abs(Fraction(float(other)) - true) for other in near)


# ---- packing -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 600), st.sampled_from(["fp8-block", "mxfp8"]))
@settings(max_examples=25, deadline=None)
def test_packing_keeps_every_code_and_scale_and_adds_no_more_than_row_ends(n, k, name):
    rng = np.random.default_rng([n, k])
    spec = weight_spec(name, channel_axis=0, contraction_axis=1)
    x = rng.standard_normal((n, k)).astype(np.float32)
    weight = quantize(x, qparams_from_range(range_of(x, spec), spec), spec)
    packed = pack_blocks(weight)
    np.testing.assert_array_equal(packed.codes[:, :k].view(E4M3).view(np.uint8), weight.qvalue.view(np.uint8))
    rows, blocks = weight.qparams.scale.shape
    held = packed.scales[:, : blocks * (1 if packed.block == 32 else 4)].copy()
    scales = held.view(E8M0.dtype if packed.block == 32 else np.float32).astype(np.float32)
    np.testing.assert_array_equal(scales, weight.qparams.scale)
    assert packed.codes.nbytes + packed.scales.nbytes <= n * (k + 15) + rows * (held.shape[1] + 15)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(format=FP8_E4M3, axis=0),
        QuantSpec(format=FP8_E4M3, axis=1, block_size=128),
        QuantSpec(format=FP8_E4M3, axis=0, block_size=32, scale_format=E8M0),
        QuantSpec(format=FP8_E4M3, block_shape=(64, 128)),
    ],
    ids=str,
)
def test_other_blocks_are_refused_by_name(spec):
    weight = QTensor(np.zeros((8, 256), ml_dtypes.float8_e4m3fn), QParams(np.ones((8, 2), np.float32)), spec)
    with pytest.raises(KernelError, match="128×128"):
        pack_blocks(weight)


def test_a_split_leaves_no_block_without_work():
    problem = BlocksProblem(m=8, n=64, k=512, block=128, output="bfloat16")
    with pytest.raises(KernelError, match="split into 1 at most"):
        launch_of(problem, TILES["few of two"], EpilogueKind(), 132)


def test_scales_of_a_row_start_at_whole_16_bytes():
    assert stored_scales(np.ones((3, 5), np.float32), 128).shape == (3, 32)
    assert stored_scales(np.ones((3, 5), np.float32), 32).shape == (3, 16)


# ---- which tile --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS.values())
@pytest.mark.parametrize("output", [name for name in OUTPUT_BYTES if name != "int32"])
def test_every_candidate_fits_shared_memory_and_wgmma(output, block):
    for tile in candidates(BlocksProblem(m=100, n=100, k=10000, block=block, output=output)):
        assert tile.shared_bytes(block) <= SHARED_LIMIT
        assert tile.stages >= 2
        assert tile.tile_m // tile.cluster <= 256 and tile.tile_n <= 256  # a box of TMA
        assert tile.tile_n % 16 == 0
        if not tile.swap:
            assert tile.tile_n % {1: 64, 2: 64, 4: 32}[OUTPUT_BYTES[output]] == 0
        else:
            assert tile.buffers == 2


def test_few_rows_put_the_weights_on_the_side_of_64():
    for m in (1, 16, 64):
        assert choose(BlocksProblem(m=m, n=8192, k=8192, block=128, output="bfloat16")).swap


def test_promotion_hides_behind_products_in_blocks_of_128_and_binds_in_mx():
    large = {
        block: BlocksProblem(m=8192, n=8192, k=8192, block=block, output="bfloat16") for block in (128, 32)
    }
    times = {block: estimate_us(problem, choose(problem)) for block, problem in large.items()}
    assert times[32] > 2 * times[128]


def test_a_tile_comes_back_from_the_timing_cache_and_a_stranger_does_not():
    problem = BlocksProblem(m=64, n=8192, k=8192, block=32, output="bfloat16")
    facts = {"time_us": 1.0, "q1_us": 1.0, "q3_us": 1.0, "m": 64, "source": ""}
    for tile in candidates(problem):
        assert tile_of(Entry(configuration=asdict(tile), **facts), problem) == tile
    odd = asdict(replace(choose(problem), tile_n=80))
    assert tile_of(Entry(configuration=odd, **facts), problem) is None
    assert tile_of(Entry(configuration={"slices": 3}, **facts), problem) is None

"""gemm_sm90.cu against its oracle, in every mode of the emulator and on a GPU where there is one."""

import itertools
import random
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import KernelError
from quantkit.kernels.compile import compile_kernel, is_available
from quantkit.kernels.emulator import Mode
from quantkit.kernels.epilogue import OUTPUT_BYTES, EpilogueKind, EpilogueValues
from quantkit.kernels.gemm_launch import SOURCE, launch_of
from quantkit.kernels.heuristics import (
    ITEM_BYTES,
    REGISTER_LIMIT,
    SHARED_LIMIT,
    Device,
    Problem,
    Tile,
    candidates,
    choose,
    estimate_us,
    shares_of,
)
from quantkit.kernels.reference import residual_reference

from .backends import EmulatorBackend, gpu
from .gemms import DTYPES, MULTIPROCESSORS, Case, Tensors, oracle, run, tensors_of
from .sass import listing, opcodes, tools

# What the epilogue is asked for: every factor in every granularity, every activation, every type of residual.
KINDS = {
    "nothing": EpilogueKind(),
    "zero point": EpilogueKind(zero_point="one"),
    "scales": EpilogueKind(row_scale="each", column_scale="each"),
    "one scale": EpilogueKind(row_scale="one", column_scale="one", bias=True),
    "relu": EpilogueKind(row_scale="each", column_scale="each", bias=True, activation="relu"),
    "asymmetric": EpilogueKind(
        row_scale="each", column_scale="each", zero_point="each", bias=True, output_zero_point=True
    ),
    "resnet": EpilogueKind(
        row_scale="one", column_scale="each", bias=True, residual="before", residual_type="int8",
        activation="clip",
    ),
    "transformer": EpilogueKind(
        row_scale="each", column_scale="one", bias=True, residual="after", activation="gelu"
    ),
    "gelu tanh": EpilogueKind(
        row_scale="one", column_scale="one", residual="before", residual_type="float16", activation="gelu_tanh"
    ),
    "silu": EpilogueKind(row_scale="each", column_scale="each", activation="silu"),
    "float residual": EpilogueKind(
        row_scale="one", zero_point="one", residual="after", residual_type="float32"
    ),
    "fp8 residual": EpilogueKind(
        column_scale="each", residual="after", residual_type="float8_e4m3fn", activation="clip"
    ),
}  # fmt: skip
APPROXIMATE = {"gelu", "gelu_tanh", "silu"}

SWAPPED = Tile(blocks_of_64=1, tile_n=128, stages=3, swap=True)
PAIR = Tile(blocks_of_64=1, tile_n=128, stages=3, cluster=2)
FEW = Tile(blocks_of_64=1, tile_n=16, stages=6, consumers=1, swap=True)
TILES = {
    "wide": Tile(blocks_of_64=1, tile_n=256, stages=3),
    "pair": PAIR,
    "tall": Tile(blocks_of_64=2, tile_n=128, stages=3),
    "narrow": Tile(blocks_of_64=2, tile_n=64, stages=3),
    "turns": Tile(blocks_of_64=2, tile_n=128, stages=4, cluster=2, pingpong=True),
    "small turns": Tile(blocks_of_64=1, tile_n=128, stages=3, group=2, pingpong=True),
    "few": FEW,
    "some": Tile(blocks_of_64=1, tile_n=64, stages=5, swap=True),
    "swapped": SWAPPED,
    "few of two": Tile(blocks_of_64=1, tile_n=16, stages=3, consumers=1, swap=True, split=2),
    "some of two": Tile(blocks_of_64=1, tile_n=64, stages=3, swap=True, split=2),
    "wide of two": Tile(blocks_of_64=1, tile_n=256, stages=2, swap=True, split=2),
    "few in shares": Tile(blocks_of_64=1, tile_n=16, stages=3, consumers=1, swap=True, stream=True),
    "some in shares": Tile(blocks_of_64=1, tile_n=64, stages=3, swap=True, stream=True),
    "many in shares": Tile(blocks_of_64=1, tile_n=128, stages=2, swap=True, stream=True),
    "some of four": Tile(blocks_of_64=1, tile_n=64, stages=3, consumers=1, swap=True, split=4),
}
FACTORS: dict[str, list[Any]] = {
    "m": [1, 3, 16, 17, 64, 130, 257],
    "n": [8, 130, 2880],
    "k": [16, 48, 272, 2880],
    "format": ["int8", "float8_e4m3fn", "bfloat16"],
    "output": list(OUTPUT_BYTES),
    "kind": list(KINDS),
    "tile": list(TILES),
    "mode": list(Mode),
}


def legal(chosen: dict[str, Any]) -> bool:
    """Whether a kernel computes a row of factors, or can with what is still to be chosen."""
    get = chosen.get
    kind = KINDS[chosen["kind"]] if "kind" in chosen else None
    tile = TILES[chosen["tile"]] if "tile" in chosen else None
    integer = get("format", "int8") == "int8"
    if kind is not None:
        if kind.zero_point != "none" and not integer:
            return False
        if kind.output_zero_point and get("output", "int8") != "int8":
            return False
        if get("output") == "int32" and chosen["kind"] not in ("nothing", "zero point"):
            return False
    if get("output") == "int32" and not integer:
        return False
    if tile is None:
        return True
    m, n, k = get("m", 1), get("n", 8), get("k", 16)
    first, second = (n, m) if tile.swap else (m, n)
    area = -(-first // tile.tile_m) * tile.tile_m * -(-second // tile.tile_n) * tile.tile_n
    if area * k > 250e6:  # what the emulator multiplies in a tenth of a second
        return False
    wide = {1: 64, 2: 64, 4: 32}[OUTPUT_BYTES[get("output", "int32")]]
    if not tile.swap and tile.tile_n % wide:
        return False
    k_bytes = get("k", 2880) * ITEM_BYTES[get("format", "bfloat16")]
    return tile.split <= -(-k_bytes // 128)


@cache
def pairwise() -> tuple[dict[str, Any], ...]:
    """Rows of factors in which every legal pair of two factors' values stands together at least once.

    Greedy: each row starts with a pair not seen yet, and each further factor takes the value that adds most pairs.
    """
    draw = random.Random(0)
    # A dictionary, for its order is the same in every run.
    pairs = dict.fromkeys(
        ((f, x), (g, y))
        for f, g in itertools.combinations(FACTORS, 2)
        for x, y in itertools.product(FACTORS[f], FACTORS[g])
        if legal({f: x, g: y})
    )

    def unseen(row: dict[str, Any]) -> list[Any]:
        ordered = [(factor, row[factor]) for factor in FACTORS if factor in row]
        return [pair for pair in itertools.combinations(ordered, 2) if pair in pairs]

    rows = []
    while pairs:
        best: dict[str, Any] = {}
        for _ in range(8):
            row = dict(draw.choice(list(pairs)))
            others = [factor for factor in FACTORS if factor not in row]
            for factor in draw.sample(others, len(others)):
                values = [{**row, factor: value} for value in FACTORS[factor]]
                row = max(filter(legal, values), key=lambda r: (len(unseen(r)), draw.random()), default={})
                if not row:
                    break
            if len(unseen(row)) > len(unseen(best)):
                best = row
        if best:
            rows.append(best)
            for pair in unseen(best):
                del pairs[pair]
    return tuple(rows)


def case_of(row: dict[str, Any]) -> Case:
    chosen = {**row, "kind": KINDS[row["kind"]], "tile": TILES[row["tile"]]}
    return Case(**{name: value for name, value in chosen.items() if name != "mode"})


CASES = [(row["mode"], case_of(row)) for row in pairwise()]
IDS = [f"{mode.name.lower()} {case}" for mode, case in CASES]


def check(case: Case, d: np.ndarray) -> None:
    """Equal to the oracle bit for bit; with Gelu or Silu within their bound, and the output's rounding."""
    if case.kind.activation not in APPROXIMATE:
        np.testing.assert_array_equal(d.view(np.uint8), oracle(case).view(np.uint8))
        return
    t = tensors_of(case)
    want = oracle(case, t, "float32").astype(np.float64)
    magnitude = np.abs(want)
    if case.kind.residual == "after":
        magnitude = magnitude + np.abs(residual_reference(t.residual, t.values))
    bound = magnitude * 2.0**-15 + 2.0**-120
    got = d.astype(np.float64)
    if case.output == "int8":
        scaled = np.clip(want / t.values.scale, -128, 127)
        assert np.all(np.abs(got - scaled) <= 0.5 + bound / t.values.scale)
    elif case.output == "float8_e4m3fn":
        scaled = np.clip(want / t.values.scale, -448, 448)
        assert np.all(np.abs(got - scaled) <= np.abs(scaled) * 2.0**-4 + 2.0**-10 + bound / t.values.scale)
    else:
        bits, least = {"float32": (24, -150), "bfloat16": (8, -134), "float16": (11, -25)}[case.output]
        assert np.all(np.abs(got - want) <= bound + (magnitude + bound) * 2.0**-bits + 2.0**least)


@pytest.mark.parametrize(("mode", "case"), CASES, ids=IDS)
def test_every_pair_of_shape_format_output_epilogue_tile_and_mode_is_exact(compiler, mode, case):
    check(case, run(EmulatorBackend(mode), case))


@pytest.mark.parametrize("form", ITEM_BYTES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (2, 1, 17), (1, 9, 3), (5, 3, 1), (70, 1, 130)])
def test_nothing_is_too_small(compiler, form, m, n, k):
    problem = Problem(m=m, n=n, k=k, format=form, output="bfloat16")
    tile = choose(problem, Device(multiprocessors=4))
    case = Case(m=m, n=n, k=k, format=form, output="bfloat16", kind=KINDS["relu"], tile=tile)
    check(case, run(EmulatorBackend(Mode.BOTH), case))


@pytest.mark.skipif(gpu() is None, reason="no GPU")
@pytest.mark.parametrize("case", [case for _, case in CASES], ids=str)
def test_a_gpu_gives_what_the_emulator_gives(case):
    check(case, run(gpu(), case))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for _, case in CASES], ids=str)
def test_every_case_is_exact_in_every_mode(machine, case):
    check(case, run(machine, case))


@pytest.mark.parametrize(("form", "bits"), [("bfloat16", 21), ("float8_e4m3fn", 12)])
@pytest.mark.parametrize("tile", ["pair", "some of four"])
def test_real_values_stay_within_what_the_accumulator_loses(machine, form, bits, tile):
    """Each instruction adds its products with at least `bits` of the largest one: K / depth roundings of the sum."""
    case = Case(m=70, n=136, k=512, format=form, output="float32", tile=TILES[tile])
    t = real(case)
    d = run(machine, case, t)
    wide = t.a.astype(np.float64), t.b.astype(np.float64)
    magnitude = np.abs(wide[0]) @ np.abs(wide[1]).T
    instructions = case.k * ITEM_BYTES[form] / 32
    assert np.all(np.abs(d - wide[0] @ wide[1].T) <= instructions * magnitude * 2.0**-bits)


def real(case: Case) -> Tensors:
    """Operands that are no integers, so that the order of additions shows."""
    rng = np.random.default_rng(5)
    a, b = (rng.standard_normal((rows, case.k)).astype(DTYPES[case.format]) for rows in (case.m, case.n))
    return replace(tensors_of(case), a=a, b=b)


@pytest.mark.parametrize(("tile", "parts"), [("some of two", 2), ("some of four", 4), ("wide of two", 2)])
def test_parts_of_k_are_added_in_their_order(machine, tile, parts):
    case = Case(m=100, n=136, k=200 * 4, format="bfloat16", output="float32", tile=TILES[tile])
    t = real(case)
    d = run(machine, case, t)
    steps = -(-case.k * 2 // 128)
    bounds = [min(case.k, steps * part // parts * 64) for part in range(parts + 1)]
    want = None
    for begin, end in itertools.pairwise(bounds):
        piece = replace(t, a=t.a[:, begin:end], b=t.b[:, begin:end])
        term = run(machine, replace(case, k=end - begin, tile=SWAPPED), piece)
        want = term if want is None else want + term
    np.testing.assert_array_equal(d, want)


def test_shares_of_k_are_added_in_their_order(machine):
    case = Case(m=13, n=400, k=592, format="bfloat16", output="float32", tile=TILES["few in shares"])
    t = real(case)
    d = run(machine, case, t)
    shares = shares_of(case.problem, case.tile, MULTIPROCESSORS)
    steps = -(-case.k * 2 // 128)
    ends = list(itertools.accumulate(shares.share + (block < shares.extra) for block in range(shares.blocks)))
    assert shares.whole == 0 and ends[-1] == steps * -(-case.n // case.tile.tile_m)
    assert any(end % steps for end in ends), "a case whose tiles are cut"
    for tile, first in enumerate(range(0, case.n, case.tile.tile_m)):
        inside = [end - tile * steps for end in ends if tile * steps < end < (tile + 1) * steps]
        rows, want = slice(first, first + case.tile.tile_m), None
        for begin, end in itertools.pairwise([0, *(64 * at for at in inside), case.k]):
            piece = replace(t, a=t.a[:, begin:end], b=t.b[:, begin:end])
            term = run(machine, replace(case, k=end - begin, tile=FEW), piece)[:, rows]
            want = term if want is None else want + term
        np.testing.assert_array_equal(d[:, rows], want)


@pytest.mark.parametrize("activation", ["none", "relu", "clip", "gelu", "gelu_tanh", "silu"])
def test_a_nan_stays_one(machine, activation):
    case = Case(
        m=4,
        n=8,
        k=32,
        format="bfloat16",
        output="float32",
        tile=FEW,
        kind=EpilogueKind(activation=activation),
    )
    t = tensors_of(case)
    t.a[1, 3] = np.nan
    d = run(machine, case, t)
    assert np.isnan(d[1]).all()
    assert np.isfinite(d[[0, 2, 3]]).all()


def test_whole_tiles_come_before_shares(machine):
    case = Case(
        m=50,
        n=1500,
        k=300,
        format="int8",
        output="bfloat16",
        kind=KINDS["relu"],
        tile=TILES["some in shares"],
    )
    assert shares_of(case.problem, case.tile, MULTIPROCESSORS).whole == 8
    check(case, run(machine, case))


def test_blocks_that_take_many_tiles_keep_their_buffers_apart(machine):
    """More tiles than clusters, and stores of one tile under way while the next is exchanged."""
    case = Case(
        m=90, n=900, k=640, format="int8", output="bfloat16", tile=TILES["some of two"],
        kind=KINDS["relu"],
    )  # fmt: skip
    check(case, run(machine, case))


# ---- what is built -----------------------------------------------------------------------------------------------

FULL = KINDS["relu"]
SHIPPED = [
    (Problem(m=m, n=8192, k=8192, format=form, output=output), kind)
    for form, output, kind in (
        ("int8", "bfloat16", FULL),
        ("int8", "int8", replace(KINDS["asymmetric"], activation="relu")),
        ("float8_e4m3fn", "bfloat16", KINDS["scales"]),
        ("float8_e4m3fn", "bfloat16", KINDS["transformer"]),
        ("float8_e4m3fn", "float8_e4m3fn", KINDS["silu"]),
        ("bfloat16", "bfloat16", KINDS["nothing"]),
    )
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
    # One load of each operand, by a thread that the compiler knows to be one: no loop over the lanes around it.
    assert found["UTMALDG"] == 2
    lines = listing(built.cubin)
    loads = [number for number, line in enumerate(lines) if "UTMALDG" in line]
    assert not any("BRA.U.ANY" in line for at in loads for line in lines[at : at + 4])


@pytest.mark.skipif(
    not is_available() or tools() is None, reason="NVRTC or its disassembler is not installed"
)
@pytest.mark.parametrize("form", OPCODES)
@pytest.mark.parametrize("tile_n", [16, 128])
def test_stream_k_runs_on_the_tensor_core_and_keeps_to_registers(form, tile_n, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "gemm-cubins"
    problem = Problem(m=tile_n, n=28672, k=8192, format=form, output="bfloat16")
    tile = Tile(blocks_of_64=1, tile_n=tile_n, stages=4, swap=True, stream=True)
    built = compile_kernel(
        SOURCE, arch="sm_90a", defines=launch_of(problem, tile, FULL, 132).defines, cache=cache
    )
    found = opcodes(built.cubin)
    assert {name for name in found if name.endswith("MMA")} == {OPCODES[form]}
    assert found["LDL"] == found["STL"] == built.spill_bytes == 0
    assert not built.warnings


# ---- which tile --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", OUTPUT_BYTES)
def test_every_candidate_fits_shared_memory_registers_and_wgmma(output):
    for tile in candidates(Problem(m=100, n=100, k=10000, format="int8", output=output)):
        assert tile.shared_bytes <= SHARED_LIMIT
        assert tile.registers <= REGISTER_LIMIT
        assert 128 * (REGISTER_LIMIT * tile.consumers + 40) <= 65536  # the producer keeps 40
        assert tile.stages >= 2
        assert tile.tile_m <= 256  # a box of TMA
        assert tile.tile_n % 16 == 0 and tile.tile_n <= 256
        assert tile.blocks <= 8  # what every GPU grants a cluster


def test_sums_that_leave_no_registers_are_no_candidates():
    shapes = {
        (t.blocks_of_64, t.tile_n)
        for t in candidates(Problem(m=4096, n=4096, k=4096, format="int8", output="bfloat16"))
    }
    assert (2, 128) in shapes and (1, 256) in shapes
    assert not shapes & {(2, 192), (2, 256)}


def test_few_rows_put_the_weights_on_the_side_of_64():
    for m in (1, 16, 64):
        assert choose(Problem(m=m, n=8192, k=8192, format="int8", output="bfloat16")).swap


def test_every_shape_gets_a_tile_with_work_for_every_block_of_a_cluster():
    for m, n, k in [(1, 1, 1), (1, 100000, 7), (100000, 1, 7), (5, 5, 100000), (16, 64, 300)]:
        problem = Problem(m=m, n=n, k=k, format="bfloat16", output="float32")
        tile = choose(problem)
        assert tile.clusters(problem, 132) >= 1
        assert all(t.split <= -(-problem.row_bytes // 128) for t in candidates(problem))


def test_a_split_leaves_no_block_without_work():
    problem = Problem(m=8, n=64, k=100, format="int8", output="bfloat16")
    with pytest.raises(KernelError, match="split into 1 at most"):
        launch_of(problem, TILES["some of two"], EpilogueKind(), 132)


@given(
    st.integers(1, 300),
    st.integers(1, 30000),
    st.integers(1, 9000),
    st.sampled_from([1, 4, 132]),
    st.booleans(),
)
def test_shares_are_all_of_what_is_not_whole(m, n, k, multiprocessors, two):
    problem = Problem(m=m, n=n, k=k, format="int8", output="bfloat16")
    tile = Tile(blocks_of_64=1, tile_n=64, stages=3, consumers=1 + two, swap=True, stream=True)
    shares = shares_of(problem, tile, multiprocessors)
    along_first, along_second = tile.tiles(problem)
    steps = -(-k // 128)
    assert 0 <= shares.extra < shares.blocks <= multiprocessors
    assert shares.share >= 1
    assert shares.whole % multiprocessors == 0
    cut = (along_first * along_second - shares.whole) * steps
    assert shares.blocks * shares.share + shares.extra == cut
    # Shorter than a tile only where there are fewer tiles than multiprocessors.
    assert shares.share >= steps or along_first * along_second < 2 * multiprocessors


def test_stream_k_is_chosen_where_a_last_wave_is_long_and_nearly_empty():
    def best(m, n, k, stream):
        problem = Problem(m=m, n=n, k=k, format="bfloat16", output="bfloat16")
        return min(estimate_us(problem, t) for t in candidates(problem) if t.stream == stream)

    assert best(16, 768, 768, stream=True) > best(16, 768, 768, stream=False)
    long = Problem(m=128, n=17408, k=65536, format="bfloat16", output="bfloat16")
    wasteful = Tile(blocks_of_64=1, tile_n=128, stages=4, swap=True)
    assert estimate_us(long, replace(wasteful, stream=True)) < estimate_us(long, wasteful)


def test_few_tiles_and_a_long_k_are_split():
    assert choose(Problem(m=16, n=768, k=16384, format="int8", output="bfloat16")).split > 1


def test_numbers_of_an_epilogue_travel_in_the_order_of_the_header():
    packed = EpilogueValues(
        low=1, high=2, scale=4, zero_point=5, residual_scale=6, residual_zero_point=7
    ).packed()
    np.testing.assert_array_equal(np.frombuffer(packed.tobytes(), np.float32), [1, 2, 4, 0.25, 5, 6, 7])

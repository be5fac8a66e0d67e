"""gemm_mma.cu against its oracle, in every mode of the emulator and on a GPU where there is one."""

import itertools
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantkit.errors import KernelError
from quantkit.kernels.emulator import Mode
from quantkit.kernels.epilogue import OUTPUT_BYTES, EpilogueKind
from quantkit.kernels.heuristics import Problem
from quantkit.kernels.mma_heuristics import (
    ITEM_BYTES,
    MmaTile,
    mma_candidates,
    mma_choose,
    mma_device,
    mma_estimate_us,
)
from quantkit.kernels.mma_launch import launch_of

from .backends import EmulatorBackend, gpu
from .gemms import DTYPES, Tensors, oracle, tensors_of
from .mmas import MmaCase, run_mma
from .pairs import pairwise


def tile(m: int, n: int, warps_m: int, warps_n: int, row: int, stages: int, slices: int = 1) -> MmaTile:
    return MmaTile(
        tile_m=m, tile_n=n, warps_m=warps_m, warps_n=warps_n, row=row, stages=stages, slices=slices, group=2
    )


SMALL = tile(16, 64, 1, 4, 128, 3)
MIDDLE = tile(64, 128, 2, 2, 64, 4)
TILES = {
    "small": SMALL,
    "small of three": replace(SMALL, slices=3),
    "flat of two": tile(16, 128, 1, 4, 128, 2, 2),
    "two rows": tile(32, 128, 1, 4, 128, 6),
    "middle of five": replace(MIDDLE, slices=5),
    "four warps": tile(128, 128, 2, 2, 64, 3),
    "eight warps": tile(128, 128, 2, 4, 128, 3),
    "wide": tile(128, 256, 2, 4, 64, 3),
}
KINDS = {
    "nothing": EpilogueKind(),
    "zero point": EpilogueKind(zero_point="each"),
    "scales": EpilogueKind(row_scale="each", column_scale="each"),
    "one scale": EpilogueKind(row_scale="one", column_scale="one", bias=True, activation="relu"),
    "residual": EpilogueKind(
        row_scale="one", column_scale="each", residual="after", residual_type="bfloat16", activation="clip"
    ),
}
# Each format, and each way the kernel has with it.
WAYS = {
    "int8": ("int8", "sm_80"),
    "e4m3": ("float8_e4m3fn", "sm_89"),
    "e4m3 moved": ("float8_e4m3fn", "sm_80"),
    "e4m3 converted": ("float8_e4m3fn", "sm_90a"),
    "bf16": ("bfloat16", "sm_80"),
    "fp16": ("float16", "sm_80"),
}
FACTORS: dict[str, list[Any]] = {
    "tile": list(TILES),
    "m": [1, 3, 16, 17, 64, 130, 257],
    "way": list(WAYS),
    "output": list(OUTPUT_BYTES),
    "n": [1, 8, 130, 260, 2880],
    "k": [1, 16, 48, 50, 272, 700, 2880],
    "kind": list(KINDS),
    "mode": list(Mode),
}


def legal(row: dict[str, Any]) -> bool:
    """Whether the kernel computes a row of factors, or can with what is still to be chosen."""
    tile = TILES[row.get("tile", "small")]
    rows, columns = (-(-row.get(a, 1) // side) * side for a, side in (("m", tile.tile_m), ("n", tile.tile_n)))
    if rows * columns * row.get("k", 1) > 150e6:  # what the emulator multiplies in a tenth of a second
        return False
    integer = row.get("way", "int8") == "int8"
    kind = row.get("kind", "nothing")
    if not integer and (row.get("output") == "int32" or kind == "zero point"):
        return False
    return row.get("output") != "int32" or kind in ("nothing", "zero point")


def case_of(row: dict[str, Any]) -> MmaCase:
    form, arch = WAYS[row["way"]]
    return MmaCase(
        m=row["m"], n=row["n"], k=row["k"], format=form, arch=arch, output=row["output"],
        tile=TILES[row["tile"]], kind=KINDS[row["kind"]], gap=32 if row["m"] % 2 else 0,
    )  # fmt: skip


CASES = [(case_of(row), EmulatorBackend(row["mode"])) for row in pairwise(FACTORS, legal)]


def check(machine, case: MmaCase) -> None:
    d = run_mma(machine, case)
    np.testing.assert_array_equal(d.view(np.uint8), oracle(case).view(np.uint8))


@pytest.mark.parametrize(
    ("case", "where"),
    [*CASES, *((case, gpu()) for case, _ in CASES if gpu())],
    ids=lambda value: str(value) if isinstance(value, MmaCase) else getattr(value, "mode", "gpu"),
)
def test_every_pair_of_shape_format_output_epilogue_tile_and_mode_is_exact(compiler, case, where):
    check(where, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case, _ in CASES], ids=str)
def test_every_case_is_exact_in_every_mode(machine, case):
    check(machine, case)


# ---- real values -------------------------------------------------------------------------------------------------


def real(case: MmaCase) -> Tensors:
    rng = np.random.default_rng(5)
    a, b = (rng.standard_normal((rows, case.k)).astype(DTYPES[case.format]) for rows in (case.m, case.n))
    return replace(tensors_of(case), a=a, b=b)


@pytest.mark.parametrize("way", ["e4m3", "e4m3 moved", "e4m3 converted", "bf16", "fp16"])
def test_real_values_stay_within_what_the_accumulator_loses(machine, way):
    """Each instruction adds its products with at least 21 bits of the largest one: K / depth roundings of the sum."""
    form, arch = WAYS[way]
    case = MmaCase(m=40, n=68, k=512, format=form, arch=arch, output="float32", tile=MIDDLE)
    t = real(case)
    d = run_mma(machine, case, t)
    wide = t.a.astype(np.float64), t.b.astype(np.float64)
    magnitude = np.abs(wide[0]) @ np.abs(wide[1]).T
    instructions = case.k / 16
    assert np.all(np.abs(d - wide[0] @ wide[1].T) <= instructions * magnitude * 2.0**-21)


@pytest.mark.parametrize("slices", [2, 3, 7])
def test_slices_of_k_are_added_in_their_order(machine, slices):
    """Each slice's sum is that of the product of its part of K, and the parts are added from the first to the last."""
    case = MmaCase(m=20, n=68, k=200 * 4, format="bfloat16", output="float32", tile=SMALL)
    t = real(case)
    d = run_mma(machine, replace(case, tile=replace(SMALL, slices=slices)), t)
    steps = -(-case.k * 2 // SMALL.row)
    bounds = [min(case.k, steps * part // slices * SMALL.row // 2) for part in range(slices + 1)]
    want = np.zeros_like(d)
    for begin, end in itertools.pairwise(bounds):
        piece = replace(t, a=t.a[:, begin:end], b=t.b[:, begin:end])
        want = want + run_mma(machine, replace(case, k=end - begin), piece)
    np.testing.assert_array_equal(d, want)


def test_more_slices_than_steps_leave_some_without_work(machine):
    check(
        machine,
        MmaCase(m=3, n=20, k=40, format="int8", output="int32", tile=replace(SMALL, slices=4)),
    )


@pytest.mark.parametrize("way", ["e4m3", "e4m3 moved", "e4m3 converted"])
def test_every_code_of_e4m3_is_multiplied_as_its_value(compiler, way):
    """All 256 codes on one diagonal against ones: subnormal numbers, both zeros, both NaNs."""
    form, arch = WAYS[way]
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    case = MmaCase(
        m=256, n=8, k=256, format=form, arch=arch, output="float32", tile=tile(256, 128, 4, 2, 64, 3)
    )
    a = np.zeros((256, 256), every.dtype)
    np.fill_diagonal(a, every)
    t = replace(tensors_of(case), a=a, b=np.ones((8, 256), every.dtype))
    d = run_mma(EmulatorBackend(Mode.EAGER), case, t)
    want = np.broadcast_to(every.astype(np.float32)[:, None], d.shape)
    np.testing.assert_array_equal(d, want)
    d = run_mma(EmulatorBackend(Mode.EAGER), replace(case, m=8, n=256), replace(t, a=t.b, b=t.a))
    np.testing.assert_array_equal(d, want.T)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_approximate_activations_stay_within_their_bound(machine, activation):
    kind = EpilogueKind(row_scale="each", column_scale="each", activation=activation)
    case = MmaCase(m=17, n=132, k=272, format="int8", output="float32", tile=SMALL, kind=kind)
    want = oracle(case).astype(np.float64)
    np.testing.assert_allclose(run_mma(machine, case), want, rtol=2.0**-15, atol=2.0**-120)


# ---- which tile --------------------------------------------------------------------------------------------------

GPUS = {"sm_80": 108, "sm_86": 72, "sm_89": 142, "sm_90a": 132, "sm_100a": 148, "sm_120a": 170}


@pytest.mark.parametrize("arch", GPUS)
def test_every_candidate_fits_its_gpu(arch):
    device = mma_device(arch, GPUS[arch])
    for m, k in ((1, 16384), (4096, 4096)):
        for t in mma_candidates(Problem(m=m, n=1024, k=k, format="int8", output="bfloat16"), device):
            assert t.shared_bytes <= device.shared_limit
            assert t.residents(device) >= 1
            assert t.stages >= 2


@pytest.mark.parametrize("form", ITEM_BYTES)
@pytest.mark.parametrize("arch", [*GPUS, "sm_87"])
def test_every_shape_gets_a_tile(arch, form):
    for m, n, k in [(1, 1, 1), (1, 100000, 7), (100000, 1, 7), (5, 5, 100000), (8192, 8192, 8192)]:
        problem = Problem(m=m, n=n, k=k, format=form, output="float32")
        chosen = mma_choose(problem, mma_device(arch, 100))
        launch = launch_of(problem, chosen, EpilogueKind(), arch)
        assert launch.grid[0] == -(-m // chosen.tile_m) * -(-n // chosen.tile_n)
        assert launch.workspace_bytes < 1 << 28


def test_few_tiles_and_a_long_k_are_sliced_and_many_are_not():
    device = mma_device("sm_90a", 132)
    few, many = (
        Problem(m=m, n=n, k=16384, format="int8", output="bfloat16") for m, n in ((1, 768), (4096, 4096))
    )
    assert mma_choose(few, device).slices > 1
    assert mma_choose(many, device).slices == 1


def test_large_products_get_large_tiles():
    problem = Problem(m=8192, n=8192, k=8192, format="int8", output="bfloat16")
    for arch, count in GPUS.items():
        chosen = mma_choose(problem, mma_device(arch, count))
        assert chosen.tile_m * chosen.tile_n >= 128 * 128


@pytest.mark.parametrize("arch", GPUS)
def test_the_model_grows_with_the_work(arch):
    device = mma_device(arch, GPUS[arch])
    for t in mma_candidates(Problem(m=512, n=4096, k=4096, format="int8", output="bfloat16"), device):
        times = [
            mma_estimate_us(Problem(m=512, n=4096, k=k, format="int8", output="bfloat16"), t, device)
            for k in (4096, 8192, 16384)
        ]
        assert times == sorted(times)


def test_a_format_it_does_not_multiply_is_refused():
    with pytest.raises(KernelError, match="int4: gemm_mma does not multiply it"):
        launch_of(Problem(m=1, n=1, k=1, format="int4", output="float32"), SMALL, EpilogueKind(), "sm_80")

"""Which tile gemm_blocks_sm120.cu takes, and what NVRTC makes of it."""

import re
from pathlib import Path

import pytest

from quantkit.kernels.compile import compile_kernel, is_available
from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.mma_heuristics import mma_device
from quantkit.kernels.mx.heuristics import (
    MxProblem,
    MxTile,
    mx_candidates,
    mx_choose,
    mx_estimate_us,
    mx_rank,
)
from quantkit.kernels.mx.launch import SOURCE, mx_launch_of

from ..sass import listing, opcodes, tools
from .runs import SPECS

DEVICE = mma_device("sm_120a", 170)
PLAIN = EpilogueKind(row_scale="one", column_scale="one", bias=True)
HEAVY = EpilogueKind(row_scale="each", column_scale="each", bias=True, activation="gelu", residual="after")
# What the tensor core is asked to do: codes with scales (SF), of their types.
INSTRUCTIONS = {
    "mxfp8": "QMMA.SF.16832.F32.E4M3.E4M3.E8",
    "mxfp4": "OMMA.SF.16864.F32.E2M1.E2M1.E8",
    "nvfp4": "OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X",
}
needs_nvrtc = pytest.mark.skipif(
    not is_available() or tools() is None, reason="NVRTC or its disassembler is not installed"
)


def problem(m: int, form: str, n: int = 8192, k: int = 8192, output: str = "bfloat16") -> MxProblem:
    return MxProblem(m=m, n=n, k=k, format=form, output=output)


def check_build(folder: Path, one: MxProblem, tile: MxTile, kind: EpilogueKind) -> None:
    """The tensor core multiplies by the scales, and nothing else does; nothing goes through local memory."""
    built = compile_kernel(
        SOURCE, arch="sm_120a", defines=mx_launch_of(one, tile, kind).defines, cache=folder
    )
    found, lines = opcodes(built.cubin), listing(built.cubin)
    products = [match.group(0) for line in lines if (match := re.search(r"\b[A-Z]MMA\S*", line))]
    pieces = tile.tile_m // tile.warps_m // 16 * (tile.tile_n // tile.warps_n // 8)
    assert products == [INSTRUCTIONS[one.format]] * (4 * pieces)
    assert (found["LDL"], found["STL"], built.spill_bytes, built.stack_bytes, built.warnings) == (
        0,
        0,
        0,
        0,
        (),
    )
    assert found["LDSM"] > 0 and found["LDGSTS"] > 0  # ldmatrix, cp.async


@needs_nvrtc
@pytest.mark.parametrize(("m", "form"), [(1, "mxfp8"), (64, "mxfp4"), (4096, "nvfp4")])
def test_chosen_tiles_run_on_the_block_scaled_tensor_core(m, form, tmp_path):
    one = problem(m, form)
    check_build(tmp_path, one, mx_choose(one, DEVICE), PLAIN)


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("form", SPECS)
def test_every_tile_runs_on_the_block_scaled_tensor_core(form, tmp_path):
    """With an epilogue that needs much, whole with four columns stored at a time, and in slices with single ones."""
    for m, n in ((1, 1001), (64, 1001), (4096, 1024)):
        one = problem(m, form, n, 32768)
        for tile in mx_candidates(one, DEVICE):
            if tile.stages == 2 and tile.slices == (2 if n == 1001 else 1):
                check_build(tmp_path, one, tile, HEAVY)


@pytest.mark.parametrize("form", SPECS)
def test_every_shape_gets_tiles_that_fit(form):
    for m, n, k in [(1, 1, 1), (1, 100000, 7), (5000, 1, 70), (5, 5, 100000), (8192, 8192, 8192)]:
        one = problem(m, form, n, k, "float32")
        found = mx_rank(one, DEVICE)
        assert found
        for tile in found:
            assert tile.shared_bytes(one) <= DEVICE.shared_limit
            launch = mx_launch_of(one, tile, PLAIN)
            assert launch.grid[0] == -(-m // tile.tile_m) * -(-n // tile.tile_n)
            assert launch.partials_bytes < 1 << 28


@pytest.mark.parametrize("form", SPECS)
def test_the_model_grows_with_the_work_and_never_beats_memory(form):
    for tile in mx_rank(problem(512, form), DEVICE):
        times = [mx_estimate_us(problem(512, form, k=k), tile, DEVICE) for k in (4096, 8192, 16384)]
        assert times == sorted(times)
    one = problem(1, form, 28672)
    least = one.size_bytes / DEVICE.dram_bytes_per_us
    assert least <= mx_estimate_us(one, mx_choose(one, DEVICE), DEVICE) <= 1.5 * least


def test_few_tiles_and_a_long_k_are_sliced_and_many_are_not():
    assert mx_choose(problem(1, "nvfp4", 768, 65536), DEVICE).slices > 1
    assert mx_choose(problem(4096, "nvfp4"), DEVICE).slices == 1

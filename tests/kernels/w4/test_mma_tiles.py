"""Which tile gemm_w4_mma.cu takes on each architecture, and what NVRTC makes of it."""

from pathlib import Path
from typing import Any

import pytest

from quantkit.kernels.compile import ARCHITECTURES, compile_kernel, is_available
from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.mma_heuristics import mma_device
from quantkit.kernels.w4.heuristics import W4Problem
from quantkit.kernels.w4.mma_heuristics import (
    W4MmaTile,
    w4_mma_candidates,
    w4_mma_choose,
    w4_mma_estimate_us,
    w4_mma_rank,
)
from quantkit.kernels.w4.mma_launch import SOURCE, w4_mma_launch_of

from ..sass import opcodes, tools
from .mma import KIND

# ---- what is built -----------------------------------------------------------------------------------------------

NVFP4 = {"codes": "fp4_e2m1", "group": 16, "scales": "e4m3"}
MXFP4 = {"codes": "fp4_e2m1", "group": 32, "scales": "e8m0"}
WITH_ZEROS = {"codes": "uint4", "group": 32, "scales": "float32", "zeros": True}
SHIPPED: list[tuple[str, int, dict[str, Any]]] = [
    ("sm_80", 1, {}),
    ("sm_80", 4096, WITH_ZEROS),
    ("sm_86", 64, NVFP4 | {"activations": "float16"}),
    ("sm_89", 16, MXFP4),
    ("sm_89", 64, MXFP4 | {"activations": "float8_e4m3fn"}),
    ("sm_90a", 4096, {"output": "float32"}),
    ("sm_120a", 4096, NVFP4),
    ("sm_120a", 8, {"activations": "int8", "scales": "uint8"}),
]


def problem(m: int, n: int = 8192, k: int = 8192, **options: Any) -> W4Problem:
    usual = {
        "activations": "bfloat16", "output": "bfloat16", "codes": "int4", "group": 128, "scales": "bfloat16",
    }  # fmt: skip
    return W4Problem(m=m, n=n, k=k, **(usual | {"zeros": False} | options))


def check_build(folder: Path, arch: str, one: W4Problem, tile: W4MmaTile, kind: EpilogueKind) -> None:
    """The tensor core multiplies, codes are decoded two at a time in registers, nothing goes through local memory."""
    launch = w4_mma_launch_of(one, tile, kind)
    built = compile_kernel(SOURCE, arch=arch, defines=launch.defines, cache=folder)
    found = opcodes(built.cubin)
    letter = {"int8": "I", "float8_e4m3fn": "Q"}.get(one.activations, "H")
    assert {name for name in found if name.endswith("MMA")} == {f"{letter}MMA"}
    assert (found["LDL"], found["STL"], built.spill_bytes, built.stack_bytes, built.warnings) == (
        0,
        0,
        0,
        0,
        (),
    )
    # Two codes an instruction that makes numbers of them, and that often for each 16 rows, slab by slab.
    assert letter != "H" or found["HFMA2"] + found["HMUL2"] + found["HADD2"] >= 16 * tile.slabs
    assert found["LDSM"] > 0 and found["LDGSTS"] > 0  # ldmatrix, cp.async


needs_nvrtc = pytest.mark.skipif(
    not is_available() or tools() is None, reason="NVRTC or its disassembler is not installed"
)


@needs_nvrtc
@pytest.mark.parametrize(("arch", "m", "form"), SHIPPED, ids=str)
def test_chosen_tiles_decode_in_registers(arch, m, form, tmp_path):
    one = problem(m, **form)
    check_build(tmp_path, arch, one, w4_mma_choose(one, mma_device(arch, 100)), KIND)


FORMS: dict[str, dict[str, Any]] = {
    "int4": {},
    "zeros": WITH_ZEROS,
    "nvfp4": NVFP4,
    "mxfp4": MXFP4,
    "rows": {"activations": "float16", "group": None, "scales": "none"},
}


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_tile_decodes_in_registers(arch, form, tmp_path):
    """With an epilogue that needs much, and in slices with columns stored singly."""
    heavy = EpilogueKind(
        row_scale="each", column_scale="each", bias=True, activation="gelu", residual="after"
    )
    for m, n in ((64, 1001), (4096, 1024), (1, 1001)):
        one = problem(m, n, 16384, **FORMS[form])
        for tile in w4_mma_candidates(one, mma_device(arch, 100)):
            if tile.stages == 3 and tile.slices == (2 if n == 1001 else 1):
                check_build(tmp_path, arch, one, tile, heavy)


# ---- which tile --------------------------------------------------------------------------------------------------

GPUS = {"sm_80": 108, "sm_86": 72, "sm_89": 142, "sm_90a": 132, "sm_100a": 148, "sm_120a": 170}


@pytest.mark.parametrize(
    "form", [{}, {"zeros": True, "group": 32, "scales": "float32"}], ids=["int4", "widest"]
)
@pytest.mark.parametrize("arch", [*GPUS, "sm_87"])
def test_every_shape_gets_tiles_that_fit(arch, form):
    device = mma_device(arch, 100)
    for m, n, k in [(1, 1, 1), (1, 100000, 7), (5000, 1, 70), (5, 5, 100000), (8192, 8192, 8192)]:
        one = problem(m, n, k, output="float32", **form)
        found = w4_mma_rank(one, device)
        assert found
        for tile in found:
            assert tile.shared_bytes(one) <= device.shared_limit
            assert tile.threads <= 1024
            launch = w4_mma_launch_of(one, tile, KIND)
            assert launch.grid[0] == -(-m // tile.tile_a) * -(-n // tile.tile_w)
            assert launch.partials_bytes < 1 << 28


def test_few_tiles_and_a_long_k_are_sliced_and_many_are_not():
    device = mma_device("sm_80", 108)
    assert w4_mma_choose(problem(1, 768, 16384), device).slices > 1
    assert w4_mma_choose(problem(4096), device).slices == 1


def test_sums_of_slices_have_room_beside_what_decodes():
    """Zero points and scales in two parts leave no registers for the sums of 128 rows of A on their way to memory."""
    device = mma_device("sm_80", 108)
    for scales, found in (("float32", {1}), ("bfloat16", {1, 2})):
        one = problem(256, codes="uint4", group=32, zeros=True, scales=scales)
        wide = [tile for tile in w4_mma_rank(one, device) if tile.tile_a == 128]
        assert {min(tile.slices, 2) for tile in wide} == found


@pytest.mark.parametrize("arch", GPUS)
def test_the_model_grows_with_the_work(arch):
    device = mma_device(arch, GPUS[arch])
    for tile in w4_mma_rank(problem(512), device):
        times = [w4_mma_estimate_us(problem(512, k=k), tile, device) for k in (4096, 8192, 16384)]
        assert times == sorted(times)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_120a"])
def test_one_row_is_bound_by_the_bytes_of_the_weight(arch):
    """Decoding keeps up with memory there, so a path without the tensor core, of more instructions, wins nothing."""
    device = mma_device(arch, GPUS[arch])
    one = problem(1, 28672)
    least = one.weight_bytes / device.dram_bytes_per_us
    assert least <= w4_mma_estimate_us(one, w4_mma_choose(one, device), device) <= 1.5 * least

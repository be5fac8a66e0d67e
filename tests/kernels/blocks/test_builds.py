"""What NVRTC makes of gemm_blocks_sm90.cu: tensor cores, registers, and no more instructions than the model counts."""

import re
from collections import Counter
from pathlib import Path

import pytest

from quantkit.kernels.blocks.heuristics import (
    BLOCKS,
    BlocksProblem,
    BlocksTile,
    candidates,
    choose,
    deepest,
    step_instructions,
)
from quantkit.kernels.blocks.launch import SOURCE, launch_of
from quantkit.kernels.compile import CompiledKernel, compile_kernel, is_available
from quantkit.kernels.epilogue import EpilogueKind

from ..sass import listing, opcodes, tools

pytestmark = pytest.mark.skipif(
    not is_available() or tools() is None, reason="NVRTC or its disassembler is not installed"
)

PLAIN = EpilogueKind(bias=True)
HEAVY = EpilogueKind(bias=True, activation="gelu", residual="after")
WORST = EpilogueKind(
    row_scale="each", column_scale="each", bias=True, activation="silu", residual="before", residual_type="float32"
)  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("builds")


def built(cache: Path, problem: BlocksProblem, tile: BlocksTile, kind: EpilogueKind) -> CompiledKernel:
    """The cubin, once it is known to run on the tensor core and to keep to registers."""
    kernel = compile_kernel(
        SOURCE, arch="sm_90a", defines=launch_of(problem, tile, kind, 132).defines, cache=cache
    )
    found = opcodes(kernel.cubin)
    assert {name for name in found if name.endswith("MMA")} == {"QGMMA"}
    assert found["LDL"] == found["STL"] == kernel.spill_bytes == kernel.stack_bytes == 0
    assert kernel.warnings == ()
    assert found["UTMALDG"] == 2
    return kernel


def main_loop(cubin: Path) -> Counter[str]:
    """Opcodes of the innermost loop around all products."""
    pattern = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(.*?);")
    lines = [(int(m[1], 16), m[2], m[3]) for line in listing(cubin) if (m := pattern.search(line))]
    products = [at for at, name, _ in lines if name == "QGMMA"]
    backward = [
        (int(target[1], 16), at)
        for at, name, rest in lines
        if name == "BRA" and (target := re.search(r"0x([0-9a-f]+)", rest)) and int(target[1], 16) < at
    ]
    around = [(start, end) for start, end in backward if start <= products[0] and products[-1] <= end]
    start, end = min(around, key=lambda loop: loop[1] - loop[0])
    return Counter(name for at, name, _ in lines if start <= at <= end)


def large(block: int, m: int = 8192, output: str = "bfloat16") -> BlocksProblem:
    return BlocksProblem(m=m, n=8192, k=8192, block=block, output=output)


@pytest.mark.parametrize("block", BLOCKS.values())
@pytest.mark.parametrize(("m", "kind"), [(16, PLAIN), (128, PLAIN), (8192, PLAIN), (8192, HEAVY)])
def test_chosen_tiles_run_on_the_tensor_core_and_keep_to_registers(cache, block, m, kind):
    problem = large(block, m)
    tile = choose(problem)
    loop = main_loop(built(cache, problem, tile, kind).cubin)
    sums = tile.blocks_of_64 * tile.tile_n // 2 * (128 // block)
    assert loop["QGMMA"] == 4 * tile.blocks_of_64
    assert loop["FFMA"] == sums  # one for each sum and block of K
    assert loop["FMUL"] == (sums if block == 32 else 0)  # scales are multiplied before, or once for each sum
    assert loop["CCTL"] == loop["MEMBAR"] == 0  # no cache is emptied, no fence waited for
    assert sum(loop.values()) == pytest.approx(step_instructions(problem, tile), rel=0.15)


def test_the_promotion_of_a_large_tile_takes_less_than_half_of_the_tensor_cores_time(cache):
    problem = large(128)
    tile = deepest(128, blocks_of_64=2, tile_n=128, cluster=2)
    assert tile is not None and tile.stages == 4
    loop = main_loop(built(cache, problem, tile, PLAIN).cubin)
    tensor_cycles = tile.tile_m * tile.tile_n * 128 / 4096
    assert tile.consumers * sum(loop.values()) < 0.45 * tensor_cycles


@pytest.mark.slow
@pytest.mark.parametrize("output", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("block", BLOCKS.values())
def test_every_tile_keeps_to_registers(cache, block, output):
    problem = large(block, output=output)
    for tile in candidates(problem):
        for kind in (EpilogueKind(), HEAVY, WORST):
            built(cache, problem, tile, kind)

"""What NVRTC makes of statistics.cu: it stays in registers, and counts in shared memory by one instruction a value."""

from pathlib import Path

import pytest

from quantkit.kernels.compile import ARCHITECTURES, compile_kernel, is_available
from quantkit.kernels.statistics_launch import INPUTS, SOURCE, launch_of

from .sass import listing, opcodes, tools

pytestmark = pytest.mark.skipif(
    not is_available() or tools() is None, reason="NVRTC or its disassembler is not installed"
)

# A flat tensor, images, narrow images, tokens, tokens of an odd number of channels.
CUBES = {
    "flat": ((1, 1, 1 << 24), False),
    "images": ((32, 64, 56 * 56), True),
    "narrow images": ((32, 512, 49), True),
    "tokens": ((4096, 4096, 1), True),
    "odd tokens": ((4096, 4095, 1), True),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("builds")


def check(cache: Path, name: str, dtype: str, arch: str) -> None:
    cube, channels = CUBES[name]
    launch = launch_of(cube, dtype, channels=channels)
    kernel = compile_kernel(SOURCE, arch=arch, defines=launch.defines, cache=cache)
    assert (kernel.spill_bytes, kernel.stack_bytes, kernel.warnings) == (0, 0, ())
    # Two blocks on a multiprocessor.
    assert 2 * launch.block * kernel.registers <= 65536
    found, lines = opcodes(kernel.cubin), listing(kernel.cubin)
    assert found["LDL"] == found["STL"] == 0
    # An addition of 1 that a whole warp makes at once, even to one word.
    assert sum("ATOMS.POPC.INC" in line for line in lines) >= 4
    if name in ("flat", "images") or (name == "tokens" and dtype == "float32"):
        assert any("LDG" in line and ".128" in line for line in lines)
    # Only sums need floats of 64 bits.
    assert (found["F2F"] >= 4) == channels


@pytest.mark.parametrize(
    ("arch", "name", "dtype"),
    [
        ("sm_80", "flat", "float32"),
        ("sm_86", "odd tokens", "float16"),
        ("sm_89", "narrow images", "bfloat16"),
        ("sm_90a", "images", "float32"),
        ("sm_90a", "tokens", "float16"),
        ("sm_100a", "tokens", "float32"),
        ("sm_120a", "images", "bfloat16"),
    ],
)
def test_statistics_keep_to_registers_and_count_without_loops(cache, arch, name, dtype):
    check(cache, name, dtype, arch)


@pytest.mark.slow
@pytest.mark.parametrize("name", CUBES)
@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_way_to_read_a_tensor_keeps_to_registers_everywhere(cache, arch, dtype, name):
    check(cache, name, dtype, arch)

"""NVRTC builds: every architecture, what each may use, the cache."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.errors import KernelError
from quantkit.kernels import compile as compile_module
from quantkit.kernels.compile import ARCHITECTURES, compile_kernel, is_available, is_compiled
from quantkit.kernels.cuda import generate_wgmma

from .sass import opcodes, tools

HERE = Path(__file__).parent / "emulator"
pytestmark = pytest.mark.skipif(
    not is_available(), reason="NVRTC is not installed (pip install 'quantkit[gpu]')"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cubin")


@pytest.mark.parametrize("type_name", ["S8", "E4M3", "E5M2", "BF16", "F16"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_mma_kernel_builds_wherever_its_type_exists(cache, arch, type_name):
    if type_name in ("E4M3", "E5M2") and arch in ("sm_80", "sm_86"):
        with pytest.raises(KernelError, match=r"fp8 mma\.sync starts at sm_89"):
            compile_kernel(HERE / "mma_tile.cu", arch=arch, defines={"TYPE": type_name}, cache=cache)
        return
    built = compile_kernel(HERE / "mma_tile.cu", arch=arch, defines={"TYPE": type_name}, cache=cache)
    assert built.cubin.read_bytes()[:4] == b"\x7fELF"
    assert (built.spill_bytes, built.stack_bytes, built.warnings) == (0, 0, ())
    assert 0 < built.registers <= 255


@pytest.mark.parametrize("type_name", ["S8", "E4M3", "BF16"])
@pytest.mark.parametrize("cluster", [1, 2])
def test_the_wgmma_kernel_builds_without_spills_or_serialization(cache, type_name, cluster):
    defines = {"TYPE": type_name, "TILE_N": 256, "CLUSTER": cluster}
    built = compile_kernel(HERE / "wgmma_tile.cu", arch="sm_90a", defines=defines, cache=cache)
    assert (built.spill_bytes, built.stack_bytes, built.warnings) == (0, 0, ())
    assert built.registers == 168


def test_wgmma_does_not_build_where_it_does_not_exist(cache):
    for arch in ("sm_80", "sm_89", "sm_90", "sm_100a", "sm_120a"):
        with pytest.raises(KernelError, match="does not compile for " + arch):
            compile_kernel(HERE / "wgmma_tile.cu", arch=arch, defines={"TYPE": "S8"}, cache=cache)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_every_instruction_assembles_on_every_architecture_that_has_it(cache, arch, rank):
    defines = {"RANK": rank, "TYPE": "BF16"}
    built = compile_kernel(HERE / "instructions.cu", arch=arch, defines=defines, cache=cache)
    assert built.warnings == ()


# E5M2 and F16 differ from E4M3 and BF16 in one word of the instruction's name.
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("E5M2", "F16")]


@pytest.mark.parametrize("type_name", ["S8", "E4M3", "BF16", *OTHERS])
def test_wgmma_assembles_for_every_width_and_source(cache, type_name, tmp_path):
    """One kernel that uses each: the assembler is the judge of the generated text."""
    calls = "".join(
        f"{{ Registers<{type_name}::Accumulator, {n // 2}> d; QK_UNROLL for (int i = 0; i < {n // 2}; i++) d[i] = 0;"
        f"  wgmma_fence(); wgmma<{type_name}, {n}>(d, a, b, true); wgmma<{type_name}, {n}>(d, fragment, b, flag);"
        f"  wgmma_commit(); wgmma_wait<0>();"
        f"  QK_UNROLL for (int i = 0; i < {n // 2}; i++) out[i * 128 + threadIdx.x] += d[i]; }}\n"
        for n in generate_wgmma.legal_n(type_name)
    )
    source = tmp_path / "all_widths.cu"
    source.write_text(
        f'#include "instructions.h"\nusing namespace qk;\nQK_KERNEL(128, 1) all_widths({type_name}::Accumulator* out, '
        "uint64_t a, uint64_t b, int flag) {\nRegisters<uint32_t, 4> fragment; QK_UNROLL for (int i = 0; i < 4; i++) "
        f"fragment[i] = flag + i;\n{calls}}}\n"
    )
    built = compile_kernel(source, arch="sm_90a", cache=cache)
    assert built.cubin.read_bytes()[:4] == b"\x7fELF"


def test_the_generated_header_is_what_the_generator_writes():
    header = compile_module.INCLUDE / "wgmma_ptx.h"
    assert header.read_text() == generate_wgmma.header_text()


def test_a_cubin_is_compiled_once_and_anew_when_a_header_changes(tmp_path):
    (tmp_path / "include").mkdir()
    header, source = tmp_path / "include" / "value.h", tmp_path / "k.cu"
    header.write_text("#define VALUE 1\n")
    source.write_text('#include "value.h"\nextern "C" __global__ void k(int* p) { *p = VALUE; }\n')

    def build() -> Path:
        return compile_kernel(source, arch="sm_80", cache=tmp_path / "c", include=tmp_path / "include").cubin

    first = build()
    stamp = first.stat().st_mtime_ns
    assert build() == first
    assert first.stat().st_mtime_ns == stamp
    header.write_text("#define VALUE 2\n")
    second = build()
    assert second != first
    assert second.read_bytes() != first.read_bytes()


@pytest.mark.parametrize("damage", ["cubin cut", "cubin empty", "cubin junk", "log gone", "log junk"])
def test_what_was_damaged_in_the_cache_is_compiled_again(tmp_path, damage):
    source = tmp_path / "k.cu"
    source.write_text('extern "C" __global__ void k(int* p) { *p = 1; }\n')
    first = compile_kernel(source, arch="sm_80", cache=tmp_path / "c")
    whole, log = first.cubin.read_bytes(), first.cubin.with_suffix(".log")
    if damage.startswith("cubin"):
        first.cubin.write_bytes(
            {"cubin cut": whole[:-1], "cubin empty": b"", "cubin junk": b"junk" * 99}[damage]
        )
    elif damage == "log gone":
        log.unlink()
    else:
        log.write_bytes(b"\xff\xfe\x00")
    second = compile_kernel(source, arch="sm_80", cache=tmp_path / "c")
    assert (second.cubin, second.registers) == (first.cubin, first.registers)
    assert first.cubin.read_bytes() == whole
    assert "Compiling entry function 'k'" in log.read_text()


def test_what_lies_in_the_cache_whole_is_compiled(tmp_path):
    source, cache = tmp_path / "a.cu", tmp_path / "cache"
    source.write_text('extern "C" __global__ void a(int* x) { *x = N; }')
    asked = {"arch": "sm_90a", "cache": cache}
    assert not is_compiled(source, defines={"N": 1}, **asked)
    built = compile_kernel(source, defines={"N": 1}, **asked)
    assert is_compiled(source, defines={"N": 1}, **asked) and not is_compiled(
        source, defines={"N": 2}, **asked
    )
    built.cubin.write_bytes(built.cubin.read_bytes()[:100])
    assert not is_compiled(source, defines={"N": 1}, **asked)


def test_configuration_and_architecture_name_the_cubin(tmp_path):
    source = tmp_path / "k.cu"
    source.write_text('extern "C" __global__ void k(int* p) { *p = VALUE; }\n')
    built = {
        compile_kernel(source, arch=arch, defines={"VALUE": value}, cache=tmp_path / "c").cubin
        for arch in ("sm_80", "sm_90a")
        for value in (1, 2)
    }
    assert len(built) == 4


def test_what_does_not_compile_leaves_nothing_behind(tmp_path):
    source = tmp_path / "k.cu"
    source.write_text('extern "C" __global__ void k(int* p) { *p = nonsense; }\n')
    with pytest.raises(KernelError, match=r'k\.cu: does not compile for sm_80: k\.cu\(1\).*"nonsense"'):
        compile_kernel(source, arch="sm_80", cache=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_an_unknown_architecture_is_refused(tmp_path):
    source = tmp_path / "k.cu"
    source.write_text('extern "C" __global__ void k() {}\n')
    with pytest.raises(KernelError, match="names no GPU architecture"):
        compile_kernel(source, arch="hopper", cache=tmp_path)
    with pytest.raises(KernelError, match="does not compile for sm_1"):
        compile_kernel(source, arch="sm_1", cache=tmp_path)


def test_processes_may_compile_the_same_kernel_at_once(tmp_path):
    script = f"""
from pathlib import Path
from quantkit.kernels.compile import compile_kernel
source, cache = Path({str(HERE / "mma_tile.cu")!r}), Path({str(tmp_path)!r})
built = compile_kernel(source, arch="sm_80", defines={{"TYPE": "S8"}}, cache=cache)
assert built.cubin.read_bytes()[:4] == b"\\x7fELF" and built.registers > 0
"""
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".cubin", ".log"]


needs_disassembler = pytest.mark.skipif(tools() is None, reason="cuobjdump and nvdisasm are not installed")


@needs_disassembler
def test_products_and_sums_round_apart(cache, tmp_path):
    """--fmad=false: the emulator and the GPU then agree on every float expression."""
    source = tmp_path / "k.cu"
    source.write_text('extern "C" __global__ void k(float* p) { p[0] = p[1] * p[2] + p[3]; }\n')
    found = opcodes(compile_kernel(source, arch="sm_90a", cache=cache).cubin)
    assert found["FMUL"] == found["FADD"] == 1
    assert found["FFMA"] == 0


# Source, type, architecture: the tensor core's opcode there. fp8 mma.sync on sm_90 runs as fp16.
TENSOR_CORES = [
    ("mma_tile", "S8", "sm_80", "IMMA"),
    ("mma_tile", "BF16", "sm_80", "HMMA"),
    ("mma_tile", "E4M3", "sm_89", "QMMA"),
    ("mma_tile", "E4M3", "sm_90a", "HMMA"),
    ("mma_tile", "S8", "sm_120a", "IMMA"),
    ("mma_tile", "E4M3", "sm_120a", "QMMA"),
    ("wgmma_tile", "S8", "sm_90a", "IGMMA"),
    ("wgmma_tile", "E4M3", "sm_90a", "QGMMA"),
    ("wgmma_tile", "BF16", "sm_90a", "HGMMA"),
]


@needs_disassembler
@pytest.mark.parametrize(("stem", "type_name", "arch", "opcode"), TENSOR_CORES)
def test_kernels_run_on_the_tensor_core_and_keep_to_registers(cache, stem, type_name, arch, opcode):
    built = compile_kernel(HERE / f"{stem}.cu", arch=arch, defines={"TYPE": type_name}, cache=cache)
    found = opcodes(built.cubin)
    assert {name for name in found if name.endswith("MMA")} == {opcode}
    assert found["LDL"] == found["STL"] == 0


def test_kernels_include_the_instruction_layer_and_nothing_of_a_toolkit():
    own = {path.name for path in compile_module.INCLUDE.glob("*.h")}
    sources = list(compile_module.INCLUDE.parent.glob("*.cu"))
    assert len(sources) > 4
    for path in sources:
        text = path.read_text()
        for name in re.findall(r"^\s*#include\s+(\S+)", text, re.MULTILINE):
            assert name.strip('"') in own, f"{path.name}: {name}"
        assert not re.search(r"\basm\b", text), f"{path.name}: PTX belongs in the instruction layer"

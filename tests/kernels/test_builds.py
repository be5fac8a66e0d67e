"""What NVRTC makes of the kernels, on every architecture that each supports: it runs where it should, in registers."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from quantkit.formats import FP8_E4M3, INT8, UINT8, QuantSpec
from quantkit.formats.presets import ACTIVATION_SPECS
from quantkit.kernels import mma_launch, quantize_launch
from quantkit.kernels.compile import ARCHITECTURES, CompiledKernel, compile_kernel, is_available
from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.families import FAMILIES
from quantkit.kernels.gpus import GPUS
from quantkit.kernels.heuristics import Problem
from quantkit.kernels.mma_heuristics import ITEM_BYTES, MmaTile, mma_candidates, mma_choose, mma_device
from quantkit.kernels.quantize_launch import QuantizeKind
from quantkit.kernels.work import Work

from .sass import opcodes, tools

pytestmark = pytest.mark.skipif(
    not is_available() or tools() is None, reason="NVRTC or its disassembler is not installed"
)

# What mma.sync of each format runs on: fp8 has an instruction of its own on sm_89 and sm_120, else it is fp16's.
OPCODES = {
    ("int8", arch): "IMMA" for arch in ARCHITECTURES
} | {
    (form, arch): "HMMA" for form in ("bfloat16", "float16", "float8_e4m3fn") for arch in ARCHITECTURES
} | {
    ("float8_e4m3fn", arch): "QMMA" for arch in ("sm_89", "sm_120a")
}  # fmt: skip
PLAIN = EpilogueKind(row_scale="each", column_scale="each", bias=True)
HEAVY = EpilogueKind(row_scale="each", column_scale="each", bias=True, activation="gelu", residual="after")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("builds")


def built(cache: Path, source: Path, arch: str, defines: Mapping[str, str | int]) -> CompiledKernel:
    """The cubin, once it is known to spill nothing and to have drawn no warning."""
    kernel = compile_kernel(source, arch=arch, defines=defines, cache=cache)
    assert (kernel.spill_bytes, kernel.stack_bytes, kernel.warnings) == (0, 0, ())
    assert 0 < kernel.registers <= 255
    return kernel


def check_mma(cache: Path, problem: Problem, tile: MmaTile, kind: EpilogueKind, arch: str) -> None:
    launch = mma_launch.launch_of(problem, tile, kind, arch)
    found = opcodes(built(cache, mma_launch.SOURCE, arch, launch.defines).cubin)
    assert {name for name in found if name.endswith("MMA") and name != "DMMA"} == {
        OPCODES[problem.format, arch]
    }
    assert found["LDL"] == found["STL"] == 0
    assert found["LDSM"] > 0  # ldmatrix
    assert found["LDGSTS"] > 0  # cp.async


# A large product of one format and a small one of another; every format and every architecture, but not every pair.
BUILDS = [
    ("sm_80", "int8", 4096, PLAIN),
    ("sm_80", "float8_e4m3fn", 4096, PLAIN),
    ("sm_86", "float16", 4096, HEAVY),
    ("sm_89", "float8_e4m3fn", 4096, PLAIN),
    ("sm_89", "int8", 16, HEAVY),
    ("sm_90a", "bfloat16", 4096, PLAIN),
    ("sm_100a", "float8_e4m3fn", 4096, HEAVY),
    ("sm_120a", "float8_e4m3fn", 4096, HEAVY),
    ("sm_120a", "int8", 64, PLAIN),
]


@pytest.mark.parametrize(
    ("arch", "form", "m", "kind"), BUILDS, ids=lambda v: "" if isinstance(v, EpilogueKind) else str(v)
)
def test_gemm_mma_runs_on_the_tensor_core_and_keeps_to_registers(cache, arch, form, m, kind):
    problem = Problem(m=m, n=1024, k=8192, format=form, output="bfloat16")
    check_mma(cache, problem, mma_choose(problem, mma_device(arch, 100)), kind, arch)


@pytest.mark.slow
@pytest.mark.parametrize("form", ITEM_BYTES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_tile_of_gemm_mma_runs_on_the_tensor_core_and_keeps_to_registers(cache, arch, form):
    """With an epilogue that needs much, whole with four columns stored at a time, and in slices with single ones."""
    for n in (1024, 1001):
        problem = Problem(m=64, n=n, k=16384, format=form, output="bfloat16")
        for tile in mma_candidates(problem, mma_device(arch, 100)):
            if (tile.stages, tile.slices) == (3, 1 if n == 1024 else 2):
                check_mma(cache, problem, tile, HEAVY, arch)


TOKENS = QuantSpec(format=INT8, dynamic="token")
KINDS = {
    "static": QuantizeKind(x_type="float32", spec=QuantSpec(format=UINT8, symmetric=False), zero_point=True),
    "tokens": QuantizeKind(x_type="bfloat16", spec=TOKENS),
    "layer": QuantizeKind(
        x_type="bfloat16", spec=TOKENS, norm="layer", norm_weight=True, norm_bias=True, multiply=True
    ),
    "fp8 blocks": QuantizeKind(x_type="bfloat16", spec=ACTIVATION_SPECS["fp8-block"]),
    "nvfp4": QuantizeKind(x_type="float16", spec=ACTIVATION_SPECS["nvfp4"]),
    "mxfp8": QuantizeKind(x_type="float32", spec=ACTIVATION_SPECS["mxfp8"]),
    "fp8 tokens, rms": QuantizeKind(
        x_type="float16", spec=QuantSpec(format=FP8_E4M3, dynamic="token"), norm="rms", norm_weight=True
    ),
}


def check_quantize(cache: Path, kind: QuantizeKind, columns: int, arch: str) -> None:
    launch = quantize_launch.launch_of(kind, 1000, columns, vector=columns % 8 == 0)
    found = opcodes(built(cache, quantize_launch.SOURCE, arch, launch.defines).cubin)
    assert found["LDL"] == found["STL"] == 0


@pytest.mark.parametrize(
    ("arch", "name", "columns"),
    [
        ("sm_80", "fp8 blocks", 8192),
        ("sm_86", "static", 1001),
        ("sm_89", "layer", 8192),
        ("sm_90a", "layer", 8192),
        ("sm_100a", "mxfp8", 8192),
        ("sm_120a", "nvfp4", 8192),
    ],
)
def test_quantize_keeps_to_registers(cache, arch, name, columns):
    check_quantize(cache, KINDS[name], columns, arch)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_quantize_keeps_to_registers_for_rows_of_every_length(cache, arch, name):
    for columns in (64, 1001, 2880, 8192, 16384, 28672, 100000):
        check_quantize(cache, KINDS[name], columns, arch)


@pytest.mark.slow
@pytest.mark.parametrize("m", [16, 4096])
@pytest.mark.parametrize("gpu", GPUS)
def test_what_every_family_chooses_builds_and_keeps_to_registers(cache, gpu, m):
    for family in FAMILIES:
        for form in sorted(family.formats):
            work = Work(m=m, n=4096, k=4096, format=form)
            if family.takes(work, GPUS[gpu]):
                configuration = family.predict(work, GPUS[gpu]).configuration
                source, defines = family.source(work, configuration, GPUS[gpu])
                found = opcodes(built(cache, source, GPUS[gpu].architecture, defines).cubin)
                assert any(name.endswith("MMA") for name in found)
                assert found["LDL"] == found["STL"] == 0

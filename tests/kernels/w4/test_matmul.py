"""matmul_w4 from the door to the launch, on arrays that only look like CuPy's: the emulator is the GPU."""

from dataclasses import asdict, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantkit.bench.operands import exact_operands
from quantkit.errors import KernelError
from quantkit.kernels import device as gpu
from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.gemm import matmul, pack_weight
from quantkit.kernels.gemm_operands import Epilogue
from quantkit.kernels.gpus import get_gpu
from quantkit.kernels.heuristics import Device
from quantkit.kernels.timing_table import Entry
from quantkit.kernels.w4 import choice, operands
from quantkit.kernels.w4.family import W4Family
from quantkit.kernels.w4.heuristics import W4Tile, w4_rank
from quantkit.kernels.w4.launch import w4_few_launch_of
from quantkit.kernels.w4.layout import pack4
from quantkit.kernels.w4.matmul import Workspace4, matmul_w4, pack_weight4
from quantkit.kernels.w4.mma_heuristics import W4MmaTile
from quantkit.kernels.w4.problem import W4Problem
from quantkit.kernels.w4.reference import w4_reference
from quantkit.kernels.work import Work

from ..fake_cupy import MULTIPROCESSORS, FakeCupy, install
from .weights import weight


@pytest.fixture
def cupy(monkeypatch, compiler) -> FakeCupy:
    fake = install(monkeypatch, "sm_90a")
    monkeypatch.setattr(operands, "_workspaces", {})
    # No GPU, nothing timed on it.
    monkeypatch.setattr(choice.tuning, "best_entry", lambda key, device: None)
    choice.configuration_of.cache_clear()
    return fake


def assert_same(found: Any, want: np.ndarray) -> None:
    np.testing.assert_array_equal(FakeCupy.asnumpy(found), want)


def small_codes(m: int, k: int, dtype: Any) -> np.ndarray:
    return np.random.default_rng(m * k).integers(-4, 5, (m, k)).astype(dtype)


@pytest.mark.parametrize(
    ("m", "kind", "dtype", "output"),
    [
        (1, ("int4", 128), ml_dtypes.bfloat16, "bfloat16"),
        (16, ("nvfp4", 16), np.float16, "float16"),
        (70, ("mxfp4", 32), ml_dtypes.bfloat16, "float32"),
        (5, ("int4", 128), np.int8, "bfloat16"),
        (70, ("int4", None), np.int8, "float32"),
    ],
)
def test_products_take_the_chosen_kernel_and_are_exact(cupy, m, kind, dtype, output):
    w = weight(np.random.default_rng(0), 136, 400, *kind)
    bits = 8 * np.dtype(dtype).itemsize
    a = small_codes(m, 400, dtype)
    d = matmul_w4(cupy.asarray(a), pack_weight4(w, activation_bits=bits), out_dtype=output)
    assert cupy.launches[-1][0] == ("gemm_w4_few" if m <= 64 else "gemm_w4_sm90")
    assert_same(d, w4_reference(a, pack4(w, activation_bits=bits), output=output))


@pytest.mark.parametrize("m", [5, 40])
@pytest.mark.parametrize(
    ("kind", "activations", "dtype"),
    [
        (("uint4", 64), None, np.float16),
        (("int4", 128), "int8", np.int8),
        (("int4", 128), "float8_e4m3fn", ml_dtypes.float8_e4m3fn),
        (("mxfp4", 32), "float8_e4m3fn", ml_dtypes.float8_e4m3fn),
    ],
)
def test_the_common_door_takes_weights_of_four_bits(cupy, kind, activations, dtype, m):
    w = weight(np.random.default_rng(0), 136, 400, *kind)
    bits = 8 * np.dtype(dtype).itemsize
    a = small_codes(m, 400, dtype)
    carried = a.view(np.uint8) if activations == "float8_e4m3fn" else a
    packed = pack_weight(w, activations=activations)
    d = matmul(cupy.asarray(carried), packed, out_dtype="float32", epilogue=Epilogue(row_scale=0.5))
    want = w4_reference(a, pack4(w, activation_bits=bits), row_scale=np.float32([0.5]), output="float32")
    assert_same(d, want)


@pytest.mark.parametrize("m", [3, 20])
@pytest.mark.parametrize("form", ["int4", "nvfp4", "w4a8", "w4a8-fp8", "mxfp4-fp8"])
def test_what_benchmarks_prepare_is_what_their_oracle_says(cupy, form, m):
    work = Work(m=m, n=72, k=160, format=form, bias=True, relu=True)
    family, operands = W4Family(), exact_operands(work)
    h200 = get_gpu("h200")
    tile = family.predict(work, replace(h200, multiprocessors=MULTIPROCESSORS)).configuration
    d = family.prepare(work, operands, tile)()
    assert_same(d.view(ml_dtypes.bfloat16), family.reference(work, operands))


def test_the_door_refuses_activations_that_a_format_is_not_multiplied_by(cupy):
    rng = np.random.default_rng(0)
    for kind, activations, complaint in (
        (("nvfp4", 16), "float8_e4m3fn", "only fp4_e2m1 with scales of e8m0"),
        (("int4", 32), "float8_e4m3fn", "groups of 32 by e4m3"),
        (("int4", 32), "int16", "activations 'int16'; one of bfloat16"),
    ):
        with pytest.raises(KernelError, match=complaint):
            pack_weight(weight(rng, 8, 64, *kind), activations=activations)


def test_what_was_timed_fastest_is_launched(cupy, monkeypatch):
    w = weight(np.random.default_rng(0), 136, 400, "int4", 128)
    packed, a = pack_weight4(w), small_codes(3, 400, np.float16)
    problem = W4Problem.of(packed.layout, m=3, activations="float16", output="float32")
    slowest = w4_rank(problem, Device(multiprocessors=MULTIPROCESSORS))[-1]
    entry = Entry(configuration=asdict(slowest), time_us=1.0, q1_us=1.0, q3_us=1.0, m=3, source="")
    monkeypatch.setattr(
        choice.tuning,
        "best_entry",
        lambda key, device: entry if key.format == "int4-128-bfloat16-float16" else None,
    )
    matmul_w4(cupy.asarray(a), packed, out_dtype="float32")
    kind = EpilogueKind(column_scale="each")
    assert cupy.launches[-1][1] == w4_few_launch_of(problem, slowest, kind).defines


def test_the_epilogue_reaches_the_kernel(cupy):
    w = weight(np.random.default_rng(0), 72, 130, "uint4", 64, zeros=True)
    a = small_codes(6, 130, np.float16)
    row, bias = np.random.default_rng(1).random(6, np.float32), np.arange(72, dtype=np.float32)
    residual = np.ones((2, 3, 72), np.float32)
    epilogue = Epilogue(
        row_scale=cupy.asarray(row),
        bias=cupy.asarray(bias),
        activation="relu",
        residual=cupy.asarray(residual),
    )
    d = matmul_w4(cupy.asarray(a.reshape(2, 3, 130)), pack_weight4(w), epilogue=epilogue, out_dtype="float32")
    want = w4_reference(a, pack4(w), row_scale=row, bias=bias, activation="relu", output="float32") + 1
    assert_same(d, want.reshape(2, 3, 72))


def test_a_captured_call_cuts_tiles_only_with_a_workspace_of_its_own(cupy):
    w = weight(np.random.default_rng(0), 72, 900, "int4", 128)
    a, packed = cupy.asarray(small_codes(20, 900, np.float16)), pack_weight4(w)
    want = w4_reference(np.asarray(a), pack4(w), output="float32")
    tile = W4Tile(tile_n=32, consumers=1, slabs=2, grain=2, stages=2)
    matmul_w4(a, packed, out_dtype="float32", tile=tile)  # a capture can load no kernel
    operands._workspaces.clear()
    cupy.capturing = True
    assert_same(matmul_w4(a, packed, out_dtype="float32", tile=tile), want)
    assert not operands._workspaces
    own = Workspace4(1 << 20, 64)
    assert_same(matmul_w4(a, packed, out_dtype="float32", tile=tile, workspace=own), want)
    assert not cupy.asnumpy(own.arrivals).any() and not operands._workspaces
    with pytest.raises(KernelError, match="this product takes"):
        matmul_w4(a, packed, out_dtype="float32", tile=tile, workspace=Workspace4(16, 1))
    cupy.capturing = False
    assert_same(matmul_w4(a, packed, out_dtype="float32", tile=tile), want)
    assert operands._workspaces


def test_what_does_not_fit_is_refused(cupy, monkeypatch):
    packed = pack_weight4(weight(np.random.default_rng(0), 8, 64, "int4", 32))
    for dtype, options, complaint in (
        (np.float32, {}, "float32 for a weight packed for bfloat16 or float16"),
        (np.int8, {}, "int8 for a weight packed for bfloat16"),
        (np.float16, {"out_dtype": "int32"}, "int32 would hold sums without their scales"),
        (np.float16, {"epilogue": Epilogue(bias=cupy.asarray(np.ones(3, np.float32)))}, "bias: 3 values"),
        (np.float16, {"out": cupy.asarray(np.ones((2, 9), np.float16))}, "out: .* is not a contiguous"),
    ):
        with pytest.raises(KernelError, match=complaint):
            matmul_w4(cupy.asarray(np.ones((2, 64), dtype)), packed, **options)
    with pytest.raises(KernelError, match="does not end in the weight's k = 64"):
        matmul_w4(cupy.asarray(np.ones((2, 32), np.float16)), packed)
    monkeypatch.setattr(gpu, "architecture", lambda device: "sm_80")
    with pytest.raises(KernelError, match="packed for sm_90a, GPU 0 is sm_80"):
        matmul_w4(cupy.asarray(np.ones((2, 64), np.float16)), packed)
    tile = W4Tile(tile_n=32, consumers=1, slabs=2, grain=2, stages=2)
    with pytest.raises(KernelError, match="a W4Tile on sm_80; pass a W4MmaTile"):
        matmul_w4(cupy.asarray(np.ones((2, 64), np.float16)), packed, tile=tile)


@pytest.mark.parametrize(
    ("m", "kind", "dtype", "output"),
    [
        (1, ("int4", 128), ml_dtypes.bfloat16, "bfloat16"),
        (30, ("nvfp4", 16), np.float16, "float32"),
        (5, ("int4", 64), np.int8, "bfloat16"),
    ],
)
def test_other_architectures_take_the_universal_kernel(cupy, monkeypatch, m, kind, dtype, output):
    """Slices of K share the stream's workspace; a captured call has none, unless it is given one."""
    monkeypatch.setattr(gpu, "architecture", lambda device: "sm_86")
    w = weight(np.random.default_rng(0), 72, 16000, *kind)
    bits = 8 * np.dtype(dtype).itemsize
    a, packed = small_codes(m, 16000, dtype), pack_weight4(w, activation_bits=bits)
    want = w4_reference(a, pack4(w, activation_bits=bits), output=output)
    assert_same(matmul_w4(cupy.asarray(a), packed, out_dtype=output), want)
    name, defines, _ = cupy.launches[-1]
    assert (name, defines["SLICED"]) == ("gemm_w4_mma", 1) and operands._workspaces
    cupy.capturing = True
    assert_same(matmul_w4(cupy.asarray(a), packed, out_dtype=output), want)
    assert cupy.launches[-1][1]["SLICED"] == 0
    own = Workspace4(1 << 20, 64)
    assert_same(matmul_w4(cupy.asarray(a), packed, out_dtype=output, workspace=own), want)
    assert cupy.launches[-1][1]["SLICED"] == 1 and not cupy.asnumpy(own.arrivals).any()


def test_hopper_takes_the_universal_kernel_where_it_is_asked_to(cupy):
    w = weight(np.random.default_rng(0), 72, 130, "int4", 128)
    a = small_codes(6, 130, np.float16)
    tile = W4MmaTile(tile_w=64, tile_a=8, warps_w=4, slabs=2)
    d = matmul_w4(cupy.asarray(a), pack_weight4(w), out_dtype="float32", tile=tile)
    assert cupy.launches[-1][0] == "gemm_w4_mma"
    assert_same(d, w4_reference(a, pack4(w), output="float32"))

"""matmul from the door to the launch, on both kernels: the emulator is the GPU, and nothing waits for it."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantkit.formats import FP8_E4M3, INT8, QuantSpec, qparams_from_range, quantize, range_of
from quantkit.kernels import Epilogue, PackedWeight, gemm, matmul, pack_weight, quantize_activation
from quantkit.kernels import device as gpu
from quantkit.kernels.epilogue import EpilogueKind, EpilogueValues
from quantkit.kernels.gemm import pack_codes
from quantkit.kernels.heuristics import Problem, Tile, rank
from quantkit.kernels.mma_heuristics import mma_device, mma_rank
from quantkit.kernels.reference import gemm_reference

from .fake_cupy import MULTIPROCESSORS, FakeCupy, install

KERNELS = {"sm_90a": "gemm_sm90", "sm_80": "gemm_mma"}
DTYPES = {
    "int8": np.dtype(np.int8),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
CARRIERS = {"int8": np.int8, "float8_e4m3fn": np.uint8, "bfloat16": np.uint16, "float16": np.float16}
VALUES = EpilogueValues(scale=0.02, zero_point=-128, residual_scale=0.02, residual_zero_point=5)
M, N, K = 35, 72, 272
LONG = 1040  # a K that is worth slicing


@pytest.fixture(params=KERNELS)
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, compiler: str, arch: str) -> FakeCupy:
    return install(monkeypatch, arch)


def whole(shape: tuple[int, ...], form: str, seed: int = 0) -> np.ndarray:
    """Small whole numbers, whose sums every format holds."""
    return np.random.default_rng([seed, *shape]).integers(-4, 5, shape).astype(DTYPES[form])


def carried(cupy: FakeCupy, codes: np.ndarray, form: str) -> Any:
    return cupy.asarray(codes.view(CARRIERS[form]))


def assert_same(d: Any, want: np.ndarray) -> None:
    np.testing.assert_array_equal(
        np.asarray(d).view(np.uint8).reshape(-1), np.ascontiguousarray(want).view(np.uint8).reshape(-1)
    )


@pytest.mark.parametrize(
    ("form", "output"),
    [
        ("int8", "int32"),
        ("int8", "float16"),
        ("float8_e4m3fn", "bfloat16"),
        ("float8_e4m3fn", "float8_e4m3fn"),
        ("bfloat16", "float32"),
        ("float16", "int8"),
    ],
)
def test_formats_and_outputs_travel_as_what_cupy_has(cupy, arch, form, output):
    a, b = whole((M, K), form), whole((N, K), form, 1)
    scale = np.ldexp(np.float32(1), np.arange(N) % 5 - 6)
    d = matmul(carried(cupy, a, form), pack_codes(b, scale, form), out_dtype=output)
    assert_same(d, gemm_reference(a, b, column_scale=scale, output=output))
    assert d.shape == (M, N)
    assert cupy.launches[-1][0] == ("gemm_mma" if form == "float16" else KERNELS[arch])


def resnet(cupy: FakeCupy, k: int = K) -> tuple[np.ndarray, PackedWeight, Epilogue, np.ndarray]:
    """An int8 layer with everything that one can have, and what it gives."""
    rng = np.random.default_rng(0)
    a, b, residual = (rng.integers(-128, 128, s).astype(np.int8) for s in ((M, k), (N, k), (M, N)))
    row = (rng.random(M) + 0.5).astype(np.float32) * np.float32(1e-5)
    column, bias = (rng.random(N) + 0.5).astype(np.float32), rng.standard_normal(N).astype(np.float32)
    epilogue = Epilogue(
        row_scale=cupy.asarray(row), bias=cupy.asarray(bias), residual=cupy.asarray(residual),
        residual_scale=VALUES.residual_scale, residual_zero_point=VALUES.residual_zero_point,
        residual_first=True, activation="relu", output_scale=VALUES.scale, output_zero_point=VALUES.zero_point,
    )  # fmt: skip
    want = gemm_reference(
        a, b, row_scale=row, column_scale=column, bias=bias, activation="relu", residual=residual,
        residual_place="before", values=VALUES, output="int8",
    )  # fmt: skip
    return a, pack_codes(b, column, "int8"), epilogue, want


def test_a_layer_with_everything_is_exact(cupy):
    a, weight, epilogue, want = resnet(cupy)
    assert_same(matmul(cupy.asarray(a), weight, epilogue=epilogue, out_dtype="int8"), want)


def test_the_universal_kernel_is_there_on_every_gpu_by_its_tile(cupy, arch):
    a, weight, epilogue, want = resnet(cupy, LONG)
    ranked = mma_rank(
        Problem(m=M, n=N, k=LONG, format="int8", output="int8"), mma_device(arch, MULTIPROCESSORS)
    )
    for tile in (ranked[0], next(t for t in ranked if t.slices > 1)):
        assert_same(matmul(cupy.asarray(a), weight, epilogue=epilogue, out_dtype="int8", tile=tile), want)
        assert cupy.launches[-1][0] == "gemm_mma"


@pytest.mark.parametrize("arch", ["sm_90a"], indirect=True)
def test_a_tile_of_ones_own_is_the_one_that_runs(cupy):
    a, weight, epilogue, want = resnet(cupy)
    tile = Tile(blocks_of_64=1, tile_n=64, stages=3, swap=True, split=2)
    assert_same(matmul(cupy.asarray(a), weight, epilogue=epilogue, out_dtype="int8", tile=tile), want)
    assert (cupy.launches[-1][1]["SPLIT"], cupy.launches[-1][1]["TILE_N"]) == (2, 64)


@pytest.mark.parametrize("arch", ["sm_90a"], indirect=True)
def test_stream_k_meets_in_memory_of_the_stream_and_is_not_captured(cupy):
    a, weight, epilogue, want = resnet(cupy, LONG)
    tile = Tile(blocks_of_64=1, tile_n=64, stages=3, consumers=1, swap=True, stream=True)
    codes, out = cupy.asarray(a), cupy.empty((M, N), np.int8)
    for capturing in (False, False, True):
        cupy.capturing = capturing
        matmul(codes, weight, epilogue=epilogue, out_dtype="int8", out=out, tile=tile)
        assert_same(out, want)
        out.view(np.ndarray)[...] = 55
    assert [macros["STREAM"] for _, macros, _ in cupy.launches] == [1, 1, 0]


@pytest.mark.parametrize("arch", ["sm_90a"], indirect=True)
def test_a_graph_gets_the_best_tile_that_it_can_run(cupy, monkeypatch):
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: 132)
    problem = Problem(m=128, n=4096, k=28672, format="bfloat16", output="bfloat16")
    ranked = rank(problem)
    for cupy.capturing, tile in ((False, ranked[0]), (True, next(t for t in ranked if not t.stream))):
        assert gemm._tile_now(problem, EpilogueKind(), 0) == tile
    assert ranked[0].stream


def test_uint8_codes_and_their_zero_point_mean_the_same_as_int8(cupy):
    a, b = whole((M, K), "int8"), whole((N, K), "int8", 1)
    codes = (a.astype(np.int16) + 128).astype(np.uint8)
    weight = pack_codes(b, None, "int8")
    d = matmul(cupy.asarray(codes), weight, epilogue=Epilogue(zero_point=77), out_dtype="int32")
    assert_same(d, gemm_reference(a, b, zero_point=np.array([77 - 128], np.int32), output="int32"))


def test_leading_axes_are_rows_and_no_rows_give_nothing(cupy):
    a, b = whole((2, 3, 5, K), "int8"), whole((N, K), "int8", 1)
    weight = pack_codes(b, None, "int8")
    d = matmul(cupy.asarray(a), weight, out_dtype="float32")
    assert d.shape == (2, 3, 5, N)
    assert_same(d, gemm_reference(a.reshape(30, K), b, output="float32"))
    before = len(cupy.launches)
    assert matmul(cupy.asarray(a[:0]), weight).shape == (0, 3, 5, N)
    assert len(cupy.launches) == before


def test_views_that_are_not_aligned_are_as_good_as_any(cupy):
    a, b = whole((M, K), "int8"), whole((N, K), "int8", 1)
    row = np.ldexp(np.float32(1), np.arange(M) % 4)
    wide = np.zeros((M, K + 3), np.int8)
    wide[:, 3:] = a
    odd = cupy.empty(M * N + 1, np.float32)[1:].reshape(M, N)
    scales = cupy.asarray(np.concatenate([[0], row]).astype(np.float32))[1:]
    returned = matmul(
        cupy.asarray(wide)[:, 3:], pack_codes(b, None, "int8"), epilogue=Epilogue(row_scale=scales),
        out_dtype="float32", out=odd,
    )  # fmt: skip
    assert returned is odd
    assert_same(odd, gemm_reference(a, b, row_scale=row, output="float32"))


def test_rows_of_a_wider_matrix_are_read_where_they_lie(cupy):
    a, b = whole((M, 2 * K), "int8"), whole((N, K), "int8", 1)
    held, weight, out = cupy.asarray(a), pack_codes(b, None, "int8"), cupy.empty((M, N), np.float32)
    before = cupy.allocations
    matmul(held[:, K:], weight, out_dtype="float32", out=out)
    assert cupy.allocations == before
    assert_same(out, gemm_reference(a[:, K:], b, output="float32"))


def test_what_is_captured_allocates_nothing_and_is_not_sliced(cupy, arch):
    """A CUDA graph may run beside its own stream: slices of two launches would meet in one memory."""
    a, weight, epilogue, want = resnet(cupy, LONG)
    codes, out = cupy.asarray(a), cupy.empty((M, N), np.int8)
    ranked = mma_rank(
        Problem(m=M, n=N, k=LONG, format="int8", output="int8"), mma_device(arch, MULTIPROCESSORS)
    )
    sliced = next(t for t in ranked if t.slices > 1)
    for tile in (None, sliced):
        matmul(codes, weight, epilogue=epilogue, out_dtype="int8", out=out, tile=tile)
        cupy.capturing, before = True, cupy.allocations
        out.view(np.ndarray)[...] = 55
        matmul(codes, weight, epilogue=epilogue, out_dtype="int8", out=out, tile=tile)
        cupy.capturing = False
        assert cupy.allocations == before
        assert_same(out, want)
    assert cupy.launches[-2][2][1] == sliced.slices
    assert cupy.launches[-1][2][1:] in ((), (1,))


@pytest.mark.parametrize("form", [INT8, FP8_E4M3])
def test_float_activations_are_quantized_and_multiplied_without_waiting(cupy, arch, form):
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((M, K)).astype(np.float32), rng.standard_normal((N, K)).astype(np.float32)
    by_row = QuantSpec(format=form, axis=0)
    held = quantize(w, qparams_from_range(range_of(w, by_row), by_row), by_row)
    q = quantize_activation(cupy.asarray(x), QuantSpec(format=form, dynamic="token"))
    d = matmul(q.codes, pack_weight(held, arch), epilogue=Epilogue(row_scale=q.scale), out_dtype="float32")
    assert [name for name, *_ in cupy.launches] == ["quantize", KERNELS[arch]]
    codes = np.asarray(q.codes).view(form.dtype)
    scales = np.asarray(held.qparams.scale, np.float32).reshape(-1)
    want = gemm_reference(
        codes, held.qvalue, row_scale=np.asarray(q.scale), column_scale=scales, output="float32"
    )
    if form is INT8:
        assert_same(d, want)
    else:  # fp8 products are cut to some 13 bits as they are added
        reach = np.abs(codes.astype(np.float64)) @ np.abs(held.qvalue.astype(np.float64)).T
        reach *= np.asarray(q.scale).astype(np.float64) * scales
        assert np.all(np.abs(np.asarray(d) - want) <= reach * (K / 32) * 2.0**-12)
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    assert np.linalg.norm(np.asarray(d) - exact) < (0.02 if form is INT8 else 0.06) * np.linalg.norm(exact)

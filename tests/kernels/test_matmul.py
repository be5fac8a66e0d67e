"""matmul on a GPU: what the kernels' own tests cannot see. Every epilogue by name, both kernels, graphs, streams."""

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from quantkit.kernels.epilogue import EpilogueValues
from quantkit.kernels.gemm import Epilogue, PackedWeight, matmul, pack_codes
from quantkit.kernels.heuristics import Problem
from quantkit.kernels.mma_heuristics import mma_device, mma_rank
from quantkit.kernels.reference import gemm_reference

from .backends import gpu

pytestmark = pytest.mark.skipif(gpu() is None, reason="no GPU")

M, N, K = 130, 520, 1040
VALUES = EpilogueValues(scale=0.02, zero_point=-128, residual_scale=0.02, residual_zero_point=5)


@pytest.fixture(scope="module")
def cupy() -> Any:
    return importlib.import_module("cupy")


class Resnet:
    """An int8 layer with everything that one can have."""

    def __init__(self, cupy: Any) -> None:
        rng = np.random.default_rng(0)
        self.a, self.b, self.residual = (
            rng.integers(-128, 128, shape).astype(np.int8) for shape in ((M, K), (N, K), (M, N))
        )
        self.row = (rng.random(M) + 0.5).astype(np.float32) * np.float32(1e-5)
        self.column = (rng.random(N) + 0.5).astype(np.float32)
        self.bias = rng.standard_normal(N).astype(np.float32)
        self.weight: PackedWeight = pack_codes(self.b, self.column, "int8")
        self.epilogue = Epilogue(
            row_scale=cupy.asarray(self.row),
            bias=cupy.asarray(self.bias),
            residual=cupy.asarray(self.residual),
            residual_scale=VALUES.residual_scale,
            residual_zero_point=VALUES.residual_zero_point,
            residual_first=True,
            activation="relu",
            output_scale=VALUES.scale,
            output_zero_point=VALUES.zero_point,
        )

    def want(self) -> np.ndarray:
        return gemm_reference(
            self.a, self.b, row_scale=self.row, column_scale=self.column, bias=self.bias, activation="relu",
            residual=self.residual, residual_place="before", values=VALUES, output="int8",
        )  # fmt: skip


@pytest.fixture(scope="module")
def layer(cupy) -> Resnet:
    return Resnet(cupy)


def test_a_layer_with_everything_is_exact_on_both_kernels(cupy, layer):
    a = cupy.asarray(layer.a)
    problem = Problem(m=M, n=N, k=K, format="int8", output="int8")
    ranked = mma_rank(problem, mma_device("sm_90a", 132))
    sliced, whole = (next(t for t in ranked if (t.slices > 1) == many) for many in (True, False))
    for tile in (None, whole, sliced, sliced):  # slices leave their counters as they found them
        d = matmul(a, layer.weight, epilogue=layer.epilogue, out_dtype="int8", tile=tile)
        np.testing.assert_array_equal(cupy.asnumpy(d), layer.want())


def test_uint8_codes_and_their_zero_point_mean_the_same_as_int8(cupy, layer):
    codes = (layer.a.astype(np.int16) + 128).astype(np.uint8)
    epilogue = Epilogue(zero_point=77)
    d = matmul(cupy.asarray(codes), layer.weight, epilogue=epilogue, out_dtype="int32")
    want = gemm_reference(layer.a, layer.b, zero_point=np.array([77 - 128], np.int32), output="int32")
    np.testing.assert_array_equal(cupy.asnumpy(d), want)


def test_views_that_are_not_aligned_are_as_good_as_any(cupy, layer):
    odd = cupy.empty(M * N + 1, np.float32)[1:].reshape(M, N)
    wide = cupy.zeros((M, K + 3), np.int8)
    wide[:, 3:] = cupy.asarray(layer.a)
    scales = cupy.zeros(M + 1, np.float32)
    scales[1:] = cupy.asarray(layer.row)
    matmul(wide[:, 3:], layer.weight, epilogue=Epilogue(row_scale=scales[1:]), out_dtype="float32", out=odd)
    want = gemm_reference(layer.a, layer.b, row_scale=layer.row, column_scale=layer.column, output="float32")
    np.testing.assert_array_equal(cupy.asnumpy(odd.copy()), want)


@pytest.mark.parametrize("rows", [M, 16])
def test_a_captured_product_replays_on_new_operands(cupy, layer, rows):
    a, out = cupy.asarray(layer.a[:rows]), cupy.empty((rows, N), np.int8)
    epilogue = replace(
        layer.epilogue,
        row_scale=layer.epilogue.row_scale[:rows].copy(),
        residual=layer.epilogue.residual[:rows].copy(),
    )

    def run() -> None:
        matmul(a, layer.weight, epilogue=epilogue, out_dtype="int8", out=out)

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        run()  # compiles, which a capture cannot
        stream.begin_capture()
        run()
        graph = stream.end_capture()
        a[...] = cupy.asarray(layer.a[-rows:])
        run()
        want = out.copy()
        out.fill(55)
        graph.launch(stream)
        stream.synchronize()
    np.testing.assert_array_equal(cupy.asnumpy(out), cupy.asnumpy(want))


def test_products_on_streams_of_their_own_do_not_meet(cupy):
    rng = np.random.default_rng(1)
    activations = [
        cupy.asarray(rng.integers(-128, 128, (rows, 4096)).astype(np.int8)) for rows in (16, 64, 300, 2048)
    ]
    weight = pack_codes(rng.integers(-128, 128, (4096, 4096)).astype(np.int8), None, "int8")
    alone = [matmul(a, weight, out_dtype="int32") for a in activations]
    outs = [cupy.zeros_like(d) for d in alone]
    cupy.cuda.Device().synchronize()
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in activations]
    for _ in range(20):
        for stream, a, out in zip(streams, activations, outs, strict=True):
            with stream:
                matmul(a, weight, out_dtype="int32", out=out)
    cupy.cuda.Device().synchronize()
    assert all(bool((out == d).all()) for out, d in zip(outs, alone, strict=True))

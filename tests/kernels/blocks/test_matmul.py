"""Quantize, pack, multiply: block scales from the door to the launch, on a GPU that is the emulator."""

from typing import Any

import numpy as np
import pytest

from quantkit.bench.operands import exact_operands
from quantkit.errors import KernelError
from quantkit.formats import (
    FP8_E4M3,
    INT8,
    QuantSpec,
    dynamic_qparams,
    qparams_from_range,
    quantize,
    range_of,
)
from quantkit.formats.presets import ACTIVATION_SPECS, weight_spec
from quantkit.kernels import Epilogue, PackedWeight, matmul, pack_weight, quantize_activation, tuning
from quantkit.kernels.blocks import matmul as launcher
from quantkit.kernels.blocks.family import BlocksFamily
from quantkit.kernels.blocks.heuristics import BLOCKS, BlocksTile
from quantkit.kernels.blocks.matmul import PackedBlockWeight
from quantkit.kernels.blocks.reference import blocks_reference
from quantkit.kernels.gpus import get_gpu
from quantkit.kernels.work import Work

from ..fake_cupy import FakeCupy, install

M, N, K = 21, 72, 400
TILES = {
    "chosen": None,
    "plain": BlocksTile(blocks_of_64=1, tile_n=64, stages=3),
    "swapped": BlocksTile(blocks_of_64=1, tile_n=32, stages=3, swap=True),
}


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, compiler: str) -> FakeCupy:
    fake = install(monkeypatch, "sm_90a")
    monkeypatch.setattr(tuning, "best_entry", lambda key, device: None)
    monkeypatch.setattr(launcher, "_tile", launcher._tile.__wrapped__)
    return fake


def layer(name: str, n: int = N, k: int = K) -> Any:
    """A weight of whole numbers, most of them no larger than 4, so that products are exact."""
    rng = np.random.default_rng([n, k])
    spec = weight_spec(name, channel_axis=0, contraction_axis=1)
    x = rng.integers(-4, 5, (n, k)).astype(np.float32)
    x[:, ::32] = 448.0  # then a scale is 1, and a code what it stands for
    x[rng.random((n, k)) < 0.5] = 0.0
    x[:, ::32] = 448.0
    return quantize(x, qparams_from_range(range_of(x, spec), spec), spec)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("tile", TILES)
def test_quantized_activations_and_packed_weights_multiply_as_they_are(cupy, name, tile):
    rng = np.random.default_rng(0)
    x = rng.integers(-4, 5, (3, M // 3, K)).astype(np.float32)
    bias, residual = (rng.standard_normal(s).astype(np.float32) for s in ((N,), (3, M // 3, N)))
    weight, spec = layer(name), ACTIVATION_SPECS[name]
    packed = pack_weight(weight)
    assert isinstance(packed, PackedBlockWeight)
    q = quantize_activation(cupy.asarray(x), spec)
    epilogue = Epilogue(bias=cupy.asarray(bias), activation="relu", residual=cupy.asarray(residual))
    d = matmul(q, packed, epilogue=epilogue, out_dtype="float32", tile=TILES[tile])
    flat = x.reshape(M, K)
    a = quantize(flat, dynamic_qparams(flat, spec), spec)
    want = blocks_reference(
        a.qvalue, a.qparams.scale, weight.qvalue, weight.qparams.scale, block=BLOCKS[name], bias=bias,
        activation="relu", residual=residual.reshape(M, N), output="float32",
    )  # fmt: skip
    assert d.shape == (3, M // 3, N)
    # Codes of 448 and 4 side by side: within what 14 bits of a block's sum lose.
    spread = np.abs(want).max()
    np.testing.assert_allclose(np.asarray(d).reshape(M, N), want, rtol=0, atol=spread * 2.0**-11)
    assert cupy.launches[-1][0] == "gemm_blocks_sm90"


def test_codes_and_scales_are_read_where_they_lie(cupy):
    q = quantize_activation(cupy.asarray(np.ones((M, K), np.float32)), ACTIVATION_SPECS["fp8-block"])
    weight, out = pack_weight(layer("fp8-block")), cupy.empty((M, N), np.float32)
    before = cupy.allocations
    matmul(q, weight, out_dtype="float32", out=out)
    assert cupy.allocations == before


def test_scales_that_are_not_aligned_are_as_good_as_any(cupy):
    x = np.random.default_rng(1).standard_normal((M, K)).astype(np.float32)
    q = quantize_activation(cupy.asarray(x), ACTIVATION_SPECS["mxfp8"])
    odd = cupy.asarray(np.full(M * 13 + 1, 0xFF, np.uint8))[1:].reshape(M, 13)
    odd[...] = q.scale
    weight = pack_weight(layer("mxfp8"))
    moved = type(q)(codes=q.codes, scale=odd, zero_point=0, global_scale=None, spec=q.spec)
    got, want = (np.asarray(matmul(a, weight, out_dtype="float32")) for a in (moved, q))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row(cupy, rows):
    q = quantize_activation(cupy.asarray(np.ones((rows, K), np.float32)), ACTIVATION_SPECS["mxfp8"])
    assert matmul(q, pack_weight(layer("mxfp8")), out_dtype="float16").shape == (rows, N)


def test_the_door_says_what_does_not_fit(cupy, monkeypatch):
    weight = pack_weight(layer("fp8-block"))
    x = cupy.asarray(np.ones((M, K), np.float32))
    q = quantize_activation(x, ACTIVATION_SPECS["fp8-block"])
    for a, options, words in (
        (q.codes, {}, "what quantize_activation gave"),
        (quantize_activation(x, ACTIVATION_SPECS["mxfp8"]), {}, "quantize them alike"),
        (quantize_activation(x, QuantSpec(format=FP8_E4M3, dynamic="token")), {}, "quantize them alike"),
        (quantize_activation(x, QuantSpec(format=INT8, dynamic="token")), {}, "quantize them alike"),
        (q, {"out_dtype": "int32"}, "take float32"),
        (q, {"epilogue": Epilogue(zero_point=3)}, "zero_point"),
        (quantize_activation(x[:, :384], q.spec), {}, "does not end in the weight's k = 400"),
        (q, {"out": cupy.empty((M, N + 1), np.uint16)}, "out"),
    ):
        with pytest.raises(KernelError, match=words):
            matmul(a, weight, **options)
    monkeypatch.setattr(launcher.gpu, "architecture", lambda device: "sm_89")
    with pytest.raises(KernelError, match="sm_89; it needs sm_90a"):
        matmul(q, weight)


def test_weights_without_blocks_are_packed_as_before(cupy):
    spec = QuantSpec(format=FP8_E4M3, axis=0)
    x = np.ones((8, 32), np.float32)
    packed = pack_weight(quantize(x, qparams_from_range(range_of(x, spec), spec), spec))
    assert isinstance(packed, PackedWeight)


@pytest.mark.parametrize("name", BLOCKS)
def test_what_benchmarks_prepare_is_what_the_oracle_says(cupy, name):
    work = Work(m=M, n=N, k=K, format=name, output="float32", bias=True, relu=True)
    family, operands = BlocksFamily(), exact_operands(work)
    for tile in family.ranked(work, get_gpu("h200"))[:3]:
        d = family.prepare(work, operands, tile)()
        np.testing.assert_array_equal(np.asarray(d), family.reference(work, operands))

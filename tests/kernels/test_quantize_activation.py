"""quantize_activation from the door to the launch, on arrays that only look like CuPy's: the emulator is the GPU."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantkit.errors import KernelError
from quantkit.formats import (
    FP4_E2M1,
    FP8_E4M3,
    INT8,
    UINT8,
    QParams,
    QuantSpec,
    dynamic_qparams,
    quantize,
)
from quantkit.formats.packing import code_bits, pack_bits
from quantkit.formats.presets import ACTIVATION_SPECS
from quantkit.kernels import Norm, quantize_activation
from quantkit.kernels.quantize_reference import NormReference, quantize_reference

from .fake_cupy import FakeCupy, install

TOKENS = QuantSpec(format=INT8, dynamic="token")


@pytest.fixture
def cupy(monkeypatch, compiler) -> FakeCupy:
    return install(monkeypatch, "sm_90a")


def assert_same(found: Any, want: np.ndarray) -> None:
    np.testing.assert_array_equal(FakeCupy.asnumpy(found), want)


def values(shape: tuple[int, ...], dtype: Any = np.float16) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("shape", [(5, 64), (7, 130), (2, 3, 48), (1000, 16), (40,)])
@pytest.mark.parametrize("preset", ["fp8-block", "mxfp8", "nvfp4"])
def test_blocks_of_any_shape_are_those_of_numpy(cupy, shape, preset):
    spec, x = ACTIVATION_SPECS[preset], values(shape)
    options = {"global_scale": np.float32(0.002)} if spec.has_global_scale else {}
    found = quantize_activation(cupy.asarray(x).reshape(x.shape), spec, **options)
    wide = x.astype(np.float32)
    want = quantize(wide, dynamic_qparams(wide, spec, **options), spec)
    bits = code_bits(want.qvalue, spec.format)
    assert_same(found.codes, pack_bits(bits, 4) if spec.format == FP4_E2M1 else bits)
    held = want.qparams.scale
    stored = held if spec.scale_format is None else held.astype(spec.scale_format.dtype).view(np.uint8)
    assert_same(found.scale, stored)


@pytest.mark.parametrize("shape", [(64, 16), (3, 1000), (96, 32)])
def test_fixed_scales_reach_every_row_also_where_rows_are_joined(cupy, shape):
    spec, x = QuantSpec(format=UINT8, symmetric=False), values(shape, np.float32)
    found = quantize_activation(cupy.asarray(x), spec, scale=0.02, zero_point=100)
    want = quantize(x, QParams(np.float32(0.02), np.uint8(100)), spec)
    assert_same(found.codes, want.qvalue)
    assert (found.zero_point, float(found.scale[0])) == (100, np.float32(0.02))


def test_tokens_have_one_scale_each_and_rows_that_matmul_can_take(cupy):
    x = values((2, 5, 37))
    found = quantize_activation(cupy.asarray(x), TOKENS)
    want = quantize(x.astype(np.float32), dynamic_qparams(x.astype(np.float32), TOKENS), TOKENS)
    assert_same(found.codes, want.qvalue)
    assert_same(found.scale, want.qparams.scale)
    assert found.codes.strides == (5 * 48, 48, 1)
    assert found.codes.dtype == np.int8


def test_a_norm_and_a_multiplier_come_first(cupy):
    x, weight, factor = (
        values((3, 96), ml_dtypes.bfloat16),
        values((96,), np.float32),
        values((96,), np.float32),
    )
    norm = Norm(kind="rms", weight=cupy.asarray(weight), epsilon=1e-6)
    # CuPy may have no bfloat16: two bytes stand for it.
    found = quantize_activation(
        cupy.asarray(x.view(np.uint16)), TOKENS, norm=norm, multiplier=cupy.asarray(factor)
    )
    reference = NormReference(kind="rms", weight=weight, epsilon=1e-6)
    want = quantize_reference(x, TOKENS, norm=reference, multiplier=factor, row_threads=8)
    assert_same(found.codes, want.qvalue)


def test_views_are_read_where_they_lie_or_copied_where_they_cannot_be(cupy):
    whole = cupy.asarray(values((6, 128)))
    for view in (whole[:, ::2], whole.T):
        found = quantize_activation(view, TOKENS)
        wide = np.asarray(view).astype(np.float32)
        assert_same(found.codes, quantize(wide, dynamic_qparams(wide, TOKENS), TOKENS).qvalue)
    found = quantize_activation(whole[:, :72], TOKENS)
    wide = np.asarray(whole[:, :72]).astype(np.float32)
    assert_same(found.codes, quantize(wide, dynamic_qparams(wide, TOKENS), TOKENS).qvalue)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_nothing_is_launched_for_nothing(cupy, shape):
    found = quantize_activation(cupy.asarray(np.zeros(shape, np.float32)), TOKENS)
    assert found.codes.shape == shape
    assert not cupy.launches


FIXED, FLOATS = QuantSpec(format=INT8), QuantSpec(format=FP8_E4M3)
REFUSED: list[tuple[str, Any, QuantSpec, dict[str, Any]]] = [
    ("float64; use", np.zeros((2, 8)), TOKENS, {}),
    ("a number", np.zeros((), np.float32), TOKENS, {}),
    ("scale is needed", np.zeros((2, 8), np.float32), FIXED, {}),
    ("leave one out", np.zeros((2, 8), np.float32), TOKENS, {"scale": 1.0}),
    ("no zero point is free", np.zeros((2, 8), np.float32), TOKENS, {"zero_point": 3}),
    ("no zero point is free", np.zeros((2, 8), np.float32), FLOATS, {"scale": 1.0, "zero_point": 3}),
    ("zero_point 300 is no int8", np.zeros((2, 8), np.float32), FIXED, {"scale": 1.0, "zero_point": 300}),
    ("need a global_scale", np.zeros((2, 16), np.float32), ACTIVATION_SPECS["nvfp4"], {}),
    ("no meaning", np.zeros((2, 16), np.float32), TOKENS, {"global_scale": 1.0}),
    ("scale: a float", np.zeros((2, 8), np.float32), FIXED, {"scale": np.zeros(2, np.float32)}),
    ("multiplier: 7 values", np.zeros((2, 8), np.float32), TOKENS, {"multiplier": np.zeros(7, np.float32)}),
    ("norm.weight: 8 values", np.zeros((2, 8), np.float32), TOKENS, {"norm": Norm(kind="rms", weight=np.zeros(8))}),
    ("needs blocks", np.zeros((2, 8), np.float32), QuantSpec(format=FP4_E2M1), {}),
]  # fmt: skip


@pytest.mark.parametrize(("complaint", "x", "spec", "options"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_does_not_fit_is_refused_at_the_door(cupy, complaint, x, spec, options):
    with pytest.raises(KernelError, match=complaint):
        quantize_activation(cupy.asarray(x).reshape(x.shape), spec, **options)
    assert not cupy.launches

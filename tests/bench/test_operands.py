"""What a product is run on: real codes where the file has them, real values, or numbers that say what they are."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.bench.cropping import cropped, taken
from quantkit.bench.feeding import Captured
from quantkit.bench.find_layers import find_layers
from quantkit.bench.operands import drawn, exact_operands, operands_of, random_operands
from quantkit.bench.reading import Operand
from quantkit.formats.quantize import QTensor, dequantize
from quantkit.kernels.dense_family import DenseFamily
from quantkit.kernels.families import FAMILIES
from quantkit.kernels.work import FORMATS, Work
from quantkit.statistics import FloatHistogram
from tests.bench.quantized import BUILDERS

RNG = np.random.default_rng(0)


def layer_of(name: str):
    ((layer,), _) = find_layers(ir.serde.deserialize_model(BUILDERS[name]()))
    return layer


def captured(layer, x: np.ndarray, **fields) -> Captured:
    name = layer.activations.tensor
    return Captured(shapes={name: x.shape}, samples=1, tensors={name: x}, origin="calib/", **fields)


def test_a_quantized_files_codes_and_scales_are_used_as_they_are() -> None:
    layer = layer_of("qdq_matmul")
    x = RNG.standard_normal((1, 5, 16)).astype(np.float32)
    found = operands_of(Work(m=5, n=6, k=16, format="int8"), layer, captured(layer, x))
    assert isinstance(found.weight, QTensor)
    np.testing.assert_array_equal(found.weight.qvalue, layer.weights.codes.T)
    np.testing.assert_array_equal(found.scale, [np.float32(0.03)])
    np.testing.assert_array_equal(found.activations, np.clip(np.rint(x[0] / np.float32(0.03)), -128, 127))
    assert found.origin == "calib/"


IN_BLOCKS = (
    "int4_in_blocks",
    "matmul_nbits",
    "nvfp4_with_quantized_scales",
    "mxfp4_of_a_newer_operator_set",
    "fp8_in_squares",
    "mxfp8_weights_of_tensorrt",
)


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_weights_in_blocks_are_taken_as_they_lie_in_the_file(name: str) -> None:
    layer = layer_of(name)
    want = layer.weight_matrix({})
    n, k = want.shape
    group = layer.weights.block_size if layer.format == "int4" else None
    work = Work(m=3, n=n, k=k, format=layer.format, group=group)
    held = operands_of(work, layer, Captured(shapes={}, samples=1)).weight
    assert isinstance(held, QTensor)
    codes, _ = layer.block_matrix()
    np.testing.assert_array_equal(held.qvalue.astype(np.float32), codes)
    # Kernels hold the scales of int4's groups in 16 bits.
    np.testing.assert_allclose(dequantize(held), want, rtol=2**-8 if layer.format == "int4" else 0)


def test_a_float_layer_of_a_quantized_file_has_its_float_weight() -> None:
    layer = replace(layer_of("qdq_matmul"), activations=Operand(tensor="x"))
    layer = replace(layer, weights=Operand(codes=RNG.standard_normal((16, 6)).astype(np.float32)))
    assert layer.format == "bf16"
    work = Work(m=3, n=6, k=16, format="bf16")
    weight = operands_of(work, layer, Captured(shapes={}, samples=1)).weight
    np.testing.assert_array_equal(weight, layer.weights.codes.T.astype(ml_dtypes.bfloat16))


def test_zero_points_of_their_own_and_blocks_of_another_size_are_quantized_anew() -> None:
    layer = layer_of("matmul_nbits")
    work = Work(m=3, n=6, k=32, format="int4", group=16)
    zero = np.full_like(layer.weights.zero_point, 7)
    lopsided = replace(layer, weights=replace(layer.weights, zero_point=zero))
    assert lopsided.block_matrix() is None
    held = operands_of(work, lopsided, Captured(shapes={}, samples=1)).weight
    np.testing.assert_allclose(dequantize(held), lopsided.weight_matrix({}), atol=0.015)
    other = operands_of(replace(work, group=32), layer, Captured(shapes={}, samples=1)).weight
    assert other.qparams.scale.shape == (6, 1)


def test_another_format_than_the_files_is_quantized_anew() -> None:
    layer = layer_of("qdq_matmul")
    x = RNG.standard_normal((1, 5, 16)).astype(np.float32)
    found = operands_of(Work(m=5, n=6, k=16, format="fp8"), layer, captured(layer, x))
    assert found.activations.dtype == ml_dtypes.float8_e4m3fn
    values = dequantize(found.weight)
    np.testing.assert_allclose(values, layer.weight_matrix({}), rtol=0.07, atol=1e-3)


def test_without_tensors_activations_are_drawn_from_the_histograms_and_say_so() -> None:
    layer = layer_of("int8_weights_alone")
    histogram = FloatHistogram()
    histogram.observe(np.float32([3.0] * 50 + [0.0] * 50))
    work = Work(m=40, n=6, k=16, format="bf16")
    name = layer.activations.tensor
    none = Captured(shapes={name: (40, 16)}, samples=1, histograms={name: histogram})
    found = operands_of(work, layer, none)
    assert found.origin == "drawn from the cache's histograms"
    values = found.activations.astype(np.float32)
    assert set(np.round(values.reshape(-1))) == {0.0, 3.0}
    bare = operands_of(work, layer, Captured(shapes={}, samples=1))
    assert bare.origin == "random numbers"


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=60))
def test_drawn_values_stay_in_the_range_that_was_seen(values: list[float]) -> None:
    histogram = FloatHistogram()
    histogram.observe(np.float32(values))
    x = drawn(histogram, 8, 8)
    amax = np.abs(np.float32(values)).max()
    # As far as a bin reaches.
    assert np.abs(x).max() <= max(amax * (1 + 2**-7), 1e-37)


def test_shares_of_a_histogram_are_kept() -> None:
    histogram = FloatHistogram()
    histogram.observe(np.float32([-1.0] * 25 + [2.0] * 75))
    x = drawn(histogram, 200, 200)
    assert np.mean(x > 0) == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_has_operands_of_its_types(form: str) -> None:
    work = Work(m=600, n=256, k=256, format=form)
    found = random_operands(work)
    assert len(found.activations) == 512
    assert found.rows(600).shape == (600, 256)
    np.testing.assert_array_equal(found.rows(600)[512:], found.activations[:88])
    weight = found.weight.qvalue if isinstance(found.weight, QTensor) else found.weight
    bits = weight.dtype.itemsize * 8
    assert weight.shape == (256, 256)
    assert FORMATS[form].weight_bits <= bits


def test_scales_of_groups_have_the_bits_that_are_counted() -> None:
    weight = random_operands(Work(m=1, n=8, k=256, format="int4")).weight
    assert isinstance(weight, QTensor)
    scale = weight.qparams.scale
    np.testing.assert_array_equal(scale.astype(ml_dtypes.bfloat16).astype(np.float32), scale)


@pytest.mark.parametrize("form", ["int8", "fp8", "bf16"])
def test_a_part_of_d_is_the_product_of_parts(form: str) -> None:
    """What makes comparing a corner with the oracle right."""
    family = FAMILIES[0]
    assert isinstance(family, DenseFamily)
    work = Work(m=20, n=30, k=64, format=form, bias=True, relu=True)
    operands = random_operands(work)
    whole = family.reference(work, operands)
    columns = np.array([0, 7, 29])
    part = family.reference(work, taken(operands, slice(5), columns, slice(None)))
    np.testing.assert_array_equal(part, whole[:5][:, columns])
    small, corner = cropped(work, operands, m=6, n=8, k=40)
    assert (small.m, small.n, small.k) == (6, 8, 40)
    assert family.reference(small, corner).shape == (6, 8)


@pytest.mark.parametrize("form", ["fp8-block", "mxfp8"])
def test_a_part_of_a_product_with_block_scales_keeps_its_scales(form: str) -> None:
    (family,) = (f for f in FAMILIES if form in f.formats and "sm_90a" in f.architectures)
    work = Work(m=20, n=300, k=320, format=form, bias=True)
    operands = random_operands(work)
    np.testing.assert_allclose(
        operands.values(), random_operands(replace(work, format="bf16")).activations, rtol=0.07, atol=0.02
    )
    whole = family.reference(work, operands)
    columns = np.array([0, 7, 129, 299])
    part = family.reference(work, taken(operands, slice(5), columns, slice(None)))
    np.testing.assert_array_equal(part, whole[:5][:, columns])
    small, corner = cropped(work, operands, m=6, n=130, k=100)
    assert isinstance(corner.weight, QTensor) and isinstance(operands.weight, QTensor)
    np.testing.assert_array_equal(corner.values(), operands.values()[:6, :100])
    np.testing.assert_array_equal(dequantize(corner.weight), dequantize(operands.weight)[:130, :100])
    assert family.reference(small, corner).shape == (6, 130)


@pytest.mark.parametrize("form", ["int4", "nvfp4", "mxfp4"])
def test_blocks_are_cut_with_their_scales(form: str) -> None:
    work = Work(m=4, n=10, k=256, format=form)
    operands = random_operands(work)
    _, corner = cropped(work, operands, m=4, n=6, k=128)
    np.testing.assert_array_equal(dequantize(corner.weight), dequantize(operands.weight)[:6, :128])


@pytest.mark.parametrize("form", FORMATS)
def test_exact_operands_have_one_right_answer(form: str) -> None:
    """Sums of their products are whole numbers of float32, in whatever order they are added."""
    work = Work(m=5, n=256, k=300, format=form, bias=True)
    operands = exact_operands(work)
    weight = dequantize(operands.weight) if isinstance(operands.weight, QTensor) else operands.weight
    activations = operands.activations if operands.block is None else operands.values()
    products = activations.astype(np.float64)[:, None, :] * weight.astype(np.float64)[None]
    unit = 2.0**-7
    assert np.array_equal(products / unit, np.rint(products / unit))
    assert np.abs(products).sum(-1).max() / unit < 2**24
    assert np.any(operands.activations.astype(np.float32) != 0)

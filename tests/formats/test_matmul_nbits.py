import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import SpecError
from quantkit.formats import (
    FP4_E2M1,
    INT2,
    INT4,
    INT8,
    INT16,
    UINT2,
    UINT4,
    QParams,
    QTensor,
    QuantSpec,
    dequantize,
    qparams_from_range,
    quantize,
    range_of,
)
from quantkit.formats.matmul_nbits import from_matmul_nbits, to_matmul_nbits


def quantized(w, spec):
    return quantize(w, qparams_from_range(range_of(w, spec), spec), spec)


def run(packed, x):
    """The product as ONNX Runtime computes it."""
    inputs = {"B": packed.b, "scales": packed.scales}
    if packed.zero_points is not None:
        inputs["zero_points"] = packed.zero_points
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["A", *inputs],
        ["Y"],
        domain="com.microsoft",
        K=packed.k,
        N=packed.n,
        bits=packed.bits,
        block_size=packed.block_size,
    )
    graph = onnx.helper.make_graph(
        [node],
        "product",
        [onnx.helper.make_tensor_value_info("A", onnx.TensorProto.FLOAT, x.shape)],
        [onnx.helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in inputs.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"A": x})[0]


@pytest.mark.parametrize(
    ("fmt", "symmetric"),
    [(INT4, True), (INT4, False), (UINT4, True), (UINT4, False), (INT8, True), (INT2, True), (UINT2, False)],
    ids=lambda value: getattr(value, "name", str(value)),
)
@pytest.mark.parametrize("k", [64, 75])
def test_onnx_runtime_reads_the_weight_that_was_packed(fmt, symmetric, k):
    rng = np.random.default_rng(0)
    w = (rng.normal(size=(k, 17)) + 0.5).astype(np.float32)
    weight = quantized(w, QuantSpec(format=fmt, axis=0, block_size=32, symmetric=symmetric))
    x = rng.normal(size=(3, k)).astype(np.float32)
    found = run(to_matmul_nbits(weight), x)
    np.testing.assert_allclose(found, x @ dequantize(weight), rtol=1e-4, atol=1e-4)


def test_onnx_runtime_reads_negative_scales():
    rng = np.random.default_rng(1)
    spec = QuantSpec(format=INT4, axis=0, block_size=16)
    scale = rng.normal(size=(3, 5)).astype(np.float32)
    codes = rng.integers(-8, 8, (48, 5)).astype(INT4.dtype)
    weight = QTensor(codes, QParams(scale, np.zeros((3, 5), INT4.dtype)), spec)
    x = rng.normal(size=(2, 48)).astype(np.float32)
    np.testing.assert_allclose(run(to_matmul_nbits(weight), x), x @ dequantize(weight), rtol=1e-4, atol=1e-4)


def test_literal_bytes():
    spec = QuantSpec(format=INT4, axis=1, block_size=16, symmetric=False)
    codes = np.zeros((1, 18), np.int8)
    codes[0, :3], codes[0, 16:] = [-8, 7, 1], [-1, 2]
    zero = np.array([[0, -3]]).astype(INT4.dtype)
    scale = np.array([[0.5, 2]], np.float32)
    packed = to_matmul_nbits(QTensor(codes.astype(INT4.dtype), QParams(scale, zero), spec))
    assert packed.b.shape == (1, 2, 8)
    # Codes move up by 8; beyond K stands the zero point.
    assert packed.b[0, 0].tolist() == [0xF0, 0x89, *[0x88] * 6]
    assert packed.b[0, 1].tolist() == [0xA7, *[0x55] * 7]
    assert packed.zero_points is not None
    assert packed.zero_points.tolist() == [[0x58]]
    assert packed.scales.tolist() == [[0.5, 2]]
    assert (packed.k, packed.n, packed.bits, packed.block_size) == (18, 1, 4, 16)


@pytest.mark.parametrize("fmt", [INT4, UINT4, INT2, INT8], ids=lambda f: f.name)
@pytest.mark.parametrize("axis", [0, 1, -1])
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), symmetric=st.booleans())
def test_what_was_packed_comes_back_with_the_same_values(fmt, axis, rows, columns, symmetric):
    w = np.random.default_rng(rows * 41 + columns).normal(size=(rows, columns)).astype(np.float32)
    weight = quantized(w, QuantSpec(format=fmt, axis=axis, block_size=16, symmetric=symmetric))
    packed = to_matmul_nbits(weight)
    if symmetric:
        assert packed.zero_points is None
    values = dequantize(from_matmul_nbits(packed))
    np.testing.assert_array_equal(values if axis else values.T, dequantize(weight))


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (QuantSpec(format=INT16, axis=0, block_size=32), (32, 2), "integers of 2, 3, 4 or 8 bits"),
        (QuantSpec(format=FP4_E2M1, axis=0, block_size=32), (32, 2), "integers of 2, 3, 4 or 8 bits"),
        (QuantSpec(format=INT4, axis=0, block_size=24), (32, 2), "a power of two from 16 up"),
        (QuantSpec(format=INT4, axis=1), (32, 2), "a power of two from 16 up"),
        (QuantSpec(format=INT4, axis=1, block_size=16), (2, 32, 2), "not a weight of shape"),
    ],
)
def test_what_the_operator_cannot_hold_is_refused(spec, shape, message):
    with pytest.raises(SpecError, match=message):
        to_matmul_nbits(quantized(np.ones(shape, np.float32), spec))

"""Stored codes become the floats that they stand for."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from quantkit.decode import decode
from quantkit.errors import ModelError
from quantkit.formats import (
    E8M0,
    FP4_E2M1,
    FP8_E4M3,
    FP8_E5M2,
    INT2,
    INT4,
    UINT2,
    UINT4,
    UINT8,
    QTensor,
    QuantSpec,
    dequantize,
)
from quantkit.formats.matmul_nbits import to_matmul_nbits
from quantkit.formats.packing import code_bits, pack_bits
from tests.decode.constructs import Array, model_of, quantized, run

W = np.random.default_rng(0).standard_normal((40, 12)).astype(np.float32)


def weight_of(model: ir.Model) -> ir.Value:
    """The one initializer that a decoded model reads as a weight."""
    (found,) = [
        v for v in decode(model).graph.initializers.values() if v.shape is not None and len(v.shape) > 1
    ]
    return found


def reference(model: ir.Model) -> Array:
    """The first output, by ONNX's own reference implementation."""
    (found,) = ReferenceEvaluator(ir.serde.serialize_model(model)).run(None, {})
    return np.asarray(found)


def dq(spec: QuantSpec, **attributes: int) -> Any:
    inputs = ["q", "s"] if spec.symmetric else ["q", "s", "z"]
    if spec.axis is not None:
        attributes["axis"] = spec.axis
    if spec.block_size is not None:
        attributes["block_size"] = spec.block_size
    return helper.make_node("DequantizeLinear", inputs, ["w"], **attributes)


def identity(name: str = "w") -> Any:
    return helper.make_node("Identity", [name], ["y"])


# --- behind DequantizeLinear --------------------------------------------------------------------------------

SPECS = {
    "int4 blocks": QuantSpec(format=INT4, axis=0, block_size=16),
    "int4 short block": QuantSpec(format=INT4, axis=0, block_size=32),
    "uint4 zero points": QuantSpec(format=UINT4, axis=0, block_size=16, symmetric=False),
    "int2 blocks": QuantSpec(format=INT2, axis=0, block_size=8),
    "uint2 zero points": QuantSpec(format=UINT2, axis=1, block_size=4, symmetric=False),
    "uint8 blocks": QuantSpec(format=UINT8, axis=0, block_size=8, symmetric=False),
    "fp8 tensor": QuantSpec(format=FP8_E4M3),
    "fp8 channel": QuantSpec(format=FP8_E4M3, axis=1),
    "fp8 blocks": QuantSpec(format=FP8_E4M3, axis=0, block_size=16),
    "e5m2 channel": QuantSpec(format=FP8_E5M2, axis=0),
    "fp4 blocks": QuantSpec(format=FP4_E2M1, axis=0, block_size=16),
    "fp4 channel": QuantSpec(format=FP4_E2M1, axis=-1),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_dequantized_codes_are_the_oracle(spec: QuantSpec) -> None:
    held = quantized(W, spec)
    zero = {} if spec.symmetric else {"z": held.qparams.zero_point}
    model = model_of([dq(spec), identity()], opset=25, q=held.qvalue, s=held.qparams.scale, **zero)
    weight = weight_of(model)
    assert (weight.dtype, weight.name) == (ir.DataType.FLOAT, "w")
    found = run(model)
    np.testing.assert_array_equal(found, dequantize(held))
    if 40 % (spec.block_size or 1) == 0:
        np.testing.assert_array_equal(found, reference(model))


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_the_scale_says_what_type_the_weight_is(half: type) -> None:
    spec = SPECS["int4 blocks"]
    held = quantized(W, spec)
    scale = held.qparams.scale.astype(half)
    nodes = [dq(spec), helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT)]
    model = model_of(nodes, q=held.qvalue, s=scale)
    exact = dequantize(
        QTensor(held.qvalue, type(held.qparams)(scale.astype(np.float32), held.qparams.zero_point), spec)
    )
    np.testing.assert_array_equal(run(model), exact.astype(half).astype(np.float32))


def nvfp4_model(w: Array, axis: int, *, to: int = TensorProto.FLOAT) -> tuple[ir.Model, Array]:
    spec = QuantSpec(format=FP4_E2M1, axis=axis, block_size=16, scale_format=FP8_E4M3)
    held = quantized(w, spec)
    nodes = [
        helper.make_node("DequantizeLinear", ["s8", "s32"], ["s"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["wide"], axis=axis, block_size=16),
        helper.make_node("Cast", ["wide"], ["w"], to=to),
        helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT),
    ]
    scales = held.qparams.scale.astype(ml_dtypes.float8_e4m3fn)
    return (
        model_of(nodes, q=held.qvalue, s8=scales, s32=held.qparams.global_scale),
        dequantize(held),
    )


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_nvfp4_of_two_levels_is_the_oracle_and_the_reference(axis: int) -> None:
    w = np.random.default_rng(1).standard_normal((48, 32)).astype(np.float32)
    model, exact = nvfp4_model(w, axis)
    found = run(model)
    np.testing.assert_array_equal(found, exact)
    np.testing.assert_array_equal(found, reference(model))
    assert [n.op_type for n in decode(model).graph] == []


def test_nvfp4_cast_to_half_is_rounded_once() -> None:
    model, exact = nvfp4_model(
        np.random.default_rng(1).standard_normal((7, 40)).astype(np.float32), -1, to=10
    )
    np.testing.assert_array_equal(run(model), exact.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("fmt", [FP4_E2M1, FP8_E4M3], ids=["mxfp4", "mxfp8"])
@pytest.mark.parametrize("rule", ["ocp", "rceil"])
def test_mx_scales_are_powers_of_two(fmt: Any, rule: Any) -> None:
    spec = QuantSpec(format=fmt, axis=1, block_size=32, scale_format=E8M0, scale_rule=rule)
    w = np.random.default_rng(2).standard_normal((6, 96)).astype(np.float32)
    held = quantized(w, spec)
    scales = held.qparams.scale.astype(E8M0.dtype)
    node = dq(QuantSpec(format=fmt, axis=1, block_size=32), output_dtype=TensorProto.FLOAT)
    model = model_of([node, identity()], opset=25, q=held.qvalue, s=scales)
    np.testing.assert_array_equal(run(model), dequantize(held))
    np.testing.assert_array_equal(run(model), reference(model))


def test_mxfp8_of_tensorrt_reads_exponents_from_bytes() -> None:
    spec = QuantSpec(format=FP8_E4M3, axis=-1, block_size=32, scale_format=E8M0)
    w = np.random.default_rng(3).standard_normal((5, 80)).astype(np.float32)
    held = quantized(w, spec)
    exponents = held.qparams.scale.astype(E8M0.dtype).view(np.uint8)
    for dtype, wide in ((TensorProto.FLOAT, np.float32), (TensorProto.FLOAT16, np.float16)):
        nodes = [
            helper.make_node(
                "TRT_MXFP8DequantizeLinear", ["q", "s"], ["w"], domain="trt", axis=-1, block_size=32,
                output_dtype=dtype,
            ),
            helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT),
        ]  # fmt: skip
        found = run(model_of(nodes, q=held.qvalue, s=exponents))
        np.testing.assert_array_equal(found, dequantize(held).astype(wide).astype(np.float32))


def test_codes_behind_cast_and_mul_become_one_weight() -> None:
    spec = QuantSpec(format=FP8_E4M3, axis=1)
    held = quantized(W, spec)
    nodes = [
        helper.make_node("Cast", ["q"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["c", "s"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    model = model_of(nodes, inputs={"x": ["N", 40]}, q=held.qvalue, s=held.qparams.scale.reshape(1, -1))
    assert weight_of(model).name == "w"
    np.testing.assert_array_equal(run(model, {"x": np.eye(40, dtype=np.float32)}), dequantize(held))


def test_a_tile_of_scales_is_followed_through_its_reshapes() -> None:
    spec = QuantSpec(format=FP8_E4M3, block_shape=(8, 4))
    held = quantized(W, spec)
    nodes = [
        helper.make_node("Cast", ["q"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["c", "tiles"], ["t"]),
        helper.make_node("Mul", ["t", "s"], ["m"]),
        helper.make_node("Reshape", ["m", "shape"], ["y"]),
    ]
    scales = held.qparams.scale.reshape(5, 1, 3, 1)
    model = model_of(nodes, q=held.qvalue, s=scales, tiles=np.array([5, 8, 3, 4]), shape=np.array([40, 12]))
    np.testing.assert_array_equal(run(model), dequantize(held))


def test_a_scale_that_is_computed_leaves_the_product_to_float_operators() -> None:
    spec = QuantSpec(format=FP4_E2M1, axis=0, block_size=16)
    held = quantized(W, spec)
    nodes = [helper.make_node("Abs", ["x"], ["s"]), dq(spec), identity()]
    model = model_of(nodes, inputs={"x": [None, None]}, q=held.qvalue)
    found = run(model, {"x": -held.qparams.scale})
    np.testing.assert_array_equal(found, dequantize(held))


def test_int8_weights_stay_for_onnxruntimes_own_kernels() -> None:
    node = helper.make_node("DequantizeLinear", ["q", "s"], ["y"], axis=1)
    model = model_of([node], q=np.ones((4, 3), np.int8), s=np.ones(3, np.float32))
    assert [n.op_type for n in decode(model).graph] == ["DequantizeLinear"]


def test_scales_that_do_not_fit_are_refused_by_name() -> None:
    node = dq(QuantSpec(format=INT4, axis=0, block_size=16))
    node.name = "layer.3"
    model = model_of([node, identity()], q=W.astype(ml_dtypes.int4), s=np.ones((2, 12), np.float32))
    with pytest.raises(ModelError, match=r"^layer\.3: scales of shape \(2, 12\) .* where \(3, 12\)"):
        decode(model)


# --- ONNX Runtime's own operators ---------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero", [None, "packed", "float"])
def test_matmul_nbits_is_a_product_with_its_weight(bits: int, zero: str | None) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (6, 3, 16)).astype(np.uint8)
    scales = rng.random((6, 3)).astype(np.float32)
    points = rng.integers(0, 2**bits, (6, 3))
    stored = {"b": pack_bits(codes, bits), "s": scales, "bias": np.arange(6, dtype=np.float32)}
    offset: Array = np.full((6, 3), 2 ** (bits - 1))
    if zero == "packed":
        stored["z"], offset = pack_bits(points.astype(np.uint8), bits), points
    elif zero == "float":
        stored["z"] = (points + 0.25).astype(np.float32)
        offset = stored["z"]
    node = helper.make_node(
        "MatMulNBits", ["x", "b", "s", "z" if zero else "", "", "bias"], ["y"], domain="com.microsoft",
        K=40, N=6, bits=bits, block_size=16,
    )  # fmt: skip
    weight = (codes - offset[..., None].astype(np.float32)) * scales[..., None]
    found = run(model_of([node], inputs={"x": [None, 40]}, **stored), {"x": np.eye(40, dtype=np.float32)})
    np.testing.assert_array_equal(found, weight.reshape(6, 48)[:, :40].T + stored["bias"])


def test_matmul_nbits_as_it_is_written_here_is_read_back() -> None:
    spec = QuantSpec(format=UINT4, axis=0, block_size=16, symmetric=False)
    held = quantized(W, spec)
    packed = to_matmul_nbits(held)
    assert packed.zero_points is not None
    node = helper.make_node(
        "MatMulNBits", ["x", "b", "s", "z"], ["y"], domain="com.microsoft", K=packed.k, N=packed.n, bits=4,
        block_size=16,
    )  # fmt: skip
    model = model_of(
        [node], inputs={"x": [None, 40]}, b=packed.b, s=packed.scales.reshape(-1), z=packed.zero_points
    )
    np.testing.assert_array_equal(run(model, {"x": np.eye(40, dtype=np.float32)}), dequantize(held))


@pytest.mark.parametrize("kind", ["int4", "uint4", "uint8 of 4 bits", "uint8 of 8 bits", "fp4", "fp8"])
def test_a_packed_table_is_looked_up_as_floats(kind: str) -> None:
    rng = np.random.default_rng(0)
    scales = rng.random((10, 3)).astype(np.float32)
    indices = np.array([[3, 1], [9, 0]])
    attributes: dict[str, Any] = {"gather_axis": 0, "quantize_axis": 1, "block_size": 16}
    stored: dict[str, Array] = {"s": scales, "i": indices}
    inputs = ["q", "i", "s"]
    if kind.startswith("uint8"):
        bits = int(kind.split()[2])
        codes = rng.integers(0, 2**bits, (10, 48)).astype(np.uint8)
        attributes["bits"] = bits
        stored["q"], offset = pack_bits(codes, bits), np.full((10, 3), 2.0 ** (bits - 1))
    elif kind == "uint4":
        codes = rng.integers(0, 16, (10, 48)).astype(np.uint8)
        offset = rng.integers(0, 16, (10, 3)).astype(np.float32)
        stored["q"], stored["z"] = codes.astype(ml_dtypes.uint4), offset.astype(ml_dtypes.uint4)
        inputs.append("z")
    else:
        dtype = {"int4": INT4, "fp4": FP4_E2M1, "fp8": FP8_E4M3}[kind].dtype
        stored["q"] = rng.integers(-6, 7, (10, 48)).astype(np.float32).astype(dtype)
        codes, offset = stored["q"].astype(np.float32), np.zeros((10, 3))
    node = helper.make_node("GatherBlockQuantized", inputs, ["y"], domain="com.microsoft", **attributes)
    table = (codes - np.repeat(offset, 16, axis=1)).astype(np.float32) * np.repeat(scales, 16, axis=1)
    model = model_of([node], opset=21, **stored)
    found = run(model)
    np.testing.assert_array_equal(found, table[indices])
    np.testing.assert_array_equal(found, _as_written(model))


def _as_written(model: ir.Model) -> Array:
    """What ONNX Runtime makes of a model that it can run as it is."""
    from quantkit.runtime import Session

    return Session(model, optimize=False, threads=1).run({})["y"]


def test_int4_codes_of_both_layouts_hold_the_same_bits() -> None:
    # The low nibble is the first code, in ONNX's tensors as in MatMulNBits.
    codes = np.array([[1, -2, 3, -4]]).astype(ml_dtypes.int4)
    model = model_of([dq(QuantSpec(format=INT4)), identity()], q=codes, s=np.float32(1))
    stored = model.graph.initializers["q"].const_value
    assert stored is not None
    assert stored.tobytes() == pack_bits(code_bits(codes, INT4), 4).tobytes() == b"\xe1\xc3"
    np.testing.assert_array_equal(run(model), [[1, -2, 3, -4]])


# --- as a whole ---------------------------------------------------------------------------------------------


def test_weights_are_made_when_they_are_read_and_not_kept() -> None:
    model, exact = nvfp4_model(np.random.default_rng(1).standard_normal((48, 32)).astype(np.float32), -1)
    model.graph.outputs[0].name = "y"
    tensor = decode(model).graph.initializers["y"].const_value
    assert isinstance(tensor, ir.LazyTensor)
    assert not tensor.cache
    np.testing.assert_array_equal(tensor.numpy(), exact)


def test_the_model_is_not_changed() -> None:
    model, _ = nvfp4_model(np.random.default_rng(1).standard_normal((48, 32)).astype(np.float32), -1)
    before = ir.serde.serialize_model(model).SerializeToString()
    decode(model)
    assert ir.serde.serialize_model(model).SerializeToString() == before


def test_a_weight_read_by_two_is_decoded_once() -> None:
    spec = SPECS["fp4 blocks"]
    held = quantized(W, spec)
    nodes = [
        dq(spec),
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "w"], ["y"]),
    ]
    model = model_of(nodes, inputs={"x": [40, 40]}, q=held.qvalue, s=held.qparams.scale)
    assert list(decode(model).graph.initializers) == ["w"]
    found = run(model, {"x": np.eye(40, dtype=np.float32)})
    np.testing.assert_array_equal(found, 2 * dequantize(held))


def test_initializers_that_are_listed_as_inputs_are_decoded() -> None:
    model, exact = nvfp4_model(np.random.default_rng(1).standard_normal((16, 32)).astype(np.float32), -1)
    model.graph.inputs.extend(model.graph.initializers.values())
    np.testing.assert_array_equal(run(model), exact)
    assert list(decode(model).graph.inputs) == []

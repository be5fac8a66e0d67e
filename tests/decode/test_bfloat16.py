"""bfloat16 is float32 that is rounded behind every operator that computes."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper

from quantkit.decode import decode
from quantkit.runtime import Session
from tests.decode.constructs import model_of

BF16 = ml_dtypes.bfloat16
RNG = np.random.default_rng(0)
W = RNG.standard_normal((32, 8)).astype(BF16)
X = RNG.standard_normal((4, 32)).astype(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(BF16).astype(np.float32)


def mlp() -> list:
    return [
        helper.make_node("Cast", ["x"], ["b"], to=TensorProto.BFLOAT16),
        helper.make_node("MatMul", ["b", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Mul", ["r", "half"], ["m"]),
        helper.make_node("Cast", ["m"], ["y"], to=TensorProto.FLOAT),
    ]


def run(model: ir.Model, feeds: dict[str, np.ndarray], *, optimize: bool = False) -> np.ndarray:
    return Session(decode(model), optimize=optimize, threads=1).run(feeds)["y"]


def test_every_product_is_rounded_and_nothing_else() -> None:
    model = model_of(mlp(), inputs={"x": [4, 32]}, w=W, half=np.asarray(0.3, BF16))
    exact = np.maximum(rounded(rounded(X) @ W.astype(np.float32)), 0)
    expected = rounded(exact * np.float32(np.asarray(0.3, BF16)))
    for optimize in (False, True):
        np.testing.assert_array_equal(run(model, {"x": X}, optimize=optimize), expected)


def test_names_of_tensors_stay() -> None:
    decoded = decode(model_of(mlp(), inputs={"x": [4, 32]}, w=W, half=np.asarray(0.3, BF16)))
    names = {v.name for node in decoded.graph for v in node.outputs}
    assert {"b", "h", "r", "m", "y"} <= names


def test_bfloat16_is_fed_and_float32_comes_out() -> None:
    node = helper.make_node("Mul", ["x", "x"], ["y"])
    model = model_of(
        [node], inputs={"x": [4, 32]}, input_type=TensorProto.BFLOAT16, output_type=TensorProto.BFLOAT16
    )
    decoded = decode(model)
    assert [v.dtype for v in decoded.graph.inputs] == [ir.DataType.BFLOAT16]
    assert [v.dtype for v in decoded.graph.outputs] == [ir.DataType.FLOAT]
    found = Session(decoded, optimize=False, threads=1).run({"x": X.astype(BF16)})["y"]
    x = rounded(X)
    np.testing.assert_array_equal(found, rounded(x * x))


def test_quantization_of_bfloat16_stays_quantization() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["b"], to=TensorProto.BFLOAT16),
        helper.make_node("QuantizeLinear", ["b", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Cast", ["d"], ["y"], to=TensorProto.FLOAT),
    ]
    s = np.asarray(0.03, BF16)
    model = model_of(nodes, inputs={"x": [4, 32]}, s=s, z=np.int8(0))
    assert [n.op_type for n in decode(model).graph].count("QuantizeLinear") == 1
    scale = np.float32(s)
    codes = np.clip(np.rint(rounded(X) / scale), -128, 127).astype(np.float32)
    np.testing.assert_array_equal(run(model, {"x": X}), rounded(codes * scale))


def test_dequantized_weights_are_rounded_to_the_type_of_their_scale() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0, block_size=16),
        helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT),
    ]
    q = RNG.integers(-8, 8, (32, 4)).astype(np.float32)
    s = RNG.random((2, 4)).astype(BF16)
    model = model_of(nodes, q=q.astype(ml_dtypes.int4), s=s)
    np.testing.assert_array_equal(run(model, {}), rounded(q * np.repeat(s.astype(np.float32), 16, axis=0)))


def test_a_float32_model_is_left_as_it_is() -> None:
    node = helper.make_node("Mul", ["x", "x"], ["y"])
    assert [n.op_type for n in decode(model_of([node], inputs={"x": [4, 32]})).graph] == ["Mul"]

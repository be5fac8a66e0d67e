"""What is said to be beyond ONNX Runtime is what it refuses, and nothing else."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from quantkit.decode import beyond_onnxruntime, decode
from quantkit.errors import ModelError
from quantkit.runtime import Session
from tests.decode.constructs import model_of

E4M3, FP4, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e8m0fnu


def dq(codes: type, *, scale: Any = np.float32, opset: int = 23, **attributes: int) -> ir.Model:
    node = helper.make_node("DequantizeLinear", ["q", "s"], ["w"], **attributes)
    cast = helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT)
    shape = (4, 2) if "block_size" in attributes else ()
    return model_of(
        [node, cast], opset=opset, q=np.ones((4, 32)).astype(codes), s=np.ones(shape).astype(scale)
    )


def nbits(bits: int, zero: Any = None) -> ir.Model:
    stored = {"b": np.ones((6, 2, 2 * bits), np.uint8), "s": np.ones((6, 2), np.float32)}
    if zero is not None:
        stored["z"] = zero
    node = helper.make_node(
        "MatMulNBits", ["x", *stored], ["y"], domain="com.microsoft", K=32, N=6, bits=bits, block_size=16
    )
    return model_of([node], inputs={"x": [1, 32]}, **stored)


def table(codes: type) -> ir.Model:
    node = helper.make_node(
        "GatherBlockQuantized", ["q", "i", "s"], ["y"], domain="com.microsoft", quantize_axis=1, block_size=16
    )
    return model_of([node], q=np.ones((4, 32)).astype(codes), i=np.array([1]), s=np.ones((4, 2), np.float32))


def tensorrt() -> ir.Model:
    node = helper.make_node(
        "TRT_MXFP8DequantizeLinear", ["q", "s"], ["y"], domain="trt", block_size=32, axis=-1, output_dtype=1
    )
    return model_of([node], q=np.ones((4, 32)).astype(E4M3), s=np.full((4, 1), 127, np.uint8))


def activation(codes: int) -> ir.Model:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"], output_dtype=codes),
        helper.make_node("DequantizeLinear", ["q", "s"], ["y"]),
    ]
    return model_of(nodes, inputs={"x": [1, 32]}, s=np.float32(1))


def bfloat16() -> ir.Model:
    nodes = [
        helper.make_node("Cast", ["x"], ["b"], to=TensorProto.BFLOAT16),
        helper.make_node("Mul", ["b", "b"], ["c"]),
        helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]
    return model_of(nodes, inputs={"x": [1, 32]})


BEYOND = {
    "fp4": (dq(FP4), ["FP4 (float4e2m1)"]),
    "fp4 blocks": (dq(FP4, axis=1, block_size=16), ["FP4 (float4e2m1)"]),
    "fp4 activation": (activation(TensorProto.FLOAT4E2M1), ["FP4 (float4e2m1)"]),
    "mxfp8": (
        dq(E4M3, scale=E8M0, opset=25, axis=1, block_size=16, output_dtype=1),
        ["MX scales (float8e8m0)"],
    ),
    "mxfp4": (
        dq(FP4, scale=E8M0, opset=25, axis=1, block_size=16, output_dtype=1),
        ["FP4 (float4e2m1)", "MX scales (float8e8m0)"],
    ),
    "tensorrt": (tensorrt(), ["1 × trt::TRT_MXFP8DequantizeLinear"]),
    "bfloat16": (bfloat16(), ["bfloat16"]),
    "bfloat16 scale": (dq(np.int8, scale=ml_dtypes.bfloat16), ["bfloat16"]),
    "matmul_nbits 3": (nbits(3), ["1 × MatMulNBits of 3 bits"]),
    "matmul_nbits 8 float": (nbits(8, np.ones((6, 2), np.float32)), ["1 × MatMulNBits of 8 bits"]),
}
WITHIN = {
    "int8": dq(np.int8),
    "int4 blocks": dq(ml_dtypes.int4, axis=1, block_size=16),
    "int4 half": dq(ml_dtypes.int4, scale=np.float16, axis=1, block_size=16),
    "int2": dq(ml_dtypes.int2, opset=25),
    "fp8": dq(E4M3),
    "fp8 blocks": dq(E4M3, axis=1, block_size=16),
    "e5m2": dq(ml_dtypes.float8_e5m2),
    "fp8 activation": activation(TensorProto.FLOAT8E4M3FN),
    "int4 activation": activation(TensorProto.INT4),
    "matmul_nbits 4": nbits(4),
    "matmul_nbits 4 float": nbits(4, np.ones((6, 2), np.float32)),
    "matmul_nbits 8": nbits(8, np.ones((6, 2), np.uint8)),
    "matmul_nbits 2": nbits(2),
    "fp4 table": table(FP4),
    "fp8 table": table(E4M3),
}


def feeds(model: ir.Model) -> dict[str, np.ndarray]:
    return {str(v.name): np.ones((1, 32), np.float32) for v in model.graph.inputs}


@pytest.mark.parametrize(("model", "found"), BEYOND.values(), ids=BEYOND)
def test_what_onnxruntime_cannot_run_is_named_and_decoded(model: ir.Model, found: list[str]) -> None:
    assert beyond_onnxruntime(model) == found
    with pytest.raises(ModelError):
        Session(model, optimize=False, threads=1).run(feeds(model))
    decoded = decode(model)
    assert beyond_onnxruntime(decoded) in ([], ["bfloat16"])
    for optimize in (False, True):
        Session(decoded, optimize=optimize, threads=1).run(feeds(model))


@pytest.mark.parametrize("model", WITHIN.values(), ids=WITHIN)
def test_what_onnxruntime_runs_is_not_named_and_decodes_to_the_same(model: ir.Model) -> None:
    assert beyond_onnxruntime(model) == []
    exact = Session(model, optimize=False, threads=1).run(feeds(model))["y"]
    found = Session(decode(model), optimize=False, threads=1).run(feeds(model))["y"]
    np.testing.assert_allclose(found, exact, rtol=1e-6)

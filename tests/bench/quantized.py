"""Quantized graphs in every way that files store them, and what their linear operator computes."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

RNG = np.random.default_rng(3)
BUILDERS: dict[str, Callable[[], ModelProto]] = {}
# The name of the format that each one's linear operator is stored in.
FORMATS: dict[str, str] = {}


def stored(form: str) -> Callable[[Callable[[], ModelProto]], Callable[[], ModelProto]]:
    def register(build: Callable[[], ModelProto]) -> Callable[[], ModelProto]:
        BUILDERS[build.__name__] = build
        FORMATS[build.__name__] = form
        return build

    return register


def constant(name: str, array: np.ndarray, dtype: int | None = None) -> TensorProto:
    tensor = numpy_helper.from_array(array) if dtype is None else None
    if tensor is None:
        tensor = helper.make_tensor(name, dtype, array.shape, array.astype(np.float32).reshape(-1))
    tensor.name = name
    return tensor


def model(nodes: list, constants: list[TensorProto], shape: list, opset: int = 21) -> ModelProto:
    """A graph from x to y whose linear operator is named `linear`."""
    graph = helper.make_graph(
        nodes,
        "quantized",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    imports = [
        helper.make_opsetid("", opset),
        helper.make_opsetid("com.microsoft", 1),
        helper.make_opsetid("trt", 1),
    ]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def node(op: str, inputs: str, outputs: str, **attributes: object):
    domain = attributes.pop("domain", "")
    return helper.make_node(op, inputs.split(), outputs.split(), name=outputs, domain=domain, **attributes)


def activation_nodes(zero: str = "xz"):
    return [node("QuantizeLinear", f"x xs {zero}", "xq"), node("DequantizeLinear", f"xq xs {zero}", "xd")]


def int8_codes(*shape: int) -> np.ndarray:
    return RNG.integers(-127, 128, shape).astype(np.int8)


def scales(*shape: int) -> np.ndarray:
    return (RNG.random(shape) * 0.01 + 0.005).astype(np.float32)


XS, XZ = constant("xs", np.float32(0.03)), constant("xz", np.int8(0))


@stored("int8")
def qdq_conv() -> ModelProto:
    nodes = [
        *activation_nodes(),
        node("DequantizeLinear", "w ws wz", "wd", axis=0),
        node("Conv", "xd wd b", "linear", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Relu", "linear", "y"),
    ]
    weights = [
        constant("w", int8_codes(6, 4, 3, 3)),
        constant("ws", scales(6)),
        constant("wz", np.zeros(6, np.int8)),
    ]
    return model(nodes, [XS, XZ, *weights, constant("b", scales(6))], ["N", 4, 9, 9])


@stored("int8")
def qdq_matmul() -> ModelProto:
    nodes = [
        *activation_nodes(),
        node("DequantizeLinear", "w ws", "wd", axis=1),
        node("MatMul", "xd wd", "y"),
    ]
    return model(nodes, [XS, XZ, constant("w", int8_codes(16, 6)), constant("ws", scales(6))], ["N", 5, 16])


@stored("int8")
def qdq_gemm_transposed_with_an_int32_bias() -> ModelProto:
    nodes = [
        *activation_nodes(),
        node("DequantizeLinear", "w ws", "wd", axis=0),
        node("DequantizeLinear", "b bs", "bd", axis=0),
        node("Gemm", "xd wd bd", "y", transB=1),
    ]
    weights = [constant("w", int8_codes(6, 16)), constant("ws", scales(6))]
    bias = [
        constant("b", RNG.integers(-9999, 9999, 6).astype(np.int32)),
        constant("bs", scales(6) * np.float32(0.03)),
    ]
    return model(nodes, [XS, XZ, *weights, *bias], ["N", 16])


@stored("int8")
def a_transposed_weight() -> ModelProto:
    nodes = [
        *activation_nodes(),
        node("DequantizeLinear", "w ws", "wd", axis=0),
        node("Transpose", "wd", "wt", perm=[1, 0]),
        node("MatMul", "xd wt", "y"),
    ]
    return model(nodes, [XS, XZ, constant("w", int8_codes(6, 16)), constant("ws", scales(6))], ["N", 16])


@stored("int8")
def unsigned_activations() -> ModelProto:
    nodes = [
        *activation_nodes("xu"),
        node("DequantizeLinear", "w ws", "wd", axis=1),
        node("MatMul", "xd wd", "y"),
    ]
    zero = constant("xu", np.uint8(128))
    return model(nodes, [XS, zero, constant("w", int8_codes(16, 6)), constant("ws", scales(6))], ["N", 16])


@stored("int8")
def integer_operators() -> ModelProto:
    nodes = [
        node("QuantizeLinear", "x xs xz", "xq"),
        node("QLinearMatMul", "xq xs xz w ws wz ys xz", "linear"),
        node("DequantizeLinear", "linear ys xz", "y"),
    ]
    weights = [constant("w", int8_codes(16, 6)), constant("ws", np.float32(0.01)), constant("wz", np.int8(0))]
    return model(nodes, [XS, XZ, *weights, constant("ys", np.float32(0.05))], ["N", 16])


@stored("int8")
def matmul_of_integers_to_floats() -> ModelProto:
    nodes = [
        node("QuantizeLinear", "x xs xu", "xq"),
        node("MatMulIntegerToFloat", "xq w xs ws xu wz b", "y", domain="com.microsoft"),
    ]
    weights = [
        constant("w", int8_codes(16, 6)),
        constant("ws", scales(6)),
        constant("wz", np.zeros(6, np.int8)),
        constant("b", scales(6)),
    ]
    return model(nodes, [XS, constant("xu", np.uint8(128)), *weights], ["N", 16])


@stored("int8")
def qgemm() -> ModelProto:
    nodes = [
        node("QuantizeLinear", "x xs xz", "xq"),
        node("QGemm", "xq xs xz w ws wz b", "y", domain="com.microsoft", transB=1),
    ]
    weights = [
        constant("w", int8_codes(6, 16)),
        constant("ws", scales(6)),
        constant("wz", np.zeros(6, np.int8)),
        constant("b", RNG.integers(-9999, 9999, 6).astype(np.int32)),
    ]
    return model(nodes, [XS, XZ, *weights], ["N", 16])


@stored("fp8")
def fp8_matmul() -> ModelProto:
    e4m3 = TensorProto.FLOAT8E4M3FN
    nodes = [
        *activation_nodes(),
        node("DequantizeLinear", "w ws", "wd", axis=1),
        node("MatMul", "xd wd", "y"),
    ]
    weight = constant("w", RNG.standard_normal((16, 6)).astype(ml_dtypes.float8_e4m3fn), e4m3)
    return model(
        nodes, [XS, constant("xz", np.zeros(()), e4m3), weight, constant("ws", scales(6))], ["N", 16]
    )


@stored("fp8")
def fp8_by_cast_and_mul() -> ModelProto:
    e4m3 = TensorProto.FLOAT8E4M3FN
    nodes = [
        node("QuantizeLinear", "x xs", "xq", output_dtype=e4m3),
        node("Cast", "xq", "xc", to=TensorProto.FLOAT),
        node("Mul", "xc xs", "xd"),
        node("Cast", "w", "wc", to=TensorProto.FLOAT),
        node("Mul", "wc ws", "wd"),
        node("MatMul", "xd wd", "y"),
    ]
    weight = constant("w", RNG.standard_normal((16, 6)).astype(ml_dtypes.float8_e4m3fn), e4m3)
    return model(nodes, [XS, weight, constant("ws", scales(1, 6))], ["N", 16])


@stored("int4")
def int4_in_blocks() -> ModelProto:
    nodes = [node("DequantizeLinear", "w ws", "wd", axis=0, block_size=16), node("MatMul", "x wd", "y")]
    weight = constant("w", RNG.integers(-8, 8, (32, 6)), TensorProto.INT4)
    return model(nodes, [weight, constant("ws", scales(2, 6))], ["N", 32])


@stored("w4a8")
def int4_by_int8() -> ModelProto:
    nodes = [
        *activation_nodes(),
        node("DequantizeLinear", "w ws", "wd", axis=0, block_size=16),
        node("MatMul", "xd wd", "y"),
    ]
    weight = constant("w", RNG.integers(-8, 8, (32, 6)), TensorProto.INT4)
    return model(nodes, [XS, XZ, weight, constant("ws", scales(2, 6))], ["N", 32])


@stored("w8a16")
def int8_weights_alone() -> ModelProto:
    nodes = [node("DequantizeLinear", "w ws", "wd", axis=1), node("MatMul", "x wd", "y")]
    return model(nodes, [constant("w", int8_codes(16, 6)), constant("ws", scales(6))], ["N", 16])


@stored("int4")
def matmul_nbits() -> ModelProto:
    codes = RNG.integers(0, 256, (6, 2, 8)).astype(np.uint8)
    nodes = [
        node("MatMulNBits", "x w ws", "y", K=32, N=6, bits=4, block_size=16, domain="com.microsoft"),
    ]
    return model(nodes, [constant("w", codes), constant("ws", scales(6, 2))], ["N", 32])


@stored("nvfp4")
def nvfp4_with_quantized_scales() -> ModelProto:
    nodes = [
        node("DequantizeLinear", "ws wg", "wsd"),
        node("DequantizeLinear", "w wsd", "wd", axis=0, block_size=16),
        node("MatMul", "x wd", "y"),
    ]
    e2m1 = RNG.choice(np.float32([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]), (32, 6))
    weights = [
        constant("w", e2m1, TensorProto.FLOAT4E2M1),
        constant("ws", np.float32([[8, 16, 32, 64, 128, 448]] * 2), TensorProto.FLOAT8E4M3FN),
        constant("wg", np.float32(0.001)),
    ]
    return model(nodes, weights, ["N", 32], opset=23)


@stored("mxfp4")
def mxfp4_of_a_newer_operator_set() -> ModelProto:
    nodes = [node("DequantizeLinear", "w ws", "wd", axis=0, block_size=32), node("MatMul", "x wd", "y")]
    e2m1 = RNG.choice(np.float32([-6, -3, -1, -0.5, 0, 0.5, 1, 3, 6]), (64, 6))
    scale = constant("ws", np.exp2(RNG.integers(-6, -2, (2, 6))), TensorProto.FLOAT8E8M0)
    return model(nodes, [constant("w", e2m1, TensorProto.FLOAT4E2M1), scale], ["N", 64], opset=24)


@stored("fp8-block")
def fp8_in_squares() -> ModelProto:
    """One scale for 128 x 128: written once, and repeated along the axis that DequantizeLinear has no blocks for."""
    nodes = [
        node("Reshape", "ws three", "tall"),
        node("Expand", "tall wide", "repeated"),
        node("Reshape", "repeated two", "each"),
        node("DequantizeLinear", "w each", "wd", axis=0, block_size=128),
        node("MatMul", "x wd", "y"),
    ]
    e4m3 = TensorProto.FLOAT8E4M3FN
    shapes = {"three": [2, 2, 1], "wide": [2, 2, 128], "two": [2, 256]}
    weights = [
        constant("w", RNG.standard_normal((256, 256)).astype(ml_dtypes.float8_e4m3fn), e4m3),
        constant("ws", scales(2, 2)),
        *(constant(name, np.int64(shape)) for name, shape in shapes.items()),
    ]
    return model(nodes, weights, ["N", 256])


def mxfp8(nodes: list, operand: str) -> ModelProto:
    dequantize = node("TRT_MXFP8DequantizeLinear", "w ws", "wd", domain="trt", axis=0, block_size=32)
    codes = RNG.standard_normal((64, 6)).astype(ml_dtypes.float8_e4m3fn)
    weights = [
        constant("w", codes, TensorProto.FLOAT8E4M3FN),
        constant("ws", RNG.integers(120, 126, (2, 6)).astype(np.uint8)),
    ]
    return model([*nodes, dequantize, node("MatMul", f"{operand} wd", "y")], weights, ["N", 64])


@stored("mxfp8")
def mxfp8_weights_of_tensorrt() -> ModelProto:
    return mxfp8([], "x")


def mxfp8_of_tensorrt() -> ModelProto:
    options = {"domain": "trt", "axis": -1, "block_size": 32}
    quantize = helper.make_node(
        "TRT_MXFP8DynamicQuantize", ["x"], ["xq", "xs"], name="xq", output_dtype=17, **options
    )
    return mxfp8([quantize, node("TRT_MXFP8DequantizeLinear", "xq xs", "xd", **options)], "xd")


def quantized_as_it_comes(
    form: str, first: list[int], second: list[int], block: int, **options: object
) -> ModelProto:
    """A product of two computed tensors, each quantized by TensorRT's operator in blocks of the last axis but one."""
    of, nodes = {"fp4": "TRT_FP4DynamicQuantize", "mxfp8": "TRT_MXFP8DynamicQuantize"}[form], []
    for name, axis in (("x", -1), ("z", -2)):
        where = {"axis": axis, "block_size": block}
        given = [name, "g"] if form == "fp4" else [name]
        nodes.append(
            helper.make_node(
                of, given, [f"{name}q", f"{name}s"], name=f"{name}q", domain="trt", **where, **options
            )
        )
        if form == "fp4":
            nodes += [
                node("DequantizeLinear", f"{name}s g", f"{name}f"),
                node("DequantizeLinear", f"{name}q {name}f", f"{name}d", **where),
            ]
        else:
            nodes.append(
                node("TRT_MXFP8DequantizeLinear", f"{name}q {name}s", f"{name}d", domain="trt", **where)
            )
    found = model([*nodes, node("MatMul", "xd zd", "y")], [constant("g", np.float32(0.01))], first, opset=23)
    found.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, second))
    return found

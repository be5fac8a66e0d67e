"""Reading a model's products: rows times weight must be what the model computes there."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from quantkit.bench.cases import stored
from quantkit.bench.find_layers import find_layers
from quantkit.bench.layers import Gemm, Layer
from quantkit.decode import beyond_onnxruntime, decode
from quantkit.errors import ModelError
from quantkit.graph import Graph, load_graph
from quantkit.runtime import Session
from tests.bench.quantized import (
    BUILDERS,
    FORMATS,
    XS,
    constant,
    int8_codes,
    model,
    node,
    quantized_as_it_comes,
    scales,
)
from tests.models import MODELS

EVERYTHING = 10**6


def tensors_of(graph: Graph, layer: Layer, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the layer reads, and what its node gives."""
    (output,) = [str(n.outputs[0].name) for n in graph.model.graph if str(n.name) == layer.node]
    names = [t for t in (layer.activations.tensor, layer.weights.tensor, output) if t]
    found = Session(graph.model, outputs=list(dict.fromkeys(names)), optimize=False).run(feed)
    return found | {"output": found[output]}


def columns_of(layer: Layer, output: np.ndarray, n: int) -> np.ndarray:
    """The output of the first group or head as rows [rows, n], as the product gives it."""
    if layer.window is not None:
        return np.moveaxis(output[:, :n], 1, -1).reshape(-1, n)
    if not layer.is_constant:
        return output.reshape(-1, *output.shape[-2:])[0]
    if layer.turned and layer.op_type == "MatMul":
        output = np.moveaxis(output, -2, -1)
    return output.reshape(-1, n)


# How many of their layers do more than multiply: sums of what falls on one place, alpha, a computed bias, a stack.
MORE_THAN_A_PRODUCT = {
    "conv_transpose": 1,
    "conv_transpose_grouped": 1,
    "unet": 1,
    "gemm_alpha_beta": 1,
    "gemm_dynamic_bias": 1,
    "matmul_batched_weight": 1,
}


def _has_products(name: str) -> bool:
    graph, quantized = stored(load_graph(MODELS[name].build()))
    try:
        find_layers(graph.model)
    except ModelError:
        return False
    return MODELS[name].runs and not quantized


WITH_PRODUCTS = [name for name in MODELS if _has_products(name)]


@pytest.mark.parametrize("name", WITH_PRODUCTS)
def test_rows_times_weight_is_what_the_model_computes(name: str) -> None:
    tiny = MODELS[name]
    graph = load_graph(tiny.build())
    feed = tiny.feeds(1)[0]
    layers, _ = find_layers(graph.model)
    compared = 0
    for layer in layers:
        tensors = tensors_of(graph, layer, feed)
        shapes = {key: value.shape for key, value in tensors.items()}
        gemm = layer.gemm(shapes)
        rows = layer.activation_rows(tensors[layer.activations.tensor], EVERYTHING)
        weight = layer.weight_matrix(tensors)
        assert rows.shape[1] == gemm.k
        assert weight.shape == (gemm.n, gemm.k)
        assert gemm.rows == len(rows) or gemm.count > 1
        alpha_beta = layer.op_type == "Gemm" and name == "gemm_alpha_beta"
        if (
            layer.op_type == "ConvTranspose"
            or alpha_beta
            or (gemm.count > 1 and layer.is_constant and not layer.window)
        ):
            continue  # more happens there than a product
        product = rows @ weight.T
        output = columns_of(layer, tensors["output"].astype(np.float32), gemm.n)
        bias = layer.bias
        if bias is None and layer.op_type in ("Gemm", "Conv"):
            node = next(n for n in graph.model.graph if str(n.name) == layer.node)
            if len(node.inputs) > 2 and node.inputs[2] is not None:
                continue  # a bias that is computed, or broadcast in another way
        product = product if bias is None else product + bias
        np.testing.assert_allclose(product, output, rtol=2e-3, atol=2e-3)
        compared += 1
    assert compared == len(layers) - MORE_THAN_A_PRODUCT.get(name, 0)


@pytest.mark.parametrize("name", BUILDERS)
def test_quantized_files_give_their_format_codes_and_scales(name: str) -> None:
    model = ir.serde.deserialize_model(BUILDERS[name]())
    (layer,), _ = find_layers(model)
    assert layer.format == FORMATS[name]
    # ONNX Runtime's CPU provider has no four-bit floats, no E8M0 and none of TensorRT's operators.
    graph = Graph(decode(model) if beyond_onnxruntime(model) else model, name, None)
    graph.model.graph.opset_imports[""] = min(graph.model.graph.opset_imports[""], 23)
    shape = tuple(d if isinstance(d, int) else 3 for d in model.graph.inputs[0].shape)
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    tensors = tensors_of(graph, layer, {"x": x})
    rows = layer.activation_rows(tensors["x"], EVERYTHING)
    scale = layer.activations.scale
    if layer.activations.element == "int8" and scale is not None:
        rows = np.clip(np.rint(rows / scale), -128, 127) * scale
    elif layer.activations.element == "int8":
        rows = np.clip(np.rint(rows / np.float32(0.03)) + 128, 0, 255) * np.float32(0.03) - 128 * np.float32(
            0.03
        )
    elif layer.activations.element == "e4m3":
        rows = (rows / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    product = rows @ layer.weight_matrix({}).T
    product = product if layer.bias is None else product + layer.bias
    output = columns_of(layer, tensors["output"], product.shape[1])
    if name == "integer_operators":
        output = output.astype(np.float32) * np.float32(0.05)
        product = np.clip(product, -128 * 0.05, 127 * 0.05)
        np.testing.assert_allclose(product, output, atol=0.0251)
    else:
        np.testing.assert_allclose(product, output, rtol=1e-3, atol=1e-3)
    assert layer.relu == (name == "qdq_conv")


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f in ("int8", "fp8")])
def test_codes_are_taken_as_they_lie_in_the_file(name: str) -> None:
    (layer,), _ = find_layers(ir.serde.deserialize_model(BUILDERS[name]()))
    found = layer.code_matrix()
    if name == "fp8_by_cast_and_mul":
        assert found is None or found[1].size in (1, 6)
        return
    assert found is not None
    codes, scale = found
    values = codes.astype(np.float32) * scale.reshape(-1, 1)
    np.testing.assert_array_equal(values, layer.weight_matrix({}))


def test_depthwise_convolutions_are_left_and_named() -> None:
    _, left = find_layers(load_graph(MODELS["conv_depthwise"].build()).model)
    assert [(x.op_type, x.reason) for x in left] == [("Conv", "depthwise: no product of matrices")]


def test_a_model_without_products_says_what_it_has() -> None:
    graph = load_graph(MODELS["conv_dynamic_weight"].build())
    with pytest.raises(
        ModelError, match=r"no MatMul, Gemm or convolution to run \(Conv .*: its weight is computed\)"
    ):
        find_layers(graph.model)
    with pytest.raises(ModelError, match=r"^resnet: no MatMul"):
        find_layers(graph.model, "resnet")


@pytest.mark.parametrize(
    ("form", "block", "options", "want"),
    [
        ("fp4", 16, {"scale_type": 17}, "nvfp4-fp4"),
        ("mxfp8", 32, {"output_dtype": 17}, "mxfp8"),
    ],
)
def test_products_of_tensors_quantized_as_they_come_have_the_format_of_their_blocks(
    form: str, block: int, options: dict[str, int], want: str
) -> None:
    file = quantized_as_it_comes(form, [2, 5, 64], [2, 64, 6], block, **options)
    (layer,), _ = find_layers(ir.serde.deserialize_model(file))
    assert layer.format == want
    assert (layer.activations.tensor, layer.weights.tensor, layer.is_constant) == ("x", "z", False)


def test_what_multiplies_matrices_among_other_things_is_told() -> None:
    nodes = [
        node("MatMul", "x w", "m"),
        node("Einsum", "m v", "e", equation="nk,km->nm"),
        node("FusedMatMul", "e v", "y", domain="com.microsoft"),
    ]
    weights = [constant("w", scales(16, 6)), constant("v", scales(6, 6))]
    layers, left = find_layers(ir.serde.deserialize_model(model(nodes, weights, ["N", 16])))
    assert [x.op_type for x in layers] == ["MatMul"]
    assert [(x.op_type, x.node, x.reason) for x in left] == [
        ("Einsum", "e", "more than a product of matrices"),
        ("FusedMatMul", "y", "more than a product of matrices"),
    ]


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (np.full((16, 6), np.nan, np.float32), "its weight holds NaN or infinity"),
        (np.full((16, 6), np.inf, ml_dtypes.bfloat16), "its weight holds NaN or infinity"),
        (np.zeros((16, 0), np.float32), "its weight is empty"),
        (np.ones((16, 6), np.int32), "no kernel multiplies bf16 by int32"),
    ],
)
def test_a_weight_that_cannot_be_quantized_is_left_with_the_reason(weight: np.ndarray, reason: str) -> None:
    kept = constant("w", scales(16, 6))
    file = model([node("MatMul", "x kept", "m"), node("MatMul", "x w", "y")], [kept], ["N", 16])
    file.graph.initializer[0].name = "kept"
    loaded = ir.serde.deserialize_model(file)
    value = next(n for n in loaded.graph if n.name == "y").inputs[1]
    assert value is not None
    value.const_value = ir.Tensor(weight, name="w")
    layers, left = find_layers(loaded)
    assert [x.node for x in layers] == ["m"]
    assert [x.reason for x in left] == [reason]


@pytest.mark.parametrize(
    ("shape", "groups", "reason"),
    [
        ((6,), 1, r"its weight of shape (6,) has no kernel"),
        ((6, 1, 3, 3), 4, "its 6 channels are not 4 groups"),
        ((6, 1, 3, 3), 0, "its 6 channels are not 0 groups"),
        ((0, 4, 3, 3), 1, "its weight is empty"),
    ],
)
def test_a_convolution_that_is_none_is_left_with_the_reason(
    shape: tuple[int, ...], groups: int, reason: str
) -> None:
    nodes = [node("Conv", "x w", "c", group=groups), node("MatMul", "c v", "y")]
    file = model(nodes, [constant("w", scales(*shape)), constant("v", scales(9, 5))], ["N", 4, 9, 9])
    layers, left = find_layers(ir.serde.deserialize_model(file))
    assert [x.node for x in layers] == ["y"]
    assert [x.reason for x in left] == [reason]


def test_codes_between_integer_operators_are_read_as_the_values_that_they_stand_for() -> None:
    """What a QLinearMatMul writes is codes: their values are the next one's activations."""
    zero = constant("hz", np.uint8(7))
    nodes = [
        node("QuantizeLinear", "x xs xz", "xq"),
        node("QLinearMatMul", "xq xs xz w ws wz hs hz", "h"),
        node("MatMulIntegerToFloat", "h v hs vs hz", "y", domain="com.microsoft"),
    ]
    weights = [constant("w", int8_codes(16, 6)), constant("ws", np.float32(0.01)), constant("wz", np.int8(0))]
    others = [constant("v", int8_codes(6, 5)), constant("vs", scales(5)), constant("hs", np.float32(0.05))]
    file = model(nodes, [XS, constant("xz", np.int8(0)), zero, *weights, *others], ["N", 16])
    layers, _ = find_layers(ir.serde.deserialize_model(file))
    rows = layers[1].activation_rows(np.uint8([[0, 7, 255, 8, 9, 10]]), 4)
    np.testing.assert_allclose(rows, np.float32([[-0.35, 0, 12.4, 0.05, 0.1, 0.15]]), rtol=1e-6)
    # Bytes without a sign reach twice as far up as those of the kernels: such a tensor gets a scale of its own.
    assert layers[1].activations.scale is None
    assert layers[0].activations.scale is not None


def test_bytes_without_a_sign_are_not_cut_at_half_their_range() -> None:
    nodes = [
        node("QuantizeLinear", "x xs xu", "xq"),
        node("DequantizeLinear", "xq xs xu", "xd"),
        node("MatMul", "xd w", "y"),
    ]
    file = model(nodes, [XS, constant("xu", np.uint8(0)), constant("w", scales(16, 6))], ["N", 16])
    (layer,), _ = find_layers(ir.serde.deserialize_model(file))
    assert layer.activations.scale is None


def test_rows_grow_with_the_batch_and_heads_too() -> None:
    assert Gemm(rows=49 * 4, n=8, k=16).at(64, 4) == Gemm(rows=49 * 64, n=8, k=16)
    heads = Gemm(rows=10, n=10, k=8, count=6, grows="count")
    assert heads.at(5, 2) == Gemm(rows=10, n=10, k=8, count=15, grows="count")
    # A state that no sample brings along stays as it is.
    assert Gemm(rows=7, n=8, k=16).at(64, 4).rows == 7

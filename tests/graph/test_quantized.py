"""Reading the quantization that a model carries already."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from quantkit.formats import E8M0, FP4_E2M1, FP8_E4M3, INT4, INT8, UINT8, QuantSpec, dequantize
from quantkit.graph import Graph, find_sites, load_graph
from quantkit.graph.quantized import QuantizedTensor, find_quantized
from quantkit.runtime import Session
from tests.models import MODELS, model_of


def graph_of(name: str) -> Graph:
    return load_graph(MODELS[name].build())


def table(graph: Graph) -> dict[str, QuantizedTensor]:
    found, left = find_quantized(graph)
    assert left == []
    return {entry.name: entry for entry in found}


def written(nodes: list[Any], *, opset: int = 23, **stored: Any) -> Graph:
    """A graph x[N, 32] → y of nodes and arrays of any type."""
    graph = helper.make_graph(
        nodes,
        "written",
        [helper.make_tensor_value_info("x", 1, ["N", 32])],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in stored.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports)
    model.ir_version = 11
    return Graph(ir.serde.deserialize_model(model), "written")


# --- what is there ------------------------------------------------------------------------------------------


def test_activations_weights_and_biases_are_told_apart() -> None:
    found = table(graph_of("quantized_throughout"))
    assert {name: entry.role for name, entry in found.items()} == {
        "x": "activation",
        "w0": "weight",
        "r": "activation",
        "vq": "weight",
        "bq": "bias",
    }
    assert {name: entry.spec for name, entry in found.items()} == {
        "x": QuantSpec(format=INT8),
        "w0": QuantSpec(format=INT8, axis=1),
        "r": QuantSpec(format=UINT8, symmetric=False),
        "vq": QuantSpec(format=INT8),
        "bq": None,
    }
    assert {name for name, entry in found.items() if entry.stored} == {"vq", "bq"}


def test_scales_and_zero_points_are_the_models_own() -> None:
    found = table(graph_of("quantized_throughout"))
    np.testing.assert_array_equal(found["x"].qparams.scale, np.float32(0.03))
    np.testing.assert_array_equal(found["w0"].qparams.scale, np.arange(1, 7).astype(np.float32) / 100)
    assert found["r"].qparams.zero_point == 3
    # Left out, it is 0.
    assert found["vq"].qparams.zero_point == 0
    assert found["vq"].qparams.scale.shape == ()


def test_readers_are_found_behind_a_change_of_layout() -> None:
    found = table(graph_of("quantized_throughout"))
    assert found["x"].readers == (("MatMul", 0),)
    assert found["w0"].readers == (("MatMul", 1),)
    assert found["vq"].readers == (("Gemm", 1),)
    assert found["bq"].readers == (("Gemm", 2),)
    assert found["r"].nodes == ("QuantizeLinear_2", "DequantizeLinear_2")


def test_a_weight_is_read_as_the_model_dequantizes_it() -> None:
    tiny = MODELS["quantized_throughout"]
    graph = load_graph(tiny.build())
    found = table(graph)
    exact = Session(graph.model, outputs=["wd", "vd"], optimize=False).run(tiny.feeds(1)[0])
    np.testing.assert_array_equal(dequantize(found["w0"].qtensor(graph)), exact["wd"])
    np.testing.assert_array_equal(dequantize(found["vq"].qtensor(graph)), exact["vd"])


def test_a_float_model_has_none() -> None:
    assert find_quantized(graph_of("conv_relu")) == ([], [])


def test_one_quantizer_with_a_dequantizer_a_reader_is_one_tensor() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["a"], name="A"),
        helper.make_node("DequantizeLinear", ["q", "s"], ["b"], name="B"),
        helper.make_node("Add", ["a", "b"], ["y"], name="add"),
    ]
    found = table(written(nodes, s=np.float32(0.1), z=np.int8(0)))
    assert found["x"].readers == (("add", 0), ("add", 1))


@pytest.mark.parametrize("opset", [21, 23])
def test_blocks_and_their_axis_are_read(opset: int) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=-2, block_size=16),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
    ]
    graph = written(
        nodes, opset=opset, q=np.ones((32, 4)).astype(ml_dtypes.int4), s=np.ones((2, 4), np.float16)
    )
    (entry,) = table(graph).values()
    assert entry.spec == QuantSpec(format=INT4, axis=0, block_size=16)
    assert entry.qparams.scale.dtype == np.float32
    assert entry.shape == (32, 4)


def test_scales_of_two_levels_are_one_tensors() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["s8", "s32"], ["s"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0, block_size=16),
        helper.make_node("Cast", ["w"], ["c"], to=1),
        helper.make_node("MatMul", ["x", "c"], ["y"], name="product"),
    ]
    graph = written(
        nodes,
        q=np.full((32, 4), 1.5).astype(ml_dtypes.float4_e2m1fn),
        s8=np.full((2, 4), 3).astype(ml_dtypes.float8_e4m3fn),
        s32=np.float32(0.5),
    )
    (entry,) = table(graph).values()
    assert entry.spec == QuantSpec(format=FP4_E2M1, axis=0, block_size=16, scale_format=FP8_E4M3)
    assert entry.readers == (("product", 1),)
    np.testing.assert_array_equal(dequantize(entry.qtensor(graph)), np.full((32, 4), 2.25))


def test_mx_scales_are_read() -> None:
    node = helper.make_node("DequantizeLinear", ["q", "s"], ["y"], axis=1, block_size=16, output_dtype=1)
    graph = written(
        [node],
        opset=24,
        q=np.ones((4, 32)).astype(ml_dtypes.float8_e4m3fn),
        s=np.full((4, 2), 4).astype(ml_dtypes.float8_e8m0fnu),
    )
    (entry,) = table(graph).values()
    assert entry.spec == QuantSpec(format=FP8_E4M3, axis=1, block_size=16, scale_format=E8M0)


# --- what cannot be read so ---------------------------------------------------------------------------------


def dynamic() -> list[Any]:
    return [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("QuantizeLinear", ["x", "m"], ["q"], output_dtype=3, name="Q"),
        helper.make_node("DequantizeLinear", ["q", "m"], ["y"], name="DQ"),
    ]


def mismatched() -> list[Any]:
    return [
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"], output_dtype=3, name="Q"),
        helper.make_node("DequantizeLinear", ["q", "t"], ["y"]),
    ]


def unpaired() -> list[Any]:
    return [
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"], output_dtype=3, name="Q"),
        helper.make_node("Transpose", ["q"], ["turned"]),
        helper.make_node("DequantizeLinear", ["turned", "s"], ["y"], name="DQ"),
    ]


@pytest.mark.parametrize(
    ("nodes", "reasons"),
    [
        (dynamic(), {"Q": "its scales are computed"}),
        (mismatched(), {"Q": "its DequantizeLinear has another scale or zero point"}),
        (
            unpaired(),
            {"Q": "its codes are read by Transpose", "DQ": "dequantizes codes that are computed or fed"},
        ),
    ],
    ids=["dynamic", "mismatched", "unpaired"],
)
def test_what_is_not_a_pair_is_listed_with_the_reason(nodes: list[Any], reasons: dict[str, str]) -> None:
    found, left = find_quantized(written(nodes, s=np.float32(0.1), t=np.float32(0.2)))
    assert found == []
    assert {item.node: item.reason for item in left} == reasons


def test_operators_that_work_on_codes_are_listed() -> None:
    node = helper.make_node(
        "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", name="packed", K=32, N=4, bits=4, block_size=16
    )  # fmt: skip
    graph = written([node], b=np.ones((4, 2, 8), np.uint8), s=np.ones((4, 2), np.float32))
    assert [(item.node, item.op_type) for item in find_quantized(graph)[1]] == [("packed", "MatMulNBits")]


# --- what is left to quantize -------------------------------------------------------------------------------


def test_a_node_with_all_inputs_quantized_is_done() -> None:
    sites, left = find_sites(graph_of("quantized_throughout"))
    assert sites == []
    assert {item.reason for item in left} == {"already quantized in the model"}
    assert {item.op_type for item in left} == {"MatMul", "Gemm"}


def test_a_node_with_one_bare_input_has_a_site_for_it_alone() -> None:
    sites, left = find_sites(graph_of("weight_only_quantized"))
    assert left == []
    assert [(s.role, s.name) for s in sites] == [("input", "x")]
    # The axis that is contracted is known, for the weight is stored.
    assert sites[0].axis == 1
    bare_weight = model_of(
        """(float[N,8] x) => (float[N,4] y) <float s = {0.1}, float[8,4] w> {
        q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) y = MatMul (d, w) }""",
        z=np.array(0, np.int8),
    )
    sites, left = find_sites(load_graph(bare_weight))
    assert [(s.role, s.name, s.axis, s.contraction) for s in sites] == [("weight", "w", 1, 0)]


def test_what_a_quantizer_reads_is_no_output_to_quantize() -> None:
    graph = graph_of("already_quantized")
    assert {s.name for s in find_sites(graph)[0] if s.role == "output"} == {"y"}
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y) <float s = {0.1}, float[4,3,3,3] w> {
        c = Conv (x, w) r = Relu (c) q = QuantizeLinear (r, s, z) y = DequantizeLinear (q, s, z) }"""
    found = find_sites(load_graph(model_of(text, z=np.array(0, np.int8))))[0]
    assert {s.role for s in found} == {"input", "weight"}


def test_the_quantized_branch_of_a_residual_add_is_left() -> None:
    text = """(float[N,4,8,8] x) => (float[N,4,8,8] y) <float s = {0.1}, float[4,4,1,1] w> {
        q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z)
        c = Conv (x, w) a = Add (c, d) y = Relu (a) }"""
    found = find_sites(load_graph(model_of(text, z=np.array(0, np.int8))))[0]
    assert {(s.role, s.name) for s in found if s.op_type == "Add"} == {("operand", "c"), ("output", "y")}

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

from quantkit.graph import load_graph
from quantkit.runtime import Session
from tests.graph.refusals import refusal
from tests.models import MODELS, REFUSED, TinyModel, model_of, normal

every_model = pytest.mark.parametrize("tiny", MODELS.values(), ids=MODELS)


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in load_graph(model).model.graph]


# --- what cleaning keeps ------------------------------------------------------------------------------------


@every_model
def test_a_cleaned_model_computes_what_the_model_computed(tiny: TinyModel, tmp_path: Path) -> None:
    if not tiny.runs:
        pytest.skip("ONNX Runtime does not take the original")
    original = Session(tiny.save(tmp_path), optimize=False)
    cleaned = Session(load_graph(tiny.build()).model, optimize=False)
    for feed in tiny.feeds(2):
        expected, found = original.run(feed), cleaned.run(feed)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            tolerance = 1e-2 if value.dtype in (np.float16, ml_dtypes.bfloat16) else 1e-5
            np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance)


@every_model
def test_inputs_and_outputs_keep_their_names_and_order(tiny: TinyModel) -> None:
    model = tiny.build()
    stored = {t.name for t in model.graph.initializer}
    graph = load_graph(model)
    assert [i.name for i in graph.inputs] == [i.name for i in model.graph.input if i.name not in stored]
    assert graph.outputs == [o.name for o in model.graph.output]


@every_model
def test_every_node_has_a_name_of_its_own(tiny: TinyModel) -> None:
    graph = load_graph(tiny.build())
    names = [node.name for node in graph.model.graph.all_nodes()]
    assert all(names)
    assert len(set(names)) == len(names)


@every_model
def test_a_cleaned_model_is_clean(tiny: TinyModel) -> None:
    once = load_graph(tiny.build())
    twice = load_graph(once.model)
    assert twice.fingerprint == once.fingerprint
    assert [n.op_type for n in twice.model.graph] == [n.op_type for n in once.model.graph]


def test_names_that_are_unique_are_kept() -> None:
    model = MODELS["unnamed_nodes"].build()
    model.graph.node[1].name = "MatMul"
    graph = load_graph(model)
    assert graph.node("MatMul").op_type == "Relu"
    assert [n.name for n in graph.model.graph] == ["MatMul_1", "MatMul", "MatMul_2"]


def test_an_epsilon_is_no_zero_and_almost_one_is_not_one() -> None:
    for op_type, number in (
        ("Add", 1e-12),
        ("Add", 1e-8),
        ("Sub", 1e-9),
        ("Mul", 1.000001),
        ("Div", 0.999999),
    ):
        text = f"(float[N,4] x) => (float[N,4] y) {{ a = {op_type} (x, c) y = Relu (a) }}"
        graph = load_graph(model_of(text, c=np.float32(number)))
        assert [n.op_type for n in graph.model.graph] == [op_type, "Relu"]
        assert graph.array("c") == np.float32(number)
        assert [spec.name for spec in graph.inputs] == ["x"]


def test_a_norm_of_equal_elements_is_no_nan() -> None:
    text = """(float[N,4] x) => (float[N,4] y) {
        m = ReduceMean <keepdims = 1> (x, axes) d = Sub (x, m) s = Mul (d, d)
        v = ReduceMean <keepdims = 1> (s, axes) e = Add (v, eps) r = Sqrt (e) y = Div (d, r) }"""
    graph = load_graph(model_of(text, axes=np.array([1]), eps=np.float32(1e-12)))
    found = Session(graph.model).run({"x": np.full((1, 4), 2, np.float32)})["y"]
    np.testing.assert_array_equal(found, np.zeros((1, 4)))


# --- what cleaning takes away -------------------------------------------------------------------------------


def test_batch_normalization_behind_a_convolution_is_merged_into_it() -> None:
    assert ops(MODELS["conv_batchnorm"].build()) == ["Conv", "Relu", "BatchNormalization", "Conv"]


def test_identities_and_dropouts_are_gone() -> None:
    assert ops(MODELS["identity_chain"].build()) == ["Conv", "Relu", "Conv"]


def test_a_layer_that_nobody_reads_is_gone() -> None:
    assert ops(MODELS["unused_output"].build()) == ["MatMul"]


def test_constant_nodes_become_initializers() -> None:
    graph = load_graph(MODELS["constant_weight"].build())
    assert [n.op_type for n in graph.model.graph] == ["Gemm"]
    np.testing.assert_array_equal(graph.array("w"), normal(8, 2))


@pytest.mark.parametrize("name", ["weight_behind_transpose", "weight_behind_cast"])
def test_a_weight_behind_layout_or_cast_operators_is_folded_whatever_its_size(name: str) -> None:
    graph = load_graph(MODELS[name].build())
    for node in graph.model.graph:
        assert node.op_type in ("MatMul", "Relu")
        if node.op_type == "MatMul":
            assert node.inputs[1] is not None
            assert node.inputs[1].is_initializer()


def test_functions_are_inlined() -> None:
    assert ops(MODELS["local_function"].build()) == ["MatMul", "Add", "Relu", "MatMul", "Add", "Relu"]


def test_initializers_listed_as_inputs_are_not_fed() -> None:
    assert [i.name for i in load_graph(MODELS["initializers_as_inputs"].build()).inputs] == ["x"]


def test_zero_and_one_themselves_are_dropped() -> None:
    text = "(float[N,4] x) => (float[N,4] y) { a = Add (x, zero) b = Mul (a, one) y = Relu (b) }"
    assert ops(model_of(text, zero=np.float32(0), one=np.float32(1))) == ["Relu"]


# --- operator sets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [8, 9, 11, 13, 17, 18])
def test_older_operator_sets_are_raised_to_19(opset: int) -> None:
    model = model_of(
        """(float[N,3,8,8] x) => (float[N,5] y) <float[4,3,3,3] w, float[4] b, float[5,144] w1, float[5] b1> {
        a = Conv (x, w, b)
        r = Relu (a)
        f = Flatten (r)
        y = Gemm <transB = 1> (f, w1, b1) }""",
        opset=opset,
        ir=4,
    )
    assert load_graph(model).opset == 19


@pytest.mark.parametrize("opset", [19, 20, 21, 22, 23])
def test_operator_sets_from_19_to_23_are_kept(opset: int) -> None:
    model = MODELS["gemm"].build()
    model.opset_import[0].version = opset
    assert load_graph(model).opset == opset


@pytest.mark.parametrize("opset", [24, 25, 28])
def test_newer_operator_sets_are_refused(opset: int) -> None:
    model = REFUSED["opset24"].build()
    model.opset_import[0].version = opset
    assert refusal(model) == (
        f"tiny: operator set {opset}; TensorRT and ONNX Runtime read quantized models up to 23: "
        "export it with opset 23 or lower."
    )


def test_an_operator_set_that_cannot_be_raised_is_refused() -> None:
    model = model_of(
        "(float[N,8] x) => (float[N,8] y) { y = Upsample (x, s) }", opset=8, s=np.ones(2, np.float32)
    )
    assert "operator set 8 c" in refusal(model)

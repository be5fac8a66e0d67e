import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from quantkit.errors import ModelError
from quantkit.graph import load_graph
from quantkit.runtime import Session
from tests.models import MODELS, REFUSED, TinyModel, external_weights, model_of, normal, save_external

every_model = pytest.mark.parametrize("tiny", MODELS.values(), ids=MODELS)


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in load_graph(model).model.graph]


def refusal(path: Path | onnx.ModelProto) -> str:
    """The message with which a model is refused: always one line."""
    with pytest.raises(ModelError) as caught:
        load_graph(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


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


@every_model
def test_a_model_in_memory_is_not_changed(tiny: TinyModel) -> None:
    proto = tiny.build()
    load_graph(proto)
    assert proto == tiny.build()
    held = ir.serde.deserialize_model(tiny.build())
    before = ir.serde.serialize_model(held).SerializeToString()
    load_graph(held)
    assert ir.serde.serialize_model(held).SerializeToString() == before


def test_a_graph_is_returned_as_it_is() -> None:
    graph = load_graph(MODELS["gemm"].build())
    assert load_graph(graph) is graph


def test_a_model_in_memory_is_called_by_a_name_that_a_file_can_have() -> None:
    model = MODELS["gemm"].build()
    model.graph.name = "torch.export/main graph: 0"
    assert load_graph(model).name == "torch.export_main_graph_0"
    model.graph.name = ""
    assert load_graph(model).name == "model"


def test_names_that_are_unique_are_kept() -> None:
    model = MODELS["unnamed_nodes"].build()
    model.graph.node[1].name = "MatMul"
    graph = load_graph(model)
    assert graph.node("MatMul").op_type == "Relu"
    assert [n.name for n in graph.model.graph] == ["MatMul_1", "MatMul", "MatMul_2"]


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


# --- refusals -----------------------------------------------------------------------------------------------


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "model.onnx")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)


@pytest.mark.parametrize(
    "contents",
    [b"", b"# a model\n\nnot an ONNX file, but text\n" * 20, b"\x89PNG\r\n\x1a\n" + bytes(200), bytes(1000)],
    ids=["empty", "text", "picture", "zeros"],
)
def test_a_file_that_is_no_model_is_refused(contents: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(contents)
    assert str(path) in refusal(path)


@pytest.mark.parametrize("name", ["conv_relu", "if_subgraph", "constant_weight", "local_function", "opset8"])
def test_a_model_cut_short_anywhere_is_refused(name: str, tmp_path: Path) -> None:
    whole = MODELS[name].build().SerializeToString()
    path = tmp_path / "cut.onnx"
    for length in [*range(0, len(whole), max(1, len(whole) // 150)), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refusal(path)


def test_an_empty_model_is_refused() -> None:
    assert "no nodes" in refusal(onnx.ModelProto())


def test_a_tensor_that_nothing_computes_is_refused() -> None:
    model = MODELS["unnamed_nodes"].build()
    del model.graph.node[1]
    assert "MatMul without a name reads r, which nothing computes" in refusal(model)


def test_an_output_that_nothing_computes_is_refused() -> None:
    model = MODELS["gemm"].build()
    model.graph.output[0].name = "elsewhere"
    assert "nothing computes its output elsewhere" in refusal(model)


def test_a_weight_of_another_size_than_its_shape_is_refused() -> None:
    model = MODELS["gemm"].build()
    model.graph.initializer[0].dims[0] = 9
    assert "weight w cannot be read" in refusal(model)


def test_an_input_without_a_rank_is_refused() -> None:
    model = MODELS["gemm"].build()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(ModelError, match="x: the input's rank is not given"):
        load_graph(model).inputs  # noqa: B018


# --- external data ------------------------------------------------------------------------------------------


def test_external_weights_are_found_beside_the_model(tmp_path: Path) -> None:
    external_weights(tmp_path / "model.onnx")
    inline = load_graph(MODELS["conv_relu"].build())
    assert load_graph(tmp_path / "model.onnx").fingerprint == inline.fingerprint


def test_missing_external_weights_are_named(tmp_path: Path) -> None:
    external_weights(tmp_path / "model.onnx")
    (tmp_path / "model.onnx.data").unlink()
    assert f"its weights file {tmp_path / 'model.onnx.data'} is missing" in refusal(tmp_path / "model.onnx")


def test_external_weights_cut_short_are_refused(tmp_path: Path) -> None:
    external_weights(tmp_path / "model.onnx")
    data = tmp_path / "model.onnx.data"
    whole = data.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        data.write_bytes(whole[:length])
        assert f"which has {length}" in refusal(tmp_path / "model.onnx")


def test_external_weights_of_constant_nodes_are_checked_too(tmp_path: Path) -> None:
    save_external(MODELS["constant_weight"].build(), tmp_path / "model.onnx")
    (tmp_path / "model.onnx.data").unlink()
    assert "model.onnx.data is missing" in refusal(tmp_path / "model.onnx")


def test_a_path_may_hold_spaces_and_any_letters(tmp_path: Path) -> None:
    folder = tmp_path / "мои модели 模型"
    folder.mkdir()
    external_weights(folder / "a model (v2).onnx")
    graph = load_graph(str(folder / "a model (v2).onnx"))
    assert graph.name == "a model (v2)"
    assert graph.fingerprint == load_graph(MODELS["conv_relu"].build()).fingerprint


# --- fingerprint --------------------------------------------------------------------------------------------


@every_model
def test_the_fingerprint_outlives_saving_inline_and_external(tiny: TinyModel, tmp_path: Path) -> None:
    fingerprint = load_graph(tiny.build()).fingerprint
    save_external(tiny.build(), tmp_path / "external.onnx")
    assert load_graph(tiny.save(tmp_path)).fingerprint == fingerprint
    assert load_graph(tmp_path / "external.onnx").fingerprint == fingerprint
    assert len(fingerprint) == 64


def test_the_fingerprint_is_the_same_in_another_process(tmp_path: Path) -> None:
    path = MODELS["if_subgraph"].save(tmp_path)
    code = f"from quantkit.graph import load_graph; print(load_graph({str(path)!r}).fingerprint)"
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    assert found == [load_graph(path).fingerprint] * 2


@pytest.mark.parametrize("name", ["conv_relu", "if_subgraph", "fp16", "tied_embedding", "opset8"])
def test_the_fingerprint_changes_with_any_weight(name: str) -> None:
    fingerprint = load_graph(MODELS[name].build()).fingerprint
    for number in range(len(MODELS[name].build().graph.initializer)):
        model = MODELS[name].build()
        tensor = model.graph.initializer[number]
        values = numpy_helper.to_array(tensor).copy()
        values.reshape(-1)[-1:] += np.asarray(0.25, values.dtype)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        assert load_graph(model).fingerprint != fingerprint


def test_the_fingerprint_changes_with_a_weight_inside_a_branch() -> None:
    found = set()
    for value in (1.0, 2.0):
        model = MODELS["if_subgraph"].build()
        branch = next(n for n in model.graph.node if n.op_type == "If").attribute[1].g
        assert branch.node[0].op_type == "Relu"
        branch.node[0].op_type = "Mul"
        branch.node[0].input.append("factor")
        branch.initializer.append(numpy_helper.from_array(np.array(value, np.float32), "factor"))
        found.add(load_graph(model).fingerprint)
    assert len(found) == 2


@pytest.mark.parametrize("attribute", ["pads", "strides", "group"])
def test_the_fingerprint_changes_with_an_attribute(attribute: str) -> None:
    text = "(float[N,4,8,8] x) => (float[N,4,?,?] y) <float[4,2,3,3] w> {{ y = Conv <group = 2 {}> (x, w) }}"
    changed = {"pads": ", pads = [1,1,1,1]", "strides": ", strides = [2,2]", "group": ""}[attribute]
    one = model_of(text.format(""))
    other = model_of(text.format(changed))
    if attribute == "group":
        other.graph.node[0].attribute[0].i = 1
    assert load_graph(one).fingerprint != load_graph(other).fingerprint


def test_the_fingerprint_changes_with_the_wiring() -> None:
    one, other = MODELS["unnamed_nodes"].build(), MODELS["unnamed_nodes"].build()
    other.graph.node[2].input[0] = "h"
    assert load_graph(one).fingerprint != load_graph(other).fingerprint


def test_a_model_may_hold_strings() -> None:
    model = MODELS["gemm"].build()
    model.graph.node.extend(onnx.parser.parse_graph("g () => (string[2] s) { s = Identity (words) }").node)
    model.graph.output.append(onnx.helper.make_tensor_value_info("s", onnx.TensorProto.STRING, [2]))
    model.graph.initializer.append(
        onnx.helper.make_tensor("words", onnx.TensorProto.STRING, [2], [b"a", b"b"])
    )
    assert len(load_graph(model).fingerprint) == 64


@pytest.mark.parametrize(
    ("role", "kind", "says"),
    [
        ("output", "seq", "output s is a sequence"),
        ("output", "optional", "output s is optional"),
        ("input", "seq", "input s is a sequence"),
    ],
)
def test_inputs_and_outputs_that_are_no_tensors_are_refused(role: str, kind: str, says: str) -> None:
    signature, body = {
        ("output", "seq"): ("=> (float[N,3] y, seq(float[N,3]) s)", "s = SequenceConstruct (y)"),
        ("output", "optional"): ("=> (float[N,3] y, optional(float[N,3]) s)", "s = Optional (y)"),
        ("input", "seq"): (", seq(float[N,3]) s) => (float[N,3] y)", ""),
    }[role, kind]
    head = "(float[N,4] x" + ("" if role == "input" else ") ")
    model = model_of(f"{head}{signature} {{ y = MatMul (x, w) {body} }}", w=normal(4, 3))
    with pytest.raises(ModelError, match=f"{says}, .* compares tensors only; .* without that {role}"):
        load_graph(model)

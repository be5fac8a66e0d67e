from pathlib import Path

import onnx_ir as ir
import pytest

from quantkit.graph import load_graph
from tests.graph.refusals import refusal
from tests.models import MODELS, TinyModel, external_weights, save_external

every_model = pytest.mark.parametrize("tiny", MODELS.values(), ids=MODELS)


# --- models in memory ---------------------------------------------------------------------------------------


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


# --- files --------------------------------------------------------------------------------------------------


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

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quantkit.errors import ModelError
from quantkit.graph import load_graph
from quantkit.runtime import Session, reason, with_outputs
from tests.models import MODELS, TinyModel, external_weights, model_of, normal

every_model = pytest.mark.parametrize("tiny", MODELS.values(), ids=MODELS)


@every_model
def test_a_model_in_memory_runs_as_its_file_does(tiny: TinyModel, tmp_path: Path) -> None:
    graph = load_graph(tiny.build())
    ir.save(graph.model, tmp_path / "model.onnx")
    feed = tiny.feeds(1)[0]
    held = Session(graph.model, threads=1).run(feed)
    read = Session(tmp_path / "model.onnx", threads=1).run(feed)
    assert held.keys() == read.keys()
    for name, value in read.items():
        np.testing.assert_array_equal(held[name], value)


def test_large_weights_are_read_where_they_lie() -> None:
    weight = normal(64, 64)
    graph = load_graph(model_of("(float[N,64] x) => (float[N,64] y) { y = MatMul (x, w) }", w=weight))
    session = Session(graph.model)
    x = np.ones((2, 64), np.float32)
    np.testing.assert_allclose(session.run({"x": x})["y"], x @ weight, rtol=1e-4, atol=1e-5)
    # The model itself goes on as it was.
    np.testing.assert_array_equal(graph.array("w"), weight)
    np.testing.assert_array_equal(Session(graph.model).run({"x": x})["y"], session.run({"x": x})["y"])


def test_external_weights_are_read(tmp_path: Path) -> None:
    external_weights(tmp_path / "model.onnx")
    feed = MODELS["conv_relu"].feeds(1)[0]
    inline = Session(load_graph(MODELS["conv_relu"].build()).model, threads=1).run(feed)["y"]
    np.testing.assert_array_equal(
        Session(load_graph(tmp_path / "model.onnx").model, threads=1).run(feed)["y"], inline
    )


def test_any_tensor_can_be_an_output_inputs_and_weights_too() -> None:
    graph = load_graph(MODELS["conv_relu"].build())
    feed = MODELS["conv_relu"].feeds(1)[0]
    session = Session(graph.model, outputs=["r", "x", "w0", "y"])
    assert session.output_names == ["r", "x", "w0", "y"]
    found = session.run(feed)
    assert list(found) == ["r", "x", "w0", "y"]
    np.testing.assert_array_equal(found["x"], feed["x"])
    np.testing.assert_array_equal(found["w0"], graph.array("w0"))
    assert found["r"].min() == 0
    assert graph.outputs == ["y"]


def test_a_large_weight_that_is_an_output_and_nothing_else_is_given() -> None:
    weight = normal(64, 64)
    text = "(float[N,64] x) => (float[N,64] y, float[64,64] w) { y = Relu (x) }"
    session = Session(load_graph(model_of(text, w=weight)).model)
    np.testing.assert_array_equal(session.run({"x": np.ones((2, 64), np.float32)})["w"], weight)


def test_only_the_outputs_asked_for_are_given() -> None:
    session = Session(load_graph(MODELS["intermediate_output"].build()).model)
    feed = MODELS["intermediate_output"].feeds(1)[0]
    assert list(session.run(feed)) == ["y", "r"]
    assert list(session.run(feed, ["r"])) == ["r"]


def test_with_outputs_leaves_the_model_alone() -> None:
    model = load_graph(MODELS["conv_relu"].build()).model
    assert [v.name for v in with_outputs(model, ["r", "a"]).graph.outputs] == ["r", "a"]
    assert [v.name for v in model.graph.outputs] == ["y"]


def test_bfloat16_inputs_are_fed() -> None:
    model = load_graph(model_of("(bfloat16[N,4] x) => (float[N,4] y) { y = Cast <to = 1> (x) }")).model
    x = np.array([[1, -2.5, 3.140625, 0]], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(Session(model).run({"x": x})["y"], x.astype(np.float32))
    np.testing.assert_array_equal(Session(model).run({"x": x[:, ::-1]})["y"], x[:, ::-1].astype(np.float32))


def test_arrays_that_do_not_lie_in_order_are_fed_right() -> None:
    session = Session(load_graph(MODELS["gemm"].build()).model, threads=1)
    x = np.arange(16, dtype=np.float32).reshape(8, 2).T
    np.testing.assert_array_equal(session.run({"x": x})["y"], session.run({"x": x.copy("C")})["y"])


# --- without optimizations that change values ---------------------------------------------------------------


def test_biases_in_float_stay_so_when_a_file_is_judged(tmp_path: Path) -> None:
    # WeightBiasQuantization would make them int32 with the scale of the product, and 10 lie above its range.
    model = model_of(
        """(float[N,2] x) => (float[N,2] y) {
        xq = QuantizeLinear (x, xs, z) xd = DequantizeLinear (xq, xs, z)
        wd = DequantizeLinear <axis = 1> (wq, ws, wz)
        y = Gemm (xd, wd, b) }""",
        xs=np.float32(0.5),
        z=np.int8(0),
        wq=np.array([[1, 0], [0, 1]], np.int8),
        ws=np.array([0.5, 0.5], np.float32),
        wz=np.zeros(2, np.int8),
        b=np.array([0.1, -0.1], np.float32),
    )
    onnx.save(model, tmp_path / "model.onnx")
    x = np.array([[1.0, 2.0]], np.float32)
    judged = Session(tmp_path / "model.onnx", optimize=False).run({"x": x})["y"]
    np.testing.assert_allclose(judged, [[0.6, 0.9]], rtol=1e-6)


# --- refusals -----------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert "onnxruntime_src" not in message
    assert "[ONNXRuntimeError]" not in message
    return message


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("not a model")
    with pytest.raises(ModelError) as caught:
        Session(path)
    assert one_line(caught).startswith(f"{path}: ONNX Runtime cannot load it")


def test_an_operator_without_a_kernel_is_refused() -> None:
    model = load_graph(
        model_of("(bfloat16[N,8] x) => (bfloat16[N,5] y) <bfloat16[8,5] w> { y = MatMul (x, w) }")
    )
    with pytest.raises(ModelError) as caught:
        Session(model.model)
    assert "Could not find an implementation for MatMul" in one_line(caught)


@pytest.mark.parametrize(
    ("feed", "found"),
    [
        ({"x": np.zeros((1, 9), np.float32)}, "fails when run on x float32 [1, 9]"),
        ({"x": np.zeros((1, 8), np.float64)}, "fails when run on x float64 [1, 8]"),
        ({"z": np.zeros((1, 8), np.float32)}, "fails when run on z float32 [1, 8]"),
        ({}, "x"),
    ],
)
def test_a_feed_that_does_not_fit_is_refused_with_its_shape(
    feed: dict[str, np.ndarray], found: str, capfd: pytest.CaptureFixture[str]
) -> None:
    session = Session(load_graph(MODELS["gemm"].build()).model)
    with pytest.raises(ModelError) as caught:
        session.run(feed)
    assert found in one_line(caught)
    assert capfd.readouterr().err == ""


def test_a_model_that_fails_as_it_runs_is_named_and_keeps_the_screen_clean(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = model_of("(float[N,8] x, int64[1] shape) => (float[A] y) { y = Reshape (x, shape) }")
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ModelError) as caught:
        Session(tmp_path / "model.onnx").run({"x": np.zeros((1, 8), np.float32), "shape": np.array([9])})
    assert str(tmp_path / "model.onnx") in one_line(caught)
    assert capfd.readouterr().err == ""


def test_a_reason_is_one_short_line_without_codes_and_paths() -> None:
    error = RuntimeError(
        "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned.\n  Name:'' Status Message: "
        + "x" * 500
    )
    assert reason(error).startswith("Non-zero status code returned. Name:'' Status Message: x")
    assert len(reason(error)) <= 300
    assert reason(ValueError("plain")) == "plain"

"""A folder for vLLM read back as an ONNX model: equal to what NumPy makes of the plan."""

import json

import ml_dtypes
import numpy as np
import pytest

import quantkit
from quantkit.errors import ModelError
from quantkit.export.vllm_model import read_folder
from quantkit.graph import load_graph
from quantkit.planning.planning import obey
from quantkit.planning.simulate import simulate
from quantkit.runtime import Session
from tests.export.vllm_folders import PRESETS, ROWS, chain, dotted, export, two_layers
from tests.models import model_of
from tests.plans import sqnr_db

_X = np.random.default_rng(2).normal(size=(6, 256)).astype(np.float32)


@pytest.fixture(scope="module")
def linear():
    return two_layers()


@pytest.fixture(scope="module")
def cache(linear):
    return quantkit.calibrate_model(linear, ROWS)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_as_its_plan_says(linear, cache, tmp_path, name):
    exported = export(linear, tmp_path / "q", cache, **PRESETS[name][0])
    graph = load_graph(linear)
    found = Session(read_folder(tmp_path / "q", graph).model, optimize=False).run({"x": _X})["y"]
    planned = simulate(graph, exported.plan, {"x": _X})["y"]
    exact = Session(graph.model).run({"x": _X})["y"]
    # A code of an activation may flip where float sums differ in their last bits.
    assert sqnr_db(planned, found) > sqnr_db(exact, planned) + 20
    assert np.mean(np.isclose(planned, found, rtol=1e-4, atol=1e-4 * np.abs(planned).max())) > 0.9


@pytest.mark.parametrize("method", ["smoothquant+minmax", "equalize+bias+minmax"])
def test_what_a_method_changed_besides_comes_back(tmp_path, method):
    model = dotted("""(float[B,256] x) => (float[B,32] y)
        <float[256,64] up__weight, float[64,32] down__weight, float[256] norm__weight, float[256] norm__bias> {
        n = LayerNormalization (x, norm__weight, norm__bias)
        h = MatMul (n, up__weight)
        r = Relu (h)
        y = MatMul (r, down__weight) }""")
    graph, held = load_graph(model), quantkit.calibrate_model(model, ROWS)
    exported = export(model, tmp_path / "q", held, preset="int8", method=method)
    found = Session(read_folder(tmp_path / "q", graph).model, optimize=False).run({"x": _X})["y"]
    changed = obey(graph, exported.plan).graph
    assert not np.array_equal(changed.array("norm.weight"), graph.array("norm.weight")) or "bias" in method
    planned = simulate(changed, exported.plan, {"x": _X})["y"]
    assert np.mean(np.isclose(planned, found, rtol=1e-4, atol=1e-4 * np.abs(planned).max())) > 0.9
    assert sqnr_db(planned, found) > 50


def test_what_is_not_quantized_comes_from_the_folder_too(linear, cache, tmp_path):
    export(linear, tmp_path / "q", cache, preset="int8", high_precision="bf16")
    graph = load_graph(linear)
    read = read_folder(tmp_path / "q", graph)
    rounded = graph.array("scale").astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(read.array("scale"), rounded)
    assert not np.array_equal(rounded, graph.array("scale"))


@pytest.mark.parametrize("transposed", [0, 1])
def test_the_weights_of_every_way_round_come_back(tmp_path, transposed):
    shape = "24,32" if transposed else "32,24"
    model = dotted(
        f"(float[B,32] x, float[16,B] z) => (float[B,24] y, float[20,B] u) "
        f"<float[{shape}] fc__weight, float[24] b, float[20,16] left> "
        f"{{ y = Gemm <transB = {transposed}> (x, fc__weight, b)  u = MatMul (left, z) }}"
    )
    exported = export(model, tmp_path / "q", preset="int4", group=16)
    graph = load_graph(model)
    feeds = {"x": _X[:, :32], "z": _X.T[:16]}
    found = Session(read_folder(tmp_path / "q", graph).model, optimize=False).run(feeds)
    for name, planned in simulate(graph, exported.plan, feeds).items():
        np.testing.assert_allclose(found[name], planned, rtol=1e-4, atol=1e-4)


def test_a_name_map_is_not_asked_for_again(tmp_path):
    model = chain("/a/MatMul", "/b/MatMul")
    options = {"name_map": {"/a/MatMul": "model.q", "norm.weight": None}}
    exported = export(model, tmp_path / "q", preset="int4", group=16, target_options=options)
    assert json.loads((tmp_path / "q" / "names.json").read_text()) == {
        "/a/MatMul": "model.q",
        "/b/MatMul": "b",
        "norm.weight": None,
    }
    graph = load_graph(model)
    found = Session(read_folder(tmp_path / "q", graph).model, optimize=False).run({"x": _X[:, :32]})["y"]
    planned = simulate(graph, exported.plan, {"x": _X[:, :32]})["y"]
    np.testing.assert_allclose(found, planned, rtol=1e-4, atol=1e-4)


def test_the_names_that_are_written_are_a_name_map(linear, tmp_path):
    export(linear, tmp_path / "q", preset="int4", group=16)
    options = {"name_map": tmp_path / "q" / "names.json"}
    export(linear, tmp_path / "p", preset="int4", group=16, target_options=options)
    for file in ("model.safetensors", "config.json", "names.json"):
        assert (tmp_path / "q" / file).read_bytes() == (tmp_path / "p" / file).read_bytes()


def test_evaluate_takes_a_folder(linear, tmp_path):
    export(linear, tmp_path / "q", preset="int4", group=16)
    found = quantkit.evaluate_model(linear, tmp_path / "q", _X, per_layer=True)
    assert found.quantized == str(tmp_path / "q")
    assert 10 < found.outputs["y"].sqnr_db < 60
    assert len(found.layers) == 2


def test_a_shared_weight_in_two_formats_comes_back_as_both(tmp_path):
    model = dotted("""(float[B,32] x) => (float[B,32] y) <float[32,32] fc__weight> {
        h = MatMul (x, fc__weight)
        r = Relu (h)
        y = MatMul (r, fc__weight) }""")
    model.graph.node[0].name, model.graph.node[2].name = "first", "second"
    exported = export(model, tmp_path / "q", preset="int4", group=16, exclude=["second"])
    graph = load_graph(model)
    found = Session(read_folder(tmp_path / "q", graph).model, optimize=False).run({"x": _X[:, :32]})["y"]
    planned = simulate(graph, exported.plan, {"x": _X[:, :32]})["y"]
    np.testing.assert_allclose(found, planned, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", ["empty", "another model", "another shape", "no config"])
def test_a_folder_of_something_else_is_refused_in_one_line(tmp_path, wrong):
    graph = load_graph(two_layers())
    if wrong == "empty":
        (tmp_path / "q").mkdir()
    elif wrong == "another shape":
        text = "(float[B,{0}] x) => (float[B,{0}] y) <float[{0},{0}] w> {{ y = MatMul (x, w) }}"
        export(model_of(text.format(32)), tmp_path / "q", preset="int4", group=16)
        graph = load_graph(model_of(text.format(64)))
    else:
        export(chain("a", "b"), tmp_path / "q", preset="int4", group=16)
        if wrong == "no config":
            (tmp_path / "q" / "config.json").write_text("{}")
            graph = load_graph(chain("a", "b"))
    with pytest.raises(ModelError) as caught:
        read_folder(tmp_path / "q", graph)
    assert str(caught.value).startswith(str(tmp_path / "q"))
    assert "\n" not in str(caught.value)

"""INT4 weights: blocks in DequantizeLinear for TensorRT, MatMulNBits for ONNX Runtime; no calibration."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import quantkit
from quantkit.errors import CacheError, SpecError, UnknownNameError
from quantkit.formats import dequantize
from quantkit.graph import load_graph
from quantkit.runtime import Session
from tests.models import MODELS, model_of

K, N = 256, 48


@pytest.fixture
def linear():
    return model_of("""(float[B,256] x) => (float[B,24] y) <float[256,48] w, float[24,48] v, float[24] b> {
        h = MatMul (x, w)
        r = Relu (h)
        y = Gemm <transB = 1> (r, v, b) }""")


@pytest.fixture(params=["tensorrt", "ort", "ort-cpu"])
def target(request):
    return request.param


def test_weights_are_quantized_without_a_cache(linear, target, tmp_path):
    exported = quantkit.export_model(linear, preset="int4", group=16, target=target, out=tmp_path / "q.onnx")
    assert set(exported.plan.nodes.values()) == {"MatMul", "Gemm"}
    assert exported.plan.activations == {}
    x = np.random.default_rng(0).normal(size=(5, K)).astype(np.float32)
    graph = load_graph(linear)
    w, v = (dequantize(p.quantize(graph.array(p.name))) for p in exported.plan.weights)
    bias = graph.array("b")
    expected = np.maximum(x @ w, 0) @ v.T + bias
    for optimize in (False, True):
        found = Session(exported.path, optimize=optimize).run({"x": x})["y"]
        # Optimized, MatMulNBits may quantize activations to 8 bits (accuracy level 4): 1/127 of the largest.
        bound = 1e-4 if not optimize or target != "tensorrt" else 2e-2
        assert np.abs(found - expected).max() <= bound * np.abs(expected).max()


def test_tensorrt_reads_blocks_along_the_contracted_axis(linear, tmp_path):
    quantkit.export_model(linear, preset="int4", group=16, out=tmp_path / "q.onnx")
    model = onnx.load(tmp_path / "q.onnx")
    kinds = {i.name: i for i in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    assert model.opset_import[0].version >= 21
    for node, axis, scales in zip(nodes, (0, 1), ((K // 16, N), (24, N // 16)), strict=True):
        assert len(node.input) == 2
        assert kinds[node.input[0]].data_type == onnx.TensorProto.INT4
        assert tuple(kinds[node.input[1]].dims) == scales
        attributes = {a.name: a.i for a in node.attribute}
        assert (attributes["axis"], attributes["block_size"]) == (axis, 16)


def test_onnx_runtime_gets_its_own_operator(linear, tmp_path):
    quantkit.export_model(linear, preset="int4", group=32, target="ort", out=tmp_path / "q.onnx")
    nodes = {n.op_type: n for n in ir.load(tmp_path / "q.onnx").graph}
    assert set(nodes) == {"MatMulNBits", "Relu"}


def test_a_last_block_may_be_short_only_where_the_target_takes_it(linear, tmp_path):
    quantkit.export_model(linear, preset="int4", group=32, target="ort", out=tmp_path / "q.onnx")
    with pytest.raises(SpecError, match=r"v: .* 48 elements.*--group 16, or leave it"):
        quantkit.export_model(linear, preset="int4", group=32, out=tmp_path / "p.onnx")
    assert not (tmp_path / "p.onnx").exists()


def test_codes_take_half_a_byte(tmp_path):
    model = model_of("(float[B,1024] x) => (float[B,512] y) <float[1024,512] w> { y = MatMul (x, w) }")
    for target in ("tensorrt", "ort"):
        exported = quantkit.export_model(model, preset="int4", target=target, out=tmp_path / f"{target}.onnx")
        theory = 1024 * 512 // 2 + 1024 // 128 * 512 * 4
        assert theory <= exported.size_bytes <= theory * 1.02


def test_what_quantizes_activations_asks_for_a_cache(linear, tmp_path):
    with pytest.raises(CacheError, match="int8 needs a calibration cache"):
        quantkit.export_model(linear, preset="int8", out=tmp_path / "q.onnx")


def test_only_presets_in_groups_take_a_group_size(linear, tmp_path):
    cache = quantkit.calibrate_model(linear, np.ones((4, K), np.float32))
    with pytest.raises(SpecError, match="no groups"):
        quantkit.export_model(linear, cache, preset="int8", group=32, out=tmp_path / "q.onnx")


def test_products_of_activations_and_convolutions_are_listed(tmp_path):
    exported = quantkit.export_model(
        MODELS["masked_attention"].build(), preset="int4", group=4, target="ort", out=tmp_path / "q.onnx"
    )
    assert any("weights alone" in left.reason for left in exported.plan.left)


def test_the_method_is_that_of_the_weights(linear, tmp_path):
    def scales(method):
        exported = quantkit.export_model(
            linear, preset="int4", group=16, method=method, out=tmp_path / f"{method}.onnx"
        )
        assert exported.plan.method == (method or "mse")
        return exported.plan.weights[0].qparams.scale

    np.testing.assert_array_equal(scales(None), scales("mse"))
    assert not np.array_equal(scales("mse"), scales("amax"))
    with pytest.raises(UnknownNameError, match="weights alone"):
        scales("entropy")


def test_a_cache_lends_its_sample_and_its_method_is_left_aside(linear, tmp_path):
    cache = quantkit.calibrate_model(linear, np.ones((4, K), np.float32), method="entropy")
    exported = quantkit.export_model(
        linear, cache, preset="int4", group=16, target="ort", out=tmp_path / "q.onnx"
    )
    assert exported.plan.method == "mse"
    assert exported.warnings == ()

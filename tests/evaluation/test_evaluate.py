"""Evaluating files that ONNX Runtime cannot run: they are decoded, and that is said."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantkit.data import open_data
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.evaluation import Evaluation
from quantkit.formats import (
    FP4_E2M1,
    FP8_E4M3,
    QTensor,
    QuantSpec,
    dequantize,
    dynamic_qparams,
    fake_quantize,
    qparams_from_range,
    quantize,
    range_of,
)
from quantkit.graph import load_graph
from tests.models import model_of
from tests.plans import sqnr_db

W = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
FLOAT = """(float[N,40] x) => (float[N,8] y) { y = MatMul (x, w) }"""
WEIGHT = QuantSpec(format=FP4_E2M1, axis=0, block_size=16, scale_format=FP8_E4M3)
ACTIVATION = QuantSpec(format=FP4_E2M1, axis=-1, block_size=16, scale_format=FP8_E4M3, dynamic="block")
GLOBAL = np.float32(4 / (6 * 448))


def stored() -> QTensor:
    return quantize(W, qparams_from_range(range_of(W, WEIGHT), WEIGHT), WEIGHT)


def nvfp4_file(folder: Path, *, activations: bool) -> Path:
    """The MatMul with its weight in NVFP4, and its input too if asked for."""
    held = stored()
    dynamic = [
        helper.make_node(
            "TRT_FP4DynamicQuantize", ["x", "g"], ["codes", "scales"], domain="trt", axis=-1, block_size=16,
            scale_type=TensorProto.FLOAT8E4M3FN,
        ),
        helper.make_node("DequantizeLinear", ["scales", "g"], ["floats"]),
        helper.make_node("DequantizeLinear", ["codes", "floats"], ["xd"], axis=-1, block_size=16),
    ]  # fmt: skip
    nodes = [
        *(dynamic if activations else []),
        helper.make_node("DequantizeLinear", ["s8", "s32"], ["s"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0, block_size=16),
        helper.make_node("MatMul", ["xd" if activations else "x", "w"], ["y"]),
    ]
    arrays: dict[str, Any] = {
        "q": held.qvalue,
        "s8": held.qparams.scale.astype(ml_dtypes.float8_e4m3fn),
        "s32": held.qparams.global_scale,
        "g": GLOBAL,
    }
    graph = helper.make_graph(
        nodes,
        "nvfp4",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 40])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8])],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)]
    )
    model.ir_version = 11
    path = folder / "m.nvfp4.onnx"
    onnx.save(model, path)
    return path


def evaluated(path: Path, feeds: list[dict[str, np.ndarray]], **options: Any) -> Evaluation:
    graph = load_graph(model_of(FLOAT, w=W))
    return evaluate(graph, path, open_data(feeds, graph.inputs), **options)


@pytest.fixture
def feeds() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((1, 40)).astype(np.float32)} for _ in range(16)]


@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize("options", [{}, {"per_layer": True}, {"optimize": True}], ids=str)
def test_an_fp4_file_is_scored_as_numpy_reads_it(
    tmp_path: Path, feeds: list[dict[str, np.ndarray]], activations: bool, options: dict[str, bool]
) -> None:
    x = np.concatenate([f["x"] for f in feeds])
    quantized = x
    if activations:
        quantized = fake_quantize(x, dynamic_qparams(x, ACTIVATION, global_scale=GLOBAL), ACTIVATION)
    expected = sqnr_db(x @ W, quantized @ dequantize(stored()))
    found = evaluated(nvfp4_file(tmp_path, activations=activations), feeds, **options)
    assert found.outputs["y"].sqnr_db == pytest.approx(expected, abs=1e-3)
    for layer in found.layers:
        assert layer.sqnr_db == pytest.approx(expected, abs=1e-3)


def test_what_was_decoded_is_said(tmp_path: Path, feeds: list[dict[str, np.ndarray]]) -> None:
    path = nvfp4_file(tmp_path, activations=True)
    assert evaluated(path, feeds).notes == [
        f"{path}: run as floats with its quantization kept, for ONNX Runtime has no kernels for "
        "FP4 (float4e2m1), 1 × trt::TRT_FP4DynamicQuantize."
    ]


def test_a_file_that_onnxruntime_runs_is_run_as_it_is(
    tmp_path: Path, feeds: list[dict[str, np.ndarray]]
) -> None:
    path = tmp_path / "same.onnx"
    ir.save(load_graph(model_of(FLOAT, w=W)).model, path)
    found = evaluated(path, feeds)
    assert found.notes == []
    assert found.outputs["y"].sqnr_db == float("inf")

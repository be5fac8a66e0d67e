"""What ONNX Runtime's optimizer makes of files for `ort-cpu`: integer kernels from end to end."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from quantkit.export import get_emitter
from quantkit.planning.simulate import simulate
from quantkit.runtime import Session
from tests.models import MODELS, model_of
from tests.plans import Calibrated, calibrate, calibrated, images, sqnr_db


def operators(held: Calibrated, path: Path, target: str = "ort-cpu") -> Counter[str]:
    """The operators that are left of an exported file at ORT_ENABLE_ALL."""
    ir.save(get_emitter(target).emit(held.graph, held.plan(target)), path)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node)


def resnet() -> onnx.ModelProto:
    """A stem, a block with an identity and one with a convolution as its skip, pooling, a linear layer."""
    return model_of("""(float[N,3,12,12] x) => (float[N,10] y)
        <float[16,3,3,3] w0, float[16] b0, float[16,16,3,3] w1, float[16] b1, float[16,16,3,3] w2, float[16] b2,
         float[32,16,1,1] w3, float[32] b3, float[32,16,3,3] w4, float[32] b4, float[32,32,3,3] w5, float[32] b5,
         float[10,32] w6, float[10] b6> {
        c0 = Conv <pads = [1,1,1,1]> (x, w0, b0)
        r0 = Relu (c0)
        c1 = Conv <pads = [1,1,1,1]> (r0, w1, b1)
        r1 = Relu (c1)
        c2 = Conv <pads = [1,1,1,1]> (r1, w2, b2)
        a2 = Add (c2, r0)
        r2 = Relu (a2)
        c3 = Conv <strides = [2,2]> (r2, w3, b3)
        c4 = Conv <strides = [2,2], pads = [1,1,1,1]> (r2, w4, b4)
        r4 = Relu (c4)
        c5 = Conv <pads = [1,1,1,1]> (r4, w5, b5)
        a5 = Add (c3, c5)
        r5 = Relu (a5)
        p = GlobalAveragePool (r5)
        f = Flatten (p)
        y = Gemm <transB = 1> (f, w6, b6) }""")


def mobilenet() -> onnx.ModelProto:
    """An inverted residual with Clip(0, 6) behind each convolution but the last of the block."""
    return model_of("""(float[N,3,12,12] x) => (float[N,10] y)
        <float[16,3,3,3] w0, float[16] b0, float[32,16,1,1] w1, float[32] b1, float[32,1,3,3] w2, float[32] b2,
         float[16,32,1,1] w3, float[16] b3, float[32,16,1,1] w4, float[32] b4, float[10,32] w5, float[10] b5,
         float zero = {0.0}, float six = {6.0}> {
        c0 = Conv <pads = [1,1,1,1]> (x, w0, b0)
        r0 = Clip (c0, zero, six)
        c1 = Conv (r0, w1, b1)
        r1 = Clip (c1, zero, six)
        c2 = Conv <pads = [1,1,1,1], group = 32> (r1, w2, b2)
        r2 = Clip (c2, zero, six)
        c3 = Conv (r2, w3, b3)
        a3 = Add (r0, c3)
        c4 = Conv (a3, w4, b4)
        r4 = Clip (c4, zero, six)
        p = GlobalAveragePool (r4)
        f = Flatten (p)
        y = Gemm <transB = 1> (f, w5, b5) }""")


@pytest.mark.parametrize("amax", [3.0, 40.0])
def test_a_residual_network_runs_on_integers_from_end_to_end(amax: float, tmp_path: Path) -> None:
    found = operators(calibrate(resnet(), images(3, 12, 12, amax=amax)), tmp_path / "model.onnx")
    assert found["QLinearConv"] == 6
    assert found["QLinearAdd"] == 2
    assert found["QGemm"] == 1
    assert not {"Conv", "FusedConv", "Add", "Relu", "Gemm", "DequantizeLinear"} & found.keys()
    assert found["QuantizeLinear"] == 1


@pytest.mark.parametrize("amax", [3.0, 40.0])
def test_clip_to_six_is_absorbed_by_the_convolution_whether_it_clips_or_not(
    amax: float, tmp_path: Path
) -> None:
    # 40: the range is [0, 6] exactly, and 255 scales, rounded, must not come out above 6 by more than the optimizer
    # overlooks, or every Clip and every convolution before one stays in float.
    feeds = images(3, 12, 12, amax=amax)
    for feed in feeds:
        feed["x"] *= amax / 3
    held = calibrate(mobilenet(), feeds)
    assert (held.histograms["r0"].max == 6) == (amax == 40)
    found = operators(held, tmp_path / "model.onnx")
    assert found["QLinearConv"] == 5
    assert found["QLinearAdd"] == 1
    assert not {"Conv", "FusedConv", "Add", "Clip", "Gemm", "DequantizeLinear"} & found.keys()


@pytest.mark.parametrize("network", [resnet, mobilenet])
def test_what_runs_on_integers_is_as_close_to_float_as_the_plan(network: type, tmp_path: Path) -> None:
    held = calibrate(network(), images(3, 12, 12, count=16))
    ir.save(get_emitter("ort-cpu").emit(held.graph, held.plan("ort-cpu")), tmp_path / "model.onnx")
    exact, quantized = Session(held.graph.model, threads=1), Session(tmp_path / "model.onnx", threads=1)
    noise = [sqnr_db(exact.run(f)["y"], quantized.run(f)["y"]) for f in held.feeds]
    assert min(noise) > 20


def test_matmuls_take_integers_and_give_floats(tmp_path: Path) -> None:
    found = operators(calibrated("matmul_activations"), tmp_path / "model.onnx")
    assert found["MatMulIntegerToFloat"] + found["QLinearMatMul"] == 5
    assert not found["MatMul"]


def test_a_transposed_convolution_stays_one_between_quantizers(tmp_path: Path) -> None:
    # ONNX Runtime has no integer kernel for it.
    assert operators(calibrated("conv_transpose"), tmp_path / "model.onnx")["ConvTranspose"] == 1


@pytest.mark.parametrize("name", ["matmul", "gemm", "conv_relu", "matmul_batched_weight"])
def test_no_float_weight_is_left_in_a_file(name: str, tmp_path: Path) -> None:
    held = calibrated(name)
    ir.save(get_emitter("ort-cpu").emit(held.graph, held.plan("ort-cpu")), tmp_path / "model.onnx")
    stored = onnx.load(tmp_path / "model.onnx").graph.initializer
    assert not [t.name for t in stored if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1]
    assert name in MODELS


@pytest.mark.parametrize("target", ["ort", "ort-cpu"])
@pytest.mark.parametrize("between", ["h = Identity (a)", "h = Relu (a)"])
def test_stacks_of_matrices_behind_each_other_run_at_every_level(
    between: str, target: str, tmp_path: Path
) -> None:
    text = f"""(float[N,3,6,8] x) => (float[N,3,6,4] y) <float[3,8,5] v, float[3,5,4] w> {{
        a = MatMul (x, v) {between} y = MatMul (h, w) }}"""
    rng = np.random.default_rng(0)
    held = calibrate(
        model_of(text), [{"x": rng.normal(size=(2, 3, 6, 8)).astype(np.float32)} for _ in range(4)]
    )
    plan, path = held.plan(target), tmp_path / "model.onnx"
    ir.save(get_emitter(target).emit(held.graph, plan), path)
    for optimize in (True, False):
        found = Session(path, threads=1, optimize=optimize).run(held.feeds[0])["y"]
        assert sqnr_db(simulate(held.graph, plan, held.feeds[0])["y"], found) > 60

"""Files in operator form: what ONNX Runtime runs as it is written, code by code what the plan says."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from quantkit import calibrate_model, export_model
from quantkit.errors import ExportError, PlanError
from quantkit.export import get_emitter
from quantkit.export.verify import verify
from quantkit.export.verify_codes import rounding_sqnr_db
from quantkit.export.verify_weights import verify_weights
from quantkit.formats import Range, qparams_from_range
from quantkit.graph import find_sites, load_graph
from quantkit.graph.quantized import find_quantized
from quantkit.planning.plan import ActivationPlan, Plan
from quantkit.planning.presets import get_preset
from quantkit.planning.simulate import simulate
from quantkit.planning.solve import solve
from quantkit.runtime import Session
from tests.models import MODELS, TinyModel, model_of
from tests.plans import NOTHING, Calibrated, calibrate, calibrated, images, sqnr_db

TARGET = "ort-qoperator"


def written(held: Calibrated, plan: Plan, folder: Path) -> Path:
    path = folder / "quantized.onnx"
    ir.save(get_emitter(TARGET).emit(held.graph, plan), path)
    return path


def operators(path: Path) -> Counter[str]:
    return Counter(n.op_type for n in onnx.load(path).graph.node)


def checked(held: Calibrated, folder: Path, plan: Plan | None = None) -> Counter[str]:
    """Write the model, hold it against its plan, and return its operators."""
    plan = plan or held.plan(TARGET)
    path = written(held, plan, folder)
    assert verify(path, held.graph, plan, held.feeds[0]).plan_sqnr_db > 100
    return operators(path)


def network(nodes: str, *, channels: int = 4) -> Calibrated:
    """A convolution c of x and a second one d, the given nodes that end in z, and a convolution behind."""
    model = model_of(f"""(float[N,4,8,8] x) => (float[N,2,M,K] y)
        <float[4,4,3,3] w0, float[4] b0, float[4,4,1,1] w1, float[2,{channels},1,1] w2> {{
        c = Conv <pads = [1,1,1,1]> (x, w0, b0)
        d = Conv (x, w1)
        {nodes}
        y = Conv (z, w2) }}""")
    return calibrate(model, images(4, 8, 8))


def with_ranges(held: Calibrated, **ranges: tuple[float, float]) -> Plan:
    """The plan of fixed ranges, low and high by tensor."""
    return solve(
        held.graph,
        {},
        preset=get_preset("int8"),
        target=get_emitter(TARGET).target,
        calibrator=None,
        ranges={name: Range(np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()},
    )


every_model = pytest.mark.parametrize(
    "tiny", [m for n, m in MODELS.items() if n not in NOTHING], ids=lambda m: m.name
)


@every_model
def test_a_file_runs_at_every_level_and_is_the_plan_code_by_code(tiny: TinyModel, tmp_path: Path) -> None:
    held = calibrated(tiny.name)
    plan = held.plan(TARGET)
    path = written(held, plan, tmp_path)
    half = any(held.graph.values[name].dtype == ir.DataType.FLOAT16 for name in held.histograms)
    found = verify(path, held.graph, plan, held.feeds[0])
    assert found.plan_sqnr_db > (55 if half else 100), found
    verify_weights(path, held.graph, plan)
    expected = simulate(held.graph, plan, held.feeds[1])
    lost = Session(held.graph.model, threads=1).run(held.feeds[1])
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    for level in (
        ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    ):
        options.graph_optimization_level = level
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        outputs = dict(zip(held.graph.outputs, session.run(held.graph.outputs, held.feeds[1]), strict=True))
        for name, values in outputs.items():
            if values.dtype.kind == "f":
                limit = min(sqnr_db(lost[name], expected[name]) + 10, 45)
                assert sqnr_db(expected[name], values) > limit, (level, name)


# --- what is written ----------------------------------------------------------------------------------------


def test_a_convolution_and_its_relu_are_one_node_with_the_plans_numbers(tmp_path: Path) -> None:
    held = calibrated("conv_relu")
    plan = held.plan(TARGET)
    graph = onnx.load(written(held, plan, tmp_path)).graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    quantize, first, *last = graph.node
    assert (quantize.op_type, list(quantize.input)) == ("QuantizeLinear", ["x", "x_scale", "x_zero_point"])
    codes = quantize.output[0]
    assert (first.op_type, first.domain, list(first.output)) == ("QLinearConv", "", ["r_quantized"])
    assert list(first.input) == [
        *(codes, "x_scale", "x_zero_point"),
        *("w0_quantized", "w0_scale", "w0_zero_point"),
        *("r_scale", "r_zero_point", "b0_quantized"),
    ]
    assert {a.name: list(a.ints) for a in first.attribute} == {"pads": [1, 1, 1, 1]}
    # The output is float: sums of codes, with the bias, times both scales.
    assert [n.op_type for n in last] == ["ConvInteger", "Add", "Cast", "Mul", "Mul", "Relu"]
    assert list(last[0].input) == ["r_quantized", "w1_quantized", "r_zero_point"]
    assert list(last[3].input) == ["r_scale", "w1_scale_spread"]
    for name in ("x", "r"):
        activation = plan.activations[name]
        np.testing.assert_array_equal(stored[f"{name}_scale"], activation.static.scale)
        np.testing.assert_array_equal(stored[f"{name}_zero_point"], activation.static.zero_point)
        assert stored[f"{name}_zero_point"].dtype == np.uint8
    for weight in plan.weights:
        codes = weight.quantize(held.graph.array(weight.name)).qvalue
        np.testing.assert_array_equal(stored[f"{weight.name}_quantized"], codes)
        assert codes.dtype == np.int8
    b0, b1 = plan.biases
    np.testing.assert_array_equal(stored["b0_quantized"], b0.qvalue)
    np.testing.assert_array_equal(stored["b1_quantized_spread"], b1.qvalue.reshape(8, 1, 1))
    np.testing.assert_array_equal(stored["w0_scale"], plan.weights[0].qparams.scale)
    np.testing.assert_array_equal(stored["w0_zero_point"], np.zeros(16, np.int8))
    np.testing.assert_array_equal(stored["w1_scale_spread"], plan.weights[1].qparams.scale.reshape(8, 1, 1))


def test_a_matmul_is_one_node_with_the_plans_numbers(tmp_path: Path) -> None:
    held = calibrated("matmul")
    graph = onnx.load(written(held, held.plan(TARGET), tmp_path)).graph
    product = next(n for n in graph.node if n.domain == "com.microsoft")
    assert product.op_type == "MatMulIntegerToFloat"
    weight = held.plan(TARGET).weights[0].name
    assert list(product.input)[1:] == [f"{weight}_quantized", "x_scale", f"{weight}_scale", "x_zero_point"]
    assert {o.domain: o.version for o in onnx.load(tmp_path / "quantized.onnx").opset_import}[
        "com.microsoft"
    ] == 1


def test_a_weight_that_stands_left_is_multiplied_by_matmulinteger(tmp_path: Path) -> None:
    assert checked(calibrated("matmul_weight_left"), tmp_path)["MatMulInteger"] == 1


def test_a_gemm_takes_its_bias_as_int32_and_a_float_one_behind(tmp_path: Path) -> None:
    held = calibrated("gemm_trans_b")
    graph = onnx.load(written(held, held.plan(TARGET), tmp_path)).graph
    (node,) = [n for n in graph.node if n.op_type == "QGemm"]
    assert {a.name: helper.get_attribute_value(a) for a in node.attribute}["transB"] == 1
    assert node.input[6].endswith("_quantized")
    assert checked(calibrated("gemm_dynamic_bias"), tmp_path) == {"QuantizeLinear": 1, "QGemm": 1, "Add": 1}


def test_a_residual_network_has_one_quantizer_and_no_float_operator_before_its_output(tmp_path: Path) -> None:
    model = model_of("""(float[N,3,12,12] x) => (float[N,10] y)
        <float[16,3,3,3] w0, float[16] b0, float[16,16,3,3] w1, float[16] b1, float[16,16,3,3] w2, float[16] b2,
         float[10,16] w6, float[10] b6> {
        c0 = Conv <pads = [1,1,1,1]> (x, w0, b0)
        r0 = Relu (c0)
        c1 = Conv <pads = [1,1,1,1]> (r0, w1, b1)
        r1 = Relu (c1)
        c2 = Conv <pads = [1,1,1,1]> (r1, w2, b2)
        a2 = Add (c2, r0)
        r2 = Relu (a2)
        m = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r2)
        p = GlobalAveragePool (m)
        f = Flatten (p)
        y = Gemm <transB = 1> (f, w6, b6) }""")
    assert checked(calibrate(model, images(3, 12, 12)), tmp_path) == {
        "QuantizeLinear": 1,
        "QLinearConv": 3,
        "QLinearAdd": 1,
        "MaxPool": 1,
        "QLinearGlobalAveragePool": 1,
        "Reshape": 1,
        "QGemm": 1,
    }


@pytest.mark.parametrize(
    ("nodes", "op_type", "channels"),
    [
        ("z = LeakyRelu <alpha = 0.1> (c)", "QLinearLeakyRelu", 4),
        ("z = Sigmoid (c)", "QLinearSigmoid", 4),
        ("z = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1]> (c)", "QLinearAveragePool", 4),
        ("z = GlobalAveragePool (c)", "QLinearGlobalAveragePool", 4),
        ("z = Mul (c, d)", "QLinearMul", 4),
        ("z = Add (c, d)", "QLinearAdd", 4),
        ("z = Concat <axis = 1> (c, d)", "Concat", 8),
        ("z = MaxPool <kernel_shape = [2,2]> (c)", "MaxPool", 4),
        ("z = Transpose <perm = [0,1,3,2]> (c)", "Transpose", 4),
    ],
)
def test_what_stands_between_convolutions_works_on_codes(
    nodes: str, op_type: str, channels: int, tmp_path: Path
) -> None:
    found = checked(network(nodes, channels=channels), tmp_path)
    assert found[op_type] == 1
    assert found["QuantizeLinear"] == 1
    assert not found["DequantizeLinear"]


@pytest.mark.parametrize("nodes", ["z = Softmax (c)", "t = Tanh (c) z = Mul (t, c)"])
def test_what_has_no_integer_kernel_stays_in_float_between_quantizers(nodes: str, tmp_path: Path) -> None:
    found = checked(network(nodes), tmp_path)
    assert found["QLinearConv"] >= 1
    assert found["DequantizeLinear"] >= 1
    assert found["QuantizeLinear"] == 2


def test_inputs_of_a_concat_under_scales_of_their_own_keep_them(tmp_path: Path) -> None:
    held = network("z = Concat <axis = 1> (c, d)", channels=8)
    plan = with_ranges(held, x=(-3, 4), c=(-2, 3), d=(-1, 2), z=(-4, 5))
    assert checked(held, tmp_path, plan)["QLinearConcat"] == 1


def test_a_tensor_that_something_reads_in_float_is_computed_in_float_and_quantized_beside(
    tmp_path: Path,
) -> None:
    model = model_of("""(float[N,8,8] x) => (float[N,8,8] y, float[N,8,8] t) <float[8,8] w0, float[8,8] w1> {
        h = MatMul (x, w0) t = Tanh (h) y = MatMul (h, w1) }""")
    found = checked(calibrate(model, images(8, 8)), tmp_path)
    assert found == {"QuantizeLinear": 2, "MatMulIntegerToFloat": 2, "Tanh": 1}


@pytest.mark.parametrize(
    ("stored", "why"),
    [
        ({"ws": np.full(4, 0.01, np.float32), "wz": np.zeros(4, np.int8), "axis": 1}, "scales of inputs"),
        ({"ws": np.full(4, 0.01, np.float32), "wz": np.arange(4, dtype=np.int8), "axis": 0}, "zero points"),
        ({"ws": np.float32(0.01), "wz": np.int8(0), "axis": 0}, "a bias of another scale"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_model_has_quantized_as_no_kernel_takes_it_stays_as_it_is(
    stored: dict[str, Any], why: str, tmp_path: Path
) -> None:
    model = model_of(
        f"""(float[N,4,8,8] x) => (float[N,4,8,8] y) <float[4,4,1,1] w1> {{
        w = DequantizeLinear <axis = {stored["axis"]}> (codes, ws, wz)
        b = DequantizeLinear (bias, bs)
        a = Conv <pads = [1,1,1,1]> (x, w{", b" if "bias" in why else ""})
        y = Conv (a, w1) }}""",
        codes=np.random.default_rng(0).integers(-127, 128, (4, 4, 3, 3)).astype(np.int8),
        bias=np.array([100, -2000, 30, 4], np.int32),
        bs=np.float32(0.0002),
        **{name: array for name, array in stored.items() if name != "axis"},
    )
    found = checked(calibrate(model, images(4, 8, 8)), tmp_path)
    assert found["Conv"] == 1
    assert found["ConvInteger"] == 1


def test_a_written_file_is_known_to_be_quantized(tmp_path: Path) -> None:
    held = calibrated("dynamic_axes")
    graph = load_graph(written(held, held.plan(TARGET), tmp_path))
    assert find_sites(graph)[0] == []
    left = Counter(node.op_type for node in find_quantized(graph)[1])
    assert left == {"QuantizeLinear": 1, "QLinearConv": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1}


# --- Relu and Clip ------------------------------------------------------------------------------------------


def clipped(nodes: str) -> Calibrated:
    model = model_of(f"""(float[N,4,8,8] x) => (float[N,2,8,8] y)
        <float[4,4,3,3] w0, float[4] b0, float[2,4,1,1] w1, float zero = {{0.0}}, float two = {{2.0}}> {{
        c = Conv <pads = [1,1,1,1]> (x, w0, b0)
        {nodes}
        y = Conv (z, w1) }}""")
    return calibrate(model, images(4, 8, 8))


@pytest.mark.parametrize(
    ("nodes", "low", "high", "kept"),
    [
        ("z = Relu (c)", 0, 1, 0),
        # Codes below the zero point stand for negative numbers, which the Relu has to take away.
        ("z = Relu (c)", -1, 2, 1),
        ("z = Clip (c, zero, two)", 0, 2, 0),
        ("z = Clip (c, zero, two)", 0, 1.5, 0),
        ("z = Clip (c, zero, two)", 0, 4, 1),
        ("z = Clip (c, , two)", -1, 2, 0),
        ("r = Relu (c) z = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (r)", -1, 2, 1),
    ],
)
def test_relu_and_clip_are_dropped_only_where_the_range_of_codes_does_the_same(
    nodes: str, low: float, high: float, kept: int, tmp_path: Path
) -> None:
    held = clipped(nodes)
    plan = with_ranges(held, x=(-3, 3), r=(low, high), z=(low, high))
    found = checked(held, tmp_path, plan)
    assert found["QLinearConv"] == 1
    assert found["Clip"] == kept
    assert not found["Relu"]
    assert not found["DequantizeLinear"]


# --- the check of a written file ----------------------------------------------------------------------------


def change_stored(name: str, change: Callable[[np.ndarray], np.ndarray], model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(change(values).astype(values.dtype), name))


def one_code_off(codes: np.ndarray) -> np.ndarray:
    """The largest code of the first channel, four smaller."""
    changed = codes.copy()
    row = changed[0].reshape(-1)
    row[np.argmax(row.astype(int))] -= 4
    return changed


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("r_scale", lambda scale: scale * 1.01),
        ("x_scale", lambda scale: scale * 1.01),
        ("w0_scale", lambda scale: scale * 1.01),
        ("r_zero_point", lambda zero: zero + 1),
        ("b0_quantized", lambda bias: bias * 0),
        ("w0_quantized", one_code_off),
    ],
)
def test_a_wrong_number_is_found_at_the_tensor_that_holds_codes_alone(
    name: str, change: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    held = calibrated("conv_relu")
    plan = held.plan(TARGET)
    path = written(held, plan, tmp_path)
    model = onnx.load(path)
    change_stored(name, change, model)
    onnx.save(model, path)
    with pytest.raises(ExportError, match=r"its tensor [ry] differs from the plan's"):
        verify(path, held.graph, plan, held.feeds[0])


def test_a_dropped_limit_of_codes_is_found(tmp_path: Path) -> None:
    held = clipped("z = Relu (c)")
    plan = with_ranges(held, x=(-3, 3), z=(-1, 2))
    path = written(held, plan, tmp_path)
    model = onnx.load(path)
    clip = next(n for n in model.graph.node if n.op_type == "Clip")
    clip.op_type = "Identity"
    del clip.input[1:]
    onnx.save(model, path)
    with pytest.raises(ExportError, match="its tensor z differs from the plan's"):
        verify(path, held.graph, plan, held.feeds[0])


def test_a_file_without_the_codes_of_a_tensor_is_refused(tmp_path: Path) -> None:
    held = calibrated("conv_relu")
    plan = held.plan(TARGET)
    path = written(held, plan, tmp_path)
    model = onnx.load(path)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["elsewhere" if n == "r_quantized" else n for n in names]
    del model.graph.value_info[:]
    onnx.save(model, path)
    with pytest.raises(ExportError, match="has neither tensor r nor its codes"):
        verify(path, held.graph, plan, held.feeds[0])


def test_a_weight_that_is_read_back_wrong_is_found(tmp_path: Path) -> None:
    held = calibrated("conv_relu")
    plan = held.plan(TARGET)
    path = written(held, plan, tmp_path)
    for name in ("w0_quantized", "w1_quantized", "w1_scale_spread"):
        model = onnx.load(path)
        change_stored(name, lambda values: values * np.asarray(0.5), model)
        onnx.save(model, tmp_path / "wrong.onnx")
        with pytest.raises(ExportError, match=f"weight {name[:2]} differs"):
            verify_weights(tmp_path / "wrong.onnx", held.graph, plan)


def activation(zero_point: int, scale: float) -> ActivationPlan:
    spec = get_emitter(TARGET).target.int8_activations
    qparams = replace(
        qparams_from_range(Range(np.float32(0), np.float32(1)), spec),
        scale=np.float32(scale),
        zero_point=np.uint8(zero_point),
    )
    return ActivationPlan(name="t", spec=spec, range=None, qparams=qparams, readers=())


def test_every_value_that_rounds_to_its_code_is_no_noise() -> None:
    plan = activation(10, 0.5)
    codes = np.array([0, 10, 12, 255], np.uint8)
    inside = np.array([-1e6, 0.25, 0.75, 1e6], np.float32)
    assert rounding_sqnr_db(inside, codes, plan) == float("inf")


def test_what_rounds_to_another_code_is_noise_by_its_distance() -> None:
    plan = activation(10, 0.5)
    # The code 12 stands for 1 and holds 0.75 to 1.25: 1.5 lies 0.25 beyond.
    found = rounding_sqnr_db(np.array([1.5], np.float32), np.array([12], np.uint8), plan)
    assert found == pytest.approx(10 * np.log10(1.5**2 / 0.25**2))
    assert rounding_sqnr_db(np.zeros(1, np.float32), np.zeros(1, np.int8), plan) == -float("inf")
    assert rounding_sqnr_db(np.zeros(2, np.float32), np.zeros(1, np.uint8), plan) == -float("inf")


def test_values_on_a_boundary_may_round_as_float16_does(tmp_path: Path) -> None:
    model = model_of("""(float[N,100] x) => (float[N,30] y) <float[100,50] w, float[50,30] v> {
        a = MatMul (x, w) r = Relu (a) y = MatMul (r, v) }""")
    x = np.random.default_rng(1).normal(size=(64, 100)).astype(np.float32)
    exported = export_model(
        model,
        calibrate_model(model, x, batch_size=64),
        preset="int8",
        target=TARGET,
        high_precision="fp16",
        out=tmp_path / "q.onnx",
    )
    assert exported.verification is not None


# --- what it cannot hold ------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["fp8", "int4", "w4a8", "nvfp4", "mxfp8", "int16"])
def test_presets_without_integer_kernels_are_refused_in_one_line(preset: str) -> None:
    held = calibrated("gemm_trans_b")
    with pytest.raises(PlanError, match=r"ort-qoperator has no .*choose another preset") as caught:
        held.plan(TARGET, preset)
    assert "\n" not in str(caught.value)


def test_names_that_the_model_has_taken_are_left_to_it(tmp_path: Path) -> None:
    model = model_of("""(float[N,4,8,8] x) => (float[N,2,8,8] y)
        <float[4,4,3,3] w0, float[4,4,1,1] w1, float[2,4,1,1] w2> {
        r = Conv <pads = [1,1,1,1]> (x, w0)
        r_quantized = Conv (r, w1)
        y = Conv (r_quantized, w2) }""")
    held = calibrate(model, images(4, 8, 8))
    plan = held.plan(TARGET)
    path = written(held, plan, tmp_path)
    assert verify(path, held.graph, plan, held.feeds[0]).plan_sqnr_db > 100
    names = {o for n in onnx.load(path).graph.node for o in n.output}
    assert {"r_quantized_", "r_quantized_quantized"} <= names


def test_emitting_twice_gives_the_same_bytes() -> None:
    held = calibrated("residual_identity")
    emit = partial(get_emitter(TARGET).emit, held.graph, held.plan(TARGET))
    first, second = (ir.serde.serialize_model(emit()).SerializeToString() for _ in range(2))
    assert first == second

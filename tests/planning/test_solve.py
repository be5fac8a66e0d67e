from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from quantkit.calibrators import get_calibrator
from quantkit.errors import PlanError
from quantkit.export import get_emitter
from quantkit.formats import Range, dequantize, qparams_from_range
from quantkit.graph import load_graph, sharing_groups
from quantkit.planning.plan import BiasPlan, Plan
from quantkit.planning.presets import get_preset
from quantkit.planning.simulate import simulate
from quantkit.planning.solve import solve
from quantkit.statistics import FloatHistogram
from tests.models import MODELS, TinyModel, model_of, normal
from tests.plans import NOTHING, TARGETS, calibrate, calibrated, images

every_model = pytest.mark.parametrize(
    "tiny", [m for n, m in MODELS.items() if n not in NOTHING], ids=lambda m: m.name
)


def reasons(plan: Plan) -> dict[str, str]:
    return {left.node: left.reason for left in plan.left}


def with_weight(model: onnx.ModelProto, name: str, value: float, index: int = 0) -> onnx.ModelProto:
    """Set one value of an initializer."""
    tensor = next(t for t in model.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[index] = value
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    return model


# --- activations --------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("method", ["minmax", "entropy"])
def test_a_plans_ranges_are_what_its_calibrator_makes_of_the_statistics(tiny: TinyModel, method: str) -> None:
    held = calibrated(tiny.name)
    plan = held.plan("ort-cpu", method=method)
    calibrator = get_calibrator(method)
    groups = [{n for n in group if n in plan.activations} for group in sharing_groups(held.graph)]
    for name, activation in plan.activations.items():
        members = next((g for g in groups if name in g), {name})
        merged = FloatHistogram()
        for member in members:
            merged = merged.merge(held.histograms[member])
        found = calibrator.solve(merged, activation.spec)
        assert (activation.range.lo, activation.range.hi) == (found.lo, found.hi)


def test_int8_scales_are_amax_over_127_and_the_zero_point_is_0() -> None:
    held = calibrate(MODELS["conv_no_bias"].build(), images(3, 8, 8, amax=2.54))
    qparams = held.plan().activations["x"].qparams
    assert qparams.scale == np.float32(2.54) / np.float32(127)
    assert qparams.zero_point == 0


def test_uint8_covers_the_range_of_a_relu_from_zero() -> None:
    plan = calibrated("conv_relu").plan("ort-cpu")
    qparams = plan.activations["r"].qparams
    assert qparams.zero_point == 0
    np.testing.assert_allclose(qparams.scale * 255, calibrated("conv_relu").histograms["r"].max, rtol=1e-6)


def test_fp8_scales_are_amax_over_448() -> None:
    held = calibrate(MODELS["conv_no_bias"].build(), images(3, 8, 8, amax=4.48))
    activation = held.plan(preset="fp8").activations["x"]
    np.testing.assert_allclose(activation.qparams.scale, 0.01, rtol=1e-6)
    assert activation.qparams.zero_point is None


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("name", "group"), [("concat_branches", {"a", "b", "c", "p", "x"}), ("pass_through", {"r", "p", "t"})]
)
def test_tensors_tied_by_concat_or_max_pool_get_one_scale(target: str, name: str, group: set[str]) -> None:
    held = calibrated(name)
    plan = held.plan(target)
    tied = [plan.activations[n].qparams for n in sorted(group) if n in plan.activations]
    assert tied
    assert len({(float(q.scale), int(q.zero_point)) for q in tied if q.zero_point is not None}) == 1
    members = [held.histograms[n] for n in group if n in plan.activations]
    widest = max(max(abs(h.min), abs(h.max)) for h in members)
    assert all(a.range.amax == widest for n, a in plan.activations.items() if n in group)


def test_statistics_that_are_not_finite_leave_their_node_in_float() -> None:
    for name, tensor in (("infinite_activation", "l"), ("nan_activation", "s")):
        for target in TARGETS:
            plan = calibrated(name).plan(target)
            assert f"tensor {tensor} had" in reasons(plan)["MatMul"]
            assert list(plan.nodes) == ["MatMul_1"]
            assert tensor not in plan.activations


def test_a_tensor_that_was_never_computed_leaves_its_node_in_float() -> None:
    held = calibrated("conv_relu")
    for histograms, why in (
        ({"x": held.histograms["x"]}, "was never computed"),
        (held.histograms | {"r": FloatHistogram()}, "is empty"),
    ):
        plan = replace(held, histograms=histograms).plan()
        assert f"tensor r {why}" in reasons(plan)["Conv_1"]
        assert list(plan.nodes) == ["Conv"]


def test_an_empty_tensor_and_an_empty_weight_stay_in_float_as_such() -> None:
    held = calibrate(
        model_of(
            """(float[N,4] x, float[N,0] none) => (float[N,3] y, float[N,3] z) {
            y = MatMul (x, w) z = MatMul (none, v) }""",
            w=normal(4, 3),
            v=np.zeros((0, 3), np.float32),
        ),
        [{"x": np.ones((1, 4), np.float32), "none": np.zeros((1, 0), np.float32)}],
    )
    assert reasons(held.plan()) == {"MatMul_1": "tensor none is empty"}
    graph = load_graph(model_of("(float[N,4] x) => (float[N,0] y) { y = MatMul (x, v) }", v=normal(4, 0)))
    with pytest.raises(PlanError, match=r"1 × weight v is empty\); mend the model"):
        calibrate(graph, [{"x": np.ones((1, 4), np.float32)}]).plan()


# --- weights ------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("preset", ["int8", "fp8"])
def test_every_weight_is_within_half_a_step_of_its_codes(tiny: TinyModel, preset: str) -> None:
    held = calibrated(tiny.name)
    for weight in held.plan(preset=preset).weights:
        exact = held.graph.array(weight.name).astype(np.float64)
        found = dequantize(weight.quantize(held.graph.array(weight.name))).astype(np.float64)
        axis = weight.spec.axis
        assert axis is not None
        scale = np.expand_dims(
            weight.qparams.scale.astype(np.float64),
            tuple(a for a in range(exact.ndim) if a != axis % exact.ndim),
        )
        # E4M3 has 3 bits behind the leading one, and steps of 2⁻⁹ below its smallest normal number.
        step = 1.0 if preset == "int8" else np.maximum(np.abs(exact) / scale / 8, 2.0**-9)
        assert np.all(np.abs(found - exact) <= scale * step * (0.5 + 1e-5))


def test_an_all_zero_channel_keeps_a_scale_that_can_be_divided_by() -> None:
    held = calibrated("zero_weight_channel")
    for weight in held.plan().weights:
        assert weight.qparams.scale[2] == 1
        assert not weight.quantize(held.graph.array(weight.name)).qvalue[2].any()


@pytest.mark.parametrize("name", ["w0", "b0"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_or_bias_that_is_not_finite_leaves_its_node_in_float(name: str, value: float) -> None:
    held = calibrate(
        with_weight(MODELS["intermediate_output"].build(), name, value),
        MODELS["intermediate_output"].feeds(2),
    )
    healthy = calibrated("intermediate_output")
    for target in TARGETS:
        plan = replace(held, histograms=healthy.histograms).plan(target)
        assert reasons(plan)["Conv"] == f"{'weight' if name == 'w0' else 'bias'} {name} holds NaN or infinity"
        assert list(plan.nodes) == ["Conv_1"]


def test_a_weight_read_twice_is_stored_once() -> None:
    plan = calibrated("shared_weight").plan()
    (weight,) = plan.weights
    assert weight.readers == (("Conv", 1), ("Conv_1", 1))


def test_a_weight_read_along_two_axes_is_stored_along_both() -> None:
    weights = calibrated("shared_weight_axes").plan().weights
    assert [(w.name, w.spec.axis) for w in weights] == [("w", 1), ("w", 0)]


# --- biases -------------------------------------------------------------------------------------------------


def scales_of(plan: Plan, bias: BiasPlan, data: str) -> np.ndarray:
    """s_x · s_w of the node that adds a bias."""
    weight = next(w for w in plan.weights if bias.reader[0] in {n for n, _ in w.readers})
    return plan.activations[data].qparams.scale * weight.qparams.scale


@pytest.mark.parametrize("target", ["ort", "ort-cpu"])
@pytest.mark.parametrize(
    "name", ["conv_relu", "gemm_trans_b", "gemm_trans_a", "shared_weight", "shared_bias"]
)
def test_biases_are_int32_with_the_scale_of_the_product(target: str, name: str) -> None:
    held = calibrated(name)
    plan = held.plan(target)
    assert plan.biases
    for bias in plan.biases:
        data = held.graph.node(bias.reader[0]).inputs[0]
        assert data is not None
        assert bias.qvalue.dtype == np.int32
        np.testing.assert_array_equal(bias.scale, scales_of(plan, bias, str(data.name)))
        exact = held.graph.array(bias.name)
        assert np.all(np.abs(bias.qvalue * bias.scale.astype(np.float64) - exact) <= bias.scale * 0.500001)


def test_tensorrt_and_float8_keep_biases_in_float() -> None:
    assert not calibrated("conv_relu").plan("tensorrt").biases
    for target in TARGETS:
        assert not calibrated("conv_relu").plan(target, "fp8").biases


@pytest.mark.parametrize("name", ["gemm_alpha_beta", "gemm_dynamic_bias", "conv_transpose", "matmul", "fp16"])
def test_biases_that_no_integer_kernel_adds_stay_in_float(name: str) -> None:
    assert not calibrated(name).plan("ort-cpu").biases


def test_a_channel_too_small_for_its_bias_gets_a_larger_scale() -> None:
    weight = normal(4, 3, 3, 3)
    weight[1] *= 1e-7
    model = model_of(
        "(float[N,3,8,8] x) => (float[N,4,6,6] y) { y = Conv (x, w, b) }",
        w=weight,
        b=np.full(4, 50, np.float32),
    )
    held = calibrate(model, images(3, 8, 8))
    small, plain = (held.plan(t).weights[0].qparams.scale for t in ("ort", "tensorrt"))
    assert small[1] > plain[1]
    np.testing.assert_array_equal(np.delete(small, 1), np.delete(plain, 1))
    (bias,) = held.plan("ort").biases
    assert np.abs(bias.qvalue.astype(np.int64)).max() < 2**31 - 1
    np.testing.assert_allclose(bias.qvalue * bias.scale.astype(np.float64), 50, rtol=1e-5)


def test_a_subnormal_channel_with_a_bias_can_be_solved_for_every_target() -> None:
    held = calibrated("tiny_weight_channel")
    for target in TARGETS:
        plan = held.plan(target)
        assert np.all(np.isfinite(simulate(held.graph, plan, held.feeds[0])["y"]))
        for bias in plan.biases:
            np.testing.assert_allclose(
                bias.qvalue * bias.scale.astype(np.float64), held.graph.array("b"), atol=bias.scale.max()
            )


# --- float16 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["int8", "fp8"])
@pytest.mark.parametrize("target", TARGETS)
def test_scales_of_a_float16_model_are_float16_values(target: str, preset: str) -> None:
    plan = calibrated("fp16").plan(target, preset)
    scales = [a.qparams.scale for a in plan.activations.values()]
    scales += [w.qparams.scale for w in plan.weights]
    for scale in scales:
        np.testing.assert_array_equal(scale, scale.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("preset", ["int8", "fp8"])
def test_a_float16_channel_too_small_for_a_scale_is_still_quantized(preset: str) -> None:
    model = MODELS["fp16"].build()
    tensor = next(t for t in model.graph.initializer if t.name == "w0")
    array = numpy_helper.to_array(tensor).copy()
    array[1] = 6e-8
    array[2] = 0
    tensor.CopyFrom(numpy_helper.from_array(array, "w0"))
    held = calibrate(model, MODELS["fp16"].feeds(4))
    plan = held.plan("ort", preset)
    (weight,) = (w for w in plan.weights if w.name == "w0")
    assert weight.qparams.scale[1] == np.float32(2**-24)
    found = dequantize(weight.quantize(held.graph.array("w0")))
    np.testing.assert_allclose(found[1], 6e-8, rtol=0.01)
    assert not found[2].any()


def test_an_activation_too_small_for_float16_scales_leaves_its_node_in_float() -> None:
    model = model_of(
        """(float16[N,8] x) => (float16[N,8] y) <float16[8,8] w0, float16[8,8] w1> {
        h = MatMul (x, w0) t = Mul (h, tiny) y = MatMul (t, w1) }""",
        tiny=np.array(1e-7, np.float16),
    )
    rng = np.random.default_rng(0)
    held = calibrate(model, [{"x": rng.standard_normal((1, 8)).astype(np.float16)} for _ in range(4)])
    plan = held.plan()
    assert list(plan.nodes) == ["MatMul"]
    assert "does not fit float16" in reasons(plan)["MatMul_1"]
    assert "\n" not in reasons(plan)["MatMul_1"]


@pytest.mark.parametrize("preset", ["int8", "fp8"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("amax", [1e-40, 1e-37])
def test_an_activation_below_every_normal_scale_leaves_its_node_in_float(
    amax: float, target: str, preset: str
) -> None:
    model = model_of(
        """(float[N,8] x, float[N,8] t) => (float[N,4] y, float[N,4] z) {
        y = MatMul (x, w) z = MatMul (t, v) }""",
        w=normal(8, 4),
        v=normal(8, 4),
    )
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.uniform(-1, 1, (1, 8)).astype(np.float32)} for _ in range(4)]
    held = calibrate(model, [f | {"t": f["x"] * np.float32(amax)} for f in feeds])
    plan = held.plan(target, preset)
    assert list(plan.nodes) == ["MatMul"]
    assert "too small for a float32 scale" in reasons(plan)["MatMul_1"]


def test_an_activation_that_is_zero_throughout_is_still_quantized() -> None:
    held = calibrate(
        MODELS["matmul"].build(), [{"x": np.zeros_like(f["x"])} for f in MODELS["matmul"].feeds(2)]
    )
    assert held.plan().activations["x"].qparams.scale == 1


# --- the whole ----------------------------------------------------------------------------------------------


@every_model
def test_solving_twice_gives_the_same_plan(tiny: TinyModel) -> None:
    held = calibrated(tiny.name)
    for target in TARGETS:
        assert repr(held.plan(target)) == repr(held.plan(target))


@pytest.mark.parametrize(
    ("name", "preset", "found"),
    [
        ("nothing_to_quantize", "int8", "it has no Conv, MatMul or Gemm; give"),
        (
            "float64",
            "int8",
            "int8 leaves every Conv, MatMul and Gemm in float (1 × its inputs are double); give a model of float32",
        ),
        ("conv_relu", "fp8", "2 × depthwise or ≤ 16 channels"),
        ("gemm", "fp8", "(--all quantizes it)); export with --all"),
        ("quantized_throughout", "int8", "already quantized in the model); give the float model"),
        (
            "conv_relu",
            "int4",
            "which no target has for it; --group channel quantizes it); choose another preset",
        ),
    ],
)
def test_a_plan_that_would_quantize_nothing_is_refused(name: str, preset: str, found: str) -> None:
    graph = load_graph(MODELS[name].build())
    histograms = {} if name in NOTHING else calibrated(name).histograms
    with pytest.raises(PlanError) as caught:
        solve(
            graph,
            histograms,
            preset=get_preset(preset),
            target=get_emitter("ort").target,
            calibrator=get_calibrator("minmax"),
        )
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plan_says_what_it_is_for() -> None:
    held = calibrated("conv_relu")
    plan = held.plan("ort-cpu", method="entropy")
    assert (plan.model, plan.preset, plan.target, plan.method) == ("tiny", "int8", "ort-cpu", "entropy")
    assert plan.fingerprint == held.graph.fingerprint
    assert plan.nodes == {"Conv": "Conv", "Conv_1": "Conv"}


def test_the_scale_of_a_plan_is_that_of_its_range() -> None:
    for target in TARGETS:
        for activation in calibrated("conv_depthwise").plan(target).activations.values():
            again = qparams_from_range(Range(activation.range.lo, activation.range.hi), activation.spec)
            assert again.scale == activation.qparams.scale

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quantkit.calibrators import get_calibrator
from quantkit.export import get_emitter
from quantkit.formats import INT8, UINT8, QParams, QuantSpec, Range
from quantkit.graph import load_graph
from quantkit.planning.plan import ActivationPlan, BiasPlan, Plan, WeightPlan
from quantkit.planning.presets import get_preset
from quantkit.planning.simulate import simulate, simulate_steps
from quantkit.planning.solve import solve
from quantkit.runtime import Session
from quantkit.statistics import FloatHistogram
from tests.models import MODELS, TinyModel, model_of
from tests.plans import NOTHING, calibrated

every_model = pytest.mark.parametrize(
    "tiny", [m for n, m in MODELS.items() if n not in NOTHING], ids=lambda m: m.name
)

# x → Gemm(w0, b0) → Relu → Gemm(w1) → y, small enough to reckon by hand.
W0 = np.array([[0.5, -1.0], [0.25, 2.0]], np.float32)
B0 = np.array([0.1, -0.3], np.float32)
W1 = np.array([[1.0], [-0.7]], np.float32)
X = np.array([[1.0, 0.5], [-2.0, 0.3], [0.26, -1.27]], np.float32)


def network() -> onnx.ModelProto:
    # Two columns, so that it is no vector product.
    return model_of(
        """(float[N,2] x) => (float[N,2] y) {
        h = Gemm (x, w0, b0) r = Relu (h) y = Gemm (r, w1) }""",
        w0=W0,
        b0=B0,
        w1=np.hstack([W1, W1 / 2]),
    )


def activation(name: str, scale: float, zero_point: int, spec: QuantSpec) -> ActivationPlan:
    qparams = QParams(np.array(scale, np.float32), np.array(zero_point, spec.format.dtype))
    return ActivationPlan(name=name, spec=spec, range=Range(-1, 1), qparams=qparams, readers=())


def weight(name: str, w: np.ndarray, scales: list[float], reader: str) -> WeightPlan:
    spec = QuantSpec(format=INT8, axis=1)
    qparams = QParams(np.array(scales, np.float32), np.zeros(len(scales), np.int8))
    return WeightPlan(name=name, spec=spec, qparams=qparams, readers=((reader, 1),))


def test_a_symmetric_plan_is_what_integer_arithmetic_gives() -> None:
    graph = load_graph(network())
    w1 = graph.array("w1")
    plan = Plan(
        model="tiny",
        fingerprint=graph.fingerprint,
        preset="int8",
        target="ort",
        method="minmax",
        activations={
            "x": activation("x", 0.01, 0, QuantSpec(format=INT8)),
            "r": activation("r", 0.02, 0, QuantSpec(format=INT8)),
        },
        weights=[weight("w0", W0, [0.004, 0.016], "Gemm"), weight("w1", w1, [0.008, 0.004], "Gemm_1")],
        biases=[
            BiasPlan(
                name="b0",
                qvalue=np.array([2500, -1875], np.int32),
                scale=np.array([0.00004, 0.00016], np.float32),
                reader=("Gemm", 2),
            )
        ],
        nodes={"Gemm": "Gemm", "Gemm_1": "Gemm"},
        left=[],
    )
    # −2.0 / 0.01 is clipped to −128; 1.0 / 0.004 and 2.0 / 0.016 are whole codes.
    x_codes = np.array([[100, 50], [-128, 30], [26, -127]])
    w0_codes = np.array([[125, -62], [62, 125]])  # 0.25/0.004 = 62.5 and −1/0.016 = −62.5 go to the even code
    sums = x_codes @ w0_codes + np.array([2500, -1875])
    h = sums * np.array([0.00004, 0.00016])
    r_codes = np.minimum(np.rint(np.maximum(h, 0) / 0.02), 127)
    w1_codes = np.rint(w1 / np.array([0.008, 0.004], np.float32))
    y = (r_codes @ w1_codes) * 0.02 * np.array([0.008, 0.004])
    np.testing.assert_allclose(simulate(graph, plan, {"x": X})["y"], y, rtol=1e-6, atol=1e-7)


def test_an_asymmetric_plan_is_what_integer_arithmetic_gives() -> None:
    graph = load_graph(network())
    spec = QuantSpec(format=UINT8, symmetric=False)
    plan = Plan(
        model="tiny",
        fingerprint=graph.fingerprint,
        preset="int8",
        target="ort-cpu",
        method="minmax",
        activations={"x": activation("x", 0.01, 100, spec), "r": activation("r", 0.005, 3, spec)},
        weights=[],
        nodes={},
        left=[],
    )
    x = (np.clip(np.rint(X / np.float32(0.01)) + 100, 0, 255) - 100) * np.float32(0.01)
    assert x.min() == -1
    h = x @ W0 + B0
    r = (np.clip(np.rint(np.maximum(h, 0) / np.float32(0.005)) + 3, 0, 255) - 3) * np.float32(0.005)
    np.testing.assert_allclose(
        simulate(graph, plan, {"x": X})["y"], r @ graph.array("w1"), rtol=1e-6, atol=1e-7
    )


def test_only_the_readers_that_a_plan_names_see_the_quantized_tensor() -> None:
    graph = load_graph(
        model_of("""(float[N,4] x) => (float[N,4] a, float[N,4] b) <float[4,4] w> {
        a = MatMul (x, w) b = Neg (x) }""")
    )
    coarse = activation("x", 0.5, 0, QuantSpec(format=INT8))
    x = np.array([[0.3, -0.8, 1.1, 0.1]], np.float32)
    rounded = np.array([[0.5, -1.0, 1.0, 0.0]], np.float32)
    for readers, negated in (((("MatMul", 0),), x), ((), rounded)):
        plan = Plan(
            model="tiny",
            fingerprint=graph.fingerprint,
            preset="int8",
            target="ort",
            method="minmax",
            activations={
                "x": ActivationPlan(
                    name="x", spec=coarse.spec, range=coarse.range, qparams=coarse.qparams, readers=readers
                )
            },
            weights=[],
            nodes={},
            left=[],
        )
        found = simulate(graph, plan, {"x": x})
        np.testing.assert_array_equal(found["b"], -negated)
        np.testing.assert_allclose(found["a"], rounded @ graph.array("w"), rtol=1e-6)


@every_model
def test_a_plan_that_quantizes_nothing_is_the_float_model(tiny: TinyModel) -> None:
    held = calibrated(tiny.name)
    plan = held.plan()
    empty = Plan(
        model=plan.model,
        fingerprint=plan.fingerprint,
        preset="int8",
        target="ort",
        method="minmax",
        activations={},
        weights=[],
        nodes={},
        left=[],
    )
    feed = held.feeds[0]
    expected = Session(held.graph.model, optimize=False, threads=1).run(feed)
    found = simulate(held.graph, empty, feed)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


@every_model
def test_every_output_is_given_with_its_shape_and_type(tiny: TinyModel) -> None:
    held = calibrated(tiny.name)
    expected = Session(held.graph.model, threads=1).run(held.feeds[0])
    found = simulate(held.graph, held.plan("ort-cpu"), held.feeds[0])
    assert {n: (a.shape, a.dtype) for n, a in found.items()} == {
        n: (a.shape, a.dtype) for n, a in expected.items()
    }


def test_a_step_goes_on_from_what_was_observed_before_it() -> None:
    held = calibrated("conv_relu")
    plan = held.plan()
    feed = held.feeds[0]
    planned = simulate_steps(held.graph, plan, feed, {})
    assert planned == {}
    r = np.full((1, 16, 8, 8), 0.5, np.float32)
    found = simulate_steps(held.graph, plan, feed, {"r": r, "y": np.zeros(0)})
    np.testing.assert_array_equal(found["r"], simulate_steps(held.graph, plan, feed, {"r": 2 * r})["r"])
    other = simulate_steps(held.graph, plan, feed, {"r": 0 * r, "y": np.zeros(0)})["y"]
    assert not np.array_equal(found["y"], other)
    bias = held.graph.array("b1")
    np.testing.assert_allclose(other[0, :, 0, 0], np.maximum(bias, 0), rtol=1e-6)


@pytest.mark.parametrize("depth", [1, 40])
def test_a_chain_of_any_depth_is_followed_in_order(depth: int) -> None:
    nodes = " ".join(f"h{i + 1} = MatMul (h{i}, w)" for i in range(depth))
    model = model_of(f"(float[N,4] h0) => (float[N,4] h{depth}) {{ {nodes} }}", w=np.eye(4, dtype=np.float32))
    graph = load_graph(model)
    histograms = {}
    for i in range(depth):
        histograms[f"h{i}"] = FloatHistogram()
        histograms[f"h{i}"].observe(np.array([-1.27, 1.27], np.float32))
    plan = solve(
        graph,
        histograms,
        preset=get_preset("int8"),
        target=get_emitter("tensorrt").target,
        calibrator=get_calibrator("minmax"),
    )
    x = np.array([[0.011, -0.5, 1.27, 3.0]], np.float32)
    found = simulate(graph, plan, {"h0": x})[f"h{depth}"]
    np.testing.assert_allclose(found, [[0.01, -0.5, 1.27, 1.27]], rtol=1e-5)


def test_the_graph_is_not_changed() -> None:
    held = calibrated("if_subgraph")
    before = ir.serde.serialize_model(held.graph.model).SerializeToString()
    simulate(held.graph, held.plan("ort-cpu"), held.feeds[0])
    assert ir.serde.serialize_model(held.graph.model).SerializeToString() == before

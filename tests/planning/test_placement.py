from itertools import product

import pytest

from quantkit.export import get_emitter
from quantkit.formats import FP8_E4M3, INT8, UINT8, QuantSpec
from quantkit.graph import load_graph
from quantkit.planning.placement import Placement, place
from quantkit.planning.presets import get_preset
from tests.models import MODELS, TinyModel, model_of
from tests.plans import TARGETS

every_model = pytest.mark.parametrize("tiny", MODELS.values(), ids=MODELS)


def placed(
    name: str,
    target: str = "tensorrt",
    preset: str = "int8",
    *,
    everything: bool = False,
    unfit: dict[str, str] | None = None,
) -> Placement:
    graph = load_graph(MODELS[name].build())
    return place(
        graph, get_preset(preset), get_emitter(target).target, everything=everything, unfit=unfit or {}
    )


def left(placement: Placement) -> dict[str, str]:
    return {x.node: x.reason for x in placement.left}


@every_model
def test_a_linear_node_is_quantized_or_left_with_a_reason(tiny: TinyModel) -> None:
    graph = load_graph(tiny.build())
    linear = [
        n.name
        for n in graph.model.graph.all_nodes()
        if n.domain == "" and n.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
    ]
    for target, preset, everything in product(TARGETS, ("int8", "fp8"), (False, True)):
        found = place(graph, get_preset(preset), get_emitter(target).target, everything=everything)
        assert sorted(linear) == sorted([*found.nodes, *left(found)])
        assert all(left(found).values())


def test_formats_come_from_the_target_for_int8_and_from_the_preset_for_fp8() -> None:
    def spec(target: str, preset: str = "int8") -> QuantSpec:
        return placed("conv_relu", target, preset, everything=True).activations[0].spec

    assert spec("tensorrt").format is INT8
    assert spec("ort").symmetric
    assert spec("ort-cpu").format is UINT8
    assert not spec("ort-cpu").symmetric
    assert {spec(t, "fp8").format for t in TARGETS} == {FP8_E4M3}


@pytest.mark.parametrize("target", ["tensorrt", "ort"])
def test_only_inputs_are_quantized_and_only_for_those_who_read_them_so(target: str) -> None:
    assert placed("conv_relu", target).readers() == {"x": (("Conv", 0),), "r": (("Conv_1", 0),)}


def test_ort_cpu_quantizes_what_convolutions_write_but_not_the_models_output() -> None:
    found = placed("conv_relu", "ort-cpu").readers()
    assert found == {"x": (("Conv", 0),), "r": ()}


def test_ort_cpu_leaves_float_readers_of_a_matmuls_input_alone() -> None:
    # The residual stream of a transformer: rounding it for the Add would cost accuracy and win nothing.
    assert placed("layernorm_mlp", "ort-cpu").readers() == {"n": (("MatMul", 0),), "h": (("MatMul_1", 0),)}
    model = model_of("""(float[N,6,8] x) => (float[N,6,8] y) <float[8,8] w> {
        t = Tanh (x) m = MatMul (t, w) y = Add (t, m) }""")
    found = place(load_graph(model), get_preset("int8"), get_emitter("ort-cpu").target)
    assert found.readers() == {"t": (("MatMul", 0),)}


def test_the_skip_of_a_residual_add_is_quantized_for_tensorrt_in_int8_alone() -> None:
    assert ("Add", 1) in placed("residual_identity").readers()["s"]
    assert placed("residual_downsample").readers()["d"] == (("Add", 0),)
    for everything in (False, True):
        fp8 = placed("residual_identity", preset="fp8", everything=everything).readers()
        assert not any(("Add", index) in readers for readers in fp8.values() for index in (0, 1))


def test_ort_cpu_quantizes_both_sides_of_a_residual_add_and_its_sum() -> None:
    model = MODELS["residual_identity"].build()
    node = model.graph.node.add(op_type="Neg", input=["y"], output=["z2"])
    model.graph.output[0].name = node.output[0]
    found = place(load_graph(model), get_preset("int8"), get_emitter("ort-cpu").target).readers()
    assert found == {"x": (("Conv", 0),), "s": (), "r": (), "c": (), "y": ()}


def test_a_skip_is_not_quantized_when_the_convolution_beside_it_is_not() -> None:
    found = placed("residual_identity", unfit={"r": "it is broken"}).readers()
    assert found["s"] == (("Conv_1", 0),)


# --- what stays in float ------------------------------------------------------------------------------------


def test_fp8_leaves_gemm_and_narrow_convolutions_in_float_unless_told_otherwise() -> None:
    assert set(left(placed("pass_through", preset="fp8"))) == {"Conv", "Conv_1", "Gemm"}
    assert "--all" in left(placed("pass_through", preset="fp8"))["Gemm"]
    assert not left(placed("pass_through", preset="fp8", everything=True))
    assert not left(placed("pass_through"))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tensor", ["r", "w2", "b2"])
def test_nodes_that_read_an_unfit_tensor_stay_in_float_with_its_reason(target: str, tensor: str) -> None:
    names = {"r": ("conv_relu", "Conv_1"), "w2": ("pass_through", "Gemm"), "b2": ("pass_through", "Gemm")}
    name, node = names[tensor]
    found = placed(name, target, everything=True, unfit={tensor: "it is broken"})
    assert left(found) == {node: "it is broken"}
    assert tensor not in found.readers()
    assert tensor not in {weight.site.name for weight in found.weights}
    assert node not in found.nodes


def test_ort_cpu_leaves_an_add_alone_that_touches_an_unfit_tensor() -> None:
    found = placed("residual_downsample", "ort-cpu", unfit={"d": "it is broken"}).readers()
    assert "d" not in found
    assert found == {"x": (("Conv", 0), ("Conv_1", 0)), "r": (), "c": ()}


def test_an_output_that_a_layer_reads_too_is_quantized_for_that_layer() -> None:
    for target in TARGETS:
        assert placed("intermediate_output", target).readers()["r"] == (("Conv_1", 0),)


def test_a_weight_used_along_two_axes_is_placed_twice() -> None:
    axes = [(w.site.name, w.site.axis) for w in placed("shared_weight_axes").weights]
    assert axes == [("w", 1), ("w", 0)]


def test_a_target_of_layers_alone_leaves_products_and_stacks_in_float() -> None:
    assert "a stack of matrices" in left(placed("matmul_batched_weight", "vllm"))["MatMul"]
    products = placed("masked_attention", "vllm")
    assert set(products.nodes) == {weight.site.node for weight in products.weights}
    assert all("a product of two activations" in reason for reason in left(products).values())
    # Its own quantization makes a weight of it all the same.
    assert "two activations" not in str(left(placed("weight_only_quantized", "vllm")))


def reason(model: str, target: str, preset: str, group: int | None = None) -> str:
    """Why the one linear node of a model stays in float; "" where it does not."""
    graph = load_graph(model_of(model))
    placement = place(graph, get_preset(preset, block_size=group), get_emitter(target).target)
    return next(iter(left(placement).values()), "")


@pytest.mark.parametrize(
    "model",
    [
        "(float[32,N] x) => (float[N,16] y) <float[32,16] w> { y = Gemm <transA = 1> (x, w) }",
        "(float[N,32] x) => (float[N,16] y) <float[32,16] w> { y = Gemm <alpha = 0.5> (x, w) }",
        "(float[N,32,6] x) => (float[N,16,6] y) <float[16,32] w> { y = MatMul (w, x) }",
        "(float[N,3,6,32] x) => (float[N,3,6,16] y) <float[3,32,16] w> { y = MatMul (x, w) }",
    ],
)
def test_what_only_the_operator_for_plain_products_has_stays_in_float_elsewhere(model: str) -> None:
    assert "plain products x @ W alone" in reason(model, "ort", "int2")
    assert reason(model, "ort", "int4", 32) == ""


def test_groups_that_the_operator_for_plain_products_does_not_take_are_named() -> None:
    model = "(float[N,32] x) => (float[N,16] y) <float[32,16] w> { y = MatMul (x, w) }"
    assert "in groups of 16, 32, 64" in reason(model, "ort", "int2", 24)
    assert reason(model, "ort", "int2", 16) == ""


@pytest.mark.parametrize("target", ["tensorrt", "ort"])
def test_tiles_are_of_matrices_and_not_of_stacks(target: str) -> None:
    model = "(float[N,3,6,32] x) => (float[N,3,6,16] y) <float[3,32,16] w> { y = MatMul (x, w) }"
    assert "a stack" in reason(model, target, "fp8-block")


@pytest.mark.parametrize(("target", "helps"), [("ort", True), ("tensorrt", False), ("vllm", False)])
def test_channels_are_advised_for_convolutions_only_where_the_target_has_them(
    target: str, helps: bool
) -> None:
    graph = load_graph(MODELS["conv_relu"].build())
    found = left(place(graph, get_preset("int4"), get_emitter(target).target))
    assert all(("--group channel" in why) == helps for why in found.values())

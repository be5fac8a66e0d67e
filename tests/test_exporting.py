"""Exports beyond one format for all: which layers, recipes, precision of the rest, embeddings, large models."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import quantkit
from quantkit.errors import CacheError, QuantkitError, RecipeError, SpecError
from quantkit.export.verify_weights import verify_weights
from quantkit.exporting import default_name
from quantkit.graph import load_graph
from quantkit.runtime import Session
from tests.models import model_of, normal, save_external

NETWORK = """(int64[B,T] ids) => (float[B,T,40] y)
    <float[40,64] table, float[64,96] a, float[96,64] b, float[64,40] head> {
    e = Gather (table, ids)
    [up] u = MatMul (e, a)
    r = Relu (u)
    [down] d = MatMul (r, b)
    [last] y = MatMul (d, head) }"""
IDS = np.random.default_rng(0).integers(0, 40, (8, 6))


@pytest.fixture(scope="module")
def network():
    return model_of(NETWORK)


@pytest.fixture(scope="module")
def cache(network):
    return quantkit.calibrate_model(network, {"ids": IDS}, method="minmax")


def export(network, cache, path, **options):
    return quantkit.export_model(network, cache, out=path / "q.onnx", **options)


def operators(path: Path) -> dict[str, str]:
    return {str(n.name): n.op_type for n in ir.load(path).graph}


# --- which layers -------------------------------------------------------------------------------------------


def test_only_what_is_included_is_quantized(network, cache, tmp_path):
    assert set(export(network, cache, tmp_path, include=["u*"]).plan.nodes) == {"up"}
    assert set(export(network, cache, tmp_path, include=["/^(up|down)$/"]).plan.nodes) == {"up", "down"}


def test_what_is_excluded_stays_in_float_with_the_reason(network, cache, tmp_path):
    plan = export(network, cache, tmp_path, exclude=["last", "d*"]).plan
    assert set(plan.nodes) == {"up"}
    assert {x.node: x.reason for x in plan.left} == {"last": "--exclude last", "down": "--exclude d*"}
    left = export(network, cache, tmp_path, include=["up"]).plan.left
    assert {x.node: x.reason for x in left} == dict.fromkeys(
        ["down", "last"], "not among what --include names"
    )


def test_a_rule_for_an_operator_asks_for_it_but_not_against_the_command_line(network, cache, tmp_path):
    (tmp_path / "four.toml").write_text(
        '[[rule]]\nop_types = ["Gather", "MatMul"]\npreset = "int4"\ngroup = 32\n'
    )
    options = {"preset": None, "recipe": tmp_path / "four.toml", "target": "ort"}
    exported = export(network, cache, tmp_path, **options)
    assert "GatherBlockQuantized" in operators(exported.path).values()
    assert "last" not in export(network, cache, tmp_path, head=False, **options).plan.nodes


def test_rules_choose_groups_over_the_command_lines_and_whole_channels(network, cache, tmp_path):
    (tmp_path / "g.toml").write_text(
        '[[rule]]\nmatch = "up"\ngroup = "channel"\n[[rule]]\nmatch = "down"\ngroup = 16\n'
    )
    plan = export(
        network, cache, tmp_path, preset="int4", group=32, target="ort", recipe=tmp_path / "g.toml"
    ).plan
    assert [w.spec.block_size for w in plan.weights] == [None, 16, 32]
    (tmp_path / "h.toml").write_text('[[rule]]\nmatch = "down"\ngroup = 16\n')
    plan = export(
        network, cache, tmp_path, preset="int4", group="channel", target="ort", recipe=tmp_path / "h.toml"
    ).plan
    assert [w.spec.block_size for w in plan.weights] == [None, 16, None]


def test_an_operator_that_a_rule_names_is_quantized_without_all(tmp_path):
    model = model_of("(float[B,32] x) => (float[B,40] y) <float[32,40] w> { [g] y = Gemm (x, w) }")
    cache = quantkit.calibrate_model(model, {"x": normal(8, 32)}, method="minmax")
    (tmp_path / "r.toml").write_text('[[rule]]\nop_types = ["Gemm"]\npreset = "fp8"\n')
    plan = quantkit.export_model(
        model, cache, preset=None, recipe=tmp_path / "r.toml", out=tmp_path / "q.onnx"
    ).plan
    assert list(plan.nodes) == ["g"]


def test_a_weight_of_subnormal_floats_stays_in_float(tmp_path):
    model = model_of(
        "(float[B,32] x) => (float[B,40] y) <float[32,40] w, float[40,40] v> {"
        " [a] h = MatMul (x, w) [b] y = MatMul (h, v) }"
    )
    model.graph.initializer[0].raw_data = np.full((32, 40), 1e-38, np.float32).tobytes()
    plan = quantkit.export_model(model, preset="int4", group=32, target="ort", out=tmp_path / "q.onnx").plan
    assert list(plan.nodes) == ["b"]
    assert [x.reason for x in plan.left] == ["weight w holds nothing of 10⁻³⁶ or more"]


def test_groups_that_tensorrts_documentation_does_not_have_are_said(network, tmp_path):
    def warned(group, target):
        found = quantkit.export_model(
            network, preset="int4", group=group, target=target, head=False, out=tmp_path / "q.onnx"
        )
        return [w for w in found.warnings if "documentation" in w]

    assert warned(64, "ort") == warned(32, "ort") == []
    (line,) = warned(32, "tensorrt")
    assert "in groups of 64 and 128, not of 32" in line


def test_the_head_can_be_left_out(network, cache, tmp_path):
    plan = export(network, cache, tmp_path, head=False).plan
    assert set(plan.nodes) == {"up", "down"}
    assert [x.reason for x in plan.left] == ["the last layer, left out as asked"]


def test_embeddings_are_quantized_where_asked_and_possible(network, tmp_path):
    options = {"preset": "int4", "group": 32, "target": "ort"}
    without = export(network, None, tmp_path, **options)
    assert "GatherBlockQuantized" not in operators(without.path).values()
    exported = export(network, None, tmp_path, embeddings=True, **options)
    assert "GatherBlockQuantized" in operators(exported.path).values()
    assert exported.size_bytes < without.size_bytes
    assert exported.verification.plan_sqnr_db > 70


def test_a_pattern_that_matches_nothing_is_reported(network, cache, tmp_path):
    exported = export(network, cache, tmp_path, exclude=["lastt"])
    assert any("no node matches lastt" in warning for warning in exported.warnings)
    with pytest.raises(QuantkitError, match="no node matches nothing"):
        export(network, cache, tmp_path, include=["nothing"])


# --- recipes ------------------------------------------------------------------------------------------------

RECIPE = """
[[rule]]
op_types = ["MatMul"]
preset = "int8"

[[rule]]
match = "down"
preset = "int4"
group = 32

[[rule]]
match = "last"
keep = "float"
"""


def test_a_recipe_gives_every_layer_its_own_format(network, cache, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    exported = export(network, cache, tmp_path, preset=None, recipe=tmp_path / "recipe.toml", target="ort")
    assert exported.plan.preset == "recipe"
    assert exported.plan.formats == {"up": "int8, per channel × int8", "down": "int4, block 32 × float"}
    assert operators(exported.path)["down"] == "MatMulNBits"
    assert exported.verification.plan_sqnr_db > 70
    shown = str(exported)
    assert "int4, block 32 × float" in shown
    assert "the recipe keeps it in float" in shown


def test_a_recipe_stands_over_a_preset(network, cache, tmp_path):
    (tmp_path / "recipe.toml").write_text('[[rule]]\nmatch = "up"\nmethod = "percentile"\npercentile = 50\n')
    plain = export(network, cache, tmp_path).plan
    plan = export(network, cache, tmp_path, recipe=tmp_path / "recipe.toml").plan
    assert plan.nodes == plain.nodes
    assert plan.activations["e"].static.scale < plain.activations["e"].static.scale
    assert plan.activations["r"].static.scale == plain.activations["r"].static.scale
    assert plan.method == "minmax+percentile"


def test_weights_and_activations_may_have_presets_of_their_own(network, cache, tmp_path):
    (tmp_path / "r.toml").write_text(
        '[[rule]]\nmatch = "up"\nweights = "int4"\ngroup = 16\nactivations = "fp8"\n'
    )
    exported = export(network, cache, tmp_path, preset=None, recipe=tmp_path / "r.toml", target="tensorrt")
    assert exported.plan.formats == {"up": "int4, block 16 × fp8_e4m3"}


def test_a_tensor_that_two_formats_read_is_quantized_twice(tmp_path):
    model = model_of(
        """(float[B,32] x) => (float[B,16] y, float[B,16] z) <float[32,16] a, float[32,16] b> {
        [one] y = MatMul (x, a)
        [two] z = MatMul (x, b) }"""
    )
    cache = quantkit.calibrate_model(model, normal(8, 32), method="minmax")
    (tmp_path / "r.toml").write_text('[[rule]]\nmatch = "two"\npreset = "fp8"\n')
    exported = export(model, cache, tmp_path, recipe=tmp_path / "r.toml", target="ort")
    assert {str(a.spec) for a in exported.plan.activations.values()} == {"int8", "fp8_e4m3"}
    assert {a.name for a in exported.plan.activations.values()} == {"x"}
    assert exported.verification.plan_sqnr_db > 70


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('[[rule]]\nmatch = "up"\npreset = "int9"\n', QuantkitError, "int9"),
        ('[[rule]]\nmatch = "up"\nweights = "float"\n', RecipeError, "run nowhere"),
        ('[[rule]]\nmatch = "up"\npreset = "int8"\ngroup = 32\n', QuantkitError, "no groups"),
        ('[[rule]]\nmatch = "up"\nmethod = "entrpy"\n', QuantkitError, "entropy"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(network, cache, tmp_path, text, error, message):
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(error, match=message):
        export(network, cache, tmp_path, recipe=tmp_path / "recipe.toml")
    assert not (tmp_path / "q.onnx").exists()


def test_a_recipe_alone_asks_for_a_cache_only_where_activations_need_one(network, tmp_path):
    (tmp_path / "four.toml").write_text('[[rule]]\nop_types = ["MatMul"]\npreset = "int4"\ngroup = 32\n')
    exported = export(network, None, tmp_path, preset=None, recipe=tmp_path / "four.toml", target="ort")
    assert len(exported.plan.nodes) == 3
    (tmp_path / "eight.toml").write_text('[[rule]]\nop_types = ["MatMul"]\npreset = "int8"\n')
    with pytest.raises(CacheError, match="needs a calibration cache"):
        export(network, None, tmp_path, preset=None, recipe=tmp_path / "eight.toml")


def test_options_of_a_format_need_a_format(network, cache, tmp_path):
    (tmp_path / "r.toml").write_text('[[rule]]\npreset = "int8"\n')
    with pytest.raises(SpecError, match="--group: belongs to a preset"):
        export(network, cache, tmp_path, preset=None, group=32, recipe=tmp_path / "r.toml")


# --- the rest -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["int8", "fp8", "int4", "nvfp4"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_is_not_quantized_is_cast(network, cache, tmp_path, preset, precision):
    options = {"group": 32} if preset == "int4" else {}
    exported = export(network, cache, tmp_path, preset=preset, high_precision=precision, **options)
    model = ir.load(exported.path)
    wanted = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[precision]
    products = [n.outputs[0] for n in model.graph if n.op_type == "MatMul"]
    assert [v.dtype for v in products] == [wanted] * 3
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT
    (look_up,) = [n for n in model.graph if n.op_type == "Gather"]
    assert look_up.inputs[0].dtype == wanted
    # Scales are solved as the type that holds them.
    dtype = wanted.numpy()
    for weight in exported.plan.weights:
        if weight.spec.scale_format is None:
            np.testing.assert_array_equal(
                weight.qparams.scale.astype(dtype).astype(np.float32), weight.qparams.scale
            )


def test_an_unknown_precision_is_refused(network, cache, tmp_path):
    with pytest.raises(SpecError, match="choose fp32, fp16 or bf16"):
        export(network, cache, tmp_path, high_precision="fp64")


def test_options_of_another_target_are_refused(network, cache, tmp_path):
    with pytest.raises(SpecError, match="target ort: has no trt"):
        export(network, cache, tmp_path, target="ort", target_options={"trt": 10})
    with pytest.raises(SpecError, match="TensorRT 9"):
        export(network, cache, tmp_path, target_options={"trt": 9})
    with pytest.raises(SpecError, match="accuracy level 7"):
        export(network, cache, tmp_path, target="ort", target_options={"accuracy_level": 7})


def test_activations_that_a_target_lacks_stay_in_float_and_it_says_so(network, tmp_path):
    exported = export(network, None, tmp_path, preset="fp8-block", target="ort")
    assert exported.plan.activations == {}
    assert any("stay in float" in warning for warning in exported.warnings)


def test_weights_beside_the_model_stay_beside_it(tmp_path):
    save_external(model_of(NETWORK), tmp_path / "m.onnx")
    exported = quantkit.export_model(
        tmp_path / "m.onnx", preset="int4", group=32, target="ort", out=tmp_path / "q.onnx"
    )
    assert (tmp_path / "q.onnx.data").exists()
    assert exported.size_bytes == sum((tmp_path / n).stat().st_size for n in ("q.onnx", "q.onnx.data"))
    ids = {"ids": IDS}
    assert np.isfinite(Session(tmp_path / "q.onnx", optimize=False).run(ids)["y"]).all()


@pytest.mark.parametrize("target", ["tensorrt", "ort"])
@pytest.mark.parametrize("preset", ["int4", "int8", "fp8-block", "nvfp4", "mxfp8"])
def test_large_models_are_judged_weight_by_weight(network, cache, preset, target, tmp_path, monkeypatch):
    if target == "ort" and preset in ("nvfp4", "mxfp8"):
        pytest.skip("ONNX Runtime has no such weights")
    monkeypatch.setattr("quantkit.export.verify._RUN_BYTES", 0)
    options = {"group": 32} if preset == "int4" else {}
    exported = export(network, cache, tmp_path, preset=preset, target=target, **options)
    assert exported.verification.output == ""
    assert exported.verification.plan_sqnr_db > 120
    assert any("was not run" in warning for warning in exported.warnings)
    # A file of another model is seen.
    other = load_graph(model_of(NETWORK.replace("float[64,96] a", "float[64,96] a")))
    weights = other.model.graph.initializers
    weights["a"].const_value = ir.tensor(normal(64, 96, seed=9), name="a")
    with pytest.raises(QuantkitError, match="weight a differs"):
        verify_weights(exported.path, other, exported.plan)


def test_names_of_files_say_format_and_target():
    assert default_name("m", "int8", "tensorrt") == "m.int8.onnx"
    assert default_name("m", "int8", "ort") == "m.int8.ort.onnx"
    assert default_name("m", "fp8", "vllm", folder=True) == "m.fp8.vllm"

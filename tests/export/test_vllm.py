"""Folders for vLLM: literal bytes, names, config, and the compressed-tensors package's own reading where torch is."""

import json
import shutil
import struct

import ml_dtypes
import numpy as np
import onnx
import pytest
import safetensors

import quantkit
from quantkit.errors import ExportError, PlanError, QuantkitError, SpecError
from quantkit.export import get_emitter
from quantkit.export.safetensors_file import FILE, read_safetensors
from quantkit.export.vllm import VllmEmitter
from quantkit.formats import dequantize
from quantkit.graph import load_graph
from quantkit.planning.recipe import load_recipe
from tests.export.vllm_folders import PRESETS, ROWS, chain, dotted, export, two_layers
from tests.models import model_of


@pytest.fixture(scope="module")
def linear():
    return two_layers()


@pytest.fixture(scope="module")
def cache(linear):
    return quantkit.calibrate_model(linear, ROWS)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def tensors_of(folder):
    return {name: tensor.array() for name, tensor in read_safetensors(folder).items()}


def oracle(exported, model):
    """The weights of a plan as floats [out, in], by initializer."""
    graph = load_graph(model)
    found = {}
    for plan in exported.plan.weights:
        (node, _), *_ = plan.readers
        values = dequantize(plan.quantize(graph.array(plan.name)))
        turned = graph.node(node).op_type == "MatMul" or "transB" not in graph.node(node).attributes
        found[plan.name] = values.T if turned else values
    return found


# --- bytes --------------------------------------------------------------------------------------------------


def test_a_matrix_of_int4_is_these_words(tmp_path):
    w = np.zeros((8, 2), np.float32)
    w[:, 0] = [7, -7, 6, -6, 5, -5, 1, 0]
    w[:, 1] = [14, -14, 2, -2, 0, 0, 0, 4]
    model = model_of("(float[B,8] x) => (float[B,2] y) { y = MatMul (x, w) }", w=w)
    model.graph.node[0].name = "/fc/MatMul"
    export(model, tmp_path / "q", preset="int4", group="channel", method="amax")
    found = tensors_of(tmp_path / "q")
    # A code is stored as itself plus 8, the first one lowest: 7 → F, −7 → 1, 0 → 8.
    assert found["fc.weight_packed"].view(np.uint32).tolist() == [[0x893D2E1F], [0xA888791F]]
    assert found["fc.weight_scale"].tolist() == [[1], [2]]
    assert found["fc.weight_shape"].tolist() == [2, 8]
    assert set(found) == {"fc.weight_packed", "fc.weight_scale", "fc.weight_shape"}
    assert config_of(tmp_path / "q") == {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "format": "pack-quantized",
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": True,
                        "strategy": "channel",
                        "group_size": None,
                        "block_structure": None,
                        "dynamic": False,
                        "actorder": None,
                    },
                    "input_activations": None,
                    "output_activations": None,
                }
            },
            "ignore": [],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
    }


def test_nvfp4_is_these_bytes(tmp_path):
    w = np.zeros((16, 2), np.float32)
    w[0], w[1], w[2] = 6, -3, 0.5
    model = model_of("(float[B,16] x) => (float[B,2] y) { y = MatMul (x, w) }", w=w)
    export(model, tmp_path / "q", preset="nvfp4", method="amax")
    found = {name.rpartition(".")[2]: a for name, a in tensors_of(tmp_path / "q").items()}
    # E2M1: 6 → 7, −3 → D, 0.5 → 1, two to a byte with the first one low; blocks of amax 6 have the scale 448.
    assert found["weight_packed"].tolist() == [[0xD7, 0x01, 0, 0, 0, 0, 0, 0]] * 2
    assert found["weight_scale"].astype(float).tolist() == [[448], [448]]
    assert found["weight_global_scale"].tolist() == pytest.approx([448])


def test_static_activations_leave_their_scale(linear, cache, tmp_path):
    exported = export(linear, tmp_path / "q", cache, preset="int8")
    found, plans = tensors_of(tmp_path / "q"), exported.plan.activations
    assert found["layers.0.up.input_scale"].tolist() == [float(plans["x"].static.scale)]
    assert found["layers.1.input_scale"].tolist() == [float(plans["r"].static.scale)]
    assert found["layers.0.up.weight"].dtype == np.int8
    group = config_of(tmp_path / "q")["quantization_config"]["config_groups"]["group_0"]
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == (
        "tensor",
        False,
    )


def test_nvfp4_activations_leave_the_reciprocal_of_their_global_scale(linear, cache, tmp_path):
    exported = export(linear, tmp_path / "q", cache, preset="nvfp4", activations=True)
    found, plan = tensors_of(tmp_path / "q"), exported.plan.activations["x"]
    assert found["layers.0.up.input_global_scale"][0] == pytest.approx(1 / float(plan.global_scale), rel=1e-6)
    group = config_of(tmp_path / "q")["quantization_config"]["config_groups"]["group_0"]
    assert group["input_activations"]["dynamic"] == "local"


@pytest.mark.parametrize("preset", ["w4a8", "w4a8-fp8"])
def test_inputs_of_four_bit_weights_are_scaled_by_token(linear, cache, tmp_path, preset):
    exported = export(linear, tmp_path / "q", cache, preset=preset, group=16)
    assert {a.spec.dynamic for a in exported.plan.activations.values()} == {"token"}
    group = config_of(tmp_path / "q")["quantization_config"]["config_groups"]["group_0"]
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == ("token", True)
    assert not any("input" in name for name in tensors_of(tmp_path / "q"))


# --- every preset -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_written_and_verified(linear, cache, tmp_path, name):
    options, form = PRESETS[name]
    exported = export(linear, tmp_path / "q", cache, **options)
    assert set(exported.plan.nodes.values()) == {"MatMul", "Gemm"}
    assert exported.verification is not None
    assert exported.verification.plan_sqnr_db == float("inf")
    found = config_of(tmp_path / "q")["quantization_config"]
    assert found["format"] == form
    assert found["ignore"] == []
    names = set(tensors_of(tmp_path / "q"))
    # All that is no quantized weight has its own name, and nothing is there twice.
    assert {n for n in names if n.rpartition(".")[0] not in ("layers.0.up", "layers.1")} == {"scale"}
    assert "layers.0.up.bias" in names
    assert ("layers.0.up.weight" in names) != ("layers.0.up.weight_packed" in names)


@pytest.mark.parametrize("name", PRESETS)
def test_the_package_decompresses_to_the_weights_of_the_plan(linear, cache, tmp_path, name):
    torch = pytest.importorskip("torch", reason="compressed-tensors reads with torch")
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    exported = export(linear, tmp_path / "q", cache, **PRESETS[name][0])
    config = QuantizationConfig.model_validate(config_of(tmp_path / "q")["quantization_config"])
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    with safetensors.safe_open(tmp_path / "q" / FILE, framework="pt") as file:
        held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    wanted = oracle(exported, linear)
    for path in ("layers.0.up", "layers.1"):
        state = {key.removeprefix(f"{path}."): t for key, t in held.items() if key.startswith(f"{path}.")}
        # It knows no other tensors of a layer than these.
        state.pop("bias", None)
        assert set(state) - {"input_scale", "input_global_scale"} <= set(
            compressor.compression_param_names(scheme)
        )
        found = compressor.decompress(state, scheme)["weight"]
        values = found.to(torch.float32).numpy()
        # NVFP4 is decompressed to bfloat16, of 8 bits; everything else is exact.
        tolerance = 2.0**-8 if "nvfp4" in name else 0
        np.testing.assert_allclose(values, wanted[f"{path}.weight"], rtol=tolerance, atol=0)


def test_the_package_gives_every_layer_of_a_mixed_model_its_scheme(linear, cache, tmp_path):
    pytest.importorskip("torch", reason="compressed-tensors reads with torch")
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    from compressed_tensors.quantization import QuantizationConfig

    mixed(linear, cache, tmp_path)
    config = QuantizationConfig.model_validate(config_of(tmp_path / "q")["quantization_config"])
    assert config.format == "mixed-precision"
    assert [g.weights.num_bits for g in config.config_groups.values()] == [4, 8]


def mixed(linear, cache, tmp_path):
    recipe = tmp_path / "recipe.toml"
    first = load_graph(linear).model.graph.node(0).name
    recipe.write_text(f'[[rule]]\nmatch = "{first}"\nweights = "int4"\nactivations = "float"\ngroup = 32\n')
    return export(linear, tmp_path / "q", cache, preset="int8", recipe=load_recipe(recipe))


def test_a_mixed_recipe_has_a_group_for_each_format(linear, cache, tmp_path):
    mixed(linear, cache, tmp_path)
    config = config_of(tmp_path / "q")["quantization_config"]
    assert config["format"] == "mixed-precision"
    groups = [(g["targets"], g["format"]) for g in config["config_groups"].values()]
    assert groups == [(["layers.0.up"], "pack-quantized"), (["layers.1"], "int-quantized")]


def test_a_layer_left_in_float_is_ignored_and_stored_as_out_in(linear, tmp_path):
    gemm = next(n.name for n in load_graph(linear).model.graph if n.op_type == "MatMul")
    export(linear, tmp_path / "q", preset="int4", group=16, exclude=[gemm])
    assert config_of(tmp_path / "q")["quantization_config"]["ignore"] == ["layers.0.up"]
    found, graph = tensors_of(tmp_path / "q"), load_graph(linear)
    np.testing.assert_array_equal(found["layers.0.up.weight"], graph.array("layers.0.up.weight").T)


def test_weights_take_the_bytes_of_their_codes_and_scales(tmp_path):
    model = model_of("(float[B,1024] x) => (float[B,512] y) <float[1024,512] w> { y = MatMul (x, w) }")
    for preset, theory in (
        ("int4", 1024 * 512 // 2 + 1024 // 128 * 512 * 4),
        ("nvfp4", 1024 * 512 // 2 + 1024 // 16 * 512),
        ("mxfp8", 1024 * 512 + 1024 // 32 * 512),
    ):
        exported = export(model, tmp_path / preset, preset=preset)
        assert theory <= exported.size_bytes <= theory * 1.02


def test_the_same_export_gives_the_same_bytes(linear, cache, tmp_path):
    for name in ("a", "b"):
        export(two_layers(), tmp_path / name, cache, preset="int8")
    for file in (FILE, "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


# --- layers of every shape ----------------------------------------------------------------------------------


def test_a_weight_on_the_left_is_stored_as_it_is(tmp_path):
    model = dotted(
        "(float[32,B] x) => (float[24,B] y) <float[24,32] fc__weight> { y = MatMul (fc__weight, x) }"
    )
    exported = export(model, tmp_path / "q", preset="int4", group=16)
    assert tensors_of(tmp_path / "q")["fc.weight_shape"].tolist() == [24, 32]
    assert [p.spec.axis for p in exported.plan.weights] == [1]


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_is_out_in_whichever_way_it_is_stored(tmp_path, transposed):
    shape = "24,32" if transposed else "32,24"
    model = dotted(
        f"(float[B,32] x) => (float[B,24] y) <float[{shape}] fc__weight, float[24] b> "
        f"{{ y = Gemm <transB = {transposed}> (x, fc__weight, b) }}"
    )
    export(model, tmp_path / "q", preset="int4", group=16)
    found = tensors_of(tmp_path / "q")
    assert found["fc.weight_shape"].tolist() == [24, 32]
    assert found["fc.weight_scale"].shape == (24, 2)
    np.testing.assert_array_equal(found["fc.bias"], load_graph(model).array("b"))


def test_a_weight_of_two_modules_is_written_for_each(tmp_path):
    model = model_of("""(float[B,32] x) => (float[B,32] y) <float[32,32] w> {
        h = MatMul (x, w)
        r = Relu (h)
        y = MatMul (r, w) }""")
    for node, name in zip(model.graph.node, ("/a/MatMul", "relu", "/b/MatMul"), strict=True):
        node.name = name
    export(model, tmp_path / "q", preset="int4", group=16)
    found = tensors_of(tmp_path / "q")
    np.testing.assert_array_equal(found["a.weight_packed"], found["b.weight_packed"])
    assert len(found) == 6


def test_a_module_that_is_called_twice_is_one_with_the_larger_scale(tmp_path):
    model = dotted("""(float[B,32] x) => (float[B,32] y) <float[32,32] fc__weight> {
        h = MatMul (x, fc__weight)
        r = Relu (h)
        y = MatMul (r, fc__weight) }""")
    held = quantkit.calibrate_model(model, ROWS[:, :32])
    exported = export(model, tmp_path / "q", held, preset="int8")
    scales = [float(a.static.scale) for a in exported.plan.activations.values()]
    assert len(set(scales)) == 2
    assert tensors_of(tmp_path / "q")["fc.input_scale"].tolist() == [max(scales)]


def test_an_embedding_keeps_its_table_where_a_head_shares_it(tmp_path):
    model = dotted("""(int64[B] i) => (float[B,24] y) <float[24,32] emb__weight> {
        h = Gather (emb__weight, i)
        y = Gemm <transB = 1> (h, emb__weight) }""")
    model.graph.node[1].name = "/lm_head/Gemm"
    export(model, tmp_path / "q", preset="int4", group=16)
    found = tensors_of(tmp_path / "q")
    assert set(found) == {
        "emb.weight",
        "lm_head.weight_packed",
        "lm_head.weight_scale",
        "lm_head.weight_shape",
    }


def test_a_tied_head_in_float_is_stored_once_and_ignored(tmp_path):
    model = dotted("""(int64[B] i) => (float[B,24] y) <float[24,32] emb__weight, float[32,32] fc__weight> {
        h = Gather (emb__weight, i)
        g = MatMul (h, fc__weight)
        y = Gemm <transB = 1> (g, emb__weight) }""")
    model.graph.node[2].name = "/lm_head/Gemm"
    export(model, tmp_path / "q", preset="int4", group=16, head=False)
    assert {n for n in tensors_of(tmp_path / "q") if not n.startswith("fc.")} == {"emb.weight"}
    assert config_of(tmp_path / "q")["quantization_config"]["ignore"] == ["lm_head"]


def test_convolutions_products_and_stacks_stay_in_float_with_the_reason(tmp_path):
    model = dotted("""(float[B,3,8,8] x) => (float[B,16,8,8] y)
        <float[16,3,3,3] conv__weight, float[16] conv__bias, float[8,8] fc__weight, float[16,8,8] experts> {
        c = Conv <pads = [1, 1, 1, 1]> (x, conv__weight, conv__bias)
        h = MatMul (c, fc__weight)
        p = MatMul (h, h)
        y = MatMul (p, experts) }""")
    held = quantkit.calibrate_model(model, np.ones((2, 3, 8, 8), np.float32))
    exported = export(model, tmp_path / "q", held, preset="int8")
    assert list(exported.plan.nodes.values()) == ["MatMul"]
    reasons = " ".join(left.reason for left in exported.plan.left)
    for reason in ("has no convolutions with int8", "a product of two activations", "a stack of matrices"):
        assert reason in reasons
    found, graph = tensors_of(tmp_path / "q"), load_graph(model)
    for name in ("conv.weight", "conv.bias", "experts"):
        np.testing.assert_array_equal(found[name], graph.array(name))


def test_bfloat16_and_float16_models_keep_their_types(tmp_path):
    model = dotted("""(float16[B,32] x) => (float16[B,24] y) <float16[32,24] fc__weight, float16[24] fc__bias> {
        y = Gemm (x, fc__weight, fc__bias) }""")
    export(model, tmp_path / "q", preset="int4", group=16)
    assert tensors_of(tmp_path / "q")["fc.bias"].dtype == np.float16
    assert config_of(tmp_path / "q")["torch_dtype"] == "float16"


@pytest.mark.parametrize(("name", "dtype"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_what_is_not_quantized_is_cast_where_that_is_asked_for(linear, cache, tmp_path, name, dtype):
    export(linear, tmp_path / "q", cache, preset="int8", high_precision=name)
    found, graph = tensors_of(tmp_path / "q"), load_graph(linear)
    for tensor in ("scale", "layers.0.up.bias"):
        assert found[tensor].dtype == dtype
        np.testing.assert_array_equal(found[tensor], graph.array(tensor).astype(dtype))
    assert found["layers.0.up.weight"].dtype == np.int8
    assert config_of(tmp_path / "q")["torch_dtype"] == np.dtype(dtype).name


def test_a_mask_stays_finite_in_float16_and_an_infinite_one_infinite(tmp_path):
    mask = np.array([0, np.finfo(np.float32).min, -np.inf, 1.5] * 6, np.float32)
    model = model_of(
        "(float[B,32] x) => (float[B,24] y) <float[32,24] w> { h = MatMul (x, w)  r = Relu (h)  y = Add (r, mask) }",
        mask=mask,
    )
    export(model, tmp_path / "q", preset="int4", group=16, high_precision="fp16")
    assert tensors_of(tmp_path / "q")["mask"][:4].tolist() == [0, -65504, -np.inf, 1.5]


# --- names --------------------------------------------------------------------------------------------------


def paths(model, folder, **options):
    export(model, folder, preset="int4", group=16, **options)
    return sorted(n.removesuffix(".weight_scale") for n in tensors_of(folder) if n.endswith(".weight_scale"))


@pytest.mark.parametrize(
    ("node", "weight", "path"),
    [
        ("/model/layers.0/self_attn/q_proj/MatMul", "onnx::MatMul_12", "model.layers.0.self_attn.q_proj"),
        ("/layer1/layer1.0/fc/Gemm", "w", "layer1.0.fc"),
        ("/fc/MatMul_1", "w", "fc"),
        ("anything", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj"),
        ("anything", "model.layers.0.mlp.up_proj.MatMul.weight", "model.layers.0.mlp.up_proj"),
        ("node_linear", "val_42", "node_linear"),
    ],
)
def test_a_layer_is_named_by_its_onnx_path(tmp_path, node, weight, path):
    model = model_of(
        "(float[B,32] x) => (float[B,24] y) { y = MatMul (x, w) }", w=np.ones((32, 24), np.float32)
    )
    model.graph.node[0].name = node
    model.graph.node[0].input[1] = model.graph.initializer[0].name = weight
    assert paths(model, tmp_path / "q") == [path]


def test_the_scopes_of_torch_export_name_a_layer(tmp_path):
    model = model_of("(float[B,32] x) => (float[B,24] y) <float[32,24] val_1> { y = MatMul (x, val_1) }")
    scopes = onnx.StringStringEntryProto(
        key="pkg.torch.onnx.name_scopes", value="['', 'layers.0', 'layers.0.q_proj', 'linear']"
    )
    model.graph.node[0].metadata_props.append(scopes)
    assert paths(model, tmp_path / "q") == ["layers.0.q_proj"]
    model.graph.node[0].metadata_props[0].value = "no list at all("
    model.graph.node[0].name = "fallback"
    assert paths(model, tmp_path / "p") == ["fallback"]


def test_two_layers_of_one_module_get_their_nodes_names_behind_it(tmp_path):
    assert paths(chain("/attn/MatMul", "/attn/MatMul_1"), tmp_path / "q") == [
        "attn.attn.MatMul",
        "attn.attn.MatMul_1",
    ]


@pytest.mark.parametrize("source", ["mapping", "file"])
def test_a_name_map_moves_layers_modules_and_tensors(tmp_path, source):
    name_map = {"/a/MatMul": "model.q_proj", "b": "model.deep", "norm.weight": "model.norm.gain"}
    if source == "file":
        (tmp_path / "map.json").write_text(json.dumps(name_map))
    given = name_map if source == "mapping" else tmp_path / "map.json"
    model = chain("/a/MatMul", "/b/c/MatMul")
    assert paths(model, tmp_path / "q", target_options={"name_map": given}) == [
        "model.deep.c",
        "model.q_proj",
    ]
    assert "model.norm.gain" in tensors_of(tmp_path / "q")


def test_a_layer_may_be_named_by_its_weight_and_takes_its_bias_along(tmp_path):
    model = two_layers()
    found = paths(
        model, tmp_path / "q", target_options={"name_map": {"layers.0.up.weight": "up", "scale": None}}
    )
    assert found == ["layers.1", "up"]
    names = set(tensors_of(tmp_path / "q"))
    assert "up.bias" in names
    # null: what the runtime makes itself is left out.
    assert "scale" not in names


@pytest.mark.parametrize(
    ("name_map", "message"),
    [
        ({"nobody": "a", "/a/MatMul": "b"}, r"no linear layer, tensor or module called nobody; correct"),
        ({str(i): "a" for i in range(9)}, r"called 0, 1, 2, 3, 4 and 4 more"),
        ({"/a/MatMul": None}, r"/a/MatMul is a linear layer, which cannot be left out"),
        ({"/a/MatMul": "q.weight"}, r"q\.weight is a weight's name; give its module, q\."),
        ({"/a/MatMul": "b"}, r"b\.weight: is the name of two parameters, of /a/MatMul and of /b/MatMul"),
        ({"/a/MatMul": "a//b"}, r"'a//b' is no dotted path"),
        ({"/a/MatMul": ""}, r"'' is no dotted path"),
        ({"/a/MatMul": 3}, r"3 is no name"),
        (["a"], r"of type list, no object"),
    ],
)
def test_a_wrong_name_map_is_refused_in_one_line(tmp_path, name_map, message):
    with pytest.raises(SpecError, match=message) as caught:
        paths(chain("/a/MatMul", "/b/MatMul"), tmp_path / "q", target_options={"name_map": name_map})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (no such file or directory)"),
        ("{", "is not JSON"),
        ('{"a": 1}', "'a': 1 is no name"),
        (b"\xff\xfe\x00", "is not JSON"),
    ],
)
def test_a_wrong_file_of_names_is_refused_before_any_work(tmp_path, content, message):
    path = tmp_path / "map.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SpecError) as caught:
        get_emitter("vllm", name_map=path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- refusals and config ------------------------------------------------------------------------------------


def test_weights_and_activations_that_vllm_has_no_kernel_for_are_refused(linear, cache, tmp_path):
    with pytest.raises(SpecError, match=r"vllm has no uint4 block\+zero weights with int8 token activations"):
        export(linear, tmp_path / "q", cache, preset="w4a8", group=16, symmetric=False)


def test_a_rescaling_that_needs_a_tensor_of_its_own_is_refused(linear, cache, tmp_path):
    with pytest.raises(PlanError, match=r"^x: its rescaling is a tensor of its own"):
        export(linear, tmp_path / "q", cache, preset="int8", method="smoothquant", folds="insert")
    assert not (tmp_path / "q").exists()


def test_a_group_that_does_not_divide_names_those_that_do(tmp_path):
    model = model_of("(float[B,96] x) => (float[B,24] y) <float[96,24] w> { y = MatMul (x, w) }")
    with pytest.raises(SpecError, match=r"choose --group 16 or 32"):
        export(model, tmp_path / "q", preset="int4")


def test_a_model_that_is_quantized_already_is_refused(linear, cache, tmp_path):
    quantkit.export_model(linear, cache, preset="int8", out=tmp_path / "q.onnx")
    with pytest.raises(QuantkitError, match=r"float model (it|that)"):
        export(tmp_path / "q.onnx", tmp_path / "q", preset="int4", group=16)


def test_a_plan_for_something_else_than_a_layer_is_refused(linear, tmp_path):
    exported = export(linear, tmp_path / "q", preset="int4", group=16)
    other = load_graph(chain("a", "b"))
    with pytest.raises(PlanError, match=r"is no linear layer"):
        VllmEmitter().write(other, exported.plan, tmp_path)


def test_the_models_own_config_is_kept(linear, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 256}))
    onnx.save(linear, tmp_path / "m.onnx")
    export(tmp_path / "m.onnx", tmp_path / "q", preset="int4", group=16)
    found = config_of(tmp_path / "q")
    assert (found["model_type"], found["hidden_size"], found["torch_dtype"]) == ("llama", 256, "float32")
    (tmp_path / "config.json").write_text("[]")
    export(tmp_path / "m.onnx", tmp_path / "p", preset="int4", group=16)
    assert set(config_of(tmp_path / "p")) == {"torch_dtype", "quantization_config"}


# --- verifying ----------------------------------------------------------------------------------------------


def flip(path, name, byte=0):
    """Change a byte of one tensor of a safetensors file."""
    content = bytearray((path / FILE).read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    start = json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
    content[8 + length + start + byte] ^= 1
    (path / FILE).write_bytes(content)


@pytest.mark.parametrize("preset", ["int8", "int4 zero points", "nvfp4 activations", "mxfp4", "fp8-block"])
def test_one_wrong_bit_anywhere_is_found(linear, cache, tmp_path, preset):
    exported = export(linear, tmp_path / "q", cache, **PRESETS[preset][0])
    emitter, graph = VllmEmitter(), load_graph(linear)
    assert emitter.verify(tmp_path / "q", graph, exported.plan).plan_sqnr_db == float("inf")
    for name, tensor in read_safetensors(tmp_path / "q").items():
        shutil.copytree(tmp_path / "q", tmp_path / "wrong")
        # The last byte of a float32 holds its sign.
        flip(tmp_path / "wrong", name, 3 if tensor.dtype == np.float32 else 0)
        with pytest.raises(ExportError, match=r"is not what the plan has"):
            emitter.verify(tmp_path / "wrong", graph, exported.plan)
        shutil.rmtree(tmp_path / "wrong")


def test_a_damaged_folder_is_an_export_error(linear, tmp_path):
    exported = export(linear, tmp_path / "q", preset="int4", group=16)
    (tmp_path / "q" / FILE).write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(ExportError, match=r"cannot be read"):
        VllmEmitter().verify(tmp_path / "q", load_graph(linear), exported.plan)

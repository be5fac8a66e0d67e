"""How each target's files are written: what stands in them, beside that they are right."""

import hashlib
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from quantkit.errors import PlanError, UnknownNameError
from quantkit.export import get_emitter, list_emitters
from quantkit.export.rewrite import IR_VERSIONS
from quantkit.planning.plan import Plan
from quantkit.runtime import Session
from tests.models import MODELS, TinyModel, external_weights
from tests.plans import NOTHING, TARGETS, calibrate, calibrated

every_model = pytest.mark.parametrize(
    "tiny", [m for n, m in MODELS.items() if n not in NOTHING], ids=lambda m: m.name
)
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def emitted(name: str, target: str = "tensorrt", preset: str = "int8") -> tuple[Plan, onnx.ModelProto]:
    held = calibrated(name)
    plan = held.plan(target, preset)
    return plan, ir.serde.serialize_model(get_emitter(target).emit(held.graph, plan))


def initializers(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in model.graph.initializer}


def by_type(model: onnx.ModelProto, op_type: str) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.op_type == op_type]


def opset(model: onnx.ModelProto) -> int:
    return next(o.version for o in model.opset_import if o.domain == "")


def added(name: str, model: onnx.ModelProto, op_type: str) -> list[onnx.NodeProto]:
    """The nodes of a type that the float model does not have."""
    there = {n.name for n in calibrated(name).graph.model.graph}
    return [n for n in by_type(model, op_type) if n.name not in there]


# --- every target -------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("preset", ["int8", "fp8"])
def test_opset_and_ir_version_are_ones_that_runtimes_read(tiny: TinyModel, preset: str) -> None:
    for target in TARGETS:
        _, model = emitted(tiny.name, target, preset)
        assert max(19, calibrated(tiny.name).graph.opset) <= opset(model) <= 23
        assert model.ir_version == IR_VERSIONS[opset(model)] <= 11
        assert model.producer_name == "quantkit"


@every_model
def test_quantized_weights_are_stored_as_codes_and_not_as_floats_beside(tiny: TinyModel) -> None:
    held = calibrated(tiny.name)
    for target, preset in (("tensorrt", "int8"), ("tensorrt", "fp8"), ("ort", "int8"), ("ort-cpu", "int8")):
        plan, model = emitted(tiny.name, target, preset)
        stored = initializers(model)
        types = Counter(t.data_type for t in stored.values())
        wanted = TensorProto.INT8 if preset == "int8" else TensorProto.FLOAT8E4M3FN
        assert types[wanted] >= len(plan.weights)
        for weight in plan.weights:
            users = held.graph.values[weight.name].uses()
            only = {(str(n.name), i) for n, i in users} <= {r for w in plan.weights for r in w.readers}
            kept = weight.name in held.graph.outputs or not only
            assert (weight.name in stored) == kept


@every_model
def test_nothing_is_stored_that_nobody_reads(tiny: TinyModel) -> None:
    for target in TARGETS:
        _, model = emitted(tiny.name, target)
        read = {name for node in _all_nodes(model.graph) for name in node.input}
        read |= {o.name for o in model.graph.output}
        assert set(initializers(model)) <= read


def _all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    found = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            found += _all_nodes(attribute.g)
    return found


@every_model
def test_names_are_unique(tiny: TinyModel) -> None:
    for target in TARGETS:
        _, model = emitted(tiny.name, target)
        values = [o for n in model.graph.node for o in n.output if o] + [
            t.name for t in model.graph.initializer
        ]
        assert max(Counter(values).values()) == 1
        assert max(Counter(n.name for n in _all_nodes(model.graph)).values()) == 1


@pytest.mark.parametrize("target", TARGETS)
def test_a_weight_that_two_nodes_read_is_stored_and_dequantized_once(target: str) -> None:
    _, model = emitted("shared_weight", target)
    assert len([t for t in initializers(model).values() if len(t.dims) == 4]) == 1
    weights = [n.input[1] for n in by_type(model, "Conv")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("target", TARGETS)
def test_a_weight_read_along_two_axes_is_stored_along_both(target: str) -> None:
    _, model = emitted("shared_weight_axes", target)
    stored = [t for t in initializers(model).values() if t.data_type == TensorProto.INT8 and len(t.dims) == 2]
    assert len(stored) == 2


@pytest.mark.parametrize("target", TARGETS)
def test_the_table_of_a_gather_stays_in_float_though_a_matmul_reads_it_quantized(target: str) -> None:
    _, model = emitted("tied_embedding", target)
    (gather,) = by_type(model, "Gather")
    assert initializers(model)[gather.input[0]].data_type == TensorProto.FLOAT


def test_a_plan_of_another_model_is_refused() -> None:
    plan = calibrated("gemm").plan()
    with pytest.raises(PlanError, match="solve it again from this model's cache"):
        get_emitter("tensorrt").emit(calibrated("gemm_trans_b").graph, plan)


def test_an_unknown_target_answers_with_its_neighbours() -> None:
    with pytest.raises(UnknownNameError, match=r"target tensort: no such target; did you mean tensorrt"):
        get_emitter("tensort")


def test_every_target_is_listed_and_loads() -> None:
    assert {name: error for name, error in list_emitters().items() if name in TARGETS} == dict.fromkeys(
        TARGETS, ""
    )


def test_a_file_is_the_same_in_another_process_whatever_its_hash_seed() -> None:
    code = (
        "import hashlib, onnx_ir as ir\n"
        "from quantkit.export import get_emitter\n"
        "from tests.plans import TARGETS, calibrate, calibrated\n"
        "for name in ('pass_through', 'residual_downsample', 'concat_branches', 'shared_weight_axes'):\n"
        "    for target in TARGETS:\n"
        "        held = calibrated(name)\n"
        "        model = get_emitter(target).emit(held.graph, held.plan(target, method='entropy'))\n"
        "        print(hashlib.sha256(ir.serde.serialize_model(model).SerializeToString()).hexdigest())\n"
    )
    root = Path(__file__).resolve().parents[2]
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=root,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
        ).stdout.split()
        for seed in ("0", "7")
    ]
    assert runs[0] == runs[1]
    held = calibrated("pass_through")
    model = get_emitter("tensorrt").emit(held.graph, held.plan("tensorrt", method="entropy"))
    assert runs[0][0] == hashlib.sha256(ir.serde.serialize_model(model).SerializeToString()).hexdigest()


def test_a_model_of_external_weights_is_exported_whole(tmp_path: Path) -> None:
    source, folder = tmp_path / "a folder", tmp_path / "другая"
    source.mkdir()
    folder.mkdir()
    external_weights(source / "model.onnx")
    feeds = MODELS["conv_relu"].feeds(8)
    held = calibrate(source / "model.onnx", feeds)
    # One layer stays in float, so that its weight must come along.
    held = replace(held, histograms={"x": held.histograms["x"]})
    plan = held.plan()
    assert list(plan.nodes) == ["Conv"]
    model = get_emitter("tensorrt").emit(held.graph, plan)
    ir.save(model, folder / "quantized.onnx")
    inline = replace(calibrated("conv_relu"), histograms=held.histograms)
    expected = Session(get_emitter("tensorrt").emit(inline.graph, inline.plan()), threads=1).run(feeds[0])
    for file in source.iterdir():
        file.unlink()
    found = Session(folder / "quantized.onnx", threads=1).run(feeds[0])
    np.testing.assert_array_equal(found["y"], expected["y"])


# --- tensorrt -----------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("preset", ["int8", "fp8"])
def test_tensorrt_pairs_have_typed_zero_points_that_are_zero(tiny: TinyModel, preset: str) -> None:
    plan, model = emitted(tiny.name, "tensorrt", preset)
    stored = initializers(model)
    wanted = TensorProto.INT8 if preset == "int8" else TensorProto.FLOAT8E4M3FN
    quantizers = added(tiny.name, model, "QuantizeLinear")
    assert len(quantizers) == len(plan.activations)
    for node in [*quantizers, *added(tiny.name, model, "DequantizeLinear")]:
        assert len(node.input) == 3
        zero = stored[node.input[2]]
        assert zero.data_type == wanted
        assert not numpy_helper.to_array(zero).astype(np.float32).any()
        assert zero.dims == stored[node.input[1]].dims


@every_model
@pytest.mark.parametrize("preset", ["int8", "fp8"])
def test_tensorrt_quantizes_only_what_linear_operators_and_residual_adds_read(
    tiny: TinyModel, preset: str
) -> None:
    plan, model = emitted(tiny.name, "tensorrt", preset)
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    for quantize in added(tiny.name, model, "QuantizeLinear"):
        assert readers[quantize.output[0]] == {"DequantizeLinear"}
        (pair,) = (n for n in by_type(model, "DequantizeLinear") if n.input[0] == quantize.output[0])
        assert readers[pair.output[0]] <= {*LINEAR, "Add"}
        assert pair.output[0] not in {o.name for o in model.graph.output}
    assert {name for name, a in plan.activations.items() if not a.readers} == set()


@every_model
def test_tensorrt_adds_biases_in_float(tiny: TinyModel) -> None:
    _, model = emitted(tiny.name, "tensorrt")
    assert TensorProto.INT32 not in {t.data_type for t in model.graph.initializer if len(t.dims)}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 and node.input[2] in initializers(model):
            assert initializers(model)[node.input[2]].data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)


@pytest.mark.parametrize(
    ("name", "axis"), [("conv_no_bias", 0), ("conv_transpose", 1), ("gemm", 1), ("gemm_trans_b", 0)]
)
def test_weights_are_dequantized_along_their_output_channels(name: str, axis: int) -> None:
    _, model = emitted(name)
    (node,) = (n for n in by_type(model, "DequantizeLinear") if n.input[0] in initializers(model))
    assert onnx.helper.get_node_attr_value(node, "axis") == axis
    assert list(initializers(model)[node.input[1]].dims) == [initializers(model)[node.input[0]].dims[axis]]


def test_the_scales_of_a_float16_model_are_float16() -> None:
    for target in TARGETS:
        for preset in ("int8", "fp8"):
            _, model = emitted("fp16", target, preset)
            stored = initializers(model)
            for node in by_type(model, "QuantizeLinear") + by_type(model, "DequantizeLinear"):
                assert stored[node.input[1]].data_type == TensorProto.FLOAT16


# --- ort, ort-cpu -------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("target", ["ort", "ort-cpu"])
def test_onnx_runtime_gets_biases_as_int32_with_the_scale_of_the_product(
    tiny: TinyModel, target: str
) -> None:
    plan, model = emitted(tiny.name, target)
    stored = initializers(model)
    biases = [t for t in stored.values() if t.data_type == TensorProto.INT32 and "_quantized" in t.name]
    assert len(biases) == len(plan.biases)
    makers = {o: n for n in model.graph.node for o in n.output}
    for bias in plan.biases:
        node = next(n for n in model.graph.node if n.name == bias.reader[0])
        parts = [makers[name] for name in node.input]
        assert [p.op_type for p in parts] == ["DequantizeLinear"] * 3
        scales = [numpy_helper.to_array(stored[p.input[1]]) for p in parts]
        np.testing.assert_array_equal(scales[2], scales[0] * scales[1])


@every_model
def test_float8_for_onnx_runtime_has_no_zero_points_and_no_dequantizers(tiny: TinyModel) -> None:
    plan, model = emitted(tiny.name, "ort", "fp8")
    assert opset(model) >= 21
    quantizers = added(tiny.name, model, "QuantizeLinear")
    assert len(quantizers) == len(plan.activations)
    for node in quantizers:
        assert len(node.input) == 2
        assert onnx.helper.get_node_attr_value(node, "output_dtype") == TensorProto.FLOAT8E4M3FN
    assert not added(tiny.name, model, "DequantizeLinear")
    other = emitted(tiny.name, "ort-cpu", "fp8")[1]
    assert other == model


@every_model
def test_ort_cpu_has_uint8_activations_and_int8_weights(tiny: TinyModel) -> None:
    _, model = emitted(tiny.name, "ort-cpu")
    stored = initializers(model)
    for node in added(tiny.name, model, "QuantizeLinear"):
        assert stored[node.input[2]].data_type == TensorProto.UINT8
    for node in added(tiny.name, model, "DequantizeLinear"):
        if node.input[0] in stored:
            assert stored[node.input[0]].data_type in (TensorProto.INT8, TensorProto.INT32)

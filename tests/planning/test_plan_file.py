"""Plans as files: what is written reads back bit for bit, people can change it, and what cannot be is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import quantkit
from quantkit.errors import PlanError
from quantkit.formats import dequantize
from quantkit.graph import load_graph
from quantkit.planning.plan import Plan
from quantkit.planning.plan_file import load_plan, save_plan
from quantkit.planning.presets import list_presets
from tests.models import MODELS, model_of
from tests.plans import TARGETS, calibrate, calibrated


def same(one: Plan, other: Plan) -> None:
    """Assert that two plans say the same, bit for bit."""
    for name in ("model", "fingerprint", "preset", "target", "method", "nodes", "left", "formats"):
        assert getattr(one, name) == getattr(other, name)
    assert list(one.activations) == list(other.activations)
    for a, b in zip(one.activations.values(), other.activations.values(), strict=True):
        assert (a.name, a.spec, a.readers) == (b.name, b.spec, b.readers)
        assert (a.qparams is None) == (b.qparams is None)
        if a.qparams is not None and b.qparams is not None:
            assert a.qparams.scale == b.qparams.scale
            assert a.qparams.scale.dtype == b.qparams.scale.dtype
            assert a.qparams.zero_point == b.qparams.zero_point
        assert a.global_scale == b.global_scale
    assert len(one.weights) == len(other.weights)
    for w, v in zip(one.weights, other.weights, strict=True):
        assert (w.name, w.spec, w.readers) == (v.name, v.spec, v.readers)
        assert_array_equal(w.qparams.scale, v.qparams.scale, strict=True)
        assert (w.qparams.zero_point is None) == (v.qparams.zero_point is None)
        if w.qparams.zero_point is not None:
            assert_array_equal(w.qparams.zero_point, v.qparams.zero_point, strict=True)
        assert w.qparams.global_scale == v.qparams.global_scale
    for b, c in zip(one.biases, other.biases, strict=True):
        assert (b.name, b.reader) == (c.name, c.reader)
        assert_array_equal(b.qvalue, c.qvalue, strict=True)
        assert_array_equal(b.scale, c.scale, strict=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["conv_relu", "gemm_trans_b", "shared_weight_axes", "fp16", "odd_names"])
def test_a_plan_reads_back_bit_for_bit(name: str, target: str, tmp_path: Path) -> None:
    plan = calibrated(name).plan(target)
    save_plan(plan, tmp_path / "plan.json")
    same(load_plan(tmp_path / "plan.json"), plan)


MATRICES = """(float[B,64] x) => (float[B,32] y) <float[64,48] w, float[48,32] v> {
    h = MatMul (x, w) r = Relu (h) y = MatMul (r, v) }"""


@pytest.mark.parametrize("preset", list_presets())
def test_every_format_can_be_saved_and_obeyed(preset: str, tmp_path: Path) -> None:
    model = model_of(MATRICES)
    cache = quantkit.calibrate_model(model, np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32))
    target = "ort" if preset in ("int16", "w16a16", "int2") else "tensorrt"
    # Groups that divide both matrices, where there are any to choose.
    group = 16 if preset in ("int4", "w4a8", "w4a8-fp8", "int2") else None
    if preset in ("mxfp4", "mxfp8"):
        model = model_of(MATRICES.replace("48", "96"))
        cache = quantkit.calibrate_model(
            model, np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
        )
    first = quantkit.export_model(
        model,
        cache,
        preset=preset,
        target=target,
        group=group,
        everything=True,
        out=tmp_path / "first.onnx",
        plan_out=tmp_path / "plan.json",
    )
    same(load_plan(tmp_path / "plan.json"), first.plan)
    second = quantkit.export_model(model, plan=tmp_path / "plan.json", out=tmp_path / "second.onnx")
    assert (second.plan.preset, second.plan.target) == (preset, target)
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "second.onnx").read_bytes()


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    plan = calibrated("conv_relu").plan("ort")
    for name in ("one.json", "two.json"):
        save_plan(plan, tmp_path / name)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    beside = [tmp_path / f"{name}.json.safetensors" for name in ("one", "two")]
    assert beside[0].exists() == beside[1].exists()
    if beside[0].exists():
        assert beside[0].read_bytes() == beside[1].read_bytes()


def test_whoever_reads_a_plan_reads_what_lies_beside_it(tmp_path: Path) -> None:
    held = calibrate(model_of(MATRICES), [{"x": np.ones((2, 64), np.float32)}])
    save_plan(held.plan("tensorrt"), tmp_path / "plan.json")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes["plan.json.safetensors"] == modes["plan.json"]


def written(tmp_path: Path, name: str = "matmul") -> tuple[Path, dict]:
    path = tmp_path / "plan.json"
    save_plan(calibrated(name).plan("tensorrt"), path)
    return path, json.loads(path.read_text())


def test_a_scale_that_somebody_changes_is_obeyed(tmp_path: Path) -> None:
    path, found = written(tmp_path)
    (entry,) = [a for a in found["activations"] if a["name"] == "x"]
    entry["scale"] = 0.5
    path.write_text(json.dumps(found))
    model = MODELS["matmul"].build()
    exported = quantkit.export_model(model, plan=path, out=tmp_path / "q.onnx")
    assert exported.plan.activations["x"].static.scale == 0.5
    initializers = load_graph(tmp_path / "q.onnx").model.graph.initializers
    assert 0.5 in [v.const_value.numpy() for v in initializers.values() if v.const_value.size == 1]


def test_numbers_of_few_elements_stand_in_the_text(tmp_path: Path) -> None:
    _, found = written(tmp_path, "conv_relu")
    (first, *_) = found["weights"]
    assert isinstance(first["scale"], list)
    assert all(isinstance(scale, float) for scale in first["scale"])


def test_codes_that_a_method_chose_are_kept(tmp_path: Path) -> None:
    from dataclasses import replace

    held = calibrated("matmul")
    plan = held.plan("tensorrt")
    (weight, *rest) = plan.weights
    codes = weight.quantize(held.graph.array(weight.name)).qvalue.copy()
    codes.flat[0] = 7
    plan = replace(plan, weights=[replace(weight, codes=codes), *rest])
    save_plan(plan, tmp_path / "plan.json")
    found = load_plan(tmp_path / "plan.json").weights[0]
    assert found.codes is not None
    assert_array_equal(found.codes, codes, strict=True)
    assert dequantize(found.quantize(held.graph.array(weight.name))).flat[0] == pytest.approx(
        7 * weight.qparams.scale.flat[0]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("weights"), "weight: not a list"),
        (lambda p: p["weights"][0].pop("scale"), r"weight w.*: scale is missing"),
        (lambda p: p["weights"][0].update(format="int5"), r"weight w.*int5"),
        (lambda p: p["weights"][0].update(scale=[-1.0]), r"weight w.*positive"),
        (lambda p: p["weights"][0].update(scale={"in": "nowhere"}), r"nowhere is not in the safetensors"),
        (lambda p: p["activations"][0].update(scale=float("nan")), "positive"),
        (lambda p: p["activations"][0].update(zero_point=1000), "zero point 1000"),
        (lambda p: p["activations"][0].update(scale="much"), "activation x"),
        (lambda p: p["activations"][0].update(scale=0), "scale of 0"),
        (lambda p: p["activations"][0].update(zero_point=0.5), "zero point 0.5"),
        (lambda p: p["activations"][0].update(readers=[["y", -1]]), "counted from 0"),
        (lambda p: p["weights"][0].update(readers=[]), "weight w.*: nobody reads it"),
        (lambda p: p.update(quantkit_plan=99), "no plan of version 1"),
        (lambda p: p.update(nodes=3), "plan 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(change, message: str, tmp_path: Path) -> None:
    path, found = written(tmp_path)
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(PlanError, match=message) as caught:
        load_plan(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_plans_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        load_plan(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(PlanError, match="not JSON"):
        load_plan(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(PlanError, match="no plan"):
        load_plan(tmp_path / "list.json")


def test_a_plan_of_another_model_or_target_is_refused(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    with pytest.raises(PlanError, match="solved for model"):
        quantkit.export_model(MODELS["gemm"].build(), plan=path, out=tmp_path / "q.onnx")
    with pytest.raises(PlanError, match="it is for tensorrt, not ort"):
        quantkit.export_model(MODELS["matmul"].build(), plan=path, target="ort", out=tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


def test_scales_that_do_not_fit_their_weight_are_refused(tmp_path: Path) -> None:
    path, found = written(tmp_path)
    found["weights"][0]["scale"] = [1.0]
    path.write_text(json.dumps(found))
    with pytest.raises(PlanError, match=r"needs scales of shape \(.*and has \(1,\)"):
        quantkit.export_model(MODELS["matmul"].build(), plan=path, out=tmp_path / "q.onnx")
    found["weights"][0]["name"] = "x"
    path.write_text(json.dumps(found))
    with pytest.raises(PlanError, match="no weight x"):
        quantkit.export_model(MODELS["matmul"].build(), plan=path, out=tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["nodes"].update(other="MatMul"), "nodes: .* has no MatMul other"),
        (lambda p: p["nodes"].update(dict.fromkeys(p["nodes"], "Conv")), "nodes: .* has no Conv"),
        (lambda p: p["weights"].clear() or p["activations"].clear(), "reads nothing quantized"),
        (lambda p: p["nodes"].clear(), "is not among nodes"),
        (lambda p: p["formats"].update(other="int8"), "other is not among nodes"),
    ],
)
def test_nodes_that_are_not_those_quantized_are_refused(change, message: str, tmp_path: Path) -> None:
    path, found = written(tmp_path)
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(PlanError, match=message):
        quantkit.export_model(MODELS["matmul"].build(), plan=path, out=tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize("codes", [3, [[1, 2]]])
def test_codes_that_are_no_bias_are_refused(codes: object, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    save_plan(calibrated("conv_relu").plan("ort"), path)
    found = json.loads(path.read_text())
    found["biases"][0]["codes"] = codes
    path.write_text(json.dumps(found))
    with pytest.raises(PlanError, match=r"bias .* has codes of shape"):
        quantkit.export_model(MODELS["conv_relu"].build(), plan=path, out=tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()

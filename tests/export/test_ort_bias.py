"""Biases in files for ONNX Runtime: none of its passes makes others of them, whatever the types around them."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from quantkit import calibrate_model, export_model
from quantkit.export import get_emitter
from quantkit.planning.simulate import simulate
from quantkit.runtime import Session
from tests.models import model_of, normal
from tests.plans import calibrate, sqnr_db

TWO_CONVOLUTIONS = """({0}[N,16,6,6] x) => ({0}[N,8,6,6] y)
    <{0}[32,16,1,1] w, {0}[32] b, {0}[8,32,1,1] v, {0}[8] c> {{
    a = Conv (x, w, b)
    r = Relu (a)
    y = Conv (r, v, c) }}"""


@pytest.mark.parametrize("target", ["ort", "ort-cpu"])
@pytest.mark.parametrize(
    ("preset", "dtype"),
    [("int16", np.float32), ("w16a16", np.float32), ("int8", np.float16), ("int16", np.float16)],
)
def test_a_bias_far_above_the_products_stays_what_it_is_at_every_level(
    preset: str, dtype: type, target: str, tmp_path: Path
) -> None:
    # In s_x · s_w these biases need more than 2³¹ codes of 16 bits, and more than float16 holds of 8.
    weights = {
        "w": 1e-3 * normal(32, 16, 1, 1),
        "b": 4 * normal(32),
        "v": 1e-2 * normal(8, 32, 1, 1),
        "c": normal(8),
    }
    name = "float16" if dtype is np.float16 else "float"
    model = model_of(
        TWO_CONVOLUTIONS.format(name), **{n: array.astype(dtype) for n, array in weights.items()}
    )
    rng = np.random.default_rng(0)
    held = calibrate(model, [{"x": (1e-2 * rng.normal(size=(2, 16, 6, 6))).astype(dtype)} for _ in range(4)])
    plan, path = held.plan(target, preset), tmp_path / "model.onnx"
    ir.save(get_emitter(target).emit(held.graph, plan), path)
    expected = simulate(held.graph, plan, held.feeds[0])["y"]
    for optimize in (False, True):
        found = Session(path, threads=1, optimize=optimize).run(held.feeds[0])["y"]
        assert sqnr_db(expected.astype(np.float64), found.astype(np.float64)) > 50


@pytest.mark.parametrize("target", ["ort", "ort-cpu"])
def test_biases_cast_to_float16_are_not_quantized_in_it(target: str, tmp_path: Path) -> None:
    model = model_of(TWO_CONVOLUTIONS.format("float"), w=normal(32, 16, 1, 1), b=5 * normal(32))
    x = (1e-2 * np.random.default_rng(0).normal(size=(8, 16, 6, 6))).astype(np.float32)
    cache = calibrate_model(model, x, method="minmax")
    exported = export_model(
        model, cache, preset="int8", target=target, high_precision="fp16", out=tmp_path / "q.onnx"
    )
    judged, optimized = (
        Session(exported.path, threads=1, optimize=o).run({"x": x})["y"] for o in (False, True)
    )
    assert sqnr_db(judged, optimized) > 50


@pytest.mark.parametrize("target", ["ort", "ort-cpu", "ort-qoperator"])
def test_a_scale_for_a_whole_weight_is_wide_enough_for_every_bias(target: str, tmp_path: Path) -> None:
    model = model_of(TWO_CONVOLUTIONS.format("float"), b=1e6 * normal(32))
    x = np.random.default_rng(0).normal(size=(8, 16, 6, 6)).astype(np.float32)
    cache = calibrate_model(model, x, method="minmax")
    exported = export_model(
        model, cache, preset="int8", target=target, per_tensor=True, out=tmp_path / "q.onnx"
    )
    assert {weight.qparams.scale.shape for weight in exported.plan.weights} == {()}

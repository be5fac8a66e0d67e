"""The whole table of awkward models, exported for every target and held against the plan."""

import contextlib
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quantkit.errors import ModelError, PlanError
from quantkit.export import get_emitter
from quantkit.export.verify import verify
from quantkit.graph import Graph, load_graph
from quantkit.planning.plan import Plan
from quantkit.planning.simulate import simulate
from quantkit.runtime import Session
from tests.models import MODELS, TinyModel
from tests.plans import NOTHING, TARGETS, Calibrated, calibrated, sqnr_db

every_model = pytest.mark.parametrize(
    "tiny", [m for n, m in MODELS.items() if n not in NOTHING], ids=lambda m: m.name
)


@cache
def plans(name: str) -> dict[str, Plan]:
    """The plans that differ, by "target preset": those that would quantize nothing left out."""
    held = calibrated(name)
    found: dict[str, Plan] = {}
    # For float8, ort-cpu is as ort is; another test holds that.
    for target, preset in [*product(TARGETS, ("int8",)), ("tensorrt", "fp8"), ("ort", "fp8")]:
        found[f"{target} {preset}"] = held.plan(target, preset)
        with contextlib.suppress(PlanError):
            default = held.plan(target, preset, everything=False)
            if default.nodes != found[f"{target} {preset}"].nodes:
                found[f"{target} {preset} default"] = default
    return found


def is_half(held: Calibrated) -> bool:
    return any(held.graph.values[name].dtype == ir.DataType.FLOAT16 for name in held.histograms)


@every_model
def test_a_written_file_is_valid_and_does_what_its_plan_says(tiny: TinyModel, tmp_path: Path) -> None:
    held = calibrated(tiny.name)
    for name, plan in plans(tiny.name).items():
        path = tmp_path / "quantized.onnx"
        ir.save(get_emitter(plan.target).emit(held.graph, plan), path)
        onnx.checker.check_model(str(path), full_check=True)
        found = verify(path, held.graph, plan, held.feeds[0])
        # float32 sums in another order leave 120 dB and more, float16 ones 60.
        assert found.plan_sqnr_db > (55 if is_half(held) else 100), (name, found)


@every_model
def test_files_for_onnx_runtime_mean_the_same_to_its_whole_optimizer(tiny: TinyModel, tmp_path: Path) -> None:
    held = calibrated(tiny.name)
    for name, plan in plans(tiny.name).items():
        if plan.target == "tensorrt":
            continue
        path = tmp_path / "quantized.onnx"
        ir.save(get_emitter(plan.target).emit(held.graph, plan), path)
        optimized, exact = Session(path, threads=1), Session(held.graph.model, threads=1)
        expected = [simulate(held.graph, plan, feed) for feed in held.feeds[1:3]]
        found = [optimized.run(feed) for feed in held.feeds[1:3]]
        lost = [exact.run(feed) for feed in held.feeds[1:3]]
        for output in held.graph.outputs:
            if expected[0][output].dtype.kind not in "fV":
                continue
            parts = [
                np.concatenate([run[output].ravel() for run in runs]) for runs in (expected, found, lost)
            ]
            np.testing.assert_array_equal(np.isfinite(parts[0]), np.isfinite(parts[1]))
            # A value on a rounding boundary may fall either way; what is wrong costs as much as quantization.
            assert sqnr_db(parts[0], parts[1]) > min(sqnr_db(parts[2], parts[0]) + 10, 45), (name, output)


@every_model
def test_the_names_and_types_of_inputs_and_outputs_stay(tiny: TinyModel) -> None:
    held = calibrated(tiny.name)
    for plan in plans(tiny.name).values():
        model = get_emitter(plan.target).emit(held.graph, plan)
        for mine, theirs in (
            (model.graph.inputs, held.graph.model.graph.inputs),
            (model.graph.outputs, held.graph.model.graph.outputs),
        ):
            assert [(v.name, v.dtype, v.shape) for v in mine] == [(v.name, v.dtype, v.shape) for v in theirs]


@every_model
def test_exporting_leaves_the_graph_as_it_was(tiny: TinyModel) -> None:
    graph = load_graph(tiny.build())
    before = ir.serde.serialize_model(graph.model).SerializeToString()
    first = [_bytes(graph, plan) for plan in plans(tiny.name).values()]
    assert ir.serde.serialize_model(graph.model).SerializeToString() == before
    assert [_bytes(graph, plan) for plan in plans(tiny.name).values()] == first
    assert [_bytes(calibrated(tiny.name).graph, plan) for plan in plans(tiny.name).values()] == first


def _bytes(graph: Graph, plan: Plan) -> bytes:
    return ir.serde.serialize_model(get_emitter(plan.target).emit(graph, plan)).SerializeToString()


@pytest.mark.parametrize("name", sorted(NOTHING))
def test_a_model_without_anything_to_quantize_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="nothing to calibrate"):
        calibrated(name)

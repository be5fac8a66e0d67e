from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from quantkit.errors import ExportError
from quantkit.export import get_emitter
from quantkit.export.verify import Verification, verify
from quantkit.planning.plan import Plan
from tests.models import model_of
from tests.plans import Calibrated, calibrate, calibrated, images


def written(held: Calibrated, plan: Plan, folder: Path) -> Path:
    path = folder / "quantized.onnx"
    ir.save(get_emitter(plan.target).emit(held.graph, plan), path)
    return path


def spoiled(held: Calibrated, plan: Plan, folder: Path, change: Callable[[onnx.ModelProto], None]) -> str:
    """Write the file, change it, and return why it is refused."""
    path = written(held, plan, folder)
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    with pytest.raises(ExportError) as caught:
        verify(path, held.graph, plan, held.feeds[0])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_stored(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(change(array).astype(array.dtype), name))


def test_a_right_file_agrees_with_its_plan(tmp_path: Path) -> None:
    held = calibrated("residual_identity")
    plan = held.plan("ort-cpu")
    found = verify(written(held, plan, tmp_path), held.graph, plan, held.feeds[0])
    assert isinstance(found, Verification)
    assert found.output == "y"
    assert found.plan_sqnr_db > 100
    assert 20 < found.float_sqnr_db < 60


@pytest.mark.parametrize("target", ["tensorrt", "ort", "ort-cpu"])
def test_a_wrong_scale_of_one_tensor_is_found_and_named(target: str, tmp_path: Path) -> None:
    held = calibrated("conv_relu")
    plan = held.plan(target)

    def change(model: onnx.ModelProto) -> None:
        change_stored(model, "r_scale", lambda scale: scale * 1.05)

    assert "its tensor y differs from the plan's" in spoiled(held, plan, tmp_path, change)


def test_one_wrong_code_of_one_channel_is_found(tmp_path: Path) -> None:
    held = calibrated("conv_relu")
    plan = held.plan()

    def change(model: onnx.ModelProto) -> None:
        def largest_to_zero(codes: np.ndarray) -> np.ndarray:
            changed = codes.copy()
            changed.reshape(-1)[np.argmax(np.abs(codes.astype(int)))] = 0
            return changed

        change_stored(model, "w0_quantized", largest_to_zero)

    assert "its tensor r differs from the plan's" in spoiled(held, plan, tmp_path, change)


def test_a_dropped_relu_is_found(tmp_path: Path) -> None:
    # What ONNX Runtime's optimizer does to float8 files with zero points.
    held = calibrated("conv_relu")
    plan = held.plan()

    def change(model: onnx.ModelProto) -> None:
        next(n for n in model.graph.node if n.op_type == "Relu").op_type = "Identity"

    assert "its tensor r differs" in spoiled(held, plan, tmp_path, change)


def test_a_file_that_is_not_valid_is_refused(tmp_path: Path) -> None:
    held = calibrated("conv_relu")

    def change(model: onnx.ModelProto) -> None:
        model.graph.node[0].input[0] = "nowhere"

    assert "is not valid ONNX" in spoiled(held, held.plan(), tmp_path, change)


def test_a_file_that_does_not_run_is_refused(tmp_path: Path) -> None:
    held = calibrated("conv_relu")

    def change(model: onnx.ModelProto) -> None:
        model.opset_import.append(helper.make_opsetid("nobody.knows", 1))
        next(n for n in model.graph.node if n.op_type == "Relu").domain = "nobody.knows"

    assert "does not run" in spoiled(held, held.plan(), tmp_path, change)


def test_outputs_of_integers_are_not_compared(tmp_path: Path) -> None:
    model = model_of("""(float[N,3,8,8] x) => (int64[N,6,6] label, float[N,4,6,6] y) <float[4,3,3,3] w> {
        y = Conv (x, w) label = ArgMax <axis = 1, keepdims = 0> (y) }""")
    held = calibrate(model, images(3, 8, 8))
    plan = held.plan()
    found = verify(written(held, plan, tmp_path), held.graph, plan, held.feeds[0])
    assert found.output == "y"
    assert found.plan_sqnr_db > 100


def test_outputs_whose_shape_depends_on_the_data_do_not_stop_an_export(tmp_path: Path) -> None:
    model = model_of(
        """(float[N,8] x) => (float[M] y) <float[8,8] w> {
        m = MatMul (x, w) p = Greater (m, zero) y = Compress (m, q) f = Cast <to = 9> (p) q = Reshape (f, flat) }""",
        zero=np.float32(0),
        flat=np.array([-1]),
    )
    held = calibrate(
        model, [{"x": np.random.default_rng(i).standard_normal((1, 8)).astype(np.float32)} for i in range(4)]
    )
    plan = held.plan()
    assert verify(written(held, plan, tmp_path), held.graph, plan, held.feeds[0]).tensor in ("x", "y")


def test_a_plan_that_differs_from_the_file_is_found(tmp_path: Path) -> None:
    held = calibrated("conv_relu")
    plan = held.plan()
    path = written(held, plan, tmp_path)
    other = replace(
        plan, activations=plan.activations | {"r": replace(plan.activations["x"], name="r", readers=())}
    )
    with pytest.raises(ExportError, match="differs"):
        verify(path, held.graph, other, held.feeds[0])

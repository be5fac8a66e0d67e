import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

import quantkit
from quantkit.cli.app import app
from quantkit.errors import CacheError, SpecError
from quantkit.mixed_precision.sensitivity import Sensitivity, measure_sensitivity
from quantkit.planning.planning import Request
from tests.models import Feed, model_of


def two_layers(folder: Path) -> tuple[Path, list[Feed]]:
    """An easy layer, and one with an outlier in every column, which four bits per channel do not take."""
    rng = np.random.default_rng(0)
    hard = rng.normal(size=(16, 16)).astype(np.float32)
    hard[0] = 60
    model = model_of(
        """(float[N,16] x) => (float[N,16] y) {
        a = MatMul (x, easy)
        r = Relu (a)
        y = MatMul (r, hard) }""",
        easy=rng.choice([-1.0, 1.0], (16, 16)).astype(np.float32),
        hard=hard,
    )
    path = folder / "model.onnx"
    onnx.save(model, path)
    feeds = [{"x": rng.normal(size=(1, 16)).astype(np.float32)} for _ in range(16)]
    quantkit.calibrate_model(path, feeds, method="minmax").save(folder / "model.calib")
    return path, feeds


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Sensitivity:
    folder = tmp_path_factory.mktemp("two")
    path, feeds = two_layers(folder)
    return measure_sensitivity(
        path, folder / "model.calib", feeds, request=Request(preset="int4", group="channel"), target="ort"
    )


def test_the_layer_that_costs_most_stands_first(measured: Sensitivity) -> None:
    first, second = measured.nodes
    assert first.weights == second.weights == 256
    assert first.sqnr_db < 30 < second.sqnr_db
    assert first.agreement_loss is not None and 0 <= first.agreement_loss <= 1


def test_noise_of_one_layer_alone_is_that_of_a_model_with_it_alone(tmp_path: Path) -> None:
    path, feeds = two_layers(tmp_path)
    request = Request(preset="int8")
    found = measure_sensitivity(path, tmp_path / "model.calib", feeds, request=request, target="ort")
    for node in found.nodes:
        exported = quantkit.export_model(
            path, tmp_path / "model.calib", include=[node.node], target="ort", out=tmp_path / "one.onnx"
        )
        alone = quantkit.evaluate_model(path, exported.path, feeds).outputs["y"].sqnr_db
        assert alone == pytest.approx(node.sqnr_db, abs=0.01)


def test_it_shows_itself_as_a_table_and_as_json(measured: Sensitivity) -> None:
    assert "SQNR dB" in str(measured) and "int4" in str(measured)
    held = json.loads(json.dumps(measured.to_dict(), allow_nan=False))
    assert [n["node"] for n in held["nodes"]] == [n.node for n in measured.nodes]


def test_a_target_that_cannot_be_run_is_refused(tmp_path: Path) -> None:
    path, feeds = two_layers(tmp_path)
    with pytest.raises(SpecError, match="no ONNX model that could be run"):
        measure_sensitivity(path, tmp_path / "model.calib", feeds, target="vllm")


def test_the_command_prints_every_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, feeds = two_layers(tmp_path)
    np.save(tmp_path / "data.npy", np.concatenate([f["x"] for f in feeds]))
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(
        app, ["sensitivity", str(path), "--data", "data.npy", "--int8", "--target", "ort"]
    )
    assert found.exit_code == 0, found.output
    assert found.output.count("per channel × int8") == 2 and "each layer alone" in found.output


def test_a_layer_alone_takes_up_its_own_mean_error_and_no_other_layers(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    model = model_of(
        """(float[N,16] x) => (float[N,16] y) {
        a = Gemm (x, first, c)
        r = Relu (a)
        b = MatMul (r, second)
        s = Relu (b)
        y = MatMul (s, third) }""",
        first=rng.normal(size=(16, 16)).astype(np.float32),
        c=np.ones(16, np.float32),
        second=rng.normal(size=(16, 16)).astype(np.float32),
        third=rng.normal(size=(16, 16)).astype(np.float32),
    )
    path, cache = tmp_path / "model.onnx", tmp_path / "model.calib"
    onnx.save(model, path)
    feeds = [{"x": 1 + rng.normal(size=(1, 16)).astype(np.float32)} for _ in range(16)]
    quantkit.calibrate_model(path, feeds, method="minmax").save(cache)
    request = Request(preset="int4", group="channel", method="mse+bias")
    found = measure_sensitivity(path, cache, feeds, request=request, target="ort")
    assert len(found.nodes) == 3
    for node in found.nodes:
        exported = quantkit.export_model(
            path,
            cache,
            preset="int4",
            group="channel",
            method="mse+bias",
            include=[node.node],
            target="ort",
            out=tmp_path / "one.onnx",
        )
        alone = quantkit.evaluate_model(path, exported.path, feeds).outputs["y"].sqnr_db
        assert node.sqnr_db == pytest.approx(alone, abs=1e-6)


def test_the_cache_of_another_model_is_refused_before_anything_is_run(tmp_path: Path) -> None:
    _, feeds = two_layers(tmp_path)
    other = model_of(
        """(float[N,16] x) => (float[N,16] y) {
        a = MatMul (x, easy)
        r = Relu (a)
        y = MatMul (r, hard) }""",
        easy=np.eye(16, dtype=np.float32),
        hard=np.eye(16, dtype=np.float32),
    )
    onnx.save(other, tmp_path / "other.onnx")
    done: list[object] = []
    with pytest.raises(CacheError, match="belongs to another model"):
        measure_sensitivity(
            tmp_path / "other.onnx", tmp_path / "model.calib", feeds, on_node=lambda *seen: done.append(seen)
        )
    with pytest.raises(CacheError, match="belongs to another model"):
        quantkit.meet_budget(
            tmp_path / "other.onnx",
            tmp_path / "model.calib",
            feeds,
            "sqnr 3",
            request=Request(),
            target="ort",
            out=tmp_path / "out.onnx",
            on_try=done.append,
        )
    assert not done and not (tmp_path / "out.onnx").exists()

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.models import MODELS


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    # Scripts in benchmarks/ are no package: they are loaded by their path.
    spec = importlib.util.spec_from_file_location("inference_benchmark", ROOT / "benchmarks/inference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_machine_that_slows_down_between_rounds_leaves_the_ratio_alone(benchmark: ModuleType) -> None:
    rows = benchmark.summarize([{"float": s, "tool": s / 2} for s in (1.0, 2.0, 10.0)])
    assert rows["float"] == {"time_ms": 2000, "ratio": 1}
    assert rows["tool"] == {"time_ms": 1000, "ratio": 0.5}


def test_a_batch_larger_than_the_data_starts_again(benchmark: ModuleType) -> None:
    feeds = [{"x": np.full((1, 2), i)} for i in range(3)]
    assert benchmark.joined(feeds, 5)["x"][:, 0].tolist() == [0, 1, 2, 0, 1]
    assert benchmark.joined(feeds, 1)["x"].shape == (1, 2)


def test_every_contender_has_its_turn_in_every_round(benchmark: ModuleType, tmp_path: Path) -> None:
    path = MODELS["conv_relu"].save(tmp_path)
    sessions = {name: benchmark.open_session(path, 1) for name in ("float", "tool")}
    rounds = benchmark.measure(sessions, MODELS["conv_relu"].feeds(1)[0], 3, 1e-4)
    assert len(rounds) == 3
    for found in rounds:
        assert found.keys() == sessions.keys()
        assert min(found.values()) > 0


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("quantkit ort-cpu", {"QLinearConv": 1}),
        ("quantize_static u8s8", {"QLinearConv": 2}),
    ],
)
def test_the_contenders_write_models_of_integer_kernels(
    benchmark: ModuleType, name: str, kernels: dict[str, int], tmp_path: Path
) -> None:
    tiny = MODELS["conv_relu"]
    path = benchmark.WRITERS[name](str(tiny.save(tmp_path)), tiny.feeds(4), tmp_path)
    benchmark.open_session(path, 1, tmp_path / "optimized.onnx")
    found = benchmark.operators(tmp_path / "optimized.onnx")
    # quantize_static rounds the network's output to 8 bits as well; quantkit leaves that to float.
    assert {op: found[op] for op in kernels} == kernels

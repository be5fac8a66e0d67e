"""What the real models keep: CIFAR-10 classifiers, 512 calibration images, 2,000 held-out ones."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import quantkit
from quantkit.data import open_data
from quantkit.graph import Graph, load_graph
from quantkit.metrics.outputs import OutputComparison
from quantkit.runtime import Session

METHODS = ("entropy", "minmax", "mse", "percentile")
BATCHES = 20
# How the models were trained to see pixels.
CIFAR10 = quantkit.ImagePreprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616))


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The least SQNR of a model's logits, dB: what the best other tool reached on it, or NVIDIA's for FP8.

    `s8` and `u8` are of the best method for the targets tensorrt and ort-cpu, `fp8` and `fp8_all` of entropy.
    """

    s8: float
    u8: float
    fp8: float
    fp8_all: float


FLOORS = {
    "resnet20": Floor(s8=30.1, u8=32.2, fp8=29.0, fp8_all=23.8),
    "mobilenetv2": Floor(s8=28.1, u8=31.5, fp8=27.0, fp8_all=22.3),
    "cct": Floor(s8=30.2, u8=31.8, fp8=28.3, fp8_all=23.5),
}


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A model with its statistics, and the held-out samples with what the float model makes of them."""

    graph: Graph
    cache: quantkit.CalibrationCache
    samples: NDArray[np.float32]
    labels: NDArray[np.uint8]
    logits: NDArray[np.float32]
    floor: Floor
    folder: Path

    def evaluate(self, **export: object) -> tuple[float, float, float]:
        """Return SQNR in dB, and top-1 of the float and of the exported model in percent.

        As `evaluate_model` does, but the float model has been run once and for all.
        """
        exported = quantkit.export_model(
            self.graph,
            self.cache,
            out=self.folder / "model.onnx",
            **export,  # type: ignore[arg-type]
        )
        found = OutputComparison("logits")
        for exact, written, labels in zip(
            np.array_split(self.logits, BATCHES),
            run_in_batches(Session(exported.path, optimize=False), self.samples),
            np.array_split(self.labels, BATCHES),
            strict=True,
        ):
            found.update(exact, written, labels.astype(np.int64))
        output = found.result()
        assert output.sqnr_db is not None
        assert output.accuracy_float is not None and output.accuracy_quantized is not None
        return output.sqnr_db, 100 * output.accuracy_float, 100 * output.accuracy_quantized


def run_in_batches(session: Session, samples: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    for part in np.array_split(samples, BATCHES):
        (output,) = session.run({"input": part}).values()
        yield output


@pytest.fixture(scope="module", params=FLOORS)
def model(
    request: pytest.FixtureRequest,
    shared_models: Path,
    shared_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Calibrated:
    graph = load_graph(shared_models / f"{request.param}.onnx")
    cache = quantkit.calibrate_model(graph, shared_data / "cifar10" / "calib", image=CIFAR10)
    assert cache.sample_count == 512
    held_out = np.load(shared_data / "cifar10" / "eval.npz")
    source = open_data(held_out["images"], graph.inputs, image=CIFAR10)
    samples = np.concatenate([sample["input"] for sample in source])
    assert len(samples) == 2000
    return Calibrated(
        graph=graph,
        cache=cache,
        samples=samples,
        labels=held_out["labels"],
        logits=np.concatenate(list(run_in_batches(Session(graph.model), samples))),
        floor=FLOORS[request.param],
        folder=tmp_path_factory.mktemp(request.param),
    )


@pytest.mark.parametrize("target", ["tensorrt", "ort-cpu"])
def test_int8_keeps_top1_with_every_method_and_the_best_beats_other_tools(
    model: Calibrated, target: str
) -> None:
    found = {}
    for method in METHODS:
        sqnr, before, after = model.evaluate(preset="int8", target=target, method=method, everything=True)
        assert abs(after - before) <= 0.5, f"{method}: {before:.2f} % became {after:.2f} %"
        found[method] = sqnr
    assert max(found.values()) >= (model.floor.s8 if target == "tensorrt" else model.floor.u8), found


@pytest.mark.parametrize("everything", [False, True], ids=["default", "all"])
def test_fp8_keeps_the_logits(model: Calibrated, everything: bool) -> None:
    sqnr, before, after = model.evaluate(preset="fp8", method="entropy", everything=everything)
    assert sqnr >= (model.floor.fp8_all if everything else model.floor.fp8)
    assert after >= before - (1.0 if everything else 0.5)


@pytest.mark.slow
def test_operator_form_keeps_as_much_as_its_plan_does_in_pairs(model: Calibrated) -> None:
    pairs = model.evaluate(preset="int8", target="ort-cpu")
    operators = model.evaluate(preset="int8", target="ort-qoperator")
    assert abs(operators[2] - pairs[2]) <= 0.2
    assert operators[0] == pytest.approx(pairs[0], abs=0.2)

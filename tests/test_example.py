from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from PIL import Image

from tests.conftest import DigitsExample


def test_the_shipped_example_stays_below_a_megabyte(digits: DigitsExample) -> None:
    files = [p for p in digits.model.parent.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 1_000_000


def test_the_example_holds_every_kind_of_layer_it_promises(digits: DigitsExample) -> None:
    graph = onnx.load(digits.model).graph
    kinds = {node.op_type for node in graph.node}
    assert kinds >= {
        "Conv",
        "BatchNormalization",
        "Relu",
        "Add",
        "Clip",
        "MaxPool",
        "GlobalAveragePool",
        "Gemm",
    }
    groups = [onnx.helper.get_node_attr_value(n, "group") for n in graph.node if n.op_type == "Conv"]
    assert max(groups) == 64


def test_calibration_images_are_not_evaluation_images(digits: DigitsExample) -> None:
    held_out = {image.tobytes() for image in np.load(digits.eval)["images"]}
    calib = [np.asarray(Image.open(path)).tobytes() for path in sorted(digits.calib.iterdir())]
    assert len(calib) == 256
    assert held_out.isdisjoint(calib)


def test_the_float_model_reads_98_of_100_held_out_digits(digits: DigitsExample) -> None:
    data = np.load(digits.eval)
    assert len(data["labels"]) >= 540
    session = ort.InferenceSession(str(digits.model), providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {"input": data["images"].astype(np.float32) / 255})[0]
    assert np.mean(logits.argmax(axis=1) == data["labels"]) >= 0.98


def test_the_images_on_disk_are_8_by_8_gray(digits: DigitsExample) -> None:
    def look(path: Path) -> tuple[str, tuple[int, int]]:
        with Image.open(path) as image:
            return image.mode, image.size

    assert {look(path) for path in digits.calib.iterdir()} == {("L", (8, 8))}

"""What weights in few bits keep of the real models, with no method that protects accuracy."""

from pathlib import Path
from typing import Any

import pytest

import quantkit
from tests.test_accuracy import CIFAR10


def evaluated(
    model: Path, data: Path, labels: object, folder: Path, image: object = None, **export: Any
) -> Any:
    exported = quantkit.export_model(model, out=folder / "model.onnx", everything=True, **export)
    found = quantkit.evaluate_model(model, exported.path, data, labels=labels, image=image)  # type: ignore[arg-type]
    (metrics,) = found.outputs.values()
    return metrics


@pytest.mark.parametrize(
    "export",
    [{"preset": "int4", "group": 32, "target": "ort"}, {"preset": "nvfp4"}],
    ids=["int4 g32", "nvfp4"],
)
def test_a_vision_transformer_keeps_its_top1_in_four_bits(
    export: dict[str, Any], shared_models: Path, shared_data: Path, tmp_path: Path
) -> None:
    held_out = shared_data / "cifar10" / "eval.npz"
    found = evaluated(shared_models / "cct.onnx", held_out, held_out, tmp_path, CIFAR10, **export)
    assert abs(found.accuracy_quantized - found.accuracy_float) <= 0.006


# Greatest perplexity, and greatest KL divergence in mnat; the float model has 4.583.
LANGUAGE = {
    "int4 g128": ({"preset": "int4", "target": "ort"}, 4.600, 16.5),
    "int4 g32": ({"preset": "int4", "group": 32, "target": "ort"}, 4.595, 11.5),
    "nvfp4": ({"preset": "nvfp4"}, 4.612, 10.5),
    "mxfp4 ocp": ({"preset": "mxfp4", "scale_rule": "ocp"}, 4.615, 25),
    "mxfp4 rceil": ({"preset": "mxfp4", "scale_rule": "rceil"}, 4.615, 25),
    "fp8": ({"preset": "fp8", "activations": False}, 4.590, 1.5),
    "mxfp8": ({"preset": "mxfp8", "activations": False}, 4.590, 1.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LANGUAGE)
def test_a_language_model_keeps_its_perplexity(
    name: str, shared_models: Path, shared_data: Path, tmp_path: Path
) -> None:
    export, perplexity, kl_mnat = LANGUAGE[name]
    found = evaluated(
        shared_models / "tiny_llama.onnx",
        shared_data / "shakespeare" / "eval.npz",
        "next-token",
        tmp_path,
        **export,
    )
    assert found.perplexity_quantized <= perplexity
    assert found.kl_mnat <= kl_mnat

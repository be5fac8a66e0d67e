import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from quantkit.graph import load_graph
from tests.models import MODELS, TinyModel, model_of, save_external

every_model = pytest.mark.parametrize("tiny", MODELS.values(), ids=MODELS)


@every_model
def test_the_fingerprint_outlives_saving_inline_and_external(tiny: TinyModel, tmp_path: Path) -> None:
    fingerprint = load_graph(tiny.build()).fingerprint
    save_external(tiny.build(), tmp_path / "external.onnx")
    assert load_graph(tiny.save(tmp_path)).fingerprint == fingerprint
    assert load_graph(tmp_path / "external.onnx").fingerprint == fingerprint
    assert len(fingerprint) == 64


def test_the_fingerprint_is_the_same_in_another_process(tmp_path: Path) -> None:
    path = MODELS["if_subgraph"].save(tmp_path)
    code = f"from quantkit.graph import load_graph; print(load_graph({str(path)!r}).fingerprint)"
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    assert found == [load_graph(path).fingerprint] * 2


@pytest.mark.parametrize("name", ["conv_relu", "if_subgraph", "fp16", "tied_embedding", "opset8"])
def test_the_fingerprint_changes_with_any_weight(name: str) -> None:
    fingerprint = load_graph(MODELS[name].build()).fingerprint
    for number in range(len(MODELS[name].build().graph.initializer)):
        model = MODELS[name].build()
        tensor = model.graph.initializer[number]
        values = numpy_helper.to_array(tensor).copy()
        values.reshape(-1)[-1:] += np.asarray(0.25, values.dtype)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        assert load_graph(model).fingerprint != fingerprint


def test_the_fingerprint_changes_with_a_weight_inside_a_branch() -> None:
    found = set()
    for value in (1.0, 2.0):
        model = MODELS["if_subgraph"].build()
        branch = next(n for n in model.graph.node if n.op_type == "If").attribute[1].g
        assert branch.node[0].op_type == "Relu"
        branch.node[0].op_type = "Mul"
        branch.node[0].input.append("factor")
        branch.initializer.append(numpy_helper.from_array(np.array(value, np.float32), "factor"))
        found.add(load_graph(model).fingerprint)
    assert len(found) == 2


@pytest.mark.parametrize("attribute", ["pads", "strides", "group"])
def test_the_fingerprint_changes_with_an_attribute(attribute: str) -> None:
    text = "(float[N,4,8,8] x) => (float[N,4,?,?] y) <float[4,2,3,3] w> {{ y = Conv <group = 2 {}> (x, w) }}"
    changed = {"pads": ", pads = [1,1,1,1]", "strides": ", strides = [2,2]", "group": ""}[attribute]
    one = model_of(text.format(""))
    other = model_of(text.format(changed))
    if attribute == "group":
        other.graph.node[0].attribute[0].i = 1
    assert load_graph(one).fingerprint != load_graph(other).fingerprint


def test_the_fingerprint_changes_with_the_wiring() -> None:
    one, other = MODELS["unnamed_nodes"].build(), MODELS["unnamed_nodes"].build()
    other.graph.node[2].input[0] = "h"
    assert load_graph(one).fingerprint != load_graph(other).fingerprint


def test_a_model_may_hold_strings() -> None:
    model = MODELS["gemm"].build()
    model.graph.node.extend(onnx.parser.parse_graph("g () => (string[2] s) { s = Identity (words) }").node)
    model.graph.output.append(onnx.helper.make_tensor_value_info("s", onnx.TensorProto.STRING, [2]))
    model.graph.initializer.append(
        onnx.helper.make_tensor("words", onnx.TensorProto.STRING, [2], [b"a", b"b"])
    )
    assert len(load_graph(model).fingerprint) == 64

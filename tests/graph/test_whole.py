import onnx
import pytest

from quantkit.errors import ModelError
from quantkit.graph import load_graph
from tests.graph.refusals import refusal
from tests.models import MODELS, model_of, normal

every_model = pytest.mark.parametrize("tiny", MODELS.values(), ids=MODELS)


def test_an_empty_model_is_refused() -> None:
    assert "no nodes" in refusal(onnx.ModelProto())


def test_a_tensor_that_nothing_computes_is_refused() -> None:
    model = MODELS["unnamed_nodes"].build()
    del model.graph.node[1]
    assert "MatMul without a name reads r, which nothing computes" in refusal(model)


def test_an_output_that_nothing_computes_is_refused() -> None:
    model = MODELS["gemm"].build()
    model.graph.output[0].name = "elsewhere"
    assert "nothing computes its output elsewhere" in refusal(model)


def test_a_weight_of_another_size_than_its_shape_is_refused() -> None:
    model = MODELS["gemm"].build()
    model.graph.initializer[0].dims[0] = 9
    assert "weight w cannot be read" in refusal(model)


@pytest.mark.parametrize(
    ("role", "kind", "says"),
    [
        ("output", "seq", "output s is a sequence"),
        ("output", "optional", "output s is optional"),
        ("input", "seq", "input s is a sequence"),
    ],
)
def test_inputs_and_outputs_that_are_no_tensors_are_refused(role: str, kind: str, says: str) -> None:
    signature, body = {
        ("output", "seq"): ("=> (float[N,3] y, seq(float[N,3]) s)", "s = SequenceConstruct (y)"),
        ("output", "optional"): ("=> (float[N,3] y, optional(float[N,3]) s)", "s = Optional (y)"),
        ("input", "seq"): (", seq(float[N,3]) s) => (float[N,3] y)", ""),
    }[role, kind]
    head = "(float[N,4] x" + ("" if role == "input" else ") ")
    model = model_of(f"{head}{signature} {{ y = MatMul (x, w) {body} }}", w=normal(4, 3))
    with pytest.raises(ModelError, match=f"{says}, .* compares tensors only; .* without that {role}"):
        load_graph(model)

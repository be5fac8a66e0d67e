import json
import math

import pytest

from quantkit.evaluation.evaluation import Evaluation, LayerMetrics
from quantkit.metrics.outputs import OutputMetrics

CLASSIFIER = OutputMetrics(
    sqnr_db=31.25,
    cosine=0.9996,
    top1_agreement=0.987,
    kl_mnat=2.5,
    accuracy_float=0.878,
    accuracy_quantized=0.8765,
)
LAYERS = (
    LayerMetrics(name="/conv1/Conv", op_type="Conv", sqnr_db=41.5),
    LayerMetrics(name="/fc/Gemm", op_type="Gemm", sqnr_db=12.25),
    LayerMetrics(name="/drop", op_type="MatMul", sqnr_db=None),
)


def evaluation(outputs, layers=()):
    return Evaluation(model="m.onnx", quantized="m.int8.onnx", samples=2000, outputs=outputs, layers=layers)


def test_a_measure_that_does_not_apply_is_absent_from_the_table():
    text = str(evaluation({"logits": CLASSIFIER}))
    assert "accuracy" in text
    assert "perplexity" not in text
    assert "NaN" not in text


def test_the_table_gives_percents_and_units():
    text = str(evaluation({"logits": CLASSIFIER}))
    for shown in ("31.25 dB", "98.70%", "2.500 mnat", "87.80%", "87.65%", "2,000 samples"):
        assert shown in text


def test_every_output_has_a_column():
    boxes = OutputMetrics(sqnr_db=20.0, cosine=0.99)
    lines = str(evaluation({"logits": CLASSIFIER, "boxes": boxes})).splitlines()
    assert lines[0].split()[-2:] == ["logits", "boxes"]
    assert next(line for line in lines if line.startswith("same top-1")).split()[-1] == "–"


def test_identical_outputs_say_so():
    assert "identical" in str(evaluation({"y": OutputMetrics(sqnr_db=math.inf, cosine=1.0)}))


def test_broken_outputs_say_so():
    broken = OutputMetrics(sqnr_db=-math.inf, cosine=math.nan, broken_count=12)
    line = next(x for x in str(evaluation({"y": broken})).splitlines() if x.startswith("NaN or inf"))
    assert line.split()[-1] == "12"


def test_layers_are_shown_in_the_order_of_execution_and_only_when_there():
    assert "layer" not in str(evaluation({"logits": CLASSIFIER}))
    text = str(evaluation({"logits": CLASSIFIER}, LAYERS))
    assert text.index("/conv1/Conv") < text.index("/fc/Gemm") < text.index("/drop")


def test_the_worst_layers_are_those_of_least_sqnr():
    made = evaluation({"logits": CLASSIFIER}, LAYERS)
    assert [layer.name for layer in made.worst_layers()] == ["/fc/Gemm", "/conv1/Conv"]
    assert [layer.name for layer in made.worst_layers(1)] == ["/fc/Gemm"]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_json_is_valid_where_a_number_is_not_finite(value):
    made = evaluation(
        {"y": OutputMetrics(sqnr_db=value, cosine=1.0)}, [LayerMetrics(name="a", op_type="B", sqnr_db=value)]
    )
    read = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    for found in (read["outputs"]["y"]["sqnr_db"], read["layers"][0]["sqnr_db"]):
        assert isinstance(found, str)
        assert float(found) == pytest.approx(value, nan_ok=True)


def test_json_has_every_measure_and_null_for_those_that_do_not_apply():
    read = evaluation({"logits": CLASSIFIER}, LAYERS).to_dict()
    assert read["samples"] == 2000
    assert read["outputs"]["logits"]["accuracy_quantized"] == 0.8765
    assert read["outputs"]["logits"]["perplexity_float"] is None
    assert read["layers"][2] == {"name": "/drop", "op_type": "MatMul", "sqnr_db": None}


def test_a_notebook_shows_tables_with_names_escaped():
    html = evaluation({"<y>": CLASSIFIER}, LAYERS)._repr_html_()
    assert html.count("<table>") == 2
    assert "&lt;y&gt;" in html


def test_notes_are_said_in_text_in_json_and_in_notebooks():
    made = Evaluation(
        model="m.onnx", quantized="q.onnx", samples=1, outputs={"y": CLASSIFIER}, notes=["q.onnx: <decoded>."]
    )
    assert str(made).splitlines()[-1] == "q.onnx: <decoded>."
    assert made.to_dict()["notes"] == ["q.onnx: <decoded>."]
    assert "<p>q.onnx: &lt;decoded&gt;.</p>" in made._repr_html_()
    assert evaluation({"y": CLASSIFIER}).to_dict()["notes"] == []

import numpy as np
import pytest

from quantkit.formats import Range
from quantkit.graph import load_graph
from quantkit.interchange.probe import made_up_probe
from quantkit.runtime import Session
from tests.models import MODELS, model_of


@pytest.mark.parametrize("name", MODELS)
def test_every_model_gets_an_input_that_it_runs_on(name):
    graph = load_graph(MODELS[name].build())
    probe = made_up_probe(graph, {})
    assert probe.keys() == {spec.name for spec in graph.inputs}
    assert {n: a.dtype for n, a in probe.items()} == {s.name: s.dtype for s in graph.inputs}
    assert Session(graph.model).run(probe).keys() == set(graph.outputs)


def test_a_model_that_is_finite_on_no_input_gets_none():
    model = model_of(
        """(float[N,4] x) => (float[N,2] y)
        <float[4,2] w> { m = Neg (x) n = Sqrt (m) y = MatMul (n, w) }"""
    )
    graph = load_graph(model)
    assert made_up_probe(graph, {"x": Range(1.0, 2.0)}) == {}


def test_floats_keep_to_their_fixed_range():
    graph = load_graph(MODELS["conv_relu"].build())
    (name,) = (spec.name for spec in graph.inputs)
    x = made_up_probe(graph, {name: Range(2.0, 6.0)})[name]
    assert 2 <= x.min() < 3 < 5 < x.max() <= 6


def test_the_same_graph_gives_the_same_input():
    graph = load_graph(MODELS["layernorm_mlp"].build())
    first, second = made_up_probe(graph, {}), made_up_probe(graph, {})
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])

"""Which tensors a model gives a scale of its own."""

import numpy as np
import pytest

from quantkit.formats import INT8, UINT8
from quantkit.graph import load_graph
from quantkit.graph.kept_scales import kept_scales
from tests.models import model_of

SCALE = np.float32(0.25)


def scales(nodes: str, **more: np.ndarray) -> dict[str, float]:
    """{tensor: its scale} of nodes that read x[N, 4, 8, 8] and put out y; s and z are a scale and an int8 zero."""
    stored = {"s": SCALE, "z": np.int8(0), **more}
    graph = load_graph(model_of(f"(float[N,4,8,8] x) => (float[A,B,C,D] y) {{ {nodes} }}", **stored))
    return {name: float(qparams.scale) for name, (_, qparams) in kept_scales(graph).items()}


PAIR = "q = QuantizeLinear (a, s, z) d = DequantizeLinear (q, s, z)"


def test_a_tensor_has_its_scale_before_and_behind_the_pair() -> None:
    assert scales(f"a = Tanh (x) {PAIR} y = Sin (d)") == {"a": 0.25, "d": 0.25}


def test_the_zero_point_and_its_type_are_the_models_own() -> None:
    text = "(float[N,4] x) => (float[N,4] y) { q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z) }"
    for zero, fmt in ((np.uint8(7), UINT8), (np.int8(-7), INT8)):
        spec, qparams = kept_scales(load_graph(model_of(text, s=SCALE, z=zero)))["x"]
        assert spec.format == fmt
        assert not spec.symmetric
        assert qparams.zero_point == zero


@pytest.mark.parametrize(
    "node", ["MaxPool <kernel_shape = [2,2]>", "Transpose <perm = [0,1,3,2]>", "Flatten <axis = 2>"]
)
def test_what_only_passes_values_on_has_the_scale_too(node: str) -> None:
    assert scales(f"a = Tanh (x) {PAIR} p = {node} (d) y = Sin (p)").keys() == {"a", "d", "p"}
    assert scales(f"t = Tanh (x) a = {node} (t) {PAIR} y = Sin (d)").keys() >= {"t", "a", "d"}


def test_a_pool_tells_nothing_of_a_tensor_that_others_read() -> None:
    found = scales(f"t = Tanh (x) a = MaxPool <kernel_shape = [1,1]> (t) {PAIR} u = Sin (t) y = Add (u, d)")
    assert found.keys() == {"a", "d"}


def test_a_concat_tells_nothing_of_its_inputs_and_has_no_scale_of_theirs() -> None:
    assert scales(f"a = Tanh (x) {PAIR} c = Concat <axis = 1> (d, x) y = Sin (c)").keys() == {"a", "d"}
    assert scales(f"t = Tanh (x) a = Concat <axis = 1> (t, x) {PAIR} y = Sin (d)").keys() == {"a", "d"}


def test_a_tensor_under_two_scales_has_none_that_could_be_kept() -> None:
    other = "r = QuantizeLinear (a, s2, z) e = DequantizeLinear (r, s2, z)"
    found = scales(f"a = Tanh (x) {PAIR} {other} y = Add (d, e)", s2=np.float32(0.5))
    assert found == {"d": 0.25, "e": 0.5}


def test_weights_are_no_activations() -> None:
    text = """(float[N,4] x) => (float[N,3] y) <float[4,3] w> {
        q = QuantizeLinear (w, s, z) d = DequantizeLinear (q, s, z) y = MatMul (x, d) }"""
    assert kept_scales(load_graph(model_of(text, s=SCALE, z=np.int8(0)))) == {}

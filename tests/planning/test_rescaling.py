import numpy as np
import pytest

from quantkit.data import open_data
from quantkit.errors import CacheError
from quantkit.formats import INT4, INT8, QuantSpec
from quantkit.graph import Graph, load_graph
from quantkit.graph.folding import apply_edits
from quantkit.graph.groups import find_groups
from quantkit.graph.linears import find_linears
from quantkit.observing.grams import divide_grams, observe_grams
from quantkit.observing.observe import observe
from quantkit.planning.rescaling import Rescaled, equalize, layer_of, scale_for_awq, smooth
from quantkit.runtime import Session
from tests.models import MODELS, model_of

A8 = QuantSpec(format=INT8)


def block() -> Graph:
    """A norm read by two layers, a gate's product, a down projection: outliers in two channels of the norm."""
    gain = np.ones(16, np.float32)
    gain[[3, 9]] = 40
    return load_graph(
        model_of(
            """(float[N,16] x) => (float[N,16] y)
            <float[16,24] gate, float[16,24] up, float[24,16] down> {
            n = Mul (x, gain)
            g = MatMul (n, gate)
            s = Sigmoid (g)
            silu = Mul (g, s)
            u = MatMul (n, up)
            h = Mul (silu, u)
            d = MatMul (h, down)
            y = Add (x, d) }""",
            gain=gain,
        )
    )


def feeds(count=24):
    rng = np.random.default_rng(5)
    return [{"x": rng.normal(size=(1, 16)).astype(np.float32)} for _ in range(count)]


def evidence(graph, samples):
    source = open_data(samples, graph.inputs)
    work = divide_grams(graph, source, find_linears(graph).values())
    statistics = observe(graph, source).statistics
    channels = {name: found.channels for name, found in statistics.items() if found.channels is not None}
    return dict(observe_grams(graph, source, work)), channels


def specs_of(graph, **spec):
    return {name: QuantSpec(axis=linear.in_axis, **spec) for name, linear in find_linears(graph).items()}


INT4_BLOCKS = {"format": INT4, "block_size": 8}


def same_function(graph, rescaled, samples):
    other = apply_edits(graph, rescaled.edits)
    for feed in samples[:4]:
        before, after = Session(graph.model).run(feed), Session(other.model).run(feed)
        for name, wanted in before.items():
            np.testing.assert_allclose(
                after[name], wanted, rtol=1e-5, atol=1e-5 * max(np.abs(wanted).max(), 1e-30)
            )
    return other


@pytest.mark.parametrize("step", ["equalize", "smooth", "awq", "all"])
def test_every_step_leaves_the_function_as_it_is(step):
    graph, samples = block(), feeds()
    groups, specs = find_groups(graph), specs_of(block(), **INT4_BLOCKS)
    grams, channels = evidence(graph, samples)
    found = Rescaled()
    if step in ("equalize", "all"):
        found = equalize(graph, groups, found)
    if step in ("smooth", "all"):
        found = smooth(graph, groups, specs, channels, activation=A8, rescaled=found)
    if step in ("awq", "all"):
        found = scale_for_awq(graph, groups, specs, grams, rescaled=found)
    assert found.scales
    same_function(graph, found, samples)


def test_statistics_follow_the_tensors_through_every_step():
    graph, samples = block(), feeds()
    groups, specs = find_groups(graph), specs_of(graph, **INT4_BLOCKS)
    grams, channels = evidence(graph, samples)
    found = smooth(graph, groups, specs, channels, activation=A8)
    found = scale_for_awq(graph, groups, specs, grams, rescaled=found)
    other = apply_edits(graph, found.edits)
    again, _ = evidence(other, samples)
    for name, linear in find_linears(graph).items():
        now = found.gram(linear, grams)
        wanted = again[find_linears(other)[name].view]
        size = np.abs(wanted.products).max()
        np.testing.assert_allclose(now.products, wanted.products, rtol=1e-4, atol=1e-5 * size)


def test_awq_takes_the_outliers_off_the_norm():
    graph, samples = block(), feeds()
    grams, _ = evidence(graph, samples)
    found = scale_for_awq(graph, find_groups(graph), specs_of(graph, **INT4_BLOCKS), grams)
    other = apply_edits(graph, found.edits)
    before, after = (np.abs(g.array("gain")) for g in (graph, other))
    assert after.max() / after.min() < 0.5 * before.max() / before.min()
    assert "error" in found.notes["n"]


def test_little_gain_is_left_alone_where_more_is_asked_for():
    graph, samples = block(), feeds()
    grams, _ = evidence(graph, samples)
    groups, specs = find_groups(graph), specs_of(graph, **INT4_BLOCKS)
    every = scale_for_awq(graph, groups, specs, grams)
    worthy = scale_for_awq(graph, groups, specs, grams, least_gain=0.5)
    assert set(worthy.scales) == {"n"} < set(every.scales)
    assert "no scale is enough better than none" in worthy.notes["h"]


def test_folds_go_where_they_may():
    graph, samples = block(), feeds()
    _, channels = evidence(graph, samples)
    groups, specs = find_groups(graph), specs_of(graph, **INT4_BLOCKS)
    norms = smooth(graph, groups, specs, channels, activation=A8, folds="norms")
    whole = smooth(graph, groups, specs, channels, activation=A8, folds="all")
    assert set(norms.scales) == {"n"} and "norms alone" in norms.notes["h"]
    assert set(whole.scales) == {"n", "h"}
    assert norms.touched == frozenset() and whole.touched == {"u"}


def test_a_fold_does_not_cross_a_tensor_that_is_to_stay():
    graph, samples = block(), feeds()
    _, channels = evidence(graph, samples)
    groups, specs = find_groups(graph), specs_of(graph, **INT4_BLOCKS)
    found = smooth(graph, groups, specs, channels, activation=A8, keep={"u"})
    assert set(found.scales) == {"n"} and "would divide u" in found.notes["h"]
    inserted = smooth(graph, groups, specs, channels, activation=A8, keep={"u"}, folds="insert")
    assert set(inserted.scales) == {"n", "h"} and inserted.touched == frozenset()
    same_function(graph, inserted, samples)


def test_a_weight_of_two_readers_counts_what_both_multiply():
    graph = load_graph(MODELS["shared_weight"].build())
    grams, _ = evidence(graph, MODELS["shared_weight"].feeds(5))
    readers = {}
    for linear in find_linears(graph).values():
        readers.setdefault(linear.weight, []).append(linear)
    first, second = next(found for found in readers.values() if len(found) == 2)
    layer = layer_of(graph, Rescaled(), first, A8, grams, others=[second])
    assert layer.gram.count == grams[first.view].count + grams[second.view].count


def test_where_nothing_folds_a_mul_is_inserted_if_that_is_allowed():
    graph = load_graph(MODELS["residual_identity"].build())
    samples = MODELS["residual_identity"].feeds(4)
    _, channels = evidence(graph, samples)
    groups = find_groups(graph)
    specs = {name: QuantSpec(format=INT8, axis=0) for name in find_linears(graph)}
    without = smooth(graph, groups, specs, channels, activation=A8)
    inserted = smooth(graph, groups, specs, channels, activation=A8, folds="insert")
    assert len(inserted.scales) == len(groups) > len(without.scales)
    other = same_function(graph, inserted, samples)
    muls = [sum(n.op_type == "Mul" for n in g.model.graph) for g in (graph, other)]
    assert muls[1] - muls[0] == len(inserted.scales) - len(without.scales)


def test_steps_that_both_insert_share_one_mul_whose_output_is_named():
    graph = load_graph(
        model_of("""(float[N,16] x) => (float[N,8] y) <float[16,8] w> {
            s = Sigmoid (x)
            y = MatMul (s, w) }""")
    )
    samples = feeds()
    grams, channels = evidence(graph, samples)
    groups, specs = find_groups(graph), specs_of(graph, **INT4_BLOCKS)
    found = smooth(graph, groups, specs, channels, activation=A8, folds="insert")
    found = scale_for_awq(graph, groups, specs, grams, folds="insert", rescaled=found)
    other = same_function(graph, found, samples)
    assert [n.op_type for n in other.model.graph].count("Mul") == 1
    (linear,) = find_linears(other).values()
    assert found.reads == {"s": linear.tensor}
    gram, _ = evidence(other, samples)
    divided = grams["s axis -1"].divided(found.scales["s"])
    np.testing.assert_allclose(gram[linear.view].products, divided.products, rtol=1e-4)


def test_a_tensor_read_along_two_axes_gets_no_mul():
    graph = load_graph(
        model_of("""(float[4,4] x) => (float[4,4] y, float[4,4] z) <float[4,4] a, float[4,4] b> {
            y = MatMul (x, a)
            z = MatMul (b, x) }""")
    )
    samples = [{"x": np.random.default_rng(i).normal(size=(4, 4)).astype(np.float32)} for i in range(3)]
    _, channels = evidence(graph, samples)
    found = smooth(
        graph, find_groups(graph), specs_of(graph, **INT4_BLOCKS), channels, activation=A8, folds="insert"
    )
    assert found.scales == {}


def test_equalizing_evens_out_what_two_layers_have_between_them():
    graph = load_graph(
        model_of(
            """(float[N,8] x) => (float[N,4] y) <float[8,6] w1, float[6,4] w2> {
            a = MatMul (x, w1)
            r = Relu (a)
            y = MatMul (r, w2) }"""
        )
    )
    (pair,) = (g for g in find_groups(graph) if g.fold is not None)
    other = apply_edits(graph, equalize(graph, [pair]).edits)
    first, second = np.abs(other.array("w1")).max(axis=0), np.abs(other.array("w2")).max(axis=1)
    np.testing.assert_allclose(first, second, rtol=1e-3)
    before = np.abs(graph.array("w1")).max(axis=0) * np.abs(graph.array("w2")).max(axis=1)
    np.testing.assert_allclose(first * second, before, rtol=1e-5)


def test_layers_that_are_not_quantized_are_left_alone():
    graph, samples = block(), feeds()
    grams, channels = evidence(graph, samples)
    down = {
        name: spec
        for name, spec in specs_of(graph, **INT4_BLOCKS).items()
        if graph.node(name).outputs[0].name == "d"
    }
    assert set(smooth(graph, find_groups(graph), down, channels, activation=A8).scales) == {"h"}
    assert set(scale_for_awq(graph, find_groups(graph), down, grams).scales) <= {"h"}


def test_the_same_evidence_gives_the_same_bytes():
    graph, samples = block(), feeds()
    grams, channels = evidence(graph, samples)
    groups, specs = find_groups(graph), specs_of(graph, **INT4_BLOCKS)

    def made():
        found = smooth(graph, groups, specs, channels, activation=A8, alpha="auto", grams=grams)
        found = scale_for_awq(graph, groups, specs, grams, rescaled=found)
        return apply_edits(graph, found.edits).fingerprint

    assert made() == made()


def test_missing_statistics_are_named_with_the_way_to_them():
    graph, samples = block(), feeds()
    grams, channels = evidence(graph, samples)
    groups, specs = find_groups(graph), specs_of(graph, **INT4_BLOCKS)
    del grams["n axis -1"], channels["n"]
    with pytest.raises(
        CacheError, match="no Gram matrix of n in the cache; calibrate again with `--collect gram`"
    ):
        scale_for_awq(graph, groups, specs, grams)
    with pytest.raises(CacheError, match="n: no statistics of its channels"):
        smooth(graph, groups, specs, channels, activation=A8)

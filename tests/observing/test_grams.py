import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from quantkit.calibrators.weight_layout import WeightLayout
from quantkit.data import open_data
from quantkit.graph import load_graph
from quantkit.graph.linears import find_linears
from quantkit.observing.grams import DEFAULT_GRAM_MEMORY, divide_grams, observe_grams, vectors
from quantkit.runtime import Session
from quantkit.statistics import GramMatrix
from tests.models import MODELS, TinyModel, model_of


def grams_of(graph, feeds, **options):
    source = open_data(feeds, graph.inputs)
    work = divide_grams(graph, source, find_linears(graph).values(), **options)
    return dict(observe_grams(graph, source, work)), work


@pytest.mark.parametrize("tiny", [m for m in MODELS.values() if m.runs], ids=lambda m: m.name)
def test_vectors_times_the_weight_are_what_the_layer_computes(tiny: TinyModel):
    graph = load_graph(tiny.build())
    linears = find_linears(graph)
    feeds = tiny.feeds(1)[0]
    values = {
        v for linear in linears.values() for v in (linear.tensor, graph.node(linear.node).outputs[0].name)
    }
    fed = {spec.name for spec in graph.inputs}
    wanted = sorted(values - fed)
    found = {**feeds, **(Session(graph.model, outputs=wanted).run(feeds) if wanted else {})}
    for linear in linears.values():
        x, w = found[linear.tensor].astype(np.float64), graph.array(linear.weight).astype(np.float64)
        y = found[str(graph.node(linear.node).outputs[0].name)].astype(np.float64)
        rows = np.concatenate(list(vectors(x, linear)), axis=1)
        assert rows.shape[2] == linear.size
        product = rows @ WeightLayout(out_axis=linear.out_axis, groups=linear.groups).columns(w)
        if linear.window is not None:
            # (groups, batch · places, N) → [batch, groups · N, places]
            batch = x.shape[0]
            product = product.reshape(linear.groups, batch, -1, product.shape[2]).transpose(1, 0, 3, 2)
            product = product.reshape(y.shape)
        elif linear.input_axis == -2:
            product = np.moveaxis(product.reshape(*y.shape[:-2], y.shape[-1], y.shape[-2]), -1, -2)
        else:
            product = product.reshape(y.shape)
        if linear.bias:
            node = graph.node(linear.node)
            beta = node.attributes["beta"].as_float() if "beta" in node.attributes else 1.0
            bias = graph.array(linear.bias).astype(np.float64)
            shape = (-1, *[1] * (y.ndim - 2)) if linear.window is not None else bias.shape
            product = product + beta * bias.reshape(shape)
        elif len(graph.node(linear.node).inputs) > 2 and graph.node(linear.node).inputs[2] is not None:
            continue
        tolerance = 2e-3 if graph.array(linear.weight).dtype == np.float16 else 1e-5
        np.testing.assert_allclose(product, y, rtol=tolerance, atol=tolerance * max(np.abs(y).max(), 1e-30))


def test_a_little_memory_means_more_passes_and_the_same_matrices():
    tiny = MODELS["layernorm_mlp"]
    graph = load_graph(tiny.build())
    whole, once = grams_of(graph, tiny.feeds(6))
    parts, often = grams_of(graph, tiny.feeds(6), max_memory=1)
    assert len(once.passes) == 1 and len(often.passes) == len(often.views) > 1
    assert whole.keys() == parts.keys()
    for view, gram in whole.items():
        np.testing.assert_allclose(parts[view].products, gram.products, rtol=1e-5, atol=1e-6)
        assert parts[view].count == gram.count > 0


def test_the_estimate_is_what_the_matrices_take():
    tiny = MODELS["conv_grouped"]
    graph = load_graph(tiny.build())
    grams, work = grams_of(graph, tiny.feeds(2))
    assert work.file_bytes == sum(a.nbytes for g in grams.values() for a in g.to_arrays().values())
    assert work.memory_bytes > work.file_bytes


@pytest.mark.parametrize("max_memory", [None, 16 << 20])
def test_collecting_takes_no_more_memory_than_it_says(max_memory):
    width, layers = 512, 4
    rng = np.random.default_rng(0)
    lines = [f"h{i + 1} = MatMul (h{i}, w{i})" for i in range(layers)]
    graph = load_graph(
        model_of(
            f"(float[N,{width}] h0) => (float[N,{width}] h{layers}) {{ {chr(10).join(lines)} }}",
            **{f"w{i}": rng.normal(size=(width, width)).astype(np.float32) / 16 for i in range(layers)},
        )
    )
    feeds = [{"h0": rng.normal(size=(500, width)).astype(np.float32)} for _ in range(3)]
    source = open_data(feeds, graph.inputs)
    work = divide_grams(graph, source, find_linears(graph).values(), batch_size=500, max_memory=max_memory)
    assert len(work.passes) == (1 if max_memory is None else 2)
    assert work.memory_bytes <= (max_memory or DEFAULT_GRAM_MEMORY)
    dict(observe_grams(graph, source, work))  # what is imported on the way is no memory of this
    tracemalloc.start()
    counts = []
    try:
        for _, gram in observe_grams(graph, source, work):
            counts.append(gram.count)
            del gram
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert counts == [1500] * layers
    # Python's own objects are a few hundred kB; matrices alone take 8 MiB in one pass, 4 in two.
    assert 0.5 * work.memory_bytes < peak <= work.memory_bytes + 2**19


def test_samples_are_counted_in_every_pass():
    tiny = MODELS["layernorm_mlp"]
    graph = load_graph(tiny.build())
    source = open_data(tiny.feeds(5), graph.inputs)
    work = replace(divide_grams(graph, source, find_linears(graph).values(), max_memory=1), batch_size=2)
    seen: list[int] = []
    assert len(list(observe_grams(graph, source, work, on_samples=seen.append))) == len(work.views)
    assert seen == [2, 2, 1] * len(work.passes)


def test_readers_of_one_tensor_share_a_matrix():
    tiny = MODELS["shared_weight"]
    graph = load_graph(tiny.build())
    grams, _ = grams_of(graph, tiny.feeds(2))
    assert set(grams) == {linear.view for linear in find_linears(graph).values()}
    assert all(isinstance(gram, GramMatrix) for gram in grams.values())

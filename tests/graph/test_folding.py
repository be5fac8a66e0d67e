import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from quantkit.errors import PlanError
from quantkit.graph import load_graph
from quantkit.graph.folding import Edits, apply_edits, folded
from quantkit.graph.groups import can_insert, find_groups
from quantkit.runtime import Session
from tests.models import MODELS, TinyModel, model_of


def scale_for(group, rng):
    """A scale between 1/4 and 4, one for channels that are tied."""
    scale = np.exp2(rng.uniform(-2, 2, group.channels))
    return scale if group.fold is None else scale[np.array(group.fold.ties)]


def rescaled(graph, rng, *, insert=True, **options):
    """The graph with every group divided that can be, and how many were folded and inserted."""
    edits, counts = Edits(), [0, 0]
    for group in find_groups(graph, **options):
        if group.fold is not None:
            edits = folded(graph, edits, group, scale_for(group, rng))
            counts[0] += 1
        elif insert and can_insert(graph, group):
            edits = folded(graph, edits, group, scale_for(group, rng), insert=True)
            counts[1] += 1
    return apply_edits(graph, edits), counts


def assert_same_function(graph, other, feeds, *, tolerance=1e-5):
    for feed in feeds:
        before, after = (
            Session(graph.model, optimize=False).run(feed),
            Session(other.model, optimize=False).run(feed),
        )
        for name, wanted in before.items():
            if wanted.dtype.kind != "f":
                continue
            finite = np.isfinite(wanted.astype(np.float64))
            np.testing.assert_array_equal(np.isfinite(after[name].astype(np.float64)), finite)
            size = np.abs(wanted[finite].astype(np.float64)).max(initial=1e-30)
            np.testing.assert_allclose(
                after[name][finite], wanted[finite], rtol=tolerance, atol=tolerance * size
            )


@pytest.mark.parametrize("tiny", [m for m in MODELS.values() if m.runs], ids=lambda m: m.name)
def test_every_model_stays_the_same_function(tiny: TinyModel):
    graph = load_graph(tiny.build())
    other, _ = rescaled(graph, np.random.default_rng(0))
    assert_same_function(graph, other, tiny.feeds(2), tolerance=5e-3 if "fp16" in tiny.name else 1e-5)


# --- random graphs ---------------------------------------------------------------------------------------------


class _Builder:
    """A chain of layers over [N, C] or [N, C, 6, 6], with branches."""

    def __init__(self, seed, image):
        self.rng, self.image = np.random.default_rng(seed), image
        self.nodes, self.weights, self.channels, self.count = [], {}, 6, 0
        self.last, self.earlier = "x", []

    def name(self):
        self.count += 1
        return f"t{self.count}"

    def weight(self, *shape):
        name = self.name()
        fan_in = max(int(np.prod(shape[1:])), 1)
        self.weights[name] = (self.rng.normal(size=shape) / np.sqrt(fan_in)).astype(np.float32)
        return name

    def add(self, op, *inputs, outputs=1, **attributes):
        made = [self.name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, made, **attributes))
        return made[0] if outputs == 1 else made

    def vector(self):
        return self.weight(self.channels, 1, 1) if self.image else self.weight(self.channels)

    def linear(self, x, out, bias):
        if self.image:
            inputs = [x, self.weight(out, self.channels, 3, 3), *([self.weight(out)] if bias else [])]
            return self.add("Conv", *inputs, pads=[1, 1, 1, 1])
        if bias:
            transposed = bool(self.rng.integers(2))
            shape = (out, self.channels) if transposed else (self.channels, out)
            return self.add("Gemm", x, self.weight(*shape), self.weight(out), transB=int(transposed))
        return self.add("MatMul", x, self.weight(self.channels, out))

    def grow(self, kind):
        x, rng, bias = self.last, self.rng, bool(self.rng.integers(2))
        self.earlier.append((x, self.channels))
        if kind == "linear":
            out = int(rng.choice([4, 6]))
            self.last = self.linear(x, out, bias)
            self.channels = out
        elif kind == "depthwise" and self.image:
            self.last = self.add(
                "Conv", x, self.weight(self.channels, 1, 3, 3), pads=[1, 1, 1, 1], group=self.channels
            )
        elif kind == "gate":
            gate, up = self.linear(x, 6, bias), self.linear(x, 6, not bias)
            self.channels = 6
            self.last = self.add("Mul", self.add("Mul", gate, self.add("Sigmoid", gate)), up)
        elif kind == "branches":
            parts = [self.add("Relu", self.linear(x, n, bias)) for n in (2, 4)]
            self.channels = 6
            self.last = self.add("Concat", *parts, axis=1)
        elif kind == "split":
            self.weights.setdefault("halves", np.array([self.channels // 2] * 2, np.int64))
            if self.channels == 6:
                self.weights["thirds"] = np.array([2, 4], np.int64)
                first, second = self.add("Split", x, "thirds", outputs=2, axis=1)
                self.earlier.append((first, 2))
                self.last, self.channels = second, 4
        elif kind == "residual":
            same = [name for name, channels in self.earlier if channels == self.channels and name != x]
            if same:
                self.last = self.add("Add", x, same[int(rng.integers(len(same)))])
        elif kind == "gain":
            self.last = self.add("Mul", x, self.vector())
        elif kind == "shift":
            self.last = self.add("Add", self.vector(), x)
        elif kind == "scalar":
            self.weights["half"] = np.array(0.5, np.float32)
            self.last = self.add("Mul", x, "half")
        elif kind == "norm":
            if self.image:
                self.last = self.add(
                    "InstanceNormalization", x, self.weight(self.channels), self.weight(self.channels)
                )
            else:
                self.last = self.add(
                    "LayerNormalization", x, self.weight(self.channels), self.weight(self.channels)
                )
        elif kind == "transposed":
            perm = [0, 2, 3, 1] if self.image else [1, 0]
            back = [0, 3, 1, 2] if self.image else [1, 0]
            self.last = self.add(
                "Transpose", self.add("Relu", self.add("Transpose", x, perm=perm)), perm=back
            )
        elif kind == "reshaped":
            shape = [0, 2, self.channels // 2, 6, 6] if self.image else [0, 2, self.channels // 2]
            flat = [0, self.channels, 6, 6] if self.image else [0, self.channels]
            there, back = self.name(), self.name()
            self.weights[there], self.weights[back] = np.array(shape), np.array(flat)
            self.last = self.add("Reshape", self.add("LeakyRelu", self.add("Reshape", x, there)), back)
        elif kind == "clip":
            self.weights |= {"zero": np.array(0, np.float32), "six": np.array(0.6, np.float32)}
            self.last = self.add("Clip", x, "zero", *(["six"] if bias else []))
        elif kind == "pool" and self.image:
            self.last = self.add("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        else:
            self.last = self.add(str(rng.choice(["Relu", "Sigmoid", "Tanh"])), x)

    def build(self):
        sides = [6, 6] if self.image else []
        kept = [self.last, *(name for name, _ in self.earlier[1:4:2] if name != self.last)]
        outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in kept]
        graph = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 6, *sides])],
            outputs,
            [numpy_helper.from_array(w, name) for name, w in self.weights.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


KINDS = [
    "linear",
    "depthwise",
    "gate",
    "branches",
    "split",
    "residual",
    "gain",
    "shift",
    "scalar",
    "norm",
    "transposed",
    "reshaped",
    "clip",
    "pool",
    "activation",
]


@given(
    seed=st.integers(0, 10**6),
    image=st.booleans(),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=7),
)
def test_folding_leaves_a_random_graph_the_same_function(seed, image, kinds):
    builder = _Builder(seed, image)
    for kind in ["linear", *kinds, "linear"]:
        builder.grow(kind)
    graph = load_graph(builder.build())
    other, _ = rescaled(graph, builder.rng)
    shape = (2, 6, 6, 6) if image else (3, 6)
    assert_same_function(graph, other, [{"x": builder.rng.normal(size=shape).astype(np.float32)}])


# --- what folds where ------------------------------------------------------------------------------------------


def llama_attention(heads, groups):
    """One attention with `groups` heads of keys and values, as exporters write grouped-query attention."""
    repeat, size = heads // groups, heads * 4
    expand = (
        "u = Unsqueeze (vt, axis2)\n e = Expand (u, wide)\n v = Reshape (e, joined)\n"
        if repeat > 1
        else "v = Identity (vt)\n"
    )
    return model_of(
        f"""(float[N,5,{size}] x, float[N,{heads},5,5] p) => (float[N,5,{size}] y)
        <float[{size},{groups * 4}] wv, float[{size},{size}] wo, float[{size}] gain> {{
        n = Mul (x, gain)
        lv = MatMul (n, wv)
        split = Reshape (lv, heads)
        vt = Transpose <perm = [0,2,1,3]> (split)
        {expand}
        a = MatMul (p, v)
        at = Transpose <perm = [0,2,1,3]> (a)
        o = Reshape (at, flat)
        y = MatMul (o, wo) }}""",
        heads=np.array([0, 5, groups, 4]),
        flat=np.array([0, 5, size]),
        axis2=np.array([2]),
        wide=np.array([1, 1, repeat, 1, 1]),
        joined=np.array([0, heads, 5, 4]),
    )


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
def test_attention_folds_into_values_with_one_scale_for_heads_that_share_them(heads, groups):
    graph = load_graph(llama_attention(heads, groups))
    group = next(g for g in find_groups(graph) if g.tensor == "o")
    assert group.fold is not None, group.reason
    assert [(graph.node(f.node).op_type, f.kind) for f in group.fold.factors] == [("MatMul", "linear")]
    assert len(set(group.fold.ties)) == groups * 4
    other, counts = rescaled(graph, np.random.default_rng(1))
    assert counts == [2, 0]
    rng = np.random.default_rng(2)
    feed = {
        "x": rng.normal(size=(2, 5, 16)).astype(np.float32),
        "p": rng.random((2, heads, 5, 5)).astype(np.float32),
    }
    assert_same_function(graph, other, [feed])


def test_tied_channels_with_different_scales_are_refused():
    graph = load_graph(llama_attention(4, 1))
    group = next(g for g in find_groups(graph) if g.tensor == "o")
    with pytest.raises(PlanError, match="tied channels"):
        folded(graph, Edits(), group, np.linspace(1, 2, 16))


def test_a_decomposed_norm_takes_the_scale_of_all_that_read_it():
    graph = load_graph(
        model_of(
            """(float[N,8] x) => (float[N,4] q, float[N,4] k)
            <float[8] gain, float[8,4] wq, float[8,4] wk> {
            square = Pow (x, two)
            mean = ReduceMean (square, last)
            some = Add (mean, tiny)
            root = Sqrt (some)
            inverse = Reciprocal (root)
            normed = Mul (x, inverse)
            n = Mul (gain, normed)
            q = MatMul (n, wq)
            k = MatMul (n, wk) }""",
            two=np.array(2, np.float32),
            last=np.array([-1]),
            tiny=np.array(1e-5, np.float32),
        )
    )
    (group,) = find_groups(graph)
    assert len(group.linears) == 2 and group.folds_into_norm
    other, counts = rescaled(graph, np.random.default_rng(0))
    assert counts == [1, 0] and len(list(other.model.graph)) == len(list(graph.model.graph))


@pytest.mark.parametrize("norm", ["LayerNormalization", "SimplifiedLayerNormalization"])
def test_a_norms_gain_and_shift_take_the_scale(norm):
    shift = ", shift" if norm == "LayerNormalization" else ""
    graph = load_graph(
        model_of(f"""(float[N,8] x) => (float[N,4] y)
            <float[8] gain, float[8] shift, float[8,4] w> {{
            n = {norm} (x, gain{shift})
            y = MatMul (n, w) }}""")
    )
    (group,) = find_groups(graph)
    assert group.folds_into_norm
    assert len(group.fold.factors) == (2 if shift else 1)
    other, _ = rescaled(graph, np.random.default_rng(0))
    assert_same_function(
        graph, other, [{"x": np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)}]
    )


def test_the_gates_product_folds_into_the_branch_without_activation():
    graph = load_graph(
        model_of("""(float[N,8] x) => (float[N,8] y)
            <float[8,6] gate, float[8,6] up, float[6,8] down> {
            g = MatMul (x, gate)
            s = Sigmoid (g)
            silu = Mul (g, s)
            u = MatMul (x, up)
            h = Mul (silu, u)
            y = MatMul (h, down) }""")
    )
    group = next(g for g in find_groups(graph) if g.tensor == "h")
    assert [graph.node(f.node).outputs[0].name for f in group.fold.factors] == ["u"]


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        ("h = Add (a, x)", "adds two branches"),
        ("h = Gelu (a)", "computes it"),
        ("h = Clip (a, zero, six)", "clips at 6"),
    ],
)
def test_what_forbids_a_fold_is_said(between, reason):
    graph = load_graph(
        model_of(
            f"""(float[N,8] x) => (float[N,8] y) <float[8,8] w1, float[8,8] w2> {{
            a = MatMul (x, w1)
            {between}
            y = MatMul (h, w2) }}""",
            zero=np.array(0, np.float32),
            six=np.array(6, np.float32),
        )
    )
    group = next(g for g in find_groups(graph) if g.tensor == "h")
    assert group.fold is None and reason in group.reason
    with pytest.raises(PlanError, match="insert a Mul"):
        folded(graph, Edits(), group, np.ones(8))


def test_a_residual_that_reads_a_norm_forbids_its_fold():
    graph = load_graph(
        model_of("""(float[N,8] x) => (float[N,8] y) <float[8] gain, float[8,8] w> {
            n = Mul (x, gain)
            a = MatMul (n, w)
            y = Add (n, a) }""")
    )
    (group,) = find_groups(graph)
    assert group.fold is None and "also read by Add" in group.reason
    _, counts = rescaled(graph, np.random.default_rng(0))
    assert counts == [0, 1]


def test_a_clip_that_never_clips_becomes_a_relu():
    graph = load_graph(
        model_of(
            """(float[N,8] x) => (float[N,8] y) <float[8,8] w1, float[8,8] w2> {
            a = MatMul (x, w1)
            h = Clip (a, zero, six)
            y = MatMul (h, w2) }""",
            zero=np.array(0, np.float32),
            six=np.array(6, np.float32),
        )
    )
    other, counts = rescaled(graph, np.random.default_rng(0), insert=False, unclipped={"h"})
    assert counts == [1, 0]
    assert_same_function(
        graph, other, [{"x": np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)}]
    )


def test_an_inserted_mul_serves_all_readers_of_the_group_alone():
    graph = load_graph(
        model_of("""(float[N,8] x) => (float[N,4] q, float[N,4] k, float[N,8] r)
            <float[8,4] wq, float[8,4] wk> { q = MatMul (x, wq)
            k = MatMul (x, wk)
            r = Relu (x) }""")
    )
    other, counts = rescaled(graph, np.random.default_rng(0))
    assert counts == [0, 1]
    assert [n.op_type for n in other.model.graph].count("Mul") == 1
    assert_same_function(
        graph, other, [{"x": np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)}]
    )


def test_a_weight_shared_by_two_layers_is_left_alone():
    graph = load_graph(MODELS["shared_weight"].build())
    shared = {
        linear.weight
        for group in find_groups(graph)
        for linear in group.linears
        if len({user.name for user, _ in graph.values[linear.weight].uses()}) > 1
    }
    assert shared
    for group in find_groups(graph):
        if any(linear.weight in shared for linear in group.linears):
            assert group.fold is None and "is shared with" in group.reason
            assert not can_insert(graph, group)


def test_a_tied_embedding_keeps_its_rows():
    graph = load_graph(
        model_of(
            """(int64[N,3] ids) => (float[N,3,5] y) <float[5,8] emb, float[8] gain> {
            e = Gather (emb, ids)
            n = Mul (e, gain)
            flat = Reshape (n, rows)
            z = Gemm <transB = 1> (flat, emb)
            y = Reshape (z, back) }""",
            rows=np.array([-1, 8]),
            back=np.array([-1, 3, 5]),
        )
    )
    (group,) = find_groups(graph)
    assert group.fold is not None, group.reason
    other, _ = rescaled(graph, np.random.default_rng(0))
    np.testing.assert_array_equal(other.array("emb"), graph.array("emb"))
    assert_same_function(graph, other, [{"ids": np.array([[0, 4, 2]])}])


def test_constants_are_rounded_once_however_often_they_are_divided():
    graph = load_graph(
        model_of("""(float[N,8] x) => (float[N,4] y) <float[8] gain, float[8,4] w> {
            n = Mul (x, gain)
            y = MatMul (n, w) }""")
    )
    (group,) = find_groups(graph)
    edits = Edits()
    for _ in range(7):
        edits = folded(graph, edits, group, np.full(8, 3.0))
    for _ in range(7):
        edits = folded(graph, edits, group, np.full(8, 1 / 3))
    other = apply_edits(graph, edits)
    for name in ("gain", "w"):
        np.testing.assert_allclose(other.array(name), graph.array(name), rtol=1e-7)


def test_the_graph_that_was_given_stays():
    tiny = MODELS["layernorm_mlp"]
    graph = load_graph(tiny.build())
    before = graph.fingerprint
    other, counts = rescaled(graph, np.random.default_rng(0))
    assert sum(counts) > 0 and other.fingerprint != before
    assert load_graph(tiny.build()).fingerprint == before
    assert {n: graph.array(n).tobytes() for n in graph.model.graph.initializers} == {
        n: load_graph(tiny.build()).array(n).tobytes() for n in graph.model.graph.initializers
    }


def test_a_scale_that_does_not_fit_is_refused():
    graph = load_graph(MODELS["layernorm_mlp"].build())
    group = find_groups(graph)[0]
    for scale in (np.ones(group.channels + 1), np.zeros(group.channels), np.full(group.channels, np.nan)):
        with pytest.raises(PlanError, match="positive numbers"):
            folded(graph, Edits(), group, scale)

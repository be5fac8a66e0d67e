import numpy as np
import pytest

from quantkit.graph import Graph, Site, find_sites, load_graph, sharing_groups
from quantkit.graph.sites import LINEAR_OPS, fused_output, is_depthwise_or_narrow
from tests.models import MODELS, TinyModel, model_of

every_model = pytest.mark.parametrize("tiny", MODELS.values(), ids=MODELS)


def graph_of(name: str) -> Graph:
    return load_graph(MODELS[name].build())


def sites_of(name: str, role: str) -> list[Site]:
    return [s for s in find_sites(graph_of(name))[0] if s.role == role]


def reasons(graph: Graph) -> dict[str, str]:
    """Node → why it was left alone."""
    return {left.node: left.reason for left in find_sites(graph)[1]}


# --- axes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weight_axis", "input_axis"),
    [
        ("conv_no_bias", 0, 1),
        ("conv_grouped", 0, 1),
        ("conv1d", 0, 1),
        ("conv3d", 0, 1),
        ("conv_transpose", 1, 1),
        ("conv_transpose_grouped", 1, 1),
        ("gemm", 1, 1),
        ("gemm_trans_a", 1, 0),
        ("gemm_trans_b", 0, 1),
        ("matmul", 1, 2),
        ("matmul_weight_left", 0, 1),
        ("matmul_batched_weight", 2, 3),
        ("matmul_single_row", 1, 1),
    ],
)
def test_weights_have_the_axis_of_output_channels_and_inputs_the_contracted_one(
    name: str, weight_axis: int, input_axis: int
) -> None:
    (weight,), (data,) = sites_of(name, "weight"), sites_of(name, "input")
    assert (weight.axis, data.axis) == (weight_axis, input_axis)
    assert {weight.index, data.index} == {0, 1}
    assert weight.node == data.node


@every_model
def test_a_weight_has_as_many_channels_along_its_axis_as_the_output(tiny: TinyModel) -> None:
    graph = load_graph(tiny.build())
    for site in find_sites(graph)[0]:
        if site.role == "weight":
            assert site.axis is not None
            assert 0 <= site.axis < len(site.shape)
            node = graph.node(site.node)
            output = node.outputs[0].shape
            groups = node.attributes.get_int("group", 1) if node.op_type == "ConvTranspose" else 1
            if output is not None and node.op_type != "MatMul":
                assert site.shape[site.axis] * groups == output[1]
            elif output is not None:
                assert site.shape[site.axis] == output[-1 if site.index == 1 else -2]


@every_model
def test_the_contracted_axes_of_weight_and_input_have_one_length(tiny: TinyModel) -> None:
    graph = load_graph(tiny.build())
    sites = find_sites(graph)[0]
    for weight in (s for s in sites if s.role == "weight" and s.op_type in ("MatMul", "Gemm")):
        data = next(s for s in sites if s.role == "input" and s.node == weight.node)
        (contracted,) = (
            d for a, d in enumerate(weight.shape[-2:], len(weight.shape) - 2) if a != weight.axis
        )
        assert data.axis is not None
        if data.shape:
            assert data.shape[data.axis] == contracted


# --- which nodes --------------------------------------------------------------------------------------------


@every_model
def test_every_linear_node_has_sites_or_a_reason(tiny: TinyModel) -> None:
    graph = load_graph(tiny.build())
    linear = [n.name for n in graph.model.graph.all_nodes() if n.domain == "" and n.op_type in LINEAR_OPS]
    placed = {s.node for s in find_sites(graph)[0] if s.role == "input"}
    left = reasons(graph)
    assert sorted(linear) == sorted([*placed, *left])
    assert all(left.values())


@every_model
def test_sites_name_what_their_nodes_read_and_write(tiny: TinyModel) -> None:
    graph = load_graph(tiny.build())
    for site in find_sites(graph)[0]:
        node = graph.node(site.node)
        assert node.op_type == site.op_type
        value = fused_output(node) if site.role == "output" else node.inputs[site.index]
        assert value is not None
        assert value.name == site.name
        assert value.is_initializer() == (site.role in ("weight", "embedding"))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("conv_dynamic_weight", "its weight is computed"),
        ("float64", "its inputs are double"),
    ],
)
def test_a_model_of_one_node_says_why_it_is_left(name: str, found: str) -> None:
    (reason,) = reasons(graph_of(name)).values()
    assert found in reason


def test_gemv_shaped_and_vector_products_are_left_alone() -> None:
    assert list(reasons(graph_of("matmul_gemv")).values()) == [
        "GEMV-shaped (N = 1): memory-bound, nothing to gain",
        "a vector product: memory-bound, nothing to gain",
    ]


def test_one_row_against_an_activation_is_left_alone_but_not_against_a_weight() -> None:
    text = "(float[N,{rows},8] x, float[N,8,5] z) => (float[N,{rows},5] y) {{ y = MatMul (x, z) }}"
    assert "M = 1" in next(iter(reasons(load_graph(model_of(text.format(rows=1)))).values()))
    assert not reasons(load_graph(model_of(text.format(rows=2))))
    assert not reasons(graph_of("matmul_single_row"))


def test_the_rows_and_columns_of_a_transposed_gemm_are_its_own() -> None:
    column = model_of(
        "(float[8,N] x) => (float[N,1] y) <float[1,8] w> { y = Gemm <transA = 1, transB = 1> (x, w) }"
    )
    assert "N = 1" in reasons(load_graph(column))["Gemm"]
    narrow = model_of("(float[N,1] x) => (float[N,8] y) <float[8,1] w> { y = Gemm <transB = 1> (x, w) }")
    assert not reasons(load_graph(narrow))


@pytest.mark.parametrize("name", ["if_subgraph", "loop_subgraph"])
def test_nodes_inside_branches_and_loops_are_left_alone_and_named(name: str) -> None:
    graph = graph_of(name)
    left = reasons(graph)
    assert all(reason.startswith(("inside If", "inside Loop")) for reason in left.values())
    assert len(left) == {"if_subgraph": 2, "loop_subgraph": 1}[name]
    assert len({s.node for s in find_sites(graph)[0]}) == 2


def test_what_is_already_quantized_is_left_and_the_rest_is_not() -> None:
    graph = graph_of("already_quantized")
    assert list(reasons(graph).values()) == ["already quantized in the model"]
    assert [s.name for s in find_sites(graph)[0] if s.role == "weight"] == ["w1"]


def test_attention_has_sites_on_both_sides_of_its_matmuls() -> None:
    both = [s for s in sites_of("matmul_activations", "input") if s.axis is None]
    assert len(both) == 4
    assert [s.index for s in both] == [0, 1, 0, 1]


@pytest.mark.parametrize("name", ["loop_subgraph", "contrib_operator"])
def test_an_input_of_unknown_rank_and_type_is_known_by_its_weight(name: str) -> None:
    graph = graph_of(name)
    weight = [s for s in find_sites(graph)[0] if s.role == "weight"][-1]
    data = next(s for s in find_sites(graph)[0] if s.role == "input" and s.node == weight.node)
    assert graph.values[data.name].shape is None
    assert graph.values[data.name].dtype == graph.values[weight.name].dtype
    assert data.axis == -1


def test_operators_of_other_domains_are_not_taken_for_onnx_ones() -> None:
    model = model_of(
        "(float[N,8] x) => (float[N,5] y) <float[8,5] w> { y = other.MatMul (x, w) }", domains=("other",)
    )
    assert find_sites(load_graph(model)) == ([], [])


# --- what is fused, residual Adds ---------------------------------------------------------------------------


def test_the_output_of_a_convolution_is_read_behind_its_relu_or_clip() -> None:
    assert [s.name for s in sites_of("conv_relu", "output")] == ["r", "y"]
    assert [s.name for s in sites_of("conv_depthwise", "output")] == ["e6", "d6", "p", "y"]


def test_an_activation_with_another_reader_is_not_fused() -> None:
    model = model_of("""(float[N,4,8,8] x) => (float[N,4,8,8] y, float[N,4,8,8] a) <float[4,4,1,1] w> {
        a = Conv (x, w) y = Relu (a) }""")
    assert [s.name for s in find_sites(load_graph(model))[0] if s.role == "output"] == ["a"]


@pytest.mark.parametrize(
    ("name", "skips"),
    [
        # The block's input against the convolution's result; of two convolutions, the one computed first.
        ("residual_identity", ["s"]),
        ("residual_downsample", ["d"]),
        ("conv_depthwise", ["x"]),
        # Both of its operands are one value; no convolution is near.
        ("add_to_itself", []),
        ("layernorm_mlp", []),
        ("matmul", []),
    ],
)
def test_the_skip_of_a_residual_add_is_what_its_convolution_does_not_compute(
    name: str, skips: list[str]
) -> None:
    assert [s.name for s in sites_of(name, "skip")] == skips


def test_an_add_of_a_constant_is_no_residual_add() -> None:
    model = model_of("""(float[N,4,8,8] x) => (float[N,4,8,8] y) <float[4,4,1,1] w, float[4,8,8] c> {
        a = Conv (x, w) b = Relu (a) y = Add (b, c) }""")
    assert not [s for s in find_sites(load_graph(model))[0] if s.op_type == "Add"]


def test_the_later_convolution_absorbs_the_sum_wherever_it_stands_in_the_add() -> None:
    for order in ("d, c", "c, d"):
        model = model_of(f"""(float[N,4,8,8] x) => (float[N,4,8,8] y)
            <float[4,4,1,1] w0, float[4,4,1,1] w1, float[4,4,1,1] w2> {{
            d = Conv (x, w0) a = Conv (x, w1) r = Relu (a) c = Conv (r, w2) y = Add ({order}) }}""")
        skip = next(s for s in find_sites(load_graph(model))[0] if s.role == "skip")
        assert skip.name == "d"


# --- sharing ------------------------------------------------------------------------------------------------


def test_operators_that_pass_values_on_tie_their_tensors_together() -> None:
    graph = graph_of("pass_through")
    groups = sharing_groups(graph)
    # A Slice takes a part: what is behind it may have a range of its own. Cleaning made one of Reshape and Flatten.
    assert groups == [frozenset({"f", "s"}), frozenset({"p", "r", "t"})]


def test_concat_ties_all_its_inputs_and_what_reaches_them_through_a_pool() -> None:
    assert sharing_groups(graph_of("concat_branches")) == [frozenset({"a", "b", "c", "p", "x"})]


def test_shapes_and_indices_are_not_tied() -> None:
    model = model_of(
        """(float[N,8] x, int64[2] a, int64[2] b) => (float[M,5] y) <float[8,5] w> {
        s = Concat <axis = 0> (a, b) t = Reshape (s, two) r = ReduceMax <keepdims = 0> (t, axes)
        z = Reshape (x, r) y = MatMul (z, w) }""",
        two=np.array([2, 2]),
        axes=np.array([0]),
    )
    assert sharing_groups(load_graph(model)) == [frozenset({"x", "z"})]


# --- narrow convolutions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "narrow"),
    [
        ("(float[N,32,8,8] x) => (float[N,32,8,8] y) <float[32,32,1,1] w> { y = Conv (x, w) }", False),
        ("(float[N,3,8,8] x) => (float[N,32,8,8] y) <float[32,3,1,1] w> { y = Conv (x, w) }", True),
        ("(float[N,17,8,8] x) => (float[N,17,8,8] y) <float[17,17,1,1] w> { y = Conv (x, w) }", False),
        ("(float[N,32,8,8] x) => (float[N,16,8,8] y) <float[16,32,1,1] w> { y = Conv (x, w) }", True),
        (
            "(float[N,32,8,8] x) => (float[N,32,8,8] y) <float[32,1,1,1] w> { y = Conv <group = 32> (x, w) }",
            True,
        ),
        (
            "(float[N,64,8,8] x) => (float[N,64,8,8] y) <float[64,32,1,1] w> { y = Conv <group = 2> (x, w) }",
            False,
        ),
        (
            "(float[N,32,4,4] x) => (float[N,16,4,4] y) <float[32,16,1,1] w> { y = ConvTranspose (x, w) }",
            True,
        ),
        (
            "(float[N,32,4,4] x) => (float[N,32,4,4] y) <float[32,32,1,1] w> { y = ConvTranspose (x, w) }",
            False,
        ),
        ("(float[N,8] x) => (float[N,8] y) <float[8,8] w> { y = MatMul (x, w) }", False),
    ],
)
def test_a_convolution_is_narrow_with_up_to_16_channels_in_or_out_of_a_group(text: str, narrow: bool) -> None:
    (node,) = load_graph(model_of(text)).model.graph
    assert is_depthwise_or_narrow(node) == narrow

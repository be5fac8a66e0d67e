import pytest

from quantkit.graph import load_graph
from quantkit.graph.linears import find_linears
from tests.models import MODELS, model_of


def linears(name):
    return list(find_linears(load_graph(MODELS[name].build())).values())


def test_readers_of_one_tensor_have_one_view():
    graph = load_graph(
        model_of("""(float[N,8] x) => (float[N,4] q, float[N,4] k)
            <float[8,4] wq, float[8,4] wk> { q = MatMul (x, wq)
            k = MatMul (x, wk) }""")
    )
    q, k = find_linears(graph).values()
    assert q.view == k.view and q.weight != k.weight


def test_convolutions_of_other_windows_have_other_views():
    graph = load_graph(
        model_of("""(float[N,8,6,6] x) => (float[N,4,6,6] a, float[N,4,6,6] b, float[N,4,6,6] c)
            <float[4,8,3,3] wa, float[4,8,1,1] wb, float[4,8,3,3] wc> {
            a = Conv <pads = [1,1,1,1]> (x, wa)
            b = Conv (x, wb)
            c = Conv <pads = [1,1,1,1]> (x, wc) }""")
    )
    a, b, c = find_linears(graph).values()
    assert a.view == c.view != b.view
    assert (a.size, b.size, a.channels) == (72, 8, 8)


@pytest.mark.parametrize(("name", "axes"), [("gemm", (1, 0)), ("gemm_trans_b", (0, 1)), ("matmul", (1, 0))])
def test_axes_follow_how_the_weight_lies(name, axes):
    assert {(x.out_axis, x.in_axis) for x in linears(name)} == {axes}


def test_a_weight_on_the_left_contracts_the_last_axis_but_one():
    (linear,) = (x for x in linears("matmul_weight_left") if x.weight_index == 0)
    assert (linear.out_axis, linear.in_axis, linear.input_axis, linear.input_index) == (0, 1, -2, 1)


def test_a_depthwise_convolution_has_short_vectors_and_all_channels():
    found = [x for x in linears("conv_depthwise") if x.groups > 1]
    assert found and all(x.size * x.groups == x.channels * 9 for x in found)


@pytest.mark.parametrize("name", ["conv_transpose", "matmul_batched_weight", "gemm_trans_a"])
def test_what_is_not_one_product_of_vectors_is_none(name):
    graph = load_graph(MODELS[name].build())
    assert all(graph.node(x.node).op_type != "ConvTranspose" for x in find_linears(graph).values())
    for linear in find_linears(graph).values():
        assert len(graph.array(linear.weight).shape) == 2 or linear.op_type == "Conv"
        assert not ("transA" in graph.node(linear.node).attributes and linear.op_type == "Gemm")

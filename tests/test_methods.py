import pytest

from quantkit.errors import UnknownNameError
from quantkit.methods import Methods, parse_methods


def test_parts_are_recognised_by_kind_in_any_order() -> None:
    wanted = Methods(equalize=True, scaling="awq", rounding="gptq", bias=True)
    assert parse_methods("awq+gptq+bias+equalize", weights_alone=True) == wanted
    assert parse_methods("bias + gptq+equalize+awq") == wanted
    assert str(wanted) == "equalize+awq+gptq+bias"


def test_a_calibrator_may_be_a_part() -> None:
    found = parse_methods("smoothquant+percentile")
    assert (found.scaling, found.ranges) == ("smoothquant", "percentile")


def test_mse_is_for_weights_only_where_they_alone_are_quantized() -> None:
    assert parse_methods("mse", weights_alone=True) == Methods(rounding="mse")
    assert parse_methods("mse") == Methods(ranges="mse")
    assert parse_methods("mse+weighted") == Methods(ranges="mse", rounding="weighted")


@pytest.mark.parametrize(
    ("text", "alone", "says"),
    [
        ("awq+smoothquant", False, "awq and smoothquant are each a scaling of channels; keep one"),
        ("gptq+gptq", True, "it is there twice; keep one"),
        ("gptq+output", True, "gptq and output are each a rounding of weights"),
        ("entropy+minmax", False, "entropy and minmax are each a method for the ranges"),
        ("awq+gtpq", True, "gtpq: no such method; did you mean gptq?"),
        ("gtpq", False, "gtpq: no such method; did you mean gptq?"),
        ("awq+", True, "an empty part: no such method; choose one of"),
        ("smoothquant", True, "for activations, and here weights alone are quantized; choose awq"),
        ("awq+entropy", True, "entropy: for activations, and here weights alone"),
        ("awq+qqq", False, "choose one of equalize, smoothquant, awq"),
    ],
)
def test_what_does_not_go_together_is_one_line(text: str, alone: bool, says: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        parse_methods(text, weights_alone=alone)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_what_looks_across_a_layer_needs_its_gram_matrix() -> None:
    needing = {
        t
        for t in ("amax", "mse", "weighted", "output", "gptq", "awq", "equalize", "bias")
        if parse_methods(t).needs_gram
    }
    assert needing == {"weighted", "output", "gptq", "awq"}

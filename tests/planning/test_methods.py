import re
from collections.abc import Callable
from typing import get_args

import pytest
import typer

from quantkit.calibrators.weight_rounding import Rounding
from quantkit.cli.calibrate import calibrate
from quantkit.cli.export import export
from quantkit.cli.sensitivity import sensitivity
from quantkit.errors import UnknownNameError
from quantkit.mixed_precision.goals import parse_budget
from quantkit.planning.methods import Methods, Scaling, parse_methods
from tests.conftest import ROOT


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


def test_every_part_stands_in_the_page_about_them() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    first_cells = " ".join(re.findall(r"^\|(.*?)\|", page, re.MULTILINE))
    for name in ("equalize", *get_args(Scaling), *get_args(Rounding), "bias"):
        assert f"`{name}`" in first_cells


def test_goals_and_options_of_the_page_are_those_that_there_are() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for goal in re.findall(r'"((?:top1|sqnr|kl|size) [-\d.]+)"', page):
        parse_budget(goal)
    options = {*option_names(export), *option_names(calibrate), *option_names(sensitivity)}
    named = set(re.findall(r"--[a-z][a-z0-9-]+", page.partition("<!-- benchmarks")[0]))
    assert len(named) > 15
    assert named <= options


def option_names(command: Callable[..., None]) -> set[str]:
    """The options that a command takes."""
    made = typer.Typer()
    made.command()(command)
    return {name for parameter in typer.main.get_command(made).params for name in parameter.opts}

import pytest

from quantkit.errors import RecipeError
from quantkit.planning.recipe import Recipe, Rule, Settings, literal, load_recipe, recipe_text

NODES = [
    ("blocks.0.attn.q", "MatMul"),
    ("blocks.1.mlp.up", "MatMul"),
    ("stem.conv", "Conv"),
    ("head", "Gemm"),
]
INT8 = Settings(weights="int8", activations="int8", method="entropy")


@pytest.fixture
def recipe(tmp_path):
    def load(text):
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path)

    return load


def test_a_later_rule_wins(recipe):
    rules = recipe('[[rule]]\nmatch = "*"\npreset = "fp8"\n[[rule]]\nmatch = "head"\npreset = "int8"\n')
    settled = rules.settle(NODES, INT8)
    assert settled["stem.conv"].weights == "fp8"
    assert settled["head"].weights == "int8"


def test_a_rule_overrules_only_what_it_speaks_of(recipe):
    rules = recipe(
        '[[rule]]\nop_types = ["MatMul"]\nweights = "int4"\n[[rule]]\nmatch = "blocks.*"\nmethod = "mse"\n'
    )
    found = rules.settle(NODES, INT8)["blocks.0.attn.q"]
    assert (found.weights, found.activations, found.method) == ("int4", "int8", "mse")


def test_a_regular_expression_stands_between_slashes(recipe):
    rules = recipe(r"""[[rule]]
match = '/^blocks\.[1-9]/'
keep = "float"
""")
    kept = [name for name, settings in rules.settle(NODES, INT8).items() if settings.keep_float]
    assert kept == ["blocks.1.mlp.up"]


def test_operators_and_names_must_both_match(recipe):
    rules = recipe('[[rule]]\nmatch = "*e*"\nop_types = ["Conv"]\nkeep = "float"\n')
    kept = [name for name, settings in rules.settle(NODES, INT8).items() if settings.keep_float]
    assert kept == ["stem.conv"]


def test_what_is_left_in_a_rule_are_the_options_of_its_method(recipe):
    rules = recipe('[[rule]]\nmethod = "percentile"\npercentile = 99.9\n')
    assert rules.settle(NODES, INT8)["head"].method_options == {"percentile": 99.9}


def test_a_rule_with_a_preset_quantizes_what_an_earlier_one_kept(recipe):
    rules = recipe('[[rule]]\nkeep = "float"\n[[rule]]\nmatch = "head"\npreset = "int8"\n')
    settled = rules.settle(NODES, INT8)
    assert not settled["head"].keep_float
    assert settled["stem.conv"].keep_float


def test_rules_that_match_nothing_are_named():
    rules = Recipe((Rule(match="blocks.*", weights="int4"), Rule(match="blokcs.*", weights="int4")))
    assert [str(rule) for rule in rules.unmatched(NODES)] == ["blokcs.*"]


def test_the_patterns_of_the_command_line_hold_over_the_rules():
    rules = Recipe((Rule(match="head", weights="int4"),)).with_patterns(include=["blocks.*"], exclude=["*.q"])
    kept = {name for name, settings in rules.settle(NODES, INT8).items() if settings.keep_float}
    assert kept == {"blocks.0.attn.q", "stem.conv", "head"}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[[rule]\n", "not TOML"),
        ("[rule]\nmatch = 'a'\n", "a list of"),
        ("[other]\n", "other"),
        ("[[rule]]\nmatch = 'a'\n", "says nothing to do"),
        ("[[rule]]\nmatch = 3\npreset = 'int8'\n", "not a text"),
        ("[[rule]]\nop_types = 'Conv'\npreset = 'int8'\n", "not a list"),
        ("[[rule]]\nkeep = 'int8'\n", 'only "float"'),
        ("[[rule]]\nprest = 'int8'\nkeep = 'float'\n", "prest"),
        ("[[rule]]\nmatch = '/(/'\nkeep = 'float'\n", "not a regular expression"),
        ("[[rule]]\nmatch = ''\nkeep = 'float'\n", "leave match out"),
        ("[[rule]]\nkeep = 'float'\npreset = 'int8'\n", 'keep = "float" and preset'),
        ("[[rule]]\npreset = 'int8'\nweights = 'fp8'\n", "preset and weights: both say"),
        ("[[rule]]\npreset = 'int4'\ngroup = 'row'\n", "group = 'row'"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(recipe, text, what):
    with pytest.raises(RecipeError, match=what) as refused:
        recipe(text)
    assert "\n" not in str(refused.value)


def test_a_missing_recipe_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(tmp_path / "recipe.toml")


NAMES = [
    "/a.b/",
    "/a/b",
    "a.b",
    "xa.by",
    "layer[0]",
    "layer0",
    "x*",
    "xy",
    "*",
    "?",
    'q"t',
    "b\\s",
    "n\nl",
    "ü:1",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_taken_literally_matches_itself_alone_in_a_file_too(tmp_path, name):
    (tmp_path / "recipe.toml").write_text(
        recipe_text(Recipe((Rule(match=literal(name), weights="int8"),))), encoding="utf-8"
    )
    (rule,) = load_recipe(tmp_path / "recipe.toml").rules
    assert [other for other in NAMES if rule.matches(other, "MatMul")] == [name]

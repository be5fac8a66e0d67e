from pathlib import Path

import numpy as np
import onnx
import pytest

import quantkit
from quantkit.errors import FileError, SpecError
from quantkit.graph import load_graph
from quantkit.mixed_precision.budget import BudgetResult, meet_budget
from quantkit.mixed_precision.goals import Budget, Try, parse_budget, tries_table
from quantkit.planning.planning import Request
from quantkit.planning.recipe import load_recipe
from tests.models import Feed, model_of

LAYERS = 6
Chain = tuple[Path, list[Feed]]
INT4 = Request(preset="int4", group="channel")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Six layers, the third and the last of which have outliers that four bits do not take."""
    folder = tmp_path_factory.mktemp("chain")
    rng = np.random.default_rng(1)
    weights = {}
    for i in range(LAYERS):
        w = rng.normal(size=(24, 24)).astype(np.float32) / 5
        if i in (2, 5):
            w[i] *= 30
        weights[f"w{i}"] = w
    lines = [
        f"h{i} = MatMul ({'x' if i == 0 else f'r{i - 1}'}, w{i})\n r{i} = Relu (h{i})"
        for i in range(LAYERS - 1)
    ]
    body = "\n".join(lines)
    model = model_of(
        f"(float[N,24] x) => (float[N,24] y) {{\n{body}\ny = MatMul (r{LAYERS - 2}, w{LAYERS - 1}) }}",
        **weights,
    )
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path, [{"x": rng.normal(size=(1, 24)).astype(np.float32)} for _ in range(32)]


def meet(
    chain: Chain, tmp_path: Path, budget: str, request: Request = INT4, **options: object
) -> BudgetResult:
    path, feeds = chain
    return meet_budget(
        path,
        None,
        feeds,
        budget,
        request=request,
        target="ort",
        out=tmp_path / "out.onnx",
        recipe_out=tmp_path / "recipe.toml",
        **options,  # type: ignore[arg-type]
    )


def bits(result: BudgetResult) -> dict[str, int]:
    return {w.name: w.spec.format.bits for w in result.exported.plan.weights}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("top1 -0.5", Budget(measure="top1", limit=-0.5)),
        ("sqnr 30", Budget(measure="sqnr", limit=30)),
        ("SQNR=30", Budget(measure="sqnr", limit=30)),
        ("size 0.3", Budget(measure="size", limit=0.3)),
        ("kl 5", Budget(measure="kl", limit=5)),
        ("top1 -0.5%", Budget(measure="top1", limit=-0.5)),
        ("size 30%", Budget(measure="size", limit=0.3)),
    ],
)
def test_a_goal_is_read(text: str, wanted: Budget) -> None:
    assert parse_budget(text) == wanted


@pytest.mark.parametrize(
    "text",
    ["", "top1", "top1 0.5", "size 0", "speed 3", "sqnr nan", "sqnr 3 4", "sqnr 30%", "kl 5%", "size 3%%"],
)
def test_what_is_no_goal_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="no goal; write"):
        parse_budget(text)


def test_the_layers_that_cost_most_get_more_bits(chain: Chain, tmp_path: Path) -> None:
    result = meet(chain, tmp_path, "sqnr 16")
    assert result.met and result.value >= 16
    found = bits(result)
    assert found["w2"] == 8 and 4 in found.values()
    assert [t.met for t in result.tries[:2]] == [False, True]


def test_what_needs_no_more_bits_gets_none(chain: Chain, tmp_path: Path) -> None:
    result = meet(chain, tmp_path, "sqnr 1")
    assert result.met and len(result.tries) == 1 and set(bits(result).values()) == {4}


def test_layers_stay_in_float_where_eight_bits_are_too_few(chain: Chain, tmp_path: Path) -> None:
    result = meet(chain, tmp_path, "sqnr 38")
    assert result.met and {t.base for t in result.tries} == {"int4", "int8"}
    assert result.exported.plan.left and set(bits(result).values()) == {8}


def test_a_goal_that_cannot_be_met_ends_with_the_best(chain: Chain, tmp_path: Path) -> None:
    result = meet(chain, tmp_path, "sqnr 200")
    assert not result.met
    assert result.evaluation.outputs["y"].sqnr_db == pytest.approx(
        max(t.sqnr_db for t in result.tries), abs=0.01
    )
    assert result.exported.path.exists()


def test_tries_end_the_search_with_the_best_so_far(chain: Chain, tmp_path: Path) -> None:
    result = meet(chain, tmp_path, "sqnr 16", tries=2)
    assert len(result.tries) == 2 and result.met and set(bits(result).values()) == {8}


def test_of_what_fits_the_most_faithful_is_taken(chain: Chain, tmp_path: Path) -> None:
    small = meet(chain, tmp_path, "size 0.3")
    result = meet(chain, tmp_path, "size 0.4")
    assert result.met and result.value <= 0.4
    assert result.exported.size_bytes <= 0.4 * result.exported.float_size_bytes
    assert {4, 8} == set(bits(result).values())
    assert result.tries[-1].sqnr_db > small.tries[0].sqnr_db


def test_the_recipe_that_is_kept_makes_the_same_file(chain: Chain, tmp_path: Path) -> None:
    result = meet(chain, tmp_path, "sqnr 16")
    assert load_recipe(tmp_path / "recipe.toml") == result.recipe
    again = quantkit.export_model(
        chain[0],
        preset="int4",
        group="channel",
        recipe=tmp_path / "recipe.toml",
        target="ort",
        out=tmp_path / "again.onnx",
    )
    assert again.path.read_bytes() == result.exported.path.read_bytes()


def test_labels_make_top1_accuracy_and_without_them_it_is_agreement(chain: Chain, tmp_path: Path) -> None:
    bare = meet(chain, tmp_path, "top1 -4")
    agreement = bare.evaluation.outputs["y"].top1_agreement
    assert bare.met and agreement is not None
    assert bare.value == pytest.approx(100 * (agreement - 1))
    labels = np.zeros(32, np.int64)
    labelled = meet(chain, tmp_path, "top1 -40", labels=labels)
    output = labelled.evaluation.outputs["y"]
    assert output.accuracy_quantized is not None and output.accuracy_float is not None
    assert labelled.value == pytest.approx(100 * (output.accuracy_quantized - output.accuracy_float))


def test_a_format_to_start_from_is_needed(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no format to start from"):
        meet(chain, tmp_path, "sqnr 3", Request(preset=None))
    assert load_graph(chain[0]).name == "model"


def test_nothing_is_tried_before_what_is_written_has_a_place(chain: Chain, tmp_path: Path) -> None:
    path, feeds = chain
    data = tmp_path / "data.npy"
    np.save(data, np.concatenate([feed["x"] for feed in feeds]))
    bytes_before = data.read_bytes()
    for places, says in (
        ({"out": data}, "is an input here"),
        ({"recipe_out": data}, "is an input here"),
        ({"out": tmp_path / "one", "recipe_out": tmp_path / "one"}, "the model goes there"),
        ({"out": tmp_path / "nowhere" / "out.onnx"}, "nowhere"),
    ):
        tried: list[object] = []
        options = {"target": "ort", "out": tmp_path / "out.onnx", **places}
        with pytest.raises((FileError, SpecError), match=says):
            meet_budget(path, None, data, "sqnr 1", request=INT4, on_try=tried.append, **options)  # type: ignore[arg-type]
        assert not tried
    assert data.read_bytes() == bytes_before
    assert [p.name for p in tmp_path.iterdir()] == ["data.npy"]


@pytest.mark.parametrize(("was", "now", "points"), [(0.91, 0.905, 0.5), (0.91, 0.9, 1), (0.95, 0.947, 0.3)])
def test_exactly_what_may_be_lost_may_be_lost(was: float, now: float, points: float) -> None:
    value = 100 * (now - was)
    assert parse_budget(f"top1 -{points}").met_by(value)
    assert not parse_budget(f"top1 -{points}").met_by(value - 1e-3)
    assert parse_budget("size 0.3").met_by(0.1 + 0.2) and not parse_budget("size 0.3").met_by(0.30001)


@pytest.mark.parametrize("goal", ["sqnr 25", "size 0.5", "top1 -1", "kl 5"])
def test_a_table_of_tries_has_no_column_twice(goal: str) -> None:
    tried = [
        Try(base="int4", to="int8", raised=raised, size=0.5, value=24.96, sqnr_db=24.96, met=False)
        for raised in (0, 1, 2)
    ]
    table = tries_table(tried, parse_budget(goal))
    # What is judged stands once, and so that it can be told from the goal.
    assert len(set(table.headers)) == len(table.headers)
    assert ("24.960" in table.text()) == (goal != "size 0.5")
    assert [row[0] for row in table.rows] == ["int4", "int4, 1 layer int8", "int4, 2 layers int8"]


def test_what_was_found_shows_itself_in_a_notebook(chain: Chain, tmp_path: Path) -> None:
    assert "<table" in meet(chain, tmp_path, "sqnr 3")._repr_html_()


def test_neither_the_cache_nor_its_gram_matrices_are_written_over(chain: Chain, tmp_path: Path) -> None:
    path, feeds = chain
    cache, grams = tmp_path / "model.calib", tmp_path / "model.gram"
    quantkit.calibrate_model(path, feeds).save(cache)
    quantkit.collect_grams(path, feeds, grams)
    before = cache.read_bytes(), grams.read_bytes()
    held = quantkit.CalibrationCache.load(cache)
    out = tmp_path / "out.onnx"
    for place in (cache, grams):
        for first, second in ((place, None), (out, place)):
            with pytest.raises(FileError, match="is an input here"):
                meet_budget(path, held, feeds, "sqnr 1", request=INT4, out=first, recipe_out=second)
            with pytest.raises(FileError, match="is an input here"):
                quantkit.export_model(
                    path, held, preset="int4", group="channel", target="ort", out=first, plan_out=second
                )
    assert (cache.read_bytes(), grams.read_bytes()) == before

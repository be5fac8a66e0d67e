"""The commands of what protects accuracy, as they are typed."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner, Result

from quantkit.cache.gram_file import GramFile
from quantkit.cli.app import app
from quantkit.errors import QuantkitError
from tests.models import model_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of two layers, with data, in the current folder."""
    rng = np.random.default_rng(0)
    hard = rng.normal(size=(32, 32)).astype(np.float32)
    hard[0] *= 40
    model = model_of(
        """(float[N,32] x) => (float[N,32] y) <float[32,32] w> {
        n = Mul (x, gain)
        h = MatMul (n, w)
        r = Relu (h)
        y = MatMul (r, hard) }""",
        gain=np.where(np.arange(32) == 5, 30, 1).astype(np.float32),
        hard=hard,
    )
    onnx.save(model, tmp_path / "model.onnx")
    np.save(tmp_path / "data.npy", rng.normal(size=(40, 32)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def refused(*words: str) -> str:
    """The error of a command that cannot be done."""
    found = run(*words)
    assert isinstance(found.exception, QuantkitError), found.output
    assert "\n" not in str(found.exception)
    return str(found.exception)


def calibrate(*words: str) -> Result:
    found = run("calibrate", "model.onnx", "--data", "data.npy", *words)
    assert found.exit_code == 0, found.output
    return found


def test_gram_matrices_lie_beside_the_cache_and_say_before_what_they_take(folder: Path) -> None:
    found = calibrate("--collect", "gram")
    assert "gram: 2 matrices" in found.output and "1 run over the data" in found.output
    assert sorted(p.suffix for p in folder.glob("model.*")) == [".calib", ".gram", ".onnx"]


def test_a_method_that_needs_gram_matrices_collects_them(folder: Path) -> None:
    calibrate("--method", "awq+gptq")
    assert (folder / "model.gram").exists()
    found = run("export", "--int4", "--group", "16", "--target", "ort", "--method", "gptq")
    assert found.exit_code == 0 and "method gptq" in found.output


def test_smoothing_needs_nothing_beside_the_cache(folder: Path) -> None:
    calibrate("--method", "smoothquant")
    assert not (folder / "model.gram").exists()
    assert "method smoothquant+mse" in run("export", "--int8", "--target", "ort").output


def test_what_needs_more_says_the_command(folder: Path) -> None:
    calibrate()
    said = refused("export", "model.onnx", "--int4", "--group", "32", "--method", "gptq")
    assert "run `quantkit calibrate model.onnx --data" in said and "--collect gram` first" in said
    assert "alpha auto" in refused("export", "--int8", "--method", "smoothquant", "--alpha", "auto")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("calibrate", "model.onnx", "--data", "data.npy", "--collect", "hessian"),
            "--collect hessian: there is gram",
        ),
        (("calibrate", "model.onnx", "--data", "data.npy", "--method", "awq+gtpq"), "did you mean gptq?"),
        (("export", "--int8", "--alpha", "2", "--method", "smoothquant"), "--alpha 2: neither a number"),
        (
            ("export", "--int8", "--alpha", "0.5"),
            "--alpha 0.5: no layer is smoothed; add --method smoothquant",
        ),
        (
            ("export", "--int4", "--folds", "insert", "--method", "gptq", "--group", "32"),
            "no channels are scaled",
        ),
        (("export", "--int8", "--folds", "none"), "--folds none: no such choice; choose norms, all, insert."),
        (("export", "--int8", "--device", "tpu"), "--device tpu: there are cpu and cuda."),
        (("export", "--int8", "--budget", "sqnr 3"), "nothing to judge by; give --data"),
        (("export", "--int8", "--budget", "speed 3", "--data", "data.npy"), "budget speed 3: no goal; write"),
        (("export", "--int8", "--recipe-out", "r.toml"), "--recipe-out: belongs to --budget"),
        (
            ("export", "--int8", "--budget", "sqnr 3", "--plan-out", "p", "--data", "data.npy"),
            "--plan-out: does not go",
        ),
    ],
)
def test_what_cannot_be_is_one_line(folder: Path, words: tuple[str, ...], says: str) -> None:
    calibrate()
    assert says in refused(*words)


def test_a_budget_is_met_with_exit_code_0_and_else_1(folder: Path) -> None:
    calibrate()
    words = ("export", "model.onnx", "--int4", "--group", "32", "--target", "ort", "--data", "data.npy")
    met = run(*words, "--budget", "sqnr 18", "--recipe-out", "recipe.toml")
    assert met.exit_code == 0 and "sqnr 18: met" in met.output
    again = run(
        "export", "model.onnx", "--int4", "--group", "32", "--target", "ort", "--recipe", "recipe.toml"
    )
    assert again.exit_code == 0
    missed = run(*words, "--budget", "sqnr 150", "--json")
    assert missed.exit_code == 1
    found = json.loads(missed.stdout)
    assert found["met"] is False and len(found["tries"]) > 1


def test_gram_matrices_that_are_not_needed_may_be_of_another_model(folder: Path) -> None:
    calibrate()
    (folder / "model.gram").write_bytes(b"old")
    assert run("export", "--int8").exit_code == 0
    assert "not a file of Gram matrices" in refused(
        "export", "--int4", "--group", "32", "--method", "gptq", "--target", "ort"
    )


def test_gram_matrices_of_other_data_than_the_caches_are_told(folder: Path) -> None:
    gptq = ("export", "--int4", "--group", "32", "--method", "gptq", "--target", "ort")
    calibrate("--collect", "gram")
    assert "model.gram is of" not in run(*gptq).output
    np.save(folder / "other.npy", np.load(folder / "data.npy")[::-1])
    assert run("calibrate", "model.onnx", "--data", "other.npy").exit_code == 0
    assert "model.gram is of" in run(*gptq).output


def test_layers_that_look_at_weights_alone_are_ranked_without_a_cache(folder: Path) -> None:
    words = ("--data", "data.npy", "--int4", "--group", "32", "--target", "ort")
    found = run("sensitivity", "model.onnx", *words)
    assert found.exit_code == 0 and found.output.count("× float") == 2
    assert "holds no calibration cache" in refused("sensitivity", "model.onnx", *words, "--method", "gptq")
    assert "holds no calibration cache" in refused("sensitivity", "model.onnx", "--data", "data.npy")


def test_what_a_search_would_write_over_is_told_before_it_begins(folder: Path) -> None:
    calibrate()
    words = ("export", "model.onnx", "--int4", "--group", "32", "--target", "ort", "--budget", "sqnr 18")
    assert "is an input here" in refused(*words, "--data", "data.npy", "--recipe-out", "data.npy")
    assert "is an input here" in refused(*words, "--data", "data.npy", "--out", "model.onnx")
    assert "the model goes there" in refused(*words, "--data", "data.npy", "--out", "x", "--recipe-out", "x")
    (folder / "in.toml").write_text('[[rule]]\nweights = "int4"\ngroup = 32\n')
    for place in ("--recipe-out", "--out"):
        said = refused(*words, "--data", "data.npy", "--recipe", "in.toml", place, "in.toml")
        assert "in.toml: is an input here" in said
    assert "group = 32" in (folder / "in.toml").read_text()


def test_layers_that_a_recipe_puts_in_groups_can_get_eight_bits(folder: Path) -> None:
    (folder / "in.toml").write_text('[[rule]]\nweights = "int4"\ngroup = 32\n')
    words = ("export", "model.onnx", "--int4", "--target", "ort", "--data", "data.npy", "--recipe", "in.toml")
    calibrate()
    found = run(*words, "--budget", "sqnr 30", "--recipe-out", "found.toml")
    assert found.exit_code == 0 and "tried int8: met" in found.output
    written = (folder / "model.int4.ort.onnx").read_bytes()
    words = ("export", "model.onnx", "--int4", "--target", "ort", "--recipe", "found.toml")
    again = run(*words, "--out", "again.onnx")
    assert again.exit_code == 0 and (folder / "again.onnx").read_bytes() == written


def test_gram_matrices_are_merged_with_their_caches(folder: Path) -> None:
    whole = np.load(folder / "data.npy")
    for name, part in (("a", whole[:15]), ("b", whole[15:])):
        np.save(folder / f"{name}.npy", part)
        words = ("--data", f"{name}.npy", "--collect", "gram", "--out", f"{name}.calib")
        assert run("calibrate", "model.onnx", *words).exit_code == 0
    merged = run("cache", "merge", "a.calib", "b.calib", "--out", "both.calib", "--method", "awq+gptq")
    assert merged.exit_code == 0 and "wrote both.gram" in merged.output
    found = run("export", "--cache", "both.calib", "--int4", "--group", "32", "--target", "ort")
    assert (
        found.exit_code == 0 and "method awq+gptq" in found.output and "both.gram is of" not in found.output
    )
    calibrate("--collect", "gram")
    one, two = GramFile("model.gram"), GramFile("both.gram")
    for view in one:
        np.testing.assert_allclose(two[view].products, one[view].products, rtol=1e-12)


def test_where_a_part_has_no_gram_matrices_none_are_merged_and_it_is_told(folder: Path) -> None:
    for name, more in (("a", ("--collect", "gram")), ("b", ())):
        np.save(folder / f"{name}.npy", np.load(folder / "data.npy") + ord(name))
        words = ("--data", f"{name}.npy", "--out", f"{name}.calib", *more)
        assert run("calibrate", "model.onnx", *words).exit_code == 0
    merged = run("cache", "merge", "a.calib", "b.calib", "--out", "both.calib")
    assert merged.exit_code == 0 and "b.calib has no Gram matrices beside it" in merged.output
    assert not (folder / "both.gram").exists()
    said = refused(
        "export", "--cache", "both.calib", "--int4", "--group", "32", "--method", "gptq", "--target", "ort"
    )
    assert "--data PART --collect gram --out PART.calib` for every part" in said


def test_the_command_for_gram_matrices_prepares_samples_as_the_cache_says(folder: Path) -> None:
    calibrate("--samples", "20", "--method", "percentile", "--percentile", "99.9")
    said = refused(
        "export",
        "model.onnx",
        "--int4",
        "--group",
        "32",
        "--method",
        "gptq",
        "--target",
        "ort",
        "--cache",
        "model.calib",
    )
    assert "--samples 20 --method percentile --percentile 99.9 --collect gram`" in said

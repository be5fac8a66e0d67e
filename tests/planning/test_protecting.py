"""Methods that look across tensors, from the cache to the file: what is written is the model, protected."""

import contextlib
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import quantkit
from quantkit.cache import CalibrationCache
from quantkit.cache.gram_file import GramFile
from quantkit.errors import CacheError, PlanError, QuantkitError
from quantkit.exported import Exported
from quantkit.graph import load_graph
from quantkit.graph.linears import find_linears
from quantkit.kernels.statistics import why_no_gpu
from quantkit.pipeline import collect_grams
from quantkit.planning.plan_file import load_plan
from quantkit.planning.protecting import edited
from quantkit.runtime import Session
from tests.calibrators.array_module import Module
from tests.models import MODELS, Feed, model_of
from tests.plans import NOTHING, sqnr_db

METHODS = ("awq+gptq+bias", "smoothquant+gptq+minmax", "equalize+weighted+bias")


@dataclass(frozen=True, kw_only=True)
class Collected:
    """A model in a folder, with its cache and its Gram matrices."""

    path: Path
    cache: Path
    feeds: list[Feed]

    def export(self, name: str = "out.onnx", **options: object) -> Exported:
        options = {"preset": "int8", "target": "ort", "everything": True, **options}
        return quantkit.export_model(self.path, self.cache, out=self.path.parent / name, **options)  # type: ignore[arg-type]

    def loss_db(self, path: Path) -> float:
        """SQNR of the first float output over all feeds, dB."""
        exact, found = [], []
        before, after = Session(load_graph(self.path).model), Session(path, optimize=False)
        for feed in self.feeds:
            a, b = before.run(feed), after.run(feed)
            name = next(n for n, v in a.items() if v.dtype.kind == "f")
            exact.append(a[name].ravel())
            found.append(b[name].ravel())
        return sqnr_db(np.concatenate(exact), np.concatenate(found))


def collected(folder: Path, model: onnx.ModelProto, feeds: list[Feed]) -> Collected:
    path = folder / "model.onnx"
    onnx.save(model, path)
    quantkit.calibrate_model(path, feeds, method="minmax").save(folder / "model.calib")
    if find_linears(load_graph(path)):
        collect_grams(path, feeds, folder / "model.gram")
    return Collected(path=path, cache=folder / "model.calib", feeds=feeds)


def folds_for(method: str) -> str:
    """As many as there are, where the method scales anything."""
    return "insert" if {"awq", "smoothquant"} & set(method.split("+")) else "all"


def attention(heads: int = 4, groups: int = 2) -> onnx.ModelProto:
    """A norm with outliers, grouped-query attention, and an MLP with a gate; residuals around both."""
    gain = np.ones(16, np.float32)
    gain[[3, 9]] = 40
    size, repeats = 8, heads // groups
    shapes = {
        "sq": np.array([0, 0, heads, size], np.int64),
        "sk": np.array([0, 0, groups, size], np.int64),
        "wide": np.array([1, groups, repeats, 6, size], np.int64),
        "joined": np.array([0, heads, 6, size], np.int64),
        "whole": np.array([0, 0, heads * size], np.int64),
        "two": np.array([2], np.int64),
    }
    return model_of(
        f"""(float[N,6,16] x) => (float[N,6,16] y)
        <float[16,{heads * size}] wq, float[16,{groups * size}] wk, float[16,{groups * size}] wv,
         float[{heads * size},16] wo, float[16,32] wgate, float[16,32] wup, float[32,16] wdown> {{
        n = Mul (x, gain)
        q = MatMul (n, wq)
        q4 = Reshape (q, sq)
        qh = Transpose <perm = [0,2,1,3]> (q4)
        k = MatMul (n, wk)
        k4 = Reshape (k, sk)
        kt = Transpose <perm = [0,2,1,3]> (k4)
        k5 = Unsqueeze (kt, two)
        ke = Expand (k5, wide)
        kh = Reshape (ke, joined)
        kT = Transpose <perm = [0,1,3,2]> (kh)
        v = MatMul (n, wv)
        v4 = Reshape (v, sk)
        vt = Transpose <perm = [0,2,1,3]> (v4)
        v5 = Unsqueeze (vt, two)
        ve = Expand (v5, wide)
        vh = Reshape (ve, joined)
        s = MatMul (qh, kT)
        p = Softmax <axis = -1> (s)
        c = MatMul (p, vh)
        ct = Transpose <perm = [0,2,1,3]> (c)
        cj = Reshape (ct, whole)
        o = MatMul (cj, wo)
        r = Add (x, o)
        n2 = Mul (r, gain2)
        gate = MatMul (n2, wgate)
        sg = Sigmoid (gate)
        silu = Mul (gate, sg)
        up = MatMul (n2, wup)
        h = Mul (silu, up)
        d = MatMul (h, wdown)
        y = Add (r, d) }}""",
        gain=gain,
        gain2=gain[::-1].copy(),
        **shapes,
    )


def attention_feeds(count: int = 24) -> list[Feed]:
    rng = np.random.default_rng(5)
    return [{"x": rng.normal(size=(1, 6, 16)).astype(np.float32)} for _ in range(count)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Collected:
    return collected(tmp_path_factory.mktemp("llama"), attention(), attention_feeds())


# --- what they save ---------------------------------------------------------------------------------------------


def test_smoothing_saves_what_outliers_cost(llama: Collected) -> None:
    plain = llama.loss_db(llama.export(method="minmax").path)
    smoothed = llama.loss_db(llama.export(method="smoothquant+minmax").path)
    assert smoothed > plain + 2


def test_gptq_and_awq_save_what_rounding_to_nearest_costs(llama: Collected) -> None:
    loss = {
        method: llama.loss_db(llama.export(preset="int4", group=16, method=method).path)
        for method in ("amax", "awq", "gptq", "awq+gptq")
    }
    assert min(loss["awq"], loss["gptq"], loss["awq+gptq"]) > loss["amax"] + 1


def test_the_default_of_a_cache_is_what_it_was_calibrated_for(llama: Collected, tmp_path: Path) -> None:
    cache = quantkit.calibrate_model(
        llama.path, llama.feeds, method="awq+gptq+percentile", method_options={"percentile": 99.9}
    )
    cache.save(tmp_path / "model.calib")
    shutil.copy(llama.cache.with_suffix(".gram"), tmp_path)
    other = Collected(path=llama.path, cache=tmp_path / "model.calib", feeds=llama.feeds)
    assert other.export(preset="int4", group=16).plan.method == "awq+gptq"
    assert other.export(preset="int8").plan.method == "awq+gptq+percentile"


# --- groups, folds and ties -------------------------------------------------------------------------------------


def test_heads_that_share_values_get_one_scale(llama: Collected) -> None:
    # The attention's products stay in float, so that the fold from o into the values is free.
    exported = llama.export(preset="int4", group=16, method="awq")
    assert exported.plan.edits is not None
    scale = exported.plan.edits.scales["cj"].reshape(2, 2, 8)
    np.testing.assert_array_equal(scale[:, 0], scale[:, 1])


def test_quantized_values_hold_what_their_channels_tell_once_they_are_divided(llama: Collected) -> None:
    plan = llama.export(method="smoothquant").plan
    assert plan.edits is not None and "cj" in plan.edits.scales
    rescaled = edited(load_graph(llama.path), plan.edits)
    session = Session(rescaled.model, outputs=["vh"])
    seen = np.concatenate([session.run(feed)["vh"].ravel() for feed in llama.feeds])
    found = plan.activations["vh"].range
    assert found is not None
    np.testing.assert_allclose([found.lo, found.hi], [seen.min(), seen.max()], rtol=1e-5)


def test_quantized_values_whose_channels_are_unknown_are_not_divided(llama: Collected) -> None:
    cache = CalibrationCache.load(llama.cache)
    known = {n: replace(s, channels=None) if n == "v" else s for n, s in cache.statistics.items()}
    unknown = replace(cache, statistics=known)
    for folds, place in (("all", "nowhere"), ("insert", "inserted"), ("norms", "nowhere")):
        exported = quantkit.export_model(
            llama.path,
            unknown,
            method="smoothquant",
            folds=folds,
            target="ort",
            out=llama.path.parent / "o.onnx",
        )
        edits = exported.plan.edits
        assert edits is not None and ("cj" in edits.inserted) == (place == "inserted")
        assert ("cj" in edits.scales) == (place == "inserted")


def test_a_residual_that_reads_a_norm_forbids_its_fold(tmp_path: Path) -> None:
    model = model_of(
        """(float[N,16] x) => (float[N,16] y) <float[16,16] w> {
        n = Mul (x, gain)
        d = MatMul (n, w)
        y = Add (n, d) }""",
        gain=np.linspace(1, 30, 16, dtype=np.float32),
    )
    rng = np.random.default_rng(0)
    made = collected(tmp_path, model, [{"x": rng.normal(size=(1, 16)).astype(np.float32)} for _ in range(8)])
    assert made.export(method="smoothquant").plan.edits is None
    inserted = made.export(method="smoothquant", folds="insert").plan
    assert inserted.edits is not None and inserted.edits.inserted == ("n",)
    assert list(inserted.activations) == ["n::rescaled"]


def test_a_tied_embedding_keeps_its_rows(tmp_path: Path) -> None:
    tiny = MODELS["tied_embedding"]
    made = collected(tmp_path, tiny.build(), tiny.feeds(8))
    exported = made.export(preset="int4", group="channel", method="awq+gptq")
    table = load_graph(tmp_path / "model.onnx").array("table")
    written = onnx.load(exported.path)
    held = {t.name: onnx.numpy_helper.to_array(t) for t in written.graph.initializer}
    gathered = next(n for n in written.graph.node if n.op_type == "Gather").input[0]
    np.testing.assert_array_equal(held[gathered], table)


# --- plans, bytes, errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_file_makes_the_same_file_of_the_given_model(llama: Collected, method: str) -> None:
    folder = llama.path.parent
    first = llama.export("first.onnx", method=method, folds=folds_for(method), plan_out=folder / "plan.json")
    again = quantkit.export_model(
        llama.path, llama.cache, plan=folder / "plan.json", out=folder / "again.onnx"
    )
    assert first.path.read_bytes() == again.path.read_bytes()
    plan = load_plan(folder / "plan.json")
    assert plan.edits is not None and plan.fingerprint != load_graph(llama.path).fingerprint


@pytest.mark.parametrize(
    ("preset", "method"),
    [
        ("int4", "mse"),
        ("int4", "weighted"),
        ("int4", "output"),
        ("int4", "awq"),
        ("int4", "gptq"),
        ("int4", "awq+gptq"),
        ("int8", "smoothquant"),
        ("int8", "equalize+bias"),
        ("w4a8", "equalize+awq+gptq+minmax+bias"),
    ],
)
def test_the_same_cache_gives_the_same_bytes(llama: Collected, preset: str, method: str) -> None:
    group = 16 if preset in ("int4", "w4a8") else None
    first, second = (
        llama.export(
            name, preset=preset, group=group, method=method, folds=folds_for(method)
        ).path.read_bytes()
        for name in ("a.onnx", "b.onnx")
    )
    assert first == second


@pytest.mark.parametrize("method", ["awq", "gptq", "awq+gptq+bias"])
def test_searches_on_a_gpu_give_the_same_bytes(
    llama: Collected, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"preset": "int4", "group": 16, "method": method}
    here = llama.export("here.onnx", **options)
    asked = []
    monkeypatch.setattr(
        "quantkit.planning.planning.array_module", lambda device: asked.append(device) or Module()
    )
    there = llama.export("there.onnx", device="cuda", **options)
    assert asked == ["cuda"]
    assert here.path.read_bytes() == there.path.read_bytes()


@pytest.mark.parametrize(("device", "says"), [("cuda", "--device cuda"), ("tpu", "there are cpu and cuda")])
def test_a_device_that_is_not_there_is_refused(llama: Collected, device: str, says: str) -> None:
    if why_no_gpu() is None and device == "cuda":
        pytest.skip("there is a GPU")
    with pytest.raises(QuantkitError, match=says):
        llama.export("none.onnx", preset="int4", group=16, method="gptq", device=device)
    assert not (llama.path.parent / "none.onnx").exists()


def test_a_plan_of_another_model_is_refused(llama: Collected, tmp_path: Path) -> None:
    llama.export(method="smoothquant", plan_out=tmp_path / "plan.json")
    onnx.save(attention(4, 4), tmp_path / "other.onnx")
    with pytest.raises(PlanError, match="edits are for a model of fingerprint"):
        quantkit.export_model(tmp_path / "other.onnx", plan=tmp_path / "plan.json", out=tmp_path / "out.onnx")


def test_without_gram_matrices_the_command_that_collects_them_is_said(
    llama: Collected, tmp_path: Path
) -> None:
    shutil.copy(llama.cache, tmp_path / "model.calib")
    for method in ("gptq", "awq"):
        with pytest.raises(
            CacheError,
            match=r"run `quantkit calibrate .*model.onnx --data DATA --method minmax --collect gram`",
        ):
            quantkit.export_model(
                llama.path, tmp_path / "model.calib", preset="int4", method=method, group=16
            )
    assert not list(tmp_path.glob("*.onnx"))


def test_gram_matrices_of_another_model_are_refused(llama: Collected, tmp_path: Path) -> None:
    other = collected(tmp_path, attention(2, 2), attention_feeds(2))
    with pytest.raises(CacheError, match="the Gram matrices of another model"):
        llama.export(preset="int4", method="gptq", grams=other.cache.with_suffix(".gram"))


def test_less_memory_collects_the_same_matrices_in_more_runs(llama: Collected, tmp_path: Path) -> None:
    said = []
    work = collect_grams(llama.path, llama.feeds, tmp_path / "m.gram", max_memory=30_000, on_work=said.append)
    assert said == [work] and len(work.passes) > 1
    whole, parts = GramFile(llama.cache.with_suffix(".gram")), GramFile(tmp_path / "m.gram")
    assert set(whole) == set(parts)
    for view in whole:
        np.testing.assert_allclose(parts[view].products, whole[view].products, rtol=1e-6, atol=1e-9)


def test_a_recipe_names_methods_for_some_layers(llama: Collected, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[[rule]]\nop_types = ["MatMul"]\npreset = "int4"\ngroup = 16\n[[rule]]\nmatch = "*_d"\nmethod = "awq+gptq"\n'
    )
    graph = load_graph(llama.path)
    names = {v.name: n.name for n in graph.model.graph for v in n.outputs}
    recipe.write_text(recipe.read_text().replace("*_d", str(names["d"])))
    plan = llama.export(preset=None, recipe=recipe).plan
    codes = {w.name: w.codes is not None for w in plan.weights}
    assert codes["wdown"] and sum(codes.values()) == 1
    assert plan.edits is None or set(plan.edits.scales) <= {"h"}


def test_biases_take_up_the_mean_of_the_error(tmp_path: Path) -> None:
    tiny = MODELS["conv_relu"]
    rng = np.random.default_rng(3)
    feeds = [{k: np.abs(v) + rng.random(v.shape, np.float32) for k, v in f.items()} for f in tiny.feeds(16)]
    made = collected(tmp_path, tiny.build(), feeds)
    plain = made.export("plain.onnx", preset="int4", group="channel", method="mse")
    corrected = made.export("corrected.onnx", preset="int4", group="channel", method="mse+bias")
    assert corrected.plan.edits is not None and corrected.plan.edits.biases
    assert made.loss_db(corrected.path) > made.loss_db(plain.path) + 3


def test_biases_that_cannot_take_it_up_are_told(tmp_path: Path) -> None:
    model = model_of(
        """(float[N,16] x, float[16] b) => (float[N,16] y) <float[16,16] w> {
        y = Gemm (x, w, b) }"""
    )
    rng = np.random.default_rng(0)
    feeds = [
        {"x": rng.normal(size=(1, 16)).astype(np.float32), "b": np.ones(16, np.float32)} for _ in range(4)
    ]
    made = collected(tmp_path, model, feeds)
    exported = made.export(preset="int4", group="channel", method="mse+bias")
    assert any("the bias stays as it is" in warning for warning in exported.warnings)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", ["int8", "int4"])
@pytest.mark.parametrize("target", ["tensorrt", "ort-cpu"])
@pytest.mark.parametrize("name", [n for n, m in MODELS.items() if n not in NOTHING and m.runs])
def test_every_model_is_written_with_every_method(
    name: str, target: str, preset: str, method: str, tmp_path: Path
) -> None:
    tiny = MODELS[name]
    made = collected(tmp_path, tiny.build(), tiny.feeds(6))
    if preset == "int4":
        method = method.replace("smoothquant+", "").replace("+minmax", "")
    options = {"group": "channel"} if preset == "int4" else {}
    with contextlib.suppress(PlanError):
        exported = made.export(
            preset=preset, target=target, method=method, plan_out=tmp_path / "plan.json", **options
        )
        again = quantkit.export_model(
            made.path, made.cache, plan=tmp_path / "plan.json", out=tmp_path / "again.onnx"
        )
        assert exported.path.read_bytes() == again.path.read_bytes()


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_what_is_divided_is_not_held_against_what_it_was_before(llama: Collected, alpha: float) -> None:
    exported = llama.export(method="smoothquant+percentile", alpha=alpha)
    edits, activations = exported.plan.edits, exported.plan.activations
    assert edits is not None and "vh" in activations and "vh" not in edits.scales
    # The values of the attention too: they are divided on the scale's way into the weights that compute them.
    (line,) = [w for w in exported.warnings if "rescaled tensor" in w]
    assert line.startswith(
        f"{len((edits.scales.keys() | {'vh'}) & activations.keys())} rescaled tensors have"
    )
    assert not [w for w in exported.warnings if "worst vh" in w]


def test_what_no_gram_matrix_tells_of_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = model_of(
        """(float[N,16] x) => (float[N,16] y) {
        [plain] a = MatMul (x, first)
        [halved] y = Gemm <alpha = 0.5> (a, second) }""",
        first=rng.normal(size=(16, 16)).astype(np.float32),
        second=rng.normal(size=(16, 16)).astype(np.float32),
    )
    held = collected(tmp_path, model, [{"x": rng.normal(size=(4, 16)).astype(np.float32)} for _ in range(4)])
    said = [w for w in held.export(preset="int4", group="channel", method="gptq").warnings if "Gram" in w]
    assert len(said) == 1 and said[0].startswith("halved: ") and "rounded by itself" in said[0]
    assert not [w for w in held.export(preset="int4", group="channel").warnings if "Gram" in w]

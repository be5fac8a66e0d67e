import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

import quantkit
from quantkit.cache import CalibrationCache
from quantkit.data import open_data
from quantkit.errors import CacheError, DataError, ExportError, FileError, ModelError, UnknownNameError
from quantkit.graph import Graph, find_sites, load_graph
from quantkit.observing.observe import observe
from quantkit.runtime import Session
from tests.conftest import DigitsExample
from tests.models import MODELS, Feed

Images = NDArray[np.float32]


@pytest.fixture(scope="module")
def graph(digits: DigitsExample) -> Graph:
    return load_graph(digits.model)


@pytest.fixture(scope="module")
def images(digits: DigitsExample, graph: Graph) -> Images:
    """The calibration pictures as the model takes them, [256, 1, 8, 8]."""
    return np.concatenate([sample["input"] for sample in open_data(digits.calib, graph.inputs)])


@pytest.fixture(scope="module")
def cache(graph: Graph, images: Images) -> CalibrationCache:
    return quantkit.calibrate_model(graph, images)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def scales(exported: quantkit.Exported) -> dict[str, float]:
    return {name: float(plan.qparams.scale) for name, plan in exported.plan.activations.items()}


# --- invariance ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_float_tensors_of_the_example_do_not_depend_on_the_batch_size(
    graph: Graph, images: Images, batch_size: int
) -> None:
    names = sorted({site.name for site in find_sites(graph)[0] if site.role != "weight"} - {"input"})
    session = Session(graph.model, outputs=names)
    whole = session.run({"input": images})
    parts = [session.run({"input": images[i : i + batch_size]}) for i in range(0, len(images), batch_size)]
    for name in names:
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_statistics_do_not_depend_on_the_batch_size(
    graph: Graph, images: Images, cache: CalibrationCache, batch_size: int
) -> None:
    assert_same_evidence(quantkit.calibrate_model(graph, images, batch_size=batch_size), cache)


def test_statistics_do_not_depend_on_the_order_of_the_samples(
    graph: Graph, images: Images, cache: CalibrationCache
) -> None:
    shuffled = np.random.default_rng(0).permutation(images)
    assert_same_evidence(quantkit.calibrate_model(graph, shuffled), cache)


def test_two_halves_merged_are_the_whole(graph: Graph, images: Images, cache: CalibrationCache) -> None:
    halves = [quantkit.calibrate_model(graph, half) for half in (images[:100], images[100:])]
    assert_same_evidence(halves[0].merge(halves[1]), cache)
    assert_same_evidence(halves[1].merge(halves[0]), cache)


@pytest.mark.parametrize("method", ["entropy", "minmax", "mse", "percentile"])
def test_scales_do_not_depend_on_batch_size_order_or_shards(
    here: Path, graph: Graph, images: Images, cache: CalibrationCache, method: str
) -> None:
    shuffled = np.random.default_rng(1).permutation(images)
    shards = [
        quantkit.calibrate_model(graph, part, batch_size=size)
        for part, size in ((shuffled[:77], 7), (shuffled[77:], 64))
    ]
    wanted = quantkit.export_model(graph, cache, method=method)
    found = quantkit.export_model(graph, shards[0].merge(shards[1]), method=method)
    assert scales(found) == scales(wanted)
    assert [a.range for a in found.plan.activations.values()] == [
        a.range for a in wanted.plan.activations.values()
    ]


def test_a_small_memory_takes_several_passes_over_the_same_values(
    graph: Graph, images: Images, cache: CalibrationCache
) -> None:
    found = observe(graph, open_data(images, graph.inputs), batch_size=32, max_memory=2**20)
    assert found.passes > 1
    for name, statistics in cache.statistics.items():
        one, other = found.statistics[name].histogram, statistics.histogram
        assert one.count == other.count
        # Which tensors are fetched together decides what ONNX Runtime fuses, so their last bits may move.
        assert (one.min, one.max) == pytest.approx((other.min, other.max), rel=1e-5)


def test_where_nothing_is_fused_several_passes_give_the_same_statistics() -> None:
    model = load_graph(MODELS["layernorm_mlp"].build())
    x = np.random.default_rng(0).standard_normal((64, 6, 8)).astype(np.float32)
    whole, parts = (
        observe(model, open_data(x, model.inputs), batch_size=16, max_memory=memory)
        for memory in (None, 2**13)
    )
    assert (whole.passes, parts.passes) == (1, 2)
    assert {n: s.histogram for n, s in parts.statistics.items()} == {
        n: s.histogram for n, s in whole.statistics.items()
    }


def assert_same_evidence(found: CalibrationCache, wanted: CalibrationCache) -> None:
    assert found.sample_fingerprints.tolist() == wanted.sample_fingerprints.tolist()
    assert found.statistics.keys() == wanted.statistics.keys()
    for name, statistics in wanted.statistics.items():
        assert found.statistics[name].histogram == statistics.histogram, name
    for name, array in wanted.probe.items():
        np.testing.assert_array_equal(found.probe[name], array)


# --- data ---------------------------------------------------------------------------------------------------


def as_generator(images: Images) -> Iterator[Images]:
    yield from images


def as_dicts(images: Images) -> list[Feed]:
    return [{"input": image[None]} for image in images]


@pytest.mark.parametrize("kind", ["array", "list", "generator", "dicts", "pairs", "npz", "npy", "pictures"])
def test_every_way_of_giving_the_same_data_gives_the_same_statistics(
    tmp_path: Path, graph: Graph, digits: DigitsExample, images: Images, cache: CalibrationCache, kind: str
) -> None:
    np.savez(tmp_path / "data.npz", input=images)
    np.save(tmp_path / "data.npy", images)
    data = {
        "array": images,
        "list": list(images),
        "generator": as_generator(images),
        "dicts": as_dicts(images),
        "pairs": [(image, 3) for image in images],
        "npz": tmp_path / "data.npz",
        "npy": tmp_path / "data.npy",
        "pictures": digits.calib,
    }[kind]
    assert_same_evidence(quantkit.calibrate_model(graph, data), cache)


def test_samples_takes_so_many_from_the_start(graph: Graph, images: Images) -> None:
    found = quantkit.calibrate_model(graph, images, samples=10)
    assert found.sample_count == 10
    assert_same_evidence(found, quantkit.calibrate_model(graph, images[:10]))


@pytest.mark.parametrize(
    "name",
    [
        "dynamic_axes",
        "fp16",
        "fp16_inside",
        "matmul_activations",
        "scalar_input",
        "state",
        "tied_embedding",
        "uint8_input",
        "unused_input",
    ],
)
def test_awkward_models_calibrate_and_export_for_every_target(here: Path, name: str) -> None:
    model = MODELS[name].save(here)
    feeds = MODELS[name].feeds(12)
    found = quantkit.calibrate_model(model, feeds)
    assert found.sample_count == 12
    for target in ("tensorrt", "ort", "ort-cpu"):
        exported = quantkit.export_model(model, found, target=target, method="minmax")
        assert exported.plan.nodes
        compared = quantkit.evaluate_model(model, exported.path, feeds)
        worst = min(m.sqnr_db for m in compared.outputs.values() if m.sqnr_db is not None)
        assert worst > 15


def test_every_element_of_ragged_samples_is_counted(here: Path) -> None:
    feeds = MODELS["dynamic_axes"].feeds(9)
    assert len({feed["x"].shape for feed in feeds}) > 1
    found = quantkit.calibrate_model(MODELS["dynamic_axes"].build(), feeds)
    assert found.statistics["x"].histogram.count == sum(feed["x"].size for feed in feeds)


def test_several_inputs_are_matched_by_name(here: Path) -> None:
    rng = np.random.default_rng(0)
    model = MODELS["masked_attention"].build()
    x = rng.standard_normal((5, 6, 8)).astype(np.float32)
    mask = np.zeros((5, 6, 6), np.float32)
    by_name = quantkit.calibrate_model(model, {"mask": mask, "x": x})
    renamed = quantkit.calibrate_model(model, {"b": mask, "a": x}, mapping={"x": "a", "mask": "b"})
    assert by_name.statistics["x"].histogram.max == x.max()
    assert_same_evidence(renamed, by_name)


def test_a_fixed_batch_takes_whole_batches_and_says_what_it_left_out(here: Path) -> None:
    feeds = np.random.default_rng(0).standard_normal((10, 3, 8, 8)).astype(np.float32)
    with pytest.warns(UserWarning, match="2 samples were left out"):
        found = quantkit.calibrate_model(MODELS["fixed_batch"].build(), feeds, batch_size=3)
    assert found.sample_count == 8
    assert found.statistics["x"].histogram.count == feeds[:8].size


def test_tensors_that_are_not_finite_stay_in_float_and_are_listed(here: Path) -> None:
    model = MODELS["infinite_activation"].save(here)
    feeds = MODELS["infinite_activation"].feeds(8)
    exported = quantkit.export_model(model, quantkit.calibrate_model(model, feeds))
    assert any("infinite" in left.reason for left in exported.plan.left)


def test_a_model_without_anything_to_quantize_is_refused(here: Path) -> None:
    model = MODELS["nothing_to_quantize"]
    with pytest.raises(ModelError, match="nothing to calibrate"):
        quantkit.calibrate_model(model.build(), model.feeds())


def test_a_model_whose_layers_are_all_left_is_refused_before_it_is_run(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = MODELS["residual_identity"]
    cache = quantkit.calibrate_model(tiny.build(), tiny.feeds(4))
    exported = quantkit.export_model(tiny.build(), cache)
    monkeypatch.setattr("quantkit.observing.observe.Session", None)
    with pytest.raises(ModelError, match=r"already quantized in the model.*; give the float model") as caught:
        quantkit.calibrate_model(exported.path, tiny.feeds(4))
    assert "\n" not in str(caught.value)


# --- exporting ----------------------------------------------------------------------------------------------


@pytest.fixture
def calibrated(here: Path, digits: DigitsExample, images: Images) -> Path:
    """A current folder with model.onnx and model.calib in it."""
    shutil.copy(digits.model, "model.onnx")
    quantkit.calibrate_model("model.onnx", images, method="mse").save("model.calib")
    return here


def test_a_cache_and_its_path_give_the_same_file(calibrated: Path) -> None:
    quantkit.export_model("model.onnx", "model.calib", out="a.onnx")
    quantkit.export_model("model.onnx", CalibrationCache.load("model.calib"), out="b.onnx")
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()


def test_exporting_twice_gives_the_same_bytes(calibrated: Path) -> None:
    first = quantkit.export_model(None, "model.calib").path.read_bytes()
    assert quantkit.export_model(None, "model.calib").path.read_bytes() == first


def test_the_method_of_the_calibration_is_the_default_of_the_export(calibrated: Path) -> None:
    assert quantkit.export_model(None, "model.calib").plan.method == "mse"
    assert quantkit.export_model(None, "model.calib", method="minmax").plan.method == "minmax"


def test_the_options_of_the_calibration_are_the_default_of_the_export(
    here: Path, graph: Graph, images: Images
) -> None:
    low = quantkit.calibrate_model(graph, images, method="percentile", method_options={"percentile": 90.0})
    clipped = quantkit.export_model(graph, low).plan.activations["stem"].range.hi
    assert clipped < quantkit.export_model(graph, low, method="minmax").plan.activations["stem"].range.hi / 2


def test_methods_presets_and_targets_share_one_calibration(calibrated: Path) -> None:
    names = [
        quantkit.export_model(None, "model.calib", preset=preset, target=target).path.name
        for preset in ("int8", "fp8")
        for target in ("tensorrt", "ort", "ort-cpu")
    ]
    assert names == [
        "model.int8.onnx",
        "model.int8.ort.onnx",
        "model.int8.ort-cpu.onnx",
        "model.fp8.onnx",
        "model.fp8.ort.onnx",
        "model.fp8.ort-cpu.onnx",
    ]


def test_what_is_quantized_and_what_is_not_adds_up_to_all_linear_nodes(calibrated: Path) -> None:
    graph = load_graph("model.onnx")
    linear = sum(node.op_type in ("Conv", "Gemm") for node in graph.model.graph)
    for everything in (False, True):
        exported = quantkit.export_model(None, "model.calib", preset="fp8", everything=everything)
        done = sum(row[1] for row in exported.table().rows if isinstance(row[1], int))
        kept = sum(row[2] for row in exported.table().rows if isinstance(row[2], int))
        assert done + kept == linear
        assert (kept == 0) == everything
        assert all(left.reason for left in exported.plan.left)


def test_an_export_as_json_holds_its_plan(calibrated: Path) -> None:
    exported = quantkit.export_model(None, "model.calib", preset="fp8")
    found = json.loads(json.dumps(exported.to_dict(), allow_nan=False))
    assert found["path"] == "model.fp8.onnx"
    assert found["method"] == "mse"
    assert {n: a["scale"] for n, a in found["activations"].items()} == scales(exported)
    assert len(found["quantized"]) + len(found["left_in_float"]) == 8
    assert found["size_bytes"] == Path("model.fp8.onnx").stat().st_size


def test_an_int8_file_holds_its_weights_as_int8(calibrated: Path) -> None:
    exported = quantkit.export_model(None, "model.calib")
    stored = {t.name: t for t in onnx.load(exported.path).graph.initializer}
    kinds = {t.data_type for t in stored.values() if np.prod(t.dims) > 64}
    assert kinds == {onnx.TensorProto.INT8}
    assert exported.size_bytes < exported.float_size_bytes / 3


def test_the_written_file_is_held_against_its_plan(calibrated: Path) -> None:
    checked = quantkit.export_model(None, "model.calib").verification
    assert checked is not None
    assert checked.output == "logits"
    assert checked.plan_sqnr_db > checked.float_sqnr_db + 10


def test_a_file_that_fails_its_check_gets_no_name(calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ExportError("model.int8.onnx: differs; report this.")

    monkeypatch.setattr("quantkit.exporting.verify", refuse)
    with pytest.raises(ExportError):
        quantkit.export_model(None, "model.calib")
    assert sorted(p.name for p in calibrated.iterdir()) == ["model.calib", "model.onnx"]


def test_model_and_cache_can_be_moved_together(calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = calibrated / "elsewhere"
    moved.mkdir()
    for name in ("model.onnx", "model.calib"):
        shutil.move(name, moved)
    exported = quantkit.export_model(None, moved / "model.calib")
    assert exported.path == Path("model.int8.onnx")


def test_a_model_moved_away_from_its_cache_is_asked_for_by_name(calibrated: Path) -> None:
    Path("models").mkdir()
    shutil.move("model.onnx", "models/renamed.onnx")
    with pytest.raises(CacheError, match=r"model\.onnx is not there"):
        quantkit.export_model(None, "model.calib")
    assert quantkit.export_model("models/renamed.onnx", "model.calib").path == Path("renamed.int8.onnx")


def test_a_cache_of_a_model_in_memory_wants_the_model_again(here: Path, digits: DigitsExample) -> None:
    model = onnx.load(digits.model)
    found = quantkit.calibrate_model(model, np.zeros((4, 1, 8, 8), np.float32))
    with pytest.raises(CacheError, match="in memory"):
        quantkit.export_model(None, found)
    assert quantkit.export_model(model, found, out="x.onnx").path.exists()


def test_a_cache_of_another_model_is_refused(calibrated: Path) -> None:
    other = MODELS["conv_relu"].save(calibrated)
    with pytest.raises(CacheError, match="another model"):
        quantkit.export_model(other, "model.calib")


@pytest.mark.parametrize("name", ["model.onnx", "model.calib", "./model.onnx"])
def test_what_is_read_is_never_written_over(calibrated: Path, name: str) -> None:
    before = Path(name).read_bytes()
    with pytest.raises(FileError, match="would be lost"):
        quantkit.export_model("model.onnx", "model.calib", out=name)
    assert Path(name).read_bytes() == before


def test_a_cache_is_not_saved_over_its_model(calibrated: Path) -> None:
    with pytest.raises(FileError, match="would be lost"):
        CalibrationCache.load("model.calib").save("model.onnx")


@pytest.mark.parametrize(
    "wrong", [{"method": "entropi"}, {"target": "tensorflow"}, {"preset": "int9"}], ids=str
)
def test_unknown_names_are_answered_with_near_ones(calibrated: Path, wrong: dict[str, str]) -> None:
    near = {"method": "entropy", "target": "tensorrt", "preset": "int8"}
    with pytest.raises(UnknownNameError, match=near[next(iter(wrong))]):
        quantkit.export_model(None, "model.calib", **wrong)  # type: ignore[arg-type]


def test_a_wrong_method_is_refused_before_anything_is_run(graph: Graph) -> None:
    def never() -> Iterator[Images]:
        raise AssertionError("the data were touched")
        yield

    with pytest.raises(UnknownNameError):
        quantkit.calibrate_model(graph, never(), method="entropi")


# --- evaluating ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out(digits: DigitsExample) -> tuple[Images, NDArray[np.int64]]:
    data = np.load(digits.eval)
    return data["images"].astype(np.float32)[:200] / 255, data["labels"][:200]


def test_accuracy_is_the_share_of_right_answers(
    calibrated: Path, held_out: tuple[Images, NDArray[np.int64]]
) -> None:
    x, labels = held_out
    exported = quantkit.export_model(None, "model.calib")
    found = quantkit.evaluate_model("model.onnx", exported.path, x, labels=labels).outputs["logits"]
    for name, accuracy in (
        ("model.onnx", found.accuracy_float),
        (exported.path, found.accuracy_quantized),
    ):
        answers = ort.InferenceSession(str(name)).run(None, {"input": x})[0].argmax(axis=1)
        assert accuracy == pytest.approx(np.mean(answers == labels))


def test_a_model_against_itself_loses_nothing(graph: Graph, images: Images) -> None:
    found = quantkit.evaluate_model(graph, graph, images[:20], optimize=True)
    assert found.outputs["logits"].sqnr_db == float("inf")
    assert found.outputs["logits"].top1_agreement == 1


def test_per_layer_names_every_linear_operator(calibrated: Path, images: Images) -> None:
    exported = quantkit.export_model(None, "model.calib")
    found = quantkit.evaluate_model("model.onnx", exported.path, images[:50], per_layer=True)
    assert {layer.name: layer.op_type for layer in found.layers} == exported.plan.nodes
    assert found.layers[-1].sqnr_db == pytest.approx(found.outputs["logits"].sqnr_db, abs=0.1)


def test_next_token_judges_a_language_model_on_its_own_input(here: Path) -> None:
    model = MODELS["tied_embedding"].save(here)
    ids = np.random.default_rng(0).integers(0, 8, (6, 10))
    exported = quantkit.export_model(model, quantkit.calibrate_model(model, ids))
    found = quantkit.evaluate_model(model, exported.path, ids, labels="next-token").outputs["y"]
    logits = ort.InferenceSession(str(model)).run(None, {"ids": ids})[0][:, :-1].astype(np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]
    assert found.perplexity_float == pytest.approx(np.exp(losses.mean()), rel=1e-5)


@pytest.mark.parametrize("count", [199, 201, 1])
def test_labels_of_another_number_than_samples_are_refused(
    calibrated: Path, held_out: tuple[Images, NDArray[np.int64]], count: int
) -> None:
    with pytest.raises(DataError, match=f"{count} labels for 200 samples"):
        quantkit.evaluate_model("model.onnx", "model.onnx", held_out[0], labels=np.zeros(count, np.int64))


def test_labels_beyond_the_samples_asked_for_are_left_aside(
    graph: Graph, held_out: tuple[Images, NDArray[np.int64]]
) -> None:
    x, labels = held_out
    few = quantkit.evaluate_model(graph, graph, x, labels=labels, samples=20)
    assert few.samples == 20
    assert few == quantkit.evaluate_model(graph, graph, x[:20], labels=labels[:20])


def test_labels_that_are_all_left_out_are_refused(
    here: Path, graph: Graph, held_out: tuple[Images, NDArray[np.int64]]
) -> None:
    x, labels = held_out
    labels = np.where(np.arange(200) < 20, -100, labels.astype(np.int64))
    with pytest.raises(DataError, match="all of these 20 samples are -100"):
        quantkit.evaluate_model(graph, graph, x, labels=labels, samples=20)
    found = quantkit.evaluate_model(graph, graph, x, labels=labels, samples=30).outputs["logits"]
    rest = quantkit.evaluate_model(graph, graph, x[20:30], labels=labels[20:30]).outputs["logits"]
    assert found.accuracy_float == rest.accuracy_float
    model = MODELS["tied_embedding"].save(here)
    with pytest.raises(DataError, match="next-token: no sample has a second token"):
        quantkit.evaluate_model(model, model, np.zeros((3, 1), np.int64), labels="next-token")


def test_two_networks_are_not_compared(calibrated: Path, images: Images) -> None:
    other = MODELS["conv_relu"].save(calibrated)
    with pytest.raises(quantkit.QuantkitError, match="two files of one network"):
        quantkit.evaluate_model("model.onnx", other, images)


def test_a_float8_file_for_tensorrt_that_onnx_runtime_cannot_optimize_is_sent_to_the_target_that_it_can(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny = MODELS["conv_relu"]
    feeds = tiny.feeds(4)
    cache = quantkit.calibrate_model(tiny.build(), feeds)
    files = {
        target: quantkit.export_model(tiny.build(), cache, preset="fp8", target=target, everything=True).path
        for target in ("tensorrt", "ort")
    }
    with pytest.raises(ModelError, match="optimizations break it") as caught:
        quantkit.evaluate_model(tiny.build(), files["tensorrt"], feeds, optimize=True)
    assert "--target ort" in str(caught.value)
    assert "onnx.checker" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
    for target, optimize in (("tensorrt", False), ("ort", True)):
        found = quantkit.evaluate_model(tiny.build(), files[target], feeds, optimize=optimize)
        assert found.outputs["y"].sqnr_db > 20


def test_a_file_that_no_level_of_optimization_can_load_is_said_to_be_invalid(here: Path) -> None:
    tiny = MODELS["conv_relu"]
    model = tiny.build()
    model.graph.node[0].domain = "not.a.domain"
    model.opset_import.append(onnx.helper.make_opsetid("not.a.domain", 1))
    onnx.save(model, "odd.onnx")
    with pytest.raises(ModelError, match=r"odd.onnx: ONNX Runtime cannot load it: .*; check it with"):
        quantkit.evaluate_model(tiny.build(), "odd.onnx", tiny.feeds(1), optimize=True)

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import quantkit
from quantkit.cache import CalibrationCache
from quantkit.errors import CacheError, FileError, UnknownNameError
from quantkit.formats import Range
from quantkit.interchange import EXPORT_FORMATS, export_cache, import_cache
from quantkit.interchange.table import int8_scale, range_of_scale
from tests.conftest import DigitsExample
from tests.models import MODELS

TENSORRT_LIKE = ("residual_downsample", "concat_branches", "layernorm_mlp", "conv_batchnorm", "odd_names")


@pytest.fixture(scope="module")
def measured(digits: DigitsExample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example's model.onnx and model.calib."""
    folder = tmp_path_factory.mktemp("measured")
    shutil.copy(digits.model, folder / "model.onnx")
    made = quantkit.calibrate_model(folder / "model.onnx", digits.calib, samples=40)
    made.save(folder / "model.calib")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Path) -> Path:
    """The current folder, a copy of `measured`."""
    folder = tmp_path / "here"
    shutil.copytree(measured, folder)
    monkeypatch.chdir(folder)
    return folder


def bits_in_cache(path: str) -> dict[str, int]:
    """Tensor → the bits of its scale, by a reader of their own."""
    lines = Path(path).read_text().splitlines()[1:]
    return {line.rpartition(": ")[0]: int(line.rpartition(": ")[2], 16) for line in lines}


def bits_in_model(path: Path) -> dict[str, int]:
    """Quantized activation → the bits of its scale, read from the file's own QuantizeLinear nodes."""
    graph = onnx.load(path).graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    return {
        node.input[0]: int(stored[node.input[1]].astype(np.float32).view(np.uint32))
        for node in graph.node
        if node.op_type == "QuantizeLinear" and stored[node.input[1]].ndim == 0
    }


# --- there and back ---


@pytest.mark.parametrize("method", ["entropy", "minmax", "percentile"])
def test_int8_scales_are_those_of_the_tensorrt_cache_bit_for_bit(here: Path, method: str) -> None:
    export_cache("model.calib", "model.cache", format="tensorrt", method=method)
    import_cache("model.cache", "model.onnx").cache.save("imported.calib")
    exported = quantkit.export_model(None, "imported.calib", preset="int8")
    in_cache, in_model = bits_in_cache("model.cache"), bits_in_model(exported.path)
    assert in_model
    assert {name: in_cache[name] for name in in_model} == in_model
    direct = quantkit.export_model(None, "model.calib", preset="int8", method=method, out="direct.onnx")
    assert bits_in_model(direct.path) == in_model
    assert exported.path.read_bytes() == direct.path.read_bytes()


@pytest.mark.parametrize("name", TENSORRT_LIKE)
def test_every_kind_of_model_goes_there_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = MODELS[name].save(tmp_path)
    cache = quantkit.calibrate_model(model, MODELS[name].feeds(8))
    export_cache(cache, "x.cache", format="tensorrt")
    found = import_cache("x.cache", model)
    assert found.missing == found.unknown == ()
    exported = quantkit.export_model(model, found.cache)
    direct = quantkit.export_model(model, cache, out="direct.onnx")
    in_cache = bits_in_cache("x.cache")
    for tensor, plan in exported.plan.activations.items():
        assert int(plan.qparams.scale.view(np.uint32)) == in_cache[tensor]
        assert plan.qparams.scale == direct.plan.activations[tensor].qparams.scale


def test_a_cache_by_hand_gives_its_scales(here: Path) -> None:
    original = onnx.load("model.onnx").graph
    names = [i.name for i in original.input] + [name for node in original.node for name in node.output]
    lines = [f"{name}: {0x3C000001 + 12345 * i:08x}" for i, name in enumerate(names)]
    Path("hand.cache").write_text("\n".join(["TRT-8502-EntropyCalibration2", *lines]))
    found = import_cache("hand.cache", "model.onnx")
    assert found.missing == ()
    assert found.cleaned_away == (
        "block1.conv",
        "block2.conv",
        "depthwise.conv",
        "expand.conv",
        "head.conv",
        "project.conv",
        "stem.conv",
    )
    exported = quantkit.export_model("model.onnx", found.cache)
    in_cache, in_model = bits_in_cache("hand.cache"), bits_in_model(exported.path)
    assert len(in_model) == len(exported.plan.activations)
    assert {name: in_cache[name] for name in in_model} == in_model


@pytest.mark.parametrize("format", EXPORT_FORMATS)
def test_what_was_imported_is_written_again_byte_for_byte(here: Path, format: str) -> None:
    export_cache("model.calib", "first", format=format)
    export_cache(import_cache("first", "model.onnx").cache, "second", format=format)
    if format == "ort-json":
        first, second = (json.loads(Path(p).read_bytes()) for p in ("first", "second"))
        assert first["data"] == second["data"]
    else:
        assert Path("first").read_bytes() == Path("second").read_bytes()


@pytest.mark.parametrize("format", ["ort", "ort-json", "ort-flatbuffers"])
def test_ort_tables_give_the_scales_of_a_direct_export(here: Path, format: str) -> None:
    export_cache("model.calib", "table", format=format)
    exported = quantkit.export_model("model.onnx", import_cache("table", "model.onnx").cache)
    direct = quantkit.export_model("model.onnx", "model.calib", out="direct.onnx")
    assert bits_in_model(exported.path) == bits_in_model(direct.path)


@pytest.mark.parametrize("format", ["aimet", "aimet-0.6.1"])
def test_aimet_encodings_hold_the_ranges_of_a_direct_export_with_scales_of_their_own(
    here: Path, format: str
) -> None:
    exported = quantkit.export_model("model.onnx", "model.calib")
    export_cache("model.calib", "x.encodings", format=format)
    ranges = import_cache("x.encodings", "model.onnx").cache.ranges
    one_sided = 0
    for name, activation in exported.plan.activations.items():
        solved, scale = activation.range, float(activation.qparams.scale)
        lo, hi = min(float(solved.lo), 0.0), max(float(solved.hi), 0.0)
        # Zero is moved onto a code: an end may move by half a step.
        assert float(ranges[name].lo) == pytest.approx(lo, abs=0.51 * (hi - lo) / 255)
        assert float(ranges[name].hi) == pytest.approx(hi, abs=0.51 * (hi - lo) / 255)
        step = float(ranges[name].hi - ranges[name].lo) / 255
        one_sided += lo == 0
        assert lo < 0 or step == pytest.approx(scale * 127 / 255)
    assert one_sided > 2


def test_tensors_of_one_scale_have_one_in_the_file(tmp_path: Path) -> None:
    model = MODELS["concat_branches"].save(tmp_path)
    cache = quantkit.calibrate_model(model, MODELS["concat_branches"].feeds(8))
    ranges = export_cache(cache, tmp_path / "x.cache", format="tensorrt").ranges
    assert ranges["a"] == ranges["b"] == ranges["c"]


def test_a_tensor_with_nan_is_left_out_with_the_reason(tmp_path: Path) -> None:
    model = MODELS["nan_activation"].save(tmp_path)
    cache = quantkit.calibrate_model(model, MODELS["nan_activation"].feeds(4))
    broken = [n for n, s in cache.statistics.items() if s.histogram.nan_count or s.histogram.inf_count]
    found = export_cache(cache, tmp_path / "x.cache", format="tensorrt")
    assert broken
    assert found.left_out == dict.fromkeys(broken, "NaN or infinity was observed")
    assert not found.ranges.keys() & set(broken)


# --- names ---


def test_names_that_do_not_meet_are_listed_both_ways(here: Path) -> None:
    Path("x.cache").write_text(
        "TRT-8601-EntropyCalibration2\n"
        "input: 3c010204\nstem: 3d000000\nstem.conv: 3d000000\nlogits: 3d800000\n"
        "(Unnamed Layer* 48) [Constant]_output: 3bbed4cb\nnobody:0: 3bbed4cb\nstem.weight: 3d000000\n"
    )
    weight = onnx.load("model.onnx").graph.initializer[0].name
    Path("x.cache").write_text(Path("x.cache").read_text().replace("stem.weight", weight))
    found = import_cache("x.cache", "model.onnx")
    assert found.used == ("input", "stem")
    assert "block1" in found.missing
    assert found.unknown == ("(Unnamed Layer* 48) [Constant]_output", "nobody:0")
    assert found.cleaned_away == ("stem.conv",)
    assert found.idle == ("logits",)
    assert found.left_out == {weight: "a weight"}
    shown = found.table().text()
    for name in ("nobody:0", "stem.conv", "logits", "block1"):
        assert name in shown
    exported = quantkit.export_model("model.onnx", found.cache)
    left = {node.reason for node in exported.plan.left}
    assert exported.plan.activations.keys() == {"input", "stem"}
    assert "tensor block1 has no range in the imported file" in left


def test_a_file_of_another_model_is_refused(here: Path) -> None:
    Path("x.cache").write_text("TRT-8601-EntropyCalibration2\na: 3d000000\nb: 3d000000\n")
    with pytest.raises(
        CacheError, match=r"none of its 2 tensors \(a, b\) is one that model\.onnx could quantize"
    ):
        import_cache("x.cache", "model.onnx")


def test_an_imported_cache_belongs_to_its_model(here: Path, tmp_path: Path) -> None:
    export_cache("model.calib", "x.cache", format="tensorrt")
    found = import_cache("x.cache", "model.onnx").cache
    other = MODELS["conv_relu"].save(tmp_path)
    with pytest.raises(CacheError, match="belongs to another model"):
        quantkit.export_model(other, found)


def test_models_in_memory_are_taken_too(here: Path) -> None:
    export_cache("model.calib", "x.cache", format="tensorrt")
    found = import_cache("x.cache", onnx.load("model.onnx"))
    assert found.missing == found.unknown == ()
    assert quantkit.export_model(onnx.load("model.onnx"), found.cache).verification is not None


# --- fixed ranges ---


@pytest.fixture
def imported(here: Path) -> CalibrationCache:
    export_cache("model.calib", "x.cache", format="tensorrt")
    return import_cache("x.cache", "model.onnx").cache


@pytest.mark.parametrize("method", ["minmax", "entropy", "mse", "percentile"])
def test_no_method_changes_fixed_ranges(imported: CalibrationCache, method: str) -> None:
    with pytest.raises(
        CacheError, match=rf"method {method}: the cache holds fixed ranges, imported from x\.cache"
    ) as e:
        quantkit.export_model("model.onnx", imported, method=method)
    assert "\n" not in str(e.value)
    with pytest.raises(CacheError, match="fixed ranges"):
        export_cache(imported, "y.cache", format="tensorrt", method=method)
    assert not Path("y.cache").exists()


def test_an_option_of_a_method_is_refused_too(imported: CalibrationCache) -> None:
    with pytest.raises(CacheError, match="fixed ranges"):
        quantkit.export_model("model.onnx", imported, method_options={"percentile": 99.0})


def test_its_own_method_is_imported(imported: CalibrationCache) -> None:
    exported = quantkit.export_model("model.onnx", imported, method="imported")
    assert exported.plan.method == imported.method == "imported"
    with pytest.raises(UnknownNameError, match="imported"):
        quantkit.export_model("model.onnx", "model.calib", method="imported")


@pytest.mark.parametrize("target", ["tensorrt", "ort", "ort-cpu"])
@pytest.mark.parametrize("preset", ["int8", "fp8"])
def test_fixed_ranges_serve_every_preset_and_target(
    imported: CalibrationCache, preset: str, target: str
) -> None:
    exported = quantkit.export_model("model.onnx", imported, preset=preset, target=target)
    assert exported.verification is not None
    for name, activation in exported.plan.activations.items():
        assert activation.range == imported.ranges[name]
    said = any("chosen for 8-bit integers" in warning for warning in exported.warnings)
    assert said == (preset == "fp8")


def test_an_export_says_that_it_was_checked_on_made_up_input(imported: CalibrationCache) -> None:
    (warning,) = quantkit.export_model("model.onnx", imported).warnings
    assert "run on made-up input alone; evaluate it on real data" in warning


def test_a_saved_cache_of_fixed_ranges_is_the_same_cache(imported: CalibrationCache) -> None:
    imported.save("i.calib")
    found = CalibrationCache.load("i.calib")
    assert found == imported
    assert found.ranges == imported.ranges
    found.save("j.calib")
    assert Path("j.calib").read_bytes() == Path("i.calib").read_bytes()
    assert imported != CalibrationCache.load("model.calib")


def test_older_readers_are_told_that_fixed_ranges_are_newer(imported: CalibrationCache) -> None:
    imported.save("i.calib")
    assert b'\\"schema\\":2' in Path("i.calib").read_bytes()
    assert b'\\"schema\\":1' in Path("model.calib").read_bytes()


def test_a_cache_of_fixed_ranges_cut_short_is_refused(imported: CalibrationCache) -> None:
    imported.save("i.calib")
    whole = Path("i.calib").read_bytes()
    for end in (len(whole) - 1, len(whole) // 2, 9, 0):
        Path("i.calib").write_bytes(whole[:end])
        with pytest.raises(CacheError):
            CalibrationCache.load("i.calib")


def test_a_damaged_range_is_refused(imported: CalibrationCache) -> None:
    imported.save("i.calib")
    whole = Path("i.calib").read_bytes()
    Path("i.calib").write_bytes(whole[:-8] + np.array(np.nan).tobytes())
    with pytest.raises(CacheError, match="damaged"):
        CalibrationCache.load("i.calib")


def test_fixed_ranges_do_not_merge(imported: CalibrationCache) -> None:
    measured = CalibrationCache.load("model.calib")
    for first, second in ((imported, measured), (measured, imported), (imported, imported)):
        with pytest.raises(CacheError, match="holds fixed ranges, which do not add up"):
            first.merge(second)


def test_a_cache_of_fixed_ranges_shows_them(imported: CalibrationCache) -> None:
    assert imported.header()["samples"] == "none, the ranges are fixed"
    assert "x.cache" in imported.header()["data"]
    row = next(row for row in imported.summary() if row["tensor"] == "stem")
    assert (row["min"], row["max"]) == (imported.ranges["stem"].lo, imported.ranges["stem"].hi)
    assert "stem" in str(imported)


def test_zero_ranges_are_exported_with_scale_1(here: Path) -> None:
    Path("x.json").write_text('{"input": [0, 1], "stem": [0, 0], "block1": [0, 0]}')
    exported = quantkit.export_model("model.onnx", import_cache("x.json", "model.onnx").cache)
    assert exported.plan.activations["stem"].qparams.scale == 1


# --- asking ---


def test_an_imported_header_is_kept_unless_another_is_asked_for(here: Path) -> None:
    export_cache("model.calib", "x.cache", format="tensorrt", trt="100900", algorithm="MinMaxCalibration")
    found = import_cache("x.cache", "model.onnx").cache
    for asked, header in (
        ({}, "TRT-100900-MinMaxCalibration"),
        ({"trt": "7000"}, "TRT-7000-MinMaxCalibration"),
        ({"algorithm": "EntropyCalibration2"}, "TRT-100900-EntropyCalibration2"),
    ):
        export_cache(found, "y.cache", format="tensorrt", **asked)
        assert Path("y.cache").read_text().splitlines()[0] == header
    export_cache("model.calib", "z.cache", format="tensorrt")
    assert Path("z.cache").read_text().startswith("TRT-8601-EntropyCalibration2\n")


def test_unknown_formats_are_answered_with_the_known_ones(here: Path) -> None:
    with pytest.raises(UnknownNameError, match="choose one of tensorrt, ort, ort-json"):
        export_cache("model.calib", "x", format="trt")
    with pytest.raises(UnknownNameError, match="choose one of tensorrt, ort, aimet"):
        import_cache("model.calib", "model.onnx", format="json")
    with pytest.raises(CacheError, match="has no TensorRT version or algorithm"):
        export_cache("model.calib", "x", format="aimet", trt="8601")


def test_a_measured_cache_wants_its_model(here: Path) -> None:
    cache = CalibrationCache.load("model.calib")
    Path("model.onnx").rename("moved.onnx")
    with pytest.raises(CacheError, match=r"its model model\.onnx is not there; give the model too"):
        export_cache(cache, "x.cache", format="tensorrt")
    assert export_cache(cache, "x.cache", format="tensorrt", model="moved.onnx").ranges


@pytest.mark.parametrize("name", ["model.onnx", "model.calib"])
def test_what_is_read_is_never_written_over(here: Path, name: str) -> None:
    before = Path(name).read_bytes()
    with pytest.raises(FileError, match="is an input here"):
        export_cache("model.calib", name, format="tensorrt")
    assert Path(name).read_bytes() == before


def test_ranges_that_are_one_number_come_back_as_scales() -> None:
    assert int8_scale(range_of_scale(0.1)) == np.float32(0.1)
    assert int8_scale(Range(-1, 2)) == np.float32(2 / 127)

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from quantkit.cache import CalibrationCache, ModelIdentity, TensorStatistics, find_cache
from quantkit.cache.file import seal
from quantkit.errors import CacheError, FileError
from quantkit.statistics import ChannelStats, FloatHistogram

PREPROCESSING = {"mean": [0.5], "size": [32, 32]}
PROBE_TYPES = (
    *("float16", "float32", "float64", "int8", "uint8", "int32", "int64", "uint16", "bool"),
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4),
)


def tensor(values, *, channels=True):
    x = np.asarray(values, np.float32).reshape(-1, 2)
    histogram, per_channel = FloatHistogram(), ChannelStats(-1)
    histogram.observe(x)
    per_channel.observe(x)
    return TensorStatistics(
        histogram=histogram, channels=per_channel if channels else None, dtype="float32", shape=("N", None, 2)
    )


def cache(samples=(7, 3), **fields):
    """A cache whose statistics are those of its sample numbers."""
    samples = np.array(samples, np.uint64)
    values = np.repeat(samples.astype(np.float32), 2)
    described = {
        "model": ModelIdentity(path="model.onnx", name="model", fingerprint="0123456789abcdef"),
        "statistics": {"b": tensor(values, channels=False), "a": tensor(-values)},
        "sample_fingerprints": samples,
        "data": {"kind": "images", "files": len(samples), "path": "/calib", "preprocessing": PREPROCESSING},
        "method": "entropy",
        "method_options": {},
        "probe": {"x": np.array([samples.min(initial=99)], np.float32)},
        "versions": {"quantkit": "1.0"},
    }
    return CalibrationCache(**{**described, **fields})


def reload(made, folder):
    made.save(folder / "x.calib")
    return CalibrationCache.load(folder / "x.calib")


names = st.text(max_size=12) | st.sampled_from(
    ["", "/", "a/b:0", "00000.histogram", "samples", "probe.0", "層"]
)
floats = st.floats(width=32)
statistics = st.builds(
    tensor,
    st.lists(st.tuples(floats, floats), max_size=8).map(
        lambda rows: np.array(rows, np.float32).reshape(-1, 2)
    ),
    channels=st.booleans(),
)
probes = st.sampled_from(PROBE_TYPES).flatmap(
    lambda dtype: arrays(np.uint8, array_shapes(min_dims=0, max_side=3), elements=st.integers(0, 1)).map(
        lambda x: x.astype(dtype)
    )
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
caches = st.builds(
    CalibrationCache,
    model=st.builds(ModelIdentity, path=st.just("m.onnx"), name=names, fingerprint=st.text()),
    statistics=st.dictionaries(names, statistics, max_size=4),
    sample_fingerprints=st.lists(st.integers(0, 2**64 - 1), max_size=5).map(lambda x: np.array(x, np.uint64)),
    data=st.dictionaries(st.text(), json_values, max_size=3),
    method=st.text(),
    method_options=st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False), max_size=2),
    probe=st.dictionaries(names, probes, max_size=3),
    versions=st.dictionaries(st.text(), st.text(), max_size=3),
)


# --- saving and loading ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("caches")


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@given(caches)
def test_loading_what_was_saved_gives_the_same(folder, made):
    loaded = reload(made, folder)
    assert loaded == made
    assert loaded.statistics == made.statistics
    assert loaded.sample_fingerprints.tolist() == made.sample_fingerprints.tolist()
    assert (loaded.data, loaded.method, loaded.method_options) == (
        made.data,
        made.method,
        made.method_options,
    )
    assert (loaded.model, loaded.versions) == (made.model, made.versions)
    assert list(loaded.probe) == list(made.probe)
    for name, array in made.probe.items():
        assert loaded.probe[name].dtype == array.dtype
        assert loaded.probe[name].shape == array.shape
        assert loaded.probe[name].tobytes() == array.tobytes()


def test_equal_content_gives_equal_bytes(tmp_path):
    made = cache()
    shuffled = cache(
        samples=(3, 7),
        statistics=dict(reversed(made.statistics.items())),
        data=dict(reversed(made.data.items())),
    )
    made.save(tmp_path / "one.calib")
    shuffled.save(tmp_path / "two.calib")
    assert (tmp_path / "one.calib").read_bytes() == (tmp_path / "two.calib").read_bytes()


def test_tensors_go_sorted_by_name():
    assert list(cache().statistics) == ["a", "b"]


def test_a_probe_that_is_not_contiguous_is_saved_as_it_reads(tmp_path):
    probe = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert np.array_equal(reload(cache(probe={"x": probe}), tmp_path).probe["x"], probe)


def test_a_tuple_in_the_description_is_a_list_before_and_after_saving(tmp_path):
    made = cache(data={"size": (32, 32)})
    assert made.data == {"size": [32, 32]} == reload(made, tmp_path).data


def test_a_cache_without_samples_is_saved(tmp_path):
    made = cache(samples=(), statistics={"a": tensor([])}, probe={})
    assert reload(made, tmp_path) == made


def test_a_write_that_fails_leaves_the_old_cache(tmp_path, monkeypatch):
    path = tmp_path / "x.calib"
    cache().save(path)

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        FileError, match=r"x\.calib: cannot be written \(no space left on device\); free some"
    ):
        cache(samples=(1, 2, 3)).save(path)
    assert CalibrationCache.load(path) == cache()
    assert [p.name for p in tmp_path.iterdir()] == ["x.calib"]


def test_any_content_makes_caches_differ():
    for field, value in {
        "model": ModelIdentity(path="model.onnx", name="model", fingerprint="other"),
        "statistics": {"a": tensor([1, 2])},
        "sample_fingerprints": np.array([3, 8], np.uint64),
        "data": {},
        "method": "mse",
        "method_options": {"percentile": 99.9},
        "probe": {"x": np.array([3], np.float64)},
        "versions": {},
    }.items():
        assert replace(cache(), **{field: value}) != cache()


# --- the model's path ---


@pytest.mark.parametrize(
    ("model", "saved_in", "written"),
    [
        ("model.onnx", ".", "model.onnx"),
        ("models/model.onnx", ".", "models/model.onnx"),
        ("model.onnx", "caches", "../model.onnx"),
        ("{folder}/model.onnx", ".", "model.onnx"),
        ("{folder}/model.onnx", "caches", "{folder}/model.onnx"),
        ("", ".", ""),
    ],
)
def test_the_model_is_found_from_the_cache(tmp_path, monkeypatch, model, saved_in, written):
    monkeypatch.chdir(tmp_path)
    Path("caches").mkdir()
    model, written = (text.format(folder=tmp_path) for text in (model, written))
    path = Path(saved_in, "x.calib")
    cache(model=ModelIdentity(path=model, name="model", fingerprint="f")).save(path)
    assert header(path)["model"]["path"] == written
    assert os.path.abspath(CalibrationCache.load(path).model.path or ".") == os.path.abspath(model or ".")
    assert os.path.abspath(CalibrationCache.load(path.absolute()).model.path or ".") == os.path.abspath(
        model or "."
    )


def test_a_model_and_its_cache_can_be_moved_together(tmp_path):
    (tmp_path / "old").mkdir()
    model = ModelIdentity(path=str(tmp_path / "old" / "model.onnx"), name="model", fingerprint="f")
    cache(model=model).save(tmp_path / "old" / "x.calib")
    (tmp_path / "old").rename(tmp_path / "new")
    loaded = CalibrationCache.load(tmp_path / "new" / "x.calib")
    assert loaded.model.path == str(tmp_path / "new" / "model.onnx")
    assert loaded == cache(model=model)


# --- the file ---


def header(path):
    content = Path(path).read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["quantkit"])


def rewrite(path, **changes):
    """Write the cache at `path` again with other metadata."""
    text, array = header(path), safetensors.numpy.load_file(path)
    for key, value in changes.items():
        text[key] = value
    path.write_bytes(seal(safetensors.numpy.save(array, metadata={"quantkit": json.dumps(text)})))


def refusal(path):
    with pytest.raises(CacheError) as caught:
        CalibrationCache.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "x.calib"
    cache().save(path)
    return path


def test_the_bytes_are_those_of_schema_1(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    histogram = FloatHistogram()
    made = cache(
        samples=(2, 1),
        statistics={
            "t": TensorStatistics(histogram=histogram, channels=None, dtype="float32", shape=(1, "N", None))
        },
        data={"path": "/calib"},
        probe={"x": np.array([5], ml_dtypes.bfloat16)},
    )
    made.save(tmp_path / "x.calib")
    content = (tmp_path / "x.calib").read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = (
        '{"data":{"path":"/calib"},"kind":"calibration","method":"entropy","method_options":{},'
        '"model":{"fingerprint":"0123456789abcdef","name":"model","path":"model.onnx"},"probe":["x"],'
        '"raw":{"probe.0":"bfloat16"},"schema":1,'
        '"tensors":[{"channels":false,"dtype":"float32","name":"t","shape":[1,"N",null]}],'
        '"versions":{"quantkit":"1.0"}}'
    )
    made_of = {
        "__metadata__": {"quantkit": text},
        "00000.histogram.counts": {"dtype": "I64", "shape": [4]},
        "00000.histogram.limits": {"dtype": "F32", "shape": [2]},
        "00000.histogram.linear": {"dtype": "U8", "shape": [0]},
        "00000.histogram.places": {"dtype": "I64", "shape": [3]},
        "00000.histogram.prefixes": {"dtype": "U8", "shape": [2, 0]},
        "probe.0": {"dtype": "U16", "shape": [1]},
        "samples": {"dtype": "U64", "shape": [2]},
        "sha256": {"dtype": "U8", "shape": [32]},
    }
    found = json.loads(content[8 : 8 + length])
    offsets = {key: value.pop("data_offsets") for key, value in found.items() if key != "__metadata__"}
    assert dict(sorted(found.items())) == made_of
    start, end = (8 + length + offset for offset in offsets["samples"])
    assert content[start:end] == bytes([1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0])
    start, end = (8 + length + offset for offset in offsets["probe.0"])
    assert content[start:end] == b"\xa0\x40"
    start, end = (8 + length + offset for offset in offsets["sha256"])
    assert content[start:end] == hashlib.sha256(content[:start] + bytes(32) + content[end:]).digest()


def test_any_reader_of_safetensors_opens_a_cache(saved):
    with safetensors.safe_open(saved, "np") as file:
        assert list(file.metadata()) == ["quantkit"]
        assert file.get_tensor("samples").tolist() == [3, 7]


@pytest.fixture(scope="module")
def whole(folder):
    cache().save(folder / "whole.calib")
    return (folder / "whole.calib").read_bytes()


@given(data=st.data())
def test_a_cache_cut_short_anywhere_is_refused_in_one_line(folder, whole, data):
    path = folder / "cut.calib"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    refusal(path)


@given(data=st.data())
def test_a_cache_with_any_byte_changed_is_refused_in_one_line(folder, whole, data):
    content = bytearray(whole)
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = folder / "changed.calib"
    path.write_bytes(content)
    refusal(path)


def test_every_bit_of_a_cache_is_under_its_checksum(folder, whole):
    path = folder / "changed.calib"
    rng = np.random.default_rng(0)
    places = (
        [*range(len(whole))] if len(whole) < 4000 else sorted(rng.choice(len(whole), 4000, replace=False))
    )
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        with pytest.raises(CacheError):
            CalibrationCache.load(path)


def test_a_cache_without_a_checksum_is_refused_as_older(saved):
    array = safetensors.numpy.load_file(saved)
    del array["sha256"]
    safetensors.numpy.save_file(array, saved, metadata={"quantkit": json.dumps(header(saved))})
    assert "written by an older quantkit, without a checksum; calibrate again" in refusal(saved)


def test_statistics_exchanged_between_tensors_are_refused(saved):
    array = safetensors.numpy.load_file(saved)
    one, two = "00000.histogram.limits", "00001.histogram.limits"
    array[one], array[two] = array[two], array[one]
    safetensors.numpy.save_file(array, saved, metadata={"quantkit": json.dumps(header(saved))})
    assert "damaged" in refusal(saved)


def test_a_file_cut_short_says_by_how_much(saved):
    content = saved.read_bytes()
    saved.write_bytes(content[:-10])
    assert f"cut short: {len(content) - 10} of {len(content)} bytes" in refusal(saved)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "an empty file"),
        (b"\x08\x0a\x12\x07pytorch\x1a\x052.6.0:\x9c\x01", "not a safetensors file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "not a safetensors file"),
        (b"PK\x03\x04" + bytes(50), "not a safetensors file"),
        (b"TRT-8601-EntropyCalibration2\nx: 3d000000\n", "bring it in with `quantkit cache import "),
        (b"{}", "not a safetensors file"),
        (safetensors.numpy.save({"w": np.zeros(2)}), "a safetensors file without quantkit's metadata"),
        (
            safetensors.numpy.save(
                {"w": np.zeros(2)}, metadata={"quantkit": '{"kind": "gram", "schema": 1}'}
            ),
            "a safetensors file without quantkit's metadata",
        ),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, reason):
    path = tmp_path / "x.calib"
    path.write_bytes(content)
    assert reason in refusal(path)


def test_a_missing_file_is_refused_with_the_mend(tmp_path):
    message = refusal(tmp_path / "none.calib")
    assert "no such file" in message
    assert "quantkit calibrate" in message


def test_a_folder_is_refused(tmp_path):
    assert "is a directory" in refusal(tmp_path)


def test_a_newer_schema_is_refused_as_such(saved):
    rewrite(saved, schema=3, tensors="of a new kind", raw=None)
    assert "written by a newer quantkit (schema 3, this one reads 2); update quantkit" in refusal(saved)


@pytest.mark.parametrize("schema", [0, -1, "1", None, 1.5, True])
def test_a_schema_that_never_was_is_refused(saved, schema):
    rewrite(saved, schema=schema)
    assert "damaged" in refusal(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"tensors": None},
        {"tensors": [{"name": "a"}]},
        {"tensors": [{"name": "a", "dtype": "float32", "shape": [1], "channels": True}] * 9},
        {"model": []},
        {"model": {"path": "m"}},
        {"data": 3},
        {"versions": 3},
        {"method_options": None},
        {"probe": ["x", "y"]},
        {"raw": {"probe.0": "object"}},
        {"raw": {"nothing": "bfloat16"}},
        {"raw": {"probe.0": "bfloat16"}},
        {"raw": []},
    ],
)
def test_metadata_that_makes_no_sense_is_refused(saved, changes):
    rewrite(saved, **changes)
    assert "damaged" in refusal(saved)


def test_statistics_that_do_not_add_up_are_refused_with_the_tensor(saved):
    array = safetensors.numpy.load_file(saved)
    array["00001.histogram.counts"] = array["00001.histogram.counts"] + 1
    saved.write_bytes(seal(safetensors.numpy.save(array, metadata={"quantkit": json.dumps(header(saved))})))
    assert "tensor b: histogram: damaged" in refusal(saved)


# --- belonging to a model ---


def test_a_cache_accepts_its_own_model():
    cache().check_model("0123456789abcdef", "anywhere/model.onnx")


def test_a_cache_refuses_another_model_and_says_what_to_do():
    with pytest.raises(CacheError) as caught:
        cache().check_model("fedcba9876543210", "new/other.onnx")
    message = str(caught.value)
    for part in (
        "new/other.onnx: ",
        "model.onnx (0123456789ab)",
        "fedcba987654",
        "quantkit calibrate",
        "--cache",
    ):
        assert part in message


# --- merging ---

shards = st.lists(st.integers(0, 40), min_size=3, max_size=20, unique=True).flatmap(
    lambda samples: st.tuples(st.just(samples), st.integers(1, len(samples) - 2)).flatmap(
        lambda drawn: st.tuples(
            st.just(drawn[0]), st.just(drawn[1]), st.integers(drawn[1] + 1, len(drawn[0]) - 1)
        )
    )
)


@given(shards)
def test_merged_shards_are_the_whole_in_any_order_and_grouping(drawn):
    samples, first, second = drawn
    a, b, c = cache(samples[:first]), cache(samples[first:second]), cache(samples[second:])
    whole = cache(samples)
    # Sums of whole numbers are exact, so that even the channels' are equal.
    assert a.merge(b, c) == whole
    assert c.merge(a, b) == whole
    assert a.merge(b).merge(c) == whole
    assert c.merge(b.merge(a)) == whole


def test_the_operands_do_not_change():
    a, b = cache((1, 2)), cache((3, 4))
    a.merge(b)
    assert (a, b) == (cache((1, 2)), cache((3, 4)))


def test_merging_with_nothing_is_the_same():
    assert cache().merge() == cache()


def test_sums_do_not_depend_on_the_order_of_the_operands():
    rng = np.random.default_rng(0)
    parts = [
        cache((i,), statistics={"t": tensor(rng.lognormal(sigma=8, size=64).astype(np.float32))})
        for i in range(6)
    ]
    merged = parts[0].merge(*parts[1:])
    for _ in range(5):
        rng.shuffle(parts)
        assert parts[0].merge(*parts[1:]) == merged


def test_the_probe_is_that_of_the_smallest_fingerprint():
    assert cache((5, 9)).merge(cache((2, 7)), cache((3,))).probe["x"] == [2]
    assert cache(()).merge(cache((2, 7))).probe["x"] == [2]


def test_paths_are_kept_side_by_side_and_files_add():
    one = cache((1,), data={"path": "/b", "files": 3, "samples": 5, "preprocessing": PREPROCESSING})
    two = cache((2,), data={"path": "/a", "files": 4, "samples": 6, "preprocessing": PREPROCESSING})
    free = cache((3,), data={"path": "/c", "files": 1, "preprocessing": PREPROCESSING})
    assert one.merge(two).data == {
        "path": ["/a", "/b"],
        "files": 7,
        "samples": 11,
        "preprocessing": PREPROCESSING,
    }
    assert one.merge(two).merge(free).data == {
        "path": ["/a", "/b", "/c"],
        "files": 8,
        "preprocessing": PREPROCESSING,
    }


def test_versions_are_kept_side_by_side():
    one, two = cache((1,), versions={"ort": "1.24", "numpy": "2"}), cache((2,), versions={"ort": "1.23"})
    assert one.merge(two, cache((3,), versions={"ort": "1.24"})).versions == {
        "ort": "1.23, 1.24",
        "numpy": "2",
    }


def merge_refusal(*others, **options):
    with pytest.raises(CacheError) as caught:
        cache((1, 2, 2)).merge(*others, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_caches_of_different_models_are_refused():
    other = ModelIdentity(path="other.onnx", name="other", fingerprint="fedcba9876543210")
    message = merge_refusal(cache((3,), model=other))
    assert "other.onnx (fedcba987654)" in message
    assert "model.onnx (0123456789ab)" in message


def test_a_moved_model_is_the_same_model():
    moved = ModelIdentity(path="elsewhere/model.onnx", name="model", fingerprint="0123456789abcdef")
    merged = cache((1,)).merge(cache((2,), model=moved))
    assert merged.model.path == "elsewhere/model.onnx"
    assert cache((2,), model=moved).merge(cache((1,))).model.path == "elsewhere/model.onnx"


def test_overlapping_samples_are_refused_with_their_number():
    assert "2 of 4 samples are in more than one of them" in merge_refusal(cache((2, 3)), cache((1, 5)))


def test_an_overlap_can_be_allowed_and_counts_again():
    merged = cache((1, 2)).merge(cache((2, 3)), allow_overlap=True)
    assert merged == cache((1, 2, 2, 3))
    assert merged.sample_count == 4


def test_a_sample_twice_in_one_cache_is_no_overlap():
    assert cache((1, 1)).merge(cache((2, 2))) == cache((1, 1, 2, 2))


def test_different_tensors_are_refused_with_their_names():
    assert "2 tensors are in one of them only (b, c)" in merge_refusal(
        cache((3,), statistics={"a": tensor([1, 2]), "c": tensor([1, 2])})
    )


def test_a_tensor_that_differs_in_kind_is_named():
    message = merge_refusal(
        cache((3,), statistics={"a": tensor([1, 2], channels=False), "b": tensor([1, 2])})
    )
    assert "tensor a: only one of them has per-channel statistics" in message


@pytest.mark.parametrize(
    "data", [{}, {"preprocessing": {"mean": [0]}}, {"preprocessing": None, "mapping": {"x": "y"}}]
)
def test_different_preparation_is_refused(data):
    assert "prepared in different ways" in merge_refusal(cache((3,), data=data))


@pytest.mark.parametrize(
    "other",
    [{"method": "percentile", "method_options": {"percentile": 99.9}}, {"method_options": {"bins": 128}}],
)
def test_different_methods_are_refused_until_one_is_named(other):
    message = merge_refusal(cache((3,), **other))
    assert "--method" in message
    assert "entropy" in message
    merged = cache((1,)).merge(cache((3,), **other), method="mse", method_options={"bins": 5})
    assert (merged.method, merged.method_options) == ("mse", {"bins": 5})


# --- showing ---


def test_the_summary_says_what_was_seen_and_is_json():
    made = cache((3, 4), statistics={"t": tensor([0, np.nan, -2, np.inf])})
    assert json.loads(json.dumps(made.summary(), allow_nan=False)) == [
        {
            "tensor": "t",
            "dtype": "float32",
            "count": 4,
            "min": -2.0,
            "max": 0.0,
            "zeros_percent": 25.0,
            "not_finite": 2,
            "channels": 2,
        }
    ]


def test_a_tensor_never_seen_has_no_range():
    row = cache((), statistics={"t": tensor([], channels=False)}).summary()[0]
    assert (row["min"], row["max"], row["zeros_percent"], row["channels"]) == (None, None, None, None)


def test_the_text_shows_the_header_and_every_tensor():
    text = str(cache((3, 4), method="percentile", method_options={"percentile": 99.9}))
    for shown in (
        "model.onnx (0123456789ab)",
        "percentile (percentile=99.9)",
        "/calib",
        "quantkit 1.0",
        "zeros %",
    ):
        assert shown in text
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["a", "b"]
    assert "samples   2" in lines


def test_a_notebook_shows_tables_with_names_escaped():
    html = cache(statistics={"<t>": tensor([1, 2])})._repr_html_()
    assert html.count("<table>") == 2
    assert "&lt;t&gt;" in html
    assert "<t>" not in html


def test_repr_is_one_short_line():
    assert repr(cache()) == "CalibrationCache(model='model', tensors=2, samples=2, method='entropy')"


# --- finding ---


def test_the_one_cache_of_a_folder_is_found(tmp_path):
    (tmp_path / "model.calib").touch()
    (tmp_path / "model.onnx").touch()
    (tmp_path / "folder.calib").mkdir()
    assert find_cache(tmp_path) == tmp_path / "model.calib"


def test_no_cache_says_how_to_make_one(tmp_path, monkeypatch):
    with pytest.raises(CacheError, match=r"holds no calibration cache .*quantkit calibrate"):
        find_cache(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CacheError, match=r"^the current folder: "):
        find_cache(".")


def test_several_caches_are_named(tmp_path):
    for name in "abcdefg":
        (tmp_path / f"{name}.calib").touch()
    with pytest.raises(
        CacheError, match=r"7 calibration caches \(a\.calib, .* and 2 more\); choose .* --cache"
    ):
        find_cache(tmp_path)


def test_a_temporary_folder_of_a_killed_process_is_no_cache(tmp_path):
    (tmp_path / ".quantkit-x.tmp").mkdir()
    (tmp_path / ".quantkit-x.tmp" / "model.calib").touch()
    with pytest.raises(CacheError, match="holds no calibration cache"):
        find_cache(tmp_path)

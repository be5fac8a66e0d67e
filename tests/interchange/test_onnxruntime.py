import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnxruntime.quantization import load_tensors_data, save_tensors_data
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from onnxruntime.quantization.CalTableFlatBuffers.TrtTable import TrtTable
from onnxruntime.quantization.quant_utils import write_calibration_table

from quantkit.errors import CacheError
from quantkit.formats import Range
from quantkit.interchange.onnxruntime import (
    read_ort_flatbuffers,
    read_ort_json,
    read_ort_text,
    write_ort_flatbuffers,
    write_ort_json,
    write_ort_text,
)
from quantkit.interchange.table import int8_scale

RANGES = {"b/x:0": Range(-3, 3), "a": Range(-0.1, 0.1), "層 1": Range(-1e-6, 1e-6)}

# As large as the smallest scale that GPUs know.
amaxes = st.floats(2.0**-119, 2.0**120, width=32)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
line_names = names.filter(lambda n: n == n.strip(" \t\v\f") and not {"\r", "\n"} & set(n))


def symmetric(amax_of):
    return {name: Range(-amax, amax) for name, amax in amax_of.items()}


def tensor(lowest, highest):
    return TensorData(lowest=np.array(lowest, np.float32), highest=np.array(highest, np.float32))


@pytest.fixture(scope="module")
def table_of_ort(tmp_path_factory):
    """The three files that ONNX Runtime writes of one symmetric calibration."""
    folder = tmp_path_factory.mktemp("ort")
    data = {name: tensor(r.lo, r.hi) for name, r in RANGES.items()}
    write_calibration_table(TensorsData(CalibrationMethod.Entropy, data), str(folder))
    return folder


def as_float32(ranges):
    return {name: Range(np.float32(r.lo), np.float32(r.hi)) for name, r in ranges.items()}


def refusal(read, content):
    with pytest.raises(CacheError) as caught:
        read(content, "x.table")
    assert str(caught.value).startswith("x.table")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what ONNX Runtime writes is read ---


def test_the_three_files_that_ort_writes_say_the_same(table_of_ort):
    text = read_ort_text((table_of_ort / "calibration.cache").read_bytes(), "x")
    binary = read_ort_flatbuffers((table_of_ort / "calibration.flatbuffers").read_bytes(), "x")
    document = read_ort_json(json.loads((table_of_ort / "calibration.json").read_text()), "x")
    assert text.ranges == binary.ranges == document.ranges == as_float32(RANGES)
    assert document.written_by == "CalibrationMethod.Entropy"


def test_ort_tables_of_plain_dictionaries_are_read(tmp_path):
    data = {"x": TensorData(lowest=np.float32(-3), highest=np.float32(2)), "y": tensor(0, 2.5)}
    write_calibration_table(data, str(tmp_path))
    found = read_ort_json(json.loads((tmp_path / "calibration.json").read_text()), "x")
    assert found.ranges == {"x": Range(-3, 2), "y": Range(0, 2.5)}


def test_what_save_tensors_data_writes_is_read(tmp_path):
    made = TensorsData(
        CalibrationMethod.Percentile,
        {
            "x": TensorData(
                lowest=np.array(-3, np.float32),
                highest=np.array(2, np.float32),
                hist=np.array([1, 2]),
                hist_edges=np.array([0, 1, 2], np.float32),
            ),
            "w": tensor([-1, -2], [1, 2]),
            "d": TensorData(avg=np.array(1, np.float32), std=np.array(2, np.float32)),
        },
    )
    save_tensors_data(made, tmp_path / "x.json")
    found = read_ort_json(json.loads((tmp_path / "x.json").read_text()), "x")
    assert found.ranges == {"x": Range(-3, 2)}
    assert found.left_out == {
        "w": "a range per channel there; activations have one",
        "d": "no lowest and highest there",
    }


@pytest.mark.parametrize(
    ("entry", "range_"),
    [
        ([-3.0, 2.0], Range(-3, 2)),
        (["-3.0", "2.0"], Range(-3, 2)),
        ([[-3.0], [2.0]], Range(-3, 2)),
        (2.5, Range(-2.5, 2.5)),
        ("2.5", Range(-2.5, 2.5)),
        ({"lowest": 0, "highest": 0}, Range(0, 0)),
        ({"lowest": [-3], "highest": {"data": [2], "dtype": "float32", "CLS": "numpy.array"}}, Range(-3, 2)),
    ],
)
def test_older_shapes_of_an_entry_are_read(entry, range_):
    assert read_ort_json({"x": entry}, "x").ranges == {"x": range_}


def test_the_text_file_has_names_of_any_kind():
    content = b"conv 1/out 2.0\r\nscope:0\t3\r\n\r\n  a  1e-05  \n"
    found = read_ort_text(content, "x").ranges
    assert found == {"conv 1/out": Range(-2, 2), "scope:0": Range(-3, 3), "a": Range(-1e-5, 1e-5)}


# --- what is written here, ONNX Runtime reads ---


def test_the_bytes_are_those_of_ort_itself(table_of_ort):
    ranges = as_float32(RANGES)
    assert write_ort_text(ranges, "x").decode() == (table_of_ort / "calibration.cache").read_text()
    assert write_ort_flatbuffers(ranges) == (table_of_ort / "calibration.flatbuffers").read_bytes()


def test_golden_bytes_of_a_table_of_one_tensor():
    head = "0c000000 0000 0600 0800 0400 0600 0000 04000000 01000000 0c000000"
    pair = "0800 0c00 0800 0400 0800 0000 08000000 0c000000 03000000 322e3000 01000000 7800 0000"
    assert write_ort_flatbuffers({"x": Range(-2, 2)}) == bytes.fromhex(head + pair)


@given(st.dictionaries(names, amaxes, min_size=1, max_size=6))
def test_ort_reads_the_flatbuffers(amax_of):
    content = write_ort_flatbuffers(symmetric(amax_of))
    table = TrtTable.GetRootAs(content, 0)
    pairs = [table.Dict(i) for i in range(table.DictLength())]
    assert {p.Key().decode(): float(p.Value()) for p in pairs} == amax_of
    assert read_ort_flatbuffers(content, "x").ranges == symmetric(amax_of)


@given(st.dictionaries(line_names, amaxes, min_size=1, max_size=6))
def test_the_text_comes_back(amax_of):
    assert read_ort_text(write_ort_text(symmetric(amax_of), "x"), "x").ranges == symmetric(amax_of)


@pytest.mark.parametrize(
    ("method", "known"),
    [("entropy", "Entropy"), ("minmax", "MinMax"), ("percentile", "Percentile"), ("mse", "MinMax")],
)
def test_ort_loads_the_json(tmp_path, method, known):
    ranges = {"x:0": Range(-0.5, 2), "層": Range(0, 0.1)}
    (tmp_path / "x.json").write_bytes(write_ort_json(ranges, method))
    found = load_tensors_data(tmp_path / "x.json")
    assert found.calibration_method is CalibrationMethod[known]
    assert {name: tuple(map(float, found[name].range_value)) for name in found} == {
        "x:0": (-0.5, 2),
        "層": (0, float(np.float32(0.1))),
    }


@given(st.dictionaries(names, st.tuples(amaxes, amaxes), max_size=6, min_size=1))
def test_the_json_comes_back(ends):
    ranges = {name: Range(-lo, hi) for name, (lo, hi) in ends.items()}
    assert read_ort_json(json.loads(write_ort_json(ranges, "mse")), "x").ranges == ranges


@given(amaxes)
def test_the_scale_of_int8_survives_every_kind(amax):
    ranges = {"x": Range(-amax, amax)}
    for found in (
        read_ort_text(write_ort_text(ranges, "x"), "x"),
        read_ort_flatbuffers(write_ort_flatbuffers(ranges), "x"),
        read_ort_json(json.loads(write_ort_json(ranges, "mse")), "x"),
    ):
        assert int8_scale(found.ranges["x"]) == int8_scale(ranges["x"])


def test_a_tensor_that_is_zero_throughout_has_an_amax_all_the_same():
    assert write_ort_text({"x": Range(0, 0)}, "x") == b"x 127.0\n"


# --- what is refused ---


@pytest.mark.parametrize("value", ["nan", "inf", "-1.0", "0.0", "1e39", "x", "3d000000:"])
def test_an_amax_that_is_none_is_named(value):
    message = refusal(read_ort_text, f"a 1.0\nb {value}\n".encode())
    assert f"line 2 (b): {value!r} is no amax" in message
    assert "import the calibration.json" in message


def test_an_asymmetric_table_is_refused_where_it_shows(tmp_path):
    write_calibration_table({"x": tensor(-3, -1), "y": tensor(-1, 1)}, str(tmp_path))
    message = refusal(read_ort_flatbuffers, (tmp_path / "calibration.flatbuffers").read_bytes())
    assert "tensor x: '-1.0' is no amax" in message


def test_a_line_without_a_number_is_named():
    assert "line 2 is 'b', not a name and a number" in refusal(read_ort_text, b"a 1.0\nb\n")


def test_a_name_with_two_values_is_refused():
    assert "line 2 (a): the name comes twice" in refusal(read_ort_text, b"a 1.0\na 2.0\n")


@pytest.mark.parametrize(
    "entry",
    [
        [float("nan"), 1],
        [-1, float("inf")],
        [2, 1],
        [1, "x"],
        {"lowest": 0, "highest": None},
        True,
        None,
        1e39,
        {"lowest": 0, "highest": 1e300},
    ],
)
def test_an_entry_that_is_no_range_is_named(entry):
    assert "tensor x: " in refusal(read_ort_json, {"x": entry})


@pytest.mark.parametrize("document", [[], {}, 3, {"CLS": "TensorsData"}, {"CLS": "TensorsData", "data": []}])
def test_json_that_is_no_table_is_refused(document):
    assert "not a calibration table of ONNX Runtime" in refusal(read_ort_json, document)


def test_every_table_cut_short_is_refused():
    content = write_ort_flatbuffers(RANGES)
    for end in range(len(content)):
        # What follows the last string is padding.
        if content[end:].strip(b"\0"):
            refusal(read_ort_flatbuffers, content[:end])


def test_a_list_longer_than_the_file_is_refused():
    content = bytearray(write_ort_flatbuffers({"x": Range(-2, 2)}))
    struct.pack_into("<I", content, content.index(b"\x01\0\0\0"), 2**31)
    assert "a list of 2147483648" in refusal(read_ort_flatbuffers, bytes(content))


@given(st.binary(max_size=80), st.integers(0, 200))
def test_damaged_flatbuffers_give_ranges_or_one_line(noise, at):
    whole = write_ort_flatbuffers(RANGES)
    for content in (noise, whole[:at] + noise + whole[at + len(noise) :]):
        said = ""
        try:
            read_ort_flatbuffers(content, "x")
        except CacheError as error:
            said = str(error)
        assert "\n" not in said

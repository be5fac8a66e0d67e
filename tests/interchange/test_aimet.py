import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import CacheError
from quantkit.formats import INT8, UINT8, QuantSpec, Range, qparams_from_range
from quantkit.interchange.aimet import read_aimet, write_aimet
from quantkit.interchange.table import int8_scale

SCALE = 0.0078125
SYMMETRIC_0_6 = {
    "bitwidth": 8,
    "dtype": "int",
    "is_symmetric": "True",
    "max": 127 * SCALE,
    "min": -128 * SCALE,
    "offset": -128,
    "scale": SCALE,
}
SYMMETRIC_1_0 = {
    "bw": 8,
    "dtype": "INT",
    "enc_type": "PER_TENSOR",
    "is_sym": True,
    "offset": [-128],
    "scale": [SCALE],
}
SYMMETRIC_2_0 = {"output_dtype": "int8", "y_scale": SCALE}

scales = st.floats(2.0**-100, 2.0**100, width=32)


def file_0_6(activations, version="0.6.1", **weights):
    return {"version": version, "activation_encodings": activations, "param_encodings": weights}


def file_1_0(*activations):
    return {
        "version": "1.0.0",
        "activation_encodings": [{"name": f"t{i}", **a} for i, a in enumerate(activations)],
        "param_encodings": [{"name": "w", **SYMMETRIC_1_0}],
    }


def file_2_0(*encodings):
    return {"version": "2.0.0", "encodings": [{"name": f"t{i}", **e} for i, e in enumerate(encodings)]}


def refusal(document):
    with pytest.raises(CacheError) as caught:
        read_aimet(document, "x.encodings")
    assert str(caught.value).startswith("x.encodings")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "document",
    [
        file_0_6({"t0": [SYMMETRIC_0_6]}),
        {"activation_encodings": {"t0": [{k: v for k, v in SYMMETRIC_0_6.items() if k != "dtype"}]}},
        file_1_0(SYMMETRIC_1_0),
        file_2_0(SYMMETRIC_2_0),
        file_2_0({"output_dtype": "uint8", "y_scale": SCALE, "y_zero_point": 128}),
    ],
    ids=["0.6.1", "0.4.0", "1.0.0", "2.0.0", "2.0.0 unsigned"],
)
def test_a_symmetric_encoding_keeps_its_scale(document):
    range_ = read_aimet(document, "x").ranges["t0"]
    assert range_ == Range(-127 * SCALE, 127 * SCALE)
    assert int8_scale(range_) == SCALE


@pytest.mark.parametrize(
    "document",
    [
        file_0_6(
            {
                "t0": [
                    {
                        **SYMMETRIC_0_6,
                        "is_symmetric": "False",
                        "offset": -5,
                        "min": -5 * SCALE,
                        "max": 250 * SCALE,
                    }
                ]
            }
        ),
        file_1_0({**SYMMETRIC_1_0, "is_sym": False, "offset": [-5.0]}),
        file_2_0({"output_dtype": "uint8", "y_scale": SCALE, "y_zero_point": 5}),
        file_2_0({"output_dtype": "int8", "y_scale": SCALE, "y_zero_point": -123}),
    ],
)
def test_an_asymmetric_encoding_keeps_scale_and_zero_point(document):
    range_ = read_aimet(document, "x").ranges["t0"]
    assert range_ == Range(-5 * SCALE, 250 * SCALE)
    qparams = qparams_from_range(range_, QuantSpec(format=UINT8, symmetric=False))
    assert (qparams.scale, qparams.zero_point) == (SCALE, 5)


def test_other_widths_give_the_range_they_hold():
    document = file_1_0(
        {**SYMMETRIC_1_0, "bw": 16, "offset": [-32768]}, {**SYMMETRIC_1_0, "bw": 4, "offset": [0]}
    )
    ranges = read_aimet(document, "x").ranges
    assert ranges == {"t0": Range(-32767 * SCALE, 32767 * SCALE), "t1": Range(0, 15 * SCALE)}


def test_what_is_no_range_of_an_activation_is_left_out_with_the_reason():
    document = file_1_0(
        SYMMETRIC_1_0,
        {"bw": 16, "dtype": "FLOAT", "enc_type": "PER_TENSOR"},
        {**SYMMETRIC_1_0, "enc_type": "PER_CHANNEL", "scale": [1, 2], "offset": [0, 0]},
    )
    table = read_aimet(document, "x")
    assert list(table.ranges) == ["t0"]
    assert table.written_by == "AIMET 1.0.0"
    assert table.left_out == {
        "t1": "FLOAT there",
        "t2": "a range per channel there; activations have one",
        "w": "a weight's encoding",
    }
    older = file_0_6({"a": [SYMMETRIC_0_6] * 3, "b": [{"bitwidth": 16, "dtype": "float"}]}, w=[SYMMETRIC_0_6])
    assert list(read_aimet(older, "x").left_out.values()) == [
        "a range per channel there; activations have one",
        "float there",
        "a weight's encoding",
    ]
    newest = file_2_0(
        {"output_dtype": "float8e4m3fn", "y_scale": 1}, {"output_dtype": "int8", "y_scale": [1, 2]}
    )
    assert list(read_aimet(newest, "x").left_out.values()) == [
        "float8e4m3fn there",
        "a range per channel there; activations have one",
    ]


@given(st.dictionaries(st.text(max_size=9), scales, min_size=1), st.sampled_from(["0.6.1", "1.0.0"]))
def test_symmetric_encodings_come_back_bit_for_bit(scale_of, version):
    ranges = {name: Range(-127.0 * s, 127.0 * s) for name, s in scale_of.items()}
    content = write_aimet(ranges, version)
    table = read_aimet(json.loads(content), "x")
    assert table.ranges == ranges
    assert table.written_by == f"AIMET {version}"
    assert write_aimet(table.ranges, version) == content


@given(
    scales,
    st.integers(0, 255).filter(lambda zero: zero not in (127, 128)),
    st.sampled_from(["0.6.1", "1.0.0"]),
)
def test_asymmetric_encodings_come_back_bit_for_bit(scale, zero, version):
    ranges = {"x": Range(-zero * scale, (255 - zero) * scale)}
    assert read_aimet(json.loads(write_aimet(ranges, version)), "x").ranges == ranges


def test_the_text_is_that_of_the_specification():
    ranges = {"s": Range(-127 * SCALE, 127 * SCALE), "a": Range(0, 255 * SCALE)}
    newer, older = json.loads(write_aimet(ranges)), json.loads(write_aimet(ranges, "0.6.1"))
    assert newer["version"] == "1.0.0"
    assert newer["param_encodings"] == []
    assert newer["activation_encodings"] == [
        {"name": "a", **SYMMETRIC_1_0, "is_sym": False, "offset": [0]},
        {"name": "s", **SYMMETRIC_1_0},
    ]
    assert older["version"] == "0.6.1"
    assert older["param_encodings"] == {}
    assert older["activation_encodings"] == {
        "a": [{**SYMMETRIC_0_6, "is_symmetric": "False", "offset": 0, "min": 0, "max": 255 * SCALE}],
        "s": [SYMMETRIC_0_6],
    }


@pytest.mark.parametrize(
    "change",
    [
        {"scale": [0.0]},
        {"scale": [-1.0]},
        {"scale": [float("nan")]},
        {"scale": [float("inf")]},
        {"scale": ["1"]},
        {"scale": None},
        {"offset": [float("nan")]},
        {"offset": [True]},
        {"bw": 0},
        {"bw": 99},
        {"bw": "8"},
    ],
)
def test_an_encoding_that_means_nothing_is_named(change):
    message = refusal(file_1_0(SYMMETRIC_1_0, {**SYMMETRIC_1_0, **change}))
    assert "tensor t1: " in message
    assert "are no encoding" in message


def test_offsets_counted_in_another_way_are_refused():
    message = refusal(file_0_6({"t": [{**SYMMETRIC_0_6, "offset": 0}]}))
    assert "tensor t: min -1 is not offset · scale = 0; offsets count from the smallest" in message


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"activation_encodings": 3},
        {"param_encodings": {}},
        {"activation_encodings": {"conv1": {"output": {"0": SYMMETRIC_0_6}}}},
        {"activation_encodings": {"conv1": [3]}},
        {"activation_encodings": [{"bw": 8}]},
        {"encodings": [SYMMETRIC_2_0]},
    ],
)
def test_encodings_that_are_not_by_tensor_name_are_refused(document):
    assert "not encodings of AIMET by tensor name" in refusal(document) or "without a name" in refusal(
        document
    )


def test_a_file_without_encodings_is_refused():
    assert "without a single tensor" in refusal(file_0_6({}))


def test_int8_of_an_asymmetric_encoding_covers_it():
    range_ = read_aimet(file_1_0({**SYMMETRIC_1_0, "offset": [0]}), "x").ranges["t0"]
    assert qparams_from_range(range_, QuantSpec(format=INT8)).scale * 127 >= 255 * SCALE * (1 - 1e-6)

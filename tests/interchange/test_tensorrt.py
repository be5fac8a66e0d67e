import struct

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from quantkit.errors import CacheError
from quantkit.formats import INT8, QuantSpec, Range, qparams_from_range
from quantkit.interchange.table import range_of_scale
from quantkit.interchange.tensorrt import ALGORITHMS, Header, read_tensorrt, write_tensorrt

# As TensorRT writes them: the parser's own tensors without names, and layers that became names.
SAMPLE = b"""TRT-8601-EntropyCalibration2
images: 3c010204
/model.0/conv/Conv_output_0: 3e0a1b2c
/layer1/layer1.0/relu/Relu_output_0: 3d88edfc
(Unnamed Layer* 48) [Constant]_output: 3bbed4cb
(Unnamed Layer* 50) [Shuffle]_output: 3e77132f
scope/tower:0: 3ddc858b
prob: 3c010a14
"""
# Every positive normal float32: exponent 1 … 254, any mantissa.
scale_bits = st.integers(0x00800000, 0x7F7FFFFF)
names = st.text(
    st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1, max_size=20
).filter(lambda name: name == name.strip(" \t\v\f"))


def refusal(content: bytes) -> str:
    with pytest.raises(CacheError) as caught:
        read_tensorrt(content, "x.cache")
    message = str(caught.value)
    assert message.startswith("x.cache")
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_a_cache_of_tensorrt_is_read_name_by_name():
    table = read_tensorrt(SAMPLE, "x.cache")
    assert table.written_by == "TRT-8601-EntropyCalibration2"
    assert list(table.ranges) == [
        "images",
        "/model.0/conv/Conv_output_0",
        "/layer1/layer1.0/relu/Relu_output_0",
        "(Unnamed Layer* 48) [Constant]_output",
        "(Unnamed Layer* 50) [Shuffle]_output",
        "scope/tower:0",
        "prob",
    ]
    # 0x3c010204 is 1 / 127, so the images lie in [−1, 1].
    assert table.ranges["images"].hi == pytest.approx(1, abs=1e-7)
    assert table.ranges["images"].lo == -table.ranges["images"].hi


def test_what_was_read_is_written_bit_for_bit():
    table = read_tensorrt(SAMPLE, "x.cache")
    assert write_tensorrt(table.ranges, Header(), "x.cache") == SAMPLE


def test_the_bytes_are_those_of_the_format():
    ranges = {"a": Range(-127.0, 127.0), "b:0": Range(0.0, 63.5), "c": Range(-127 * 2.0**-120, 0.0)}
    assert write_tensorrt(ranges, Header(version="100900", algorithm="MinMaxCalibration"), "x") == (
        b"TRT-100900-MinMaxCalibration\na: 3f800000\nb:0: 3f000000\nc: 03800000\n"
    )


@given(scale_bits)
@example(0x00800000)
@example(0x7F7FFFFF)
def test_every_scale_comes_back_to_the_last_bit(bits):
    content = f"TRT-8601-EntropyCalibration2\nx: {bits:08x}\n".encode()
    range_ = read_tensorrt(content, "x.cache").ranges["x"]
    scale = struct.unpack(">f", bytes.fromhex(f"{bits:08x}"))[0]
    exported = qparams_from_range(range_, QuantSpec(format=INT8)).scale
    assert exported.dtype == np.float32
    assert exported.view(np.uint32) == bits
    assert float(exported) == scale
    assert write_tensorrt({"x": range_}, Header(), "x.cache") == content


@pytest.mark.parametrize("exponent", range(1, 255))
def test_no_exponent_loses_a_bit(exponent):
    bits = ((exponent << 23) + np.arange(0, 1 << 23, 257)).astype(np.uint32)
    found = range_of_scale(bits.view(np.float32).astype(np.float64))
    assert np.array_equal(qparams_from_range(found, QuantSpec(format=INT8)).scale.view(np.uint32), bits)


@given(st.dictionaries(names, scale_bits, min_size=1, max_size=8), st.sampled_from(ALGORITHMS))
def test_any_name_on_a_line_survives(scales, algorithm):
    ranges = {name: range_of_scale(float(np.uint32(bits).view(np.float32))) for name, bits in scales.items()}
    table = read_tensorrt(write_tensorrt(ranges, Header(algorithm=algorithm), "x"), "x")
    assert table.ranges == ranges
    assert table.written_by == f"TRT-8601-{algorithm}"


@pytest.mark.parametrize(
    "header",
    [
        "TRT-7000-EntropyCalibration2",
        "TRT-8601-EntropyCalibration",
        "TRT-5105-LegacyCalibration",
        "TRT-100900-MinMaxCalibration",
        "TRT-8XXX-EntropyCalibration2",
        "TRT-8.6.1-MinMaxCalibration",
    ],
)
def test_every_header_is_known(header):
    table = read_tensorrt(f"{header}\nx: 3d000000\n".encode(), "x")
    assert table.written_by == header


@pytest.mark.parametrize(
    "content",
    [
        b"TRT-8601-EntropyCalibration2\r\na:0: 3d000000\r\nb: 3E000000\r\n",
        b"TRT-8601-EntropyCalibration2\ra:0: 3d000000\rb: 3e000000",
        b"\xef\xbb\xbfTRT-8601-EntropyCalibration2  \n\n  a:0 :  3d000000 \t\n\n\tb:3e000000\n\n",
        b"TRT-8601-EntropyCalibration2\na:0: 3d000000\nb: 3e000000\na:0: 3D000000\n",
    ],
    ids=["windows", "old macintosh", "odd white space", "a name twice alike"],
)
def test_white_space_and_line_ends_do_not_matter(content):
    ranges = read_tensorrt(content, "x").ranges
    assert ranges == {"a:0": range_of_scale(2.0**-5), "b": range_of_scale(2.0**-3)}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("x: 7fc00000", "line 3 (x): its scale 7fc00000 is NaN; delete the line"),
        ("x: ffffffff", "is NaN"),
        ("x: 00000000", "is zero; delete the line, so that the tensor stays in float"),
        ("x: 80000000", "is zero"),
        ("x: bd000000", "is negative"),
        ("x: ff800000", "is negative"),
        ("x: 7f800000", "is infinite"),
        ("x: 007fffff", "is so small that GPUs take it for zero"),
        ("x: 3d0000", "line 3 is 'x: 3d0000', not a name, a colon and 8 hexadecimal digits"),
        ("x: 3d00000000", "8 hexadecimal digits"),
        ("x: 0x3d0000", "8 hexadecimal digits"),
        ("x: 3d00000g", "8 hexadecimal digits"),
        ("x: ", "8 hexadecimal digits"),
        ("x", "8 hexadecimal digits"),
        (": 3d000000", "8 hexadecimal digits"),
        ("x: 0.03125", "8 hexadecimal digits"),
        ("good: 3d000001", "line 3 gives good the scale 3d000001, line 2 3d000000; delete one of them"),
    ],
)
def test_a_line_that_means_nothing_is_named(line, found):
    content = f"TRT-8601-EntropyCalibration2\ngood: 3d000000\n{line}\n".encode()
    assert found in refusal(content)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"good: 3d000000\n", "begins with 'good: 3d000000', not with TRT-<version>-<algorithm>"),
        (b"TRT-8601-PercentileCalibration\nx: 3d000000\n", "EntropyCalibration2, EntropyCalibration, MinMax"),
        (b"TRT-8601\nx: 3d000000\n", "not with TRT-<version>-<algorithm>"),
        (b"TRT-8601-EntropyCalibration2\n", "a header without a single tensor"),
        (b"TRT-8601-EntropyCalibration2\nx: 3d000000\n\xff\xfe\x00\n", "line 3 is not text (byte 0xff)"),
        (b"", "begins with ''"),
    ],
)
def test_what_is_no_cache_is_refused(content, found):
    assert found in refusal(content)


def test_a_cache_cut_short_inside_a_line_is_refused():
    for end in range(len(SAMPLE) - 9, len(SAMPLE) - 1):
        assert "line 8" in refusal(SAMPLE[:end])


@given(st.binary(max_size=60), st.integers(0, len(SAMPLE)))
def test_damage_gives_ranges_or_one_line(noise, at):
    content = SAMPLE[:at] + noise + SAMPLE[at + len(noise) :]
    said, ranges = "", {}
    try:
        ranges = dict(read_tensorrt(content, "x.cache").ranges)
    except CacheError as error:
        said = str(error)
    assert "\n" not in said
    assert all(np.isfinite(r.hi) and r.hi > 0 for r in ranges.values())


@pytest.mark.parametrize("name", ["", " x", "x\t", "a\nb", "a\rb"])
def test_a_name_that_does_not_fit_on_a_line_is_not_written(name):
    with pytest.raises(CacheError, match="does not fit on a line"):
        write_tensorrt({name: Range(-1, 1)}, Header(), "x")


def test_a_tensor_that_is_zero_throughout_has_the_scale_that_an_exported_file_has():
    content = write_tensorrt({"x": Range(0, 0)}, Header(), "x")
    assert content.endswith(b"x: 3f800000\n")


def test_an_unknown_algorithm_is_not_written():
    with pytest.raises(CacheError, match="choose one of EntropyCalibration2, EntropyCalibration, MinMax"):
        Header(algorithm="Entropy")
    with pytest.raises(CacheError, match="without dots, such as 8601"):
        Header(version="8 6")

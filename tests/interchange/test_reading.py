from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import CacheError
from quantkit.formats import Range
from quantkit.interchange import read_table
from quantkit.interchange.aimet import write_aimet
from quantkit.interchange.onnxruntime import write_ort_flatbuffers, write_ort_json, write_ort_text
from quantkit.interchange.tensorrt import Header, write_tensorrt

RANGES = {"a:0": Range(-127.0, 127.0), "b": Range(-254.0, 254.0)}
FILES = {
    "tensorrt": write_tensorrt(RANGES, Header(), "x"),
    "ort text": write_ort_text(RANGES, "x"),
    "ort json": write_ort_json(RANGES, "entropy"),
    "ort flatbuffers": write_ort_flatbuffers(RANGES),
    "aimet 0.6.1": write_aimet(RANGES, "0.6.1"),
    "aimet 1.0.0": write_aimet(RANGES),
}


def refusal(path: Path, content: bytes, format: str | None = None) -> str:
    path.write_bytes(content)
    with pytest.raises(CacheError) as caught:
        read_table(path, format)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("told", [True, False])
def test_the_format_is_told_from_the_content(tmp_path, kind, told):
    (tmp_path / "x").write_bytes(FILES[kind])
    table = read_table(tmp_path / "x", kind.split()[0] if told else None)
    assert table.format == kind.split()[0]
    assert dict(table.ranges) == RANGES


@pytest.mark.parametrize("kind", ["tensorrt", "ort text", "ort json", "aimet 1.0.0"])
def test_a_byte_order_mark_does_not_matter(tmp_path, kind):
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbf" + FILES[kind])
    assert dict(read_table(tmp_path / "x").ranges) == RANGES


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b" \n\n", "an empty file"),
        (b"hello world\n", "begins with 'hello world"),
        (b"x: 3d000000\ny: 3d000000\n", "not with TRT-<version>-<algorithm>"),
        (b"x: 3e000000\n", "not with TRT-<version>-<algorithm>"),
        (b'{"x": [1, 2]', "not readable JSON (Expecting ',' delimiter"),
        (b'{"x": [-1, 1], "x": [-2, 2]}', "x comes twice with different values"),
        (b"[" * 100000, "not readable JSON"),
        (b'{"x\xff": 1}', "not readable JSON"),
        (b"[1, 2]", "not a calibration table of ONNX Runtime"),
        (b"\x08\x0a\x12\x07pytorch\x1a\x052.6.0:\x9c\x01\x00", "not a flatbuffers calibration table"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "not a flatbuffers calibration table"),
    ],
)
def test_what_is_no_calibration_file_is_refused(tmp_path, content, found):
    assert found in refusal(tmp_path / "x", content)


@pytest.mark.parametrize(
    ("format", "kind"),
    [("tensorrt", "ort text"), ("tensorrt", "ort flatbuffers"), ("aimet", "ort json"), ("ort", "tensorrt")],
)
def test_a_file_of_another_format_than_said_is_refused(tmp_path, format, kind):
    refusal(tmp_path / "x", FILES[kind], format)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.cache", tmp_path):
        with pytest.raises(CacheError, match="cannot be read") as caught:
            read_table(path)
        assert "name the other tool's file" in str(caught.value)


@given(st.binary(max_size=60), st.sampled_from(list(FILES)), st.integers(0, 300))
def test_damage_gives_a_table_or_one_line(tmp_path_factory, noise, kind, at):
    path = tmp_path_factory.getbasetemp() / "damaged"
    said = ""
    for content in (noise, FILES[kind][:at] + noise + FILES[kind][at + len(noise) :]):
        path.write_bytes(content)
        try:
            read_table(path)
        except CacheError as error:
            said = str(error)
        assert "\n" not in said

import io
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from quantkit.data.files import NAMELESS, NpyFile, NpzFile, SafetensorsFile
from quantkit.errors import DataError
from tests.data.helpers import IMAGE, VECTOR, read, refused, spec

X = np.arange(12, dtype=np.float32).reshape(3, 4)


def _bytes(kind: str) -> bytes:
    file = io.BytesIO()
    match kind:
        case "npy":
            np.save(file, X)
        case "npz":
            np.savez(file, x=X)
        case "compressed.npz":
            np.savez_compressed(file, x=X)
        case "safetensors":
            file.write(safetensors.numpy.save({"x": X}))
        case "png":
            Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3)).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["npy", "npz", "compressed.npz", "safetensors"])
def test_each_kind_of_file_gives_back_its_array(tmp_path, kind):
    path = tmp_path / f"data.{kind}"
    path.write_bytes(_bytes(kind))
    np.testing.assert_array_equal(np.concatenate([s["x"] for s in read(path, VECTOR)]), X)


@pytest.mark.parametrize("kind", ["npy", "npz", "compressed.npz", "safetensors", "png"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_but_never_anything_else(tmp_path, kind, data):
    content = bytearray(_bytes(kind))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    path = tmp_path / f"data.{kind}"
    path.write_bytes(bytes(content if data.draw(st.booleans()) else content[:cut]))
    failure = ""
    try:
        assert read(path, IMAGE if kind == "png" else VECTOR)
    except DataError as error:
        failure = str(error)
    assert "\n" not in failure
    assert not failure or str(path) in failure


@pytest.mark.parametrize("kind", ["npy", "npz", "compressed.npz", "safetensors", "png"])
def test_a_truncated_file_is_refused_by_name(tmp_path, kind):
    path = tmp_path / f"data.{kind}"
    content = _bytes(kind)
    for size in (0, 5, len(content) // 2, len(content) - 20):
        path.write_bytes(content[:size])
        refused(lambda: read(path, IMAGE if kind == "png" else VECTOR), str(path))


def test_a_pickle_is_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    np.save(tmp_path / "a.npy", np.array([Trap()]), allow_pickle=True)
    np.savez(tmp_path / "b.npz", allow_pickle=True, x=np.array([Trap()]))
    (tmp_path / "c.npy").write_bytes(pickle.dumps(Trap()))
    for name in ("a.npy", "b.npz", "c.npy"):
        refused(lambda name=name: read(tmp_path / name, VECTOR), name, "bject")
    assert not (tmp_path / "sprung").exists()


def test_npy_and_safetensors_are_mapped_not_read(tmp_path):
    np.save(tmp_path / "x.npy", X)
    safetensors.numpy.save_file({"x": X}, tmp_path / "x.safetensors")
    assert isinstance(NpyFile(tmp_path / "x.npy").read(NAMELESS), np.memmap)
    assert isinstance(SafetensorsFile(tmp_path / "x.safetensors").read("x"), np.memmap)


def test_samples_do_not_hold_on_to_their_file(tmp_path):
    np.save(tmp_path / "x.npy", X)
    (first, *_) = read(tmp_path / "x.npy", VECTOR)
    assert type(first["x"]) is np.ndarray
    assert first["x"].base is None


def test_headers_are_known_without_the_contents(tmp_path):
    np.savez(tmp_path / "x.npz", a=X, b=np.int64(3))
    headers = NpzFile(tmp_path / "x.npz").headers()
    assert {k: (h.shape, h.dtype.name) for k, h in headers.items()} == {
        "a": ((3, 4), "float32"),
        "b": ((), "int64"),
    }


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int64, np.bool_]
)
def test_safetensors_of_every_type_are_read(tmp_path, dtype):
    x = (np.arange(8).reshape(2, 4) % 2).astype(dtype)
    safetensors.numpy.save_file({"pad": np.zeros(3, np.int8), "x": x}, tmp_path / "x.safetensors")
    samples = read(tmp_path / "x.safetensors", spec("batch", 4, dtype=dtype))
    np.testing.assert_array_equal(np.concatenate([s["x"] for s in samples]), x)


def test_an_npz_member_that_is_no_array_is_passed_over(tmp_path):
    np.savez(tmp_path / "x.npz", x=X)
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive:
        archive.writestr("readme.txt", "hello")
    assert len(read(tmp_path / "x.npz", VECTOR)) == 3


def test_a_file_that_is_gone_at_reading_time_is_named(tmp_path):
    np.save(tmp_path / "a.npy", X)
    np.save(tmp_path / "b.npy", X)
    from quantkit.data import open_data

    source = open_data(tmp_path, [VECTOR])
    (tmp_path / "b.npy").unlink()
    refused(lambda: list(source), "b.npy", "No such file")

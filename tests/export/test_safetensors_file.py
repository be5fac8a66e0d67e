import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from quantkit.export.safetensors_file import (
    FILE,
    INDEX,
    StoredTensor,
    read_safetensors,
    stored,
    write_safetensors,
)

DTYPES = (np.int64, np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.uint8, ml_dtypes.float8_e4m3fn)


def tensors(*dtypes, shape=(3, 5)):
    rng = np.random.default_rng(0)
    return {f"{np.dtype(d).name}.{i}": rng.integers(0, 99, shape).astype(d) for i, d in enumerate(dtypes)}


def write(arrays, folder, **options):
    write_safetensors([stored(name, array) for name, array in arrays.items()], folder, **options)


def test_a_file_of_one_tensor_is_these_bytes(tmp_path):
    write({"a": np.array([1, -2], np.int16)}, tmp_path)
    header = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"I16","shape":[2],"data_offsets":[0,4]}}   '
    assert len(header) == 88
    assert (tmp_path / FILE).read_bytes() == b"\x58\0\0\0\0\0\0\0" + header + b"\x01\x00\xfe\xff"


def test_the_package_reads_what_was_written(tmp_path):
    arrays = tensors(np.int64, np.float32, np.float16, np.int8, np.uint8) | {
        "scalar": np.float32(3).reshape(()),
        "empty": np.zeros((0, 3), np.float32),
    }
    write(arrays, tmp_path)
    with safetensors.safe_open(tmp_path / FILE, framework="numpy") as file:
        assert set(file.keys()) == set(arrays)
        assert file.metadata() == {"format": "pt"}
        for name, array in arrays.items():
            found = file.get_tensor(name)
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)


@given(
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=8),
    rows=st.integers(0, 5),
    shard=st.integers(1, 300),
)
def test_whatever_the_shards_the_tensors_come_back(tmp_path_factory, dtypes, rows, shard):
    folder = tmp_path_factory.mktemp("shards")
    arrays = tensors(*dtypes, shape=(rows, 3))
    write(arrays, folder, shard_bytes=shard)
    found = read_safetensors(folder)
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].array().dtype == array.dtype
        assert found[name].array().tobytes() == array.tobytes()


def test_every_tensor_starts_at_a_multiple_of_its_element(tmp_path):
    write(tensors(np.uint8, np.int64, np.float16, np.float32, np.int8, np.int64, shape=(3,)), tmp_path)
    for tensor in read_safetensors(tmp_path).values():
        assert tensor.offset % tensor.dtype.itemsize == 0


def test_shards_are_named_and_indexed_as_hugging_face_does(tmp_path):
    arrays = {name: np.zeros(10, np.float32) for name in "abc"}
    write(arrays, tmp_path, shard_bytes=80)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, INDEX]
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 120},
        "weight_map": {"a": names[0], "b": names[0], "c": names[1]},
    }


def test_a_tensor_is_made_when_it_is_written_and_one_at_a_time(tmp_path):
    made: list[str] = []

    def tensor(name):
        def parts():
            made.append(name)
            yield np.zeros((1, 2), np.float32)
            yield np.ones((2, 2), np.float32)

        return StoredTensor(name=name, dtype=np.dtype(np.float32), shape=(3, 2), parts=parts)

    given_tensors = [tensor("b"), tensor("a")]
    assert made == []
    write_safetensors(given_tensors, tmp_path)
    assert made == ["a", "b"]
    assert read_safetensors(tmp_path)["a"].array().tolist() == [[0, 0], [1, 1], [1, 1]]


@pytest.mark.parametrize("damage", ["cut", "longer", "gap"])
def test_a_damaged_file_is_not_read(tmp_path, damage):
    write({"a": np.arange(4), "b": np.arange(4.0)}, tmp_path)
    path = tmp_path / FILE
    content = path.read_bytes()
    if damage == "gap":
        content = content.replace(b"[0,32]", b"[8,32]")
    path.write_bytes(content[:-1] if damage == "cut" else content + b"x" * (damage == "longer"))
    with pytest.raises(ValueError, match=r"bytes|lies at"):
        read_safetensors(tmp_path)


def test_an_index_that_names_another_shard_is_not_read(tmp_path: Path):
    write({name: np.zeros(10, np.float32) for name in "ab"}, tmp_path, shard_bytes=40)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["a"] = index["weight_map"]["b"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"differ"):
        read_safetensors(tmp_path)

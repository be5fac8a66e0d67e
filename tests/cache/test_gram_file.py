import numpy as np
import pytest
import safetensors.numpy

from quantkit.cache.gram_file import GramFile, merge_grams, write_grams
from quantkit.errors import CacheError, FileError
from quantkit.statistics import GramMatrix


def grams():
    rng = np.random.default_rng(0)
    found = {}
    for name, shape in {"fc axis -1": (1, 20, 6), "conv kernel 3x3 pads 1x1": (4, 30, 9)}.items():
        found[name] = GramMatrix(shape[2], shape[0])
        found[name].observe(rng.normal(size=shape).astype(np.float32))
    return found


def write(path, **text):
    made = grams()
    write_grams(path, text, {name: (g.groups, g.size) for name, g in made.items()}, made.items())
    return made


def test_matrices_come_back_as_they_were(tmp_path):
    made = write(tmp_path / "m.gram", model="abc", samples=64)
    found = GramFile(tmp_path / "m.gram")
    assert dict(found) == made and list(found) == list(made) and len(found) == 2
    assert found.text == {"model": "abc", "samples": 64}
    assert "fc axis -1" in found and "other" not in found
    with pytest.raises(KeyError):
        found["other"]


def test_any_reader_of_safetensors_opens_it(tmp_path):
    made = write(tmp_path / "m.gram")
    arrays = safetensors.numpy.load_file(tmp_path / "m.gram")
    np.testing.assert_array_equal(arrays["fc axis -1/products"], made["fc axis -1"].products)


def test_equal_matrices_give_equal_bytes(tmp_path):
    write(tmp_path / "a.gram", model="x")
    write(tmp_path / "b.gram", model="x")
    assert (tmp_path / "a.gram").read_bytes() == (tmp_path / "b.gram").read_bytes()


def test_layers_are_written_as_they_come_and_a_failure_leaves_nothing(tmp_path):
    made = grams()

    def failing():
        yield from list(made.items())[:1]
        raise FileError("the disk is full")

    with pytest.raises(FileError):
        write_grams(tmp_path / "m.gram", {}, {n: (g.groups, g.size) for n, g in made.items()}, failing())
    assert list(tmp_path.iterdir()) == []


def test_a_changed_bit_is_told_where_it_is_read(tmp_path):
    path = tmp_path / "m.gram"
    made = write(path)
    content = bytearray(path.read_bytes())
    # The last layer's last sum, before the checksums.
    content[-64 - 3] ^= 1
    path.write_bytes(content)
    found = GramFile(path)
    assert found["fc axis -1"] == made["fc axis -1"]
    with pytest.raises(CacheError, match="conv kernel 3x3 pads 1x1: damaged"):
        found["conv kernel 3x3 pads 1x1"]


def test_what_is_no_such_file_is_refused(tmp_path):
    with pytest.raises(CacheError, match="no such file; collect Gram matrices"):
        GramFile(tmp_path / "none.gram")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CacheError, match="not a file of Gram matrices"):
        GramFile(tmp_path / "text")
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "other")
    with pytest.raises(CacheError, match="not a file of Gram matrices"):
        GramFile(tmp_path / "other")
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "kind", metadata={"quantkit": '{"kind": "x"}'})
    with pytest.raises(CacheError, match="of another kind"):
        GramFile(tmp_path / "kind")
    newer = '{"kind": "gram", "schema": 9, "views": []}'
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "newer", metadata={"quantkit": newer})
    with pytest.raises(CacheError, match="schema 9"):
        GramFile(tmp_path / "newer")
    path = tmp_path / "short"
    write(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CacheError, match="not a file of Gram matrices"):
        GramFile(path)


def test_parts_add_up_layer_by_layer(tmp_path):
    made = write(tmp_path / "a.gram", fingerprint="abc", data={"path": "a"})
    write(tmp_path / "b.gram", fingerprint="abc", data={"path": "b"})
    merge_grams(tmp_path / "m.gram", [GramFile(tmp_path / f"{n}.gram") for n in "ab"], {"path": ["a", "b"]})
    found = GramFile(tmp_path / "m.gram")
    assert found.text == {"fingerprint": "abc", "data": {"path": ["a", "b"]}}
    assert dict(found) == {name: gram.merge(gram) for name, gram in made.items()}
    assert found.sizes() == {name: (gram.groups, gram.size) for name, gram in made.items()}


def test_parts_of_different_models_are_refused(tmp_path):
    write(tmp_path / "a.gram", fingerprint="abc")
    write(tmp_path / "b.gram", fingerprint="def")
    with pytest.raises(CacheError, match="of different models"):
        merge_grams(tmp_path / "m.gram", [GramFile(tmp_path / f"{n}.gram") for n in "ab"], {})
    assert not (tmp_path / "m.gram").exists()

import numpy as np
import pytest

from quantkit.data import open_data
from tests.data.helpers import VECTOR, read, refused, spec

X = np.ones((2, 4), np.float32)
MASK = spec("batch", 4, name="mask", dtype=np.int64)


def _save(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("label", ["y", "label", "labels", "Targets"])
def test_the_only_array_beside_labels_feeds_the_only_input(tmp_path, label):
    path = _save(tmp_path / "a.npz", images=X, **{label: np.zeros(2, np.int64)})
    assert len(read(path, VECTOR)) == 2


def test_the_only_array_that_fits_feeds_the_only_input(tmp_path):
    path = _save(tmp_path / "a.npz", images=X, sizes=np.zeros((2, 9)), names=np.array(["a", "b"]))
    source = open_data(path, [VECTOR])
    assert len(list(source)) == 2
    assert source.description["ignored"] == ["names", "sizes"]


def test_two_arrays_that_fit_are_not_chosen_between(tmp_path):
    path = _save(tmp_path / "a.npz", first=X, second=X)
    refused(lambda: open_data(path, [VECTOR]), "first", "second", "x: float32[batch, 4]", "--input x=")
    assert len(read(path, VECTOR, mapping={"x": "second"})) == 2


def test_an_input_named_y_is_not_taken_for_labels(tmp_path):
    assert len(read(_save(tmp_path / "a.npz", y=X), spec("batch", 4, name="y"))) == 2


def test_several_inputs_are_matched_by_name_and_others_reported_as_ignored(tmp_path):
    path = _save(
        tmp_path / "a.npz", mask=np.ones((2, 4), np.int32), x=X, token_type_ids=X, labels=np.zeros(2)
    )
    source = open_data(path, [VECTOR, MASK])
    assert [sorted(s) for s in source] == [["mask", "x"]] * 2
    assert source.description["ignored"] == ["labels", "token_type_ids"]


def test_a_missing_input_shows_what_was_found_and_the_likely_key(tmp_path):
    path = _save(tmp_path / "a.npz", x=X, attention_mask=np.ones((2, 4), np.int64))
    refused(
        lambda: open_data(path, [VECTOR, MASK]),
        "attention_mask: int64[2, 4]",
        "x: float32[batch, 4], mask: int64[batch, 4]",
        "--input mask=attention_mask",
    )


def test_where_nothing_is_left_over_the_missing_array_is_asked_for(tmp_path):
    path = _save(tmp_path / "a.npz", x=X)
    message = refused(lambda: open_data(path, [VECTOR, MASK]), "mask: int64[batch, 4]", "add an array mask")
    assert "--input" not in message


def test_a_mapping_to_nothing_is_refused(tmp_path):
    path = _save(tmp_path / "a.npz", images=X)
    refused(lambda: open_data(path, [VECTOR], mapping={"x": "image"}), "no array image", "images")
    refused(lambda: open_data(path, [VECTOR], mapping={"X": "images"}), "no input X", "x")
    refused(lambda: open_data(X, [VECTOR], mapping={"x": "images"}), "--input")


def test_a_nameless_array_cannot_feed_several_inputs(tmp_path):
    np.save(tmp_path / "a.npy", X)
    refused(lambda: open_data(tmp_path, [VECTOR, MASK]), ".npz", "mask: int64[batch, 4]")
    refused(lambda: open_data(X, [VECTOR, MASK]), "x: float32[batch, 4], mask", "float32[2, 4]")


def test_an_empty_npz_is_refused(tmp_path):
    refused(lambda: open_data(_save(tmp_path / "a.npz"), [VECTOR]), "no arrays")

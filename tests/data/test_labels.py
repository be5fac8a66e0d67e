import numpy as np
import pytest

from quantkit.data import open_labels
from tests.data.helpers import refused

LABELS = np.array([3, 1, 2])


@pytest.mark.parametrize(
    "data",
    [LABELS, LABELS.astype(np.uint8), [3, 1, 2], [3.0, 1.0, 2.0], LABELS[:, None]],
)
def test_labels_from_python_are_integers_whatever_their_type(data):
    labels = open_labels(data)
    assert labels.dtype == np.int64
    assert labels.tolist() == [3, 1, 2]


@pytest.mark.parametrize("key", ["labels", "label", "y", "targets", "Target"])
def test_an_npz_is_read_by_the_key_that_labels_have(tmp_path, key):
    np.savez(tmp_path / "a.npz", images=np.zeros(3), **{key: LABELS})
    assert open_labels(tmp_path / "a.npz").tolist() == [3, 1, 2]


def test_an_npz_of_one_array_needs_no_name(tmp_path):
    np.savez(tmp_path / "a.npz", classes=LABELS)
    assert open_labels(str(tmp_path / "a.npz")).tolist() == [3, 1, 2]


def test_a_key_may_be_written_after_a_colon(tmp_path):
    np.savez(tmp_path / "a.npz", labels=np.zeros(3, int), classes=LABELS)
    assert open_labels(f"{tmp_path / 'a.npz'}:classes").tolist() == [3, 1, 2]
    refused(lambda: open_labels(f"{tmp_path / 'a.npz'}:clas"), "clas", "classes")


def test_npy_and_text_are_read(tmp_path):
    np.save(tmp_path / "a.npy", LABELS)
    (tmp_path / "a.txt").write_text("3\n1\n 2 \n\n")
    assert open_labels(tmp_path / "a.npy").tolist() == open_labels(tmp_path / "a.txt").tolist() == [3, 1, 2]


def test_labels_of_sequences_keep_their_positions():
    assert open_labels([[1, 2], [3, -100]]).tolist() == [[1, 2], [3, -100]]


def test_as_many_labels_as_samples_are_given_back():
    assert open_labels(LABELS, 2).tolist() == [3, 1]
    refused(lambda: open_labels(LABELS, 4), "3 labels for 4 samples")


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ([0.5, 1], "float64"),
        ([1, -1, -3, -100], "2 labels are negative, the first -1"),
        ([-100, -100], "every label is -100"),
        (["cat", "dog"], "integer"),
        ([], "integer label"),
        (np.int64(3), "integer label"),
        ({"labels": [1]}, "one array"),
        ("nowhere.npz", "no such file"),
    ],
)
def test_what_is_no_label_is_refused(data, word):
    refused(lambda: open_labels(data), word)


def test_files_that_hold_no_clear_labels_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=LABELS, b=LABELS)
    refused(lambda: open_labels(tmp_path / "a.npz"), "a, b", "a.npz:KEY")
    (tmp_path / "a.txt").write_text("3\ncat\n")
    refused(lambda: open_labels(tmp_path / "a.txt"), "line 2", "'cat'")
    (tmp_path / "a.csv").write_text("3\n")
    refused(lambda: open_labels(tmp_path / "a.csv"), ".csv")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    refused(lambda: open_labels(tmp_path / "b.txt"), "b.txt")

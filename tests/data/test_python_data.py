import collections

import numpy as np
import pytest

from quantkit.data import open_data
from tests.data.helpers import VECTOR, read, refused, spec

X = np.arange(12, dtype=np.float32).reshape(3, 4)
MASK = spec("batch", 4, name="mask")


class Tensor:
    """An array of another library: on a device, in a graph, turned into NumPy's by steps."""

    def __init__(self, array, steps=()):
        self._array, self.steps = array, steps

    def detach(self):
        return Tensor(self._array, (*self.steps, "detach"))

    def cpu(self):
        return Tensor(self._array, (*self.steps, "cpu"))

    def __array__(self, dtype=None, copy=None):
        if self.steps != ("detach", "cpu"):
            raise TypeError("cannot convert a device tensor that requires grad")
        return self._array


class MapDataset:
    """Has a length and items, and no end of its own."""

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return X[i % 3], i


class Reader:
    """As ONNX Runtime's CalibrationDataReader."""

    def __init__(self):
        self.rewind()

    def rewind(self):
        self._rows = iter(X)

    def get_next(self):
        row = next(self._rows, None)
        return None if row is None else {"x": row[None]}


@pytest.mark.parametrize(
    "data",
    [
        X,
        X.tolist(),
        list(X),
        tuple(X[:, None]),
        {"x": X},
        collections.UserDict(x=X),
        [{"x": row} for row in X],
        [(row, 7) for row in X],
        [[row[None], np.array([7])] for row in X],
        [({"x": row}, 7) for row in X],
        [(X[:2], np.zeros(2)), (X[2:], np.zeros(1))],
        [Tensor(row) for row in X],
        Tensor(X),
        MapDataset(),
        Reader(),
        lambda: iter(X),
        (row for row in X),
        collections.deque(X),
    ],
    ids=lambda data: type(data).__name__,
)
def test_every_way_to_hand_over_arrays_gives_the_same_samples(data):
    samples = read(data, VECTOR)
    assert [s["x"].shape for s in samples] == [(1, 4)] * 3
    np.testing.assert_array_equal(np.concatenate([s["x"] for s in samples]), X)


@pytest.mark.parametrize("data", [[(X, X + 1)], [(X, X + 1, np.zeros(3))], ((x, x + 1) for x in X)])
def test_a_tuple_is_in_the_order_of_the_inputs(data):
    samples = read(data, VECTOR, MASK)
    np.testing.assert_array_equal(np.concatenate([s["mask"] for s in samples]), X + 1)


def test_a_list_of_numbers_is_one_sample_not_a_tuple_of_inputs():
    text = spec("batch", "seq", dtype=np.int64)
    data = [[np.int64(1), np.int64(2)], [3, 4, 5]]
    assert [s["x"].tolist() for s in read(data, text)] == [[[1, 2]], [[3, 4, 5]]]


@pytest.mark.parametrize("data", [MapDataset(), Reader(), lambda: iter(X), list(X), X])
def test_what_can_be_started_again_is(data):
    source = open_data(data, [VECTOR])
    assert len(list(source)) == len(list(source)) == 3


def test_a_generator_serves_once_and_then_says_so():
    source = open_data((row for row in X), [VECTOR])
    assert len(list(source)) == 3
    refused(lambda: list(source), "gone through", "list")


def test_the_number_of_samples_is_known_only_of_what_is_in_memory():
    assert len(open_data([X, X[0]], [VECTOR])) == 4
    assert len(open_data({"x": X}, [VECTOR], samples=2)) == 2
    with pytest.raises(TypeError, match="known only"):
        len(open_data(iter(X), [VECTOR]))


def test_only_as_many_items_are_taken_as_samples_need():
    taken = []
    read((taken.append(i) or X[i] for i in range(3)), VECTOR, samples=2)
    assert taken == [0, 1]


def test_a_change_to_the_data_afterwards_does_not_change_a_sample():
    x = X.copy()
    samples = read(x, VECTOR)
    x[:] = -1
    assert samples[2]["x"][0, 3] == 11


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (None, "NoneType"),
        (3, "int"),
        ([None], "item 0"),
        ([{"x": [[1, 2], [3]]}], "item 0"),
        ([X[0], object()], "item 1"),
        ([(X, X, X)], "3 arrays"),
        ([{"z": X, "w": X}], "x: float32[batch, 4]"),
        (["a", 3.0], "item 0"),
        ([Tensor(X, ("stuck",))], "Tensor"),
    ],
)
def test_what_is_no_data_is_refused(data, word):
    refused(lambda: read(data, VECTOR), word)

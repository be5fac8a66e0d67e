import hashlib
import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.data import InputSpec, batches, fill_batch, open_data, sample_fingerprint
from tests.data.helpers import VECTOR, refused, spec

TEXT = spec("batch", "seq", dtype=np.int64)


def _stacked(data, *inputs, batch_size):
    return list(batches(open_data(data, inputs), inputs, batch_size))


@given(lengths=st.lists(st.integers(1, 3), min_size=1, max_size=12), batch_size=st.integers(1, 5))
def test_batches_hold_all_samples_in_order_each_of_one_shape(lengths, batch_size):
    data = [np.full(length, i) for i, length in enumerate(lengths)]
    found = [b["x"] for b in _stacked(data, TEXT, batch_size=batch_size)]
    assert [row.tolist() for batch in found for row in batch] == [x.tolist() for x in data]
    assert all(len(batch) <= batch_size for batch in found)
    # A batch ends only where it is full or the next sample has another shape.
    for a, b in itertools.pairwise(found):
        assert len(a) == batch_size or a.shape[1:] != b.shape[1:]


def test_a_state_of_equal_value_is_fed_once_to_a_batch():
    state = spec(2, 5, name="state")
    x = np.ones((4, 4), np.float32)
    (batch,) = _stacked({"x": x, "state": np.ones((2, 5))}, VECTOR, state, batch_size=8)
    assert batch["x"].shape == (4, 4)
    assert batch["state"].shape == (2, 5)


def test_samples_with_different_states_are_not_stacked():
    state = spec(name="step")
    data = {"x": np.ones((4, 4), np.float32), "step": np.array([1.0, 1.0, 2.0, 1.0])}
    found = _stacked(data, VECTOR, state, batch_size=8)
    assert [(len(b["x"]), float(b["step"])) for b in found] == [(2, 1), (1, 2), (1, 1)]


def test_recurrent_states_are_stacked_along_their_own_axis():
    state = spec(2, "batch", 5, name="state")
    data = {"x": np.ones((3, 4), np.float32), "state": np.arange(30.0).reshape(2, 3, 5)}
    (batch,) = _stacked(data, VECTOR, state, batch_size=3)
    np.testing.assert_array_equal(batch["state"], data["state"])


def test_scalars_alone_are_fed_one_by_one():
    assert [b["x"].shape for b in _stacked(np.arange(3.0), spec(), batch_size=8)] == [()] * 3


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_a_fixed_batch_is_always_filled(batch_size):
    x = np.arange(24, dtype=np.float32).reshape(6, 4)
    found = [b["x"] for b in _stacked(x, spec(2, 4), batch_size=batch_size)]
    assert [b.shape for b in found] == [(2, 4)] * 3
    np.testing.assert_array_equal(np.concatenate(found), x)


def test_what_does_not_fill_a_fixed_batch_is_left_out_with_a_warning():
    with pytest.warns(UserWarning, match="1 samples were left out.*exactly 2"):
        assert len(_stacked(np.ones((5, 4), np.float32), spec(2, 4), batch_size=1)) == 2


def test_too_few_for_a_fixed_batch_is_an_error():
    refused(lambda: _stacked(np.ones((3, 4), np.float32), spec(8, 4), batch_size=1), "3 samples", "exactly 8")


def test_filled_batches_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _stacked(np.ones((5, 4), np.float32), VECTOR, batch_size=2)


def test_a_batch_size_below_one_is_refused():
    refused(lambda: _stacked(np.ones((3, 4), np.float32), VECTOR, batch_size=0), "batch size 0")


def test_nothing_is_read_ahead_of_a_batch():
    taken = []
    source = open_data((taken.append(i) or np.ones(4, np.float32) for i in range(9)), [VECTOR])
    next(batches(source, [VECTOR], 2))
    assert taken == [0, 1]


def test_the_fingerprint_of_a_sample_is_a_golden_value():
    sample = {"x": np.array([[1.5, -2]], np.float32), "ids": np.array([[3]])}
    # By coreutils: printf "('ids', 'int64', (1, 1))\x03\0\0\0\0\0\0\0('x', 'float32', (1, 2))\0\0\xc0\x3f\0\0\0\xc0"
    # piped into sha256sum, the first 16 digits.
    assert sample_fingerprint(sample).hex() == "a130eecc80860d46"


def test_the_fingerprint_of_a_large_sample_is_that_of_its_folded_contents():
    words = [((i * i + 7) << (i % 50)) % 2**64 for i in range(3 * 8192)]
    folded = [0] * 8192
    for i, word in enumerate(words):
        h = folded[i % 8192]
        folded[i % 8192] = ((h ^ h >> 32) * 0x9E3779B97F4A7C15 + word) % 2**64
    header = repr(("x", "uint64", (3 * 8192 + 1,))).encode()
    content = b"".join(h.to_bytes(8, "little") for h in folded) + (5).to_bytes(8, "little")
    expected = hashlib.sha256(header + content).digest()[:8]
    sample = {"x": np.array([*words, 5], np.uint64)}
    assert sample_fingerprint(sample) == expected
    assert expected.hex() == "a7d9be86e57edd1c"


@given(data=st.data())
def test_the_fingerprint_tells_large_samples_apart(data):
    x = np.tile(np.arange(1, 8193, dtype=np.float32), 8)
    places = data.draw(st.sets(st.integers(0, x.size - 1), min_size=1, max_size=3))
    changed = x.copy()
    changed[list(places)] *= -1
    first = sample_fingerprint({"x": x})
    assert sample_fingerprint({"x": changed}) != first
    assert sample_fingerprint({"x": -x}) != first
    assert sample_fingerprint({"x": np.roll(changed, 16384)}) != sample_fingerprint({"x": changed})


def test_the_fingerprint_does_not_depend_on_order_or_memory_layout():
    x, y = np.arange(6.0).reshape(2, 3), np.arange(4)
    first = sample_fingerprint({"x": x, "y": y})
    assert len(first) == 8
    assert sample_fingerprint({"y": y.astype(">i8"), "x": np.asfortranarray(x)}) == first


@pytest.mark.parametrize(
    "other",
    [
        {"x": np.zeros((1, 5), np.float32)},
        {"x": np.zeros((1, 4), np.int32)},
        {"y": np.zeros((1, 4), np.float32)},
        {"x": np.zeros(4, np.float32)},
        {"x": np.array([[0, 0, 0, -0.0]], np.float32)},
        {"x": np.zeros((1, 4), np.float32), "y": np.zeros(0)},
    ],
)
def test_the_fingerprint_tells_name_type_shape_and_contents_apart(other):
    assert sample_fingerprint({"x": np.zeros((1, 4), np.float32)}) != sample_fingerprint(other)


def test_the_fingerprint_of_a_scalar_is_not_that_of_a_vector():
    assert sample_fingerprint({"x": np.array(1.0)}) != sample_fingerprint({"x": np.array([1.0])})


def test_a_sample_fills_the_batch_of_a_model_that_takes_a_fixed_one():
    inputs = [
        InputSpec(name="x", dtype=np.float32, shape=(4, 3)),
        InputSpec(name="t", dtype=np.float32, shape=()),
    ]
    filled = fill_batch({"x": np.ones((1, 3), np.float32), "t": np.float32(2)}, inputs)
    assert filled["x"].shape == (4, 3)
    assert np.shape(filled["t"]) == ()

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.data import ImagePreprocessing, open_data, slicing
from quantkit.data.files import NpyFile
from tests.data.helpers import VECTOR, read, refused, spec


def _x(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_an_array_of_the_models_rank_holds_samples_along_its_first_axis():
    samples = read(_x(3, 4), VECTOR)
    assert [s["x"].shape for s in samples] == [(1, 4)] * 3
    np.testing.assert_array_equal(samples[2]["x"], [[8, 9, 10, 11]])


def test_an_array_of_one_rank_less_is_one_sample():
    (sample,) = read(_x(4), VECTOR)
    np.testing.assert_array_equal(sample["x"], [[0, 1, 2, 3]])


@given(count=st.integers(1, 6), size=st.integers(1, 4))
def test_samples_put_together_are_the_array(count, size):
    x = _x(count, size)
    np.testing.assert_array_equal(np.concatenate([s["x"] for s in read(x, spec("n", size))]), x)


def test_a_model_of_scalars_per_sample_takes_a_vector():
    assert [s["x"].tolist() for s in read(_x(3), spec("batch"))] == [[0], [1], [2]]


def test_a_scalar_input_is_shared_by_all_samples_or_given_for_each():
    step = spec(name="step", dtype=np.int64)
    shared = read({"x": _x(3, 4), "step": np.int64(7)}, VECTOR, step)
    assert [s["step"].tolist() for s in shared] == [7, 7, 7]
    assert shared[0]["step"].shape == ()
    each = read({"x": _x(3, 4), "step": np.array([7, 8, 9])}, VECTOR, step)
    assert [s["step"].tolist() for s in each] == [7, 8, 9]


def test_a_model_of_scalars_only_takes_one_sample_or_several():
    assert [s["x"].tolist() for s in read(np.float32(2), spec())] == [2]
    assert [s["x"].tolist() for s in read(_x(3), spec())] == [0, 1, 2]


def test_a_state_without_batch_axis_is_shared_or_given_for_each():
    state = spec(2, 5, name="state")
    shared = read({"x": _x(3, 4), "state": _x(2, 5)}, VECTOR, state)
    assert [s["state"].shape for s in shared] == [(2, 5)] * 3
    each = read({"x": _x(3, 4), "state": _x(3, 2, 5)}, VECTOR, state)
    np.testing.assert_array_equal(each[1]["state"], _x(3, 2, 5)[1])
    refused(lambda: read({"x": _x(3, 4), "state": _x(2, 6)}, VECTOR, state), "state", "float32[2, 6]")


@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 2, 1, 5)])
def test_a_recurrent_state_is_cut_along_its_own_batch_axis(shape):
    state = spec(2, "batch", 5, name="state")
    samples = read({"x": _x(3, 4), "state": _x(*shape)}, VECTOR, state)
    assert [s["state"].shape for s in samples] == [(2, 1, 5)] * 3
    whole = _x(*shape) if len(shape) == 3 else np.moveaxis(_x(*shape)[:, :, 0], 0, 1)
    np.testing.assert_array_equal(np.concatenate([s["state"] for s in samples], 1), whole)


def test_a_fixed_batch_takes_rows_or_whole_batches():
    fixed = spec(2, 4)
    assert [s["x"].shape for s in read(_x(4, 4), fixed)] == [(1, 4)] * 4
    samples = read(_x(3, 2, 4), fixed)
    np.testing.assert_array_equal(np.concatenate([s["x"] for s in samples]), _x(6, 4))


def test_free_dimensions_may_differ_from_record_to_record():
    text = spec("batch", "seq", dtype=np.int64)
    samples = read([np.array([1, 2, 3]), np.array([[4, 5]])], text)
    assert [s["x"].tolist() for s in samples] == [[[1, 2, 3]], [[4, 5]]]


def test_a_free_dimension_may_be_empty():
    past = spec("batch", 2, "past", name="past")
    (sample,) = read({"x": _x(1, 4), "past": np.zeros((1, 2, 0), np.float32)}, VECTOR, past)
    assert sample["past"].shape == (1, 2, 0)


@pytest.mark.parametrize("shape", [(3, 5), (5,), (), (3, 1, 4), (2, 3, 4, 4)])
def test_a_wrong_shape_shows_what_was_found_and_what_is_wanted(shape):
    found = f"float32[{', '.join(map(str, shape))}]"
    refused(
        lambda: open_data(np.zeros(shape, np.float32), [VECTOR]), found, "x: float32[batch, 4]", "float32[4]"
    )


def test_a_transposed_picture_is_recognized():
    message = refused(lambda: read(np.zeros((2, 8, 9, 3), np.float32), spec("n", 3, 8, 9)), "NHWC")
    assert "(0, 3, 1, 2)" in message
    refused(lambda: read(np.zeros((2, 3, 8, 9), np.float32), spec("n", 8, 9, 3)), "NCHW", "(0, 2, 3, 1)")


def test_different_numbers_of_samples_are_refused():
    other = spec("batch", 2, name="y0")
    refused(lambda: read({"x": _x(3, 4), "y0": _x(2, 2)}, VECTOR, other), "3 samples of x", "2 samples of y0")


@pytest.mark.parametrize(("value", "word"), [(np.nan, "1 NaN"), (-np.inf, "1 Inf")])
def test_what_is_not_finite_is_refused_with_its_place(tmp_path, value, word):
    x = _x(3, 4)
    x[1, 2] = value
    np.save(tmp_path / "bad.npy", x)
    source = open_data(tmp_path, [VECTOR])
    refused(lambda: list(source), "bad.npy: sample 1", word, "x: float32[batch, 4]")
    refused(lambda: read([x[0], x[1]], VECTOR), "item 1", word)


def test_samples_before_a_bad_one_are_still_given():
    x = _x(3, 4)
    x[2, 0] = np.nan
    samples = iter(open_data(x, [VECTOR]))
    assert next(samples)["x"][0, 3] == 3


def test_each_input_is_cast_to_its_own_type():
    half = spec("batch", 2, name="half", dtype=np.float16)
    ids = spec("batch", 2, name="ids", dtype=np.int64)
    (sample,) = read({"half": np.ones((1, 2)), "ids": np.ones((1, 2), np.int32)}, half, ids)
    assert (sample["half"].dtype, sample["ids"].dtype) == (np.float16, np.int64)


def test_pixels_for_a_float_input_need_a_preprocessing():
    pixels = np.zeros((2, 3, 4, 5), np.uint8)
    refused(lambda: open_data(pixels, [spec("n", 3, 4, 5)]), "uint8", "--mean", "0-1")


def test_a_preprocessing_that_applies_to_nothing_is_refused():
    image = ImagePreprocessing.preset("0-1")
    refused(
        lambda: open_data(np.zeros((2, 3, 4, 5), np.float32), [spec("n", 3, 4, 5)], image=image),
        "float32",
        "--mean",
    )
    refused(lambda: open_data(_x(2, 4), [VECTOR], image=image), "rank 4")


@pytest.mark.parametrize("layout", [(0, 1, 2, 3), (0, 2, 3, 1)])
def test_pixels_in_an_array_are_preprocessed_in_either_layout(layout):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), np.uint8)
    image = ImagePreprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    samples = read(pixels.transpose(layout), spec("n", 3, 4, 5), image=image)
    wanted = (pixels / 255 - np.array(image.mean)[:, None, None]) / np.array(image.std)[:, None, None]
    np.testing.assert_array_equal(np.concatenate([s["x"] for s in samples]), wanted.astype(np.float32))
    (one,) = read(pixels.transpose(layout)[0], spec("n", 3, 4, 5), image=image)
    np.testing.assert_array_equal(one["x"], samples[0]["x"])


def test_pixels_beside_other_inputs_are_preprocessed_and_the_others_not():
    data = {"x": np.full((2, 3, 4, 5), 255, np.uint8), "mask": np.ones((2, 4), np.float32)}
    image = ImagePreprocessing(std=(0.5,))
    (first, _) = read(data, spec("n", 3, 4, 5), spec("n", 4, name="mask"), image=image)
    assert (first["x"] == 2).all()
    assert (first["mask"] == 1).all()


def test_pixels_of_the_wrong_number_of_channels_are_refused():
    image = ImagePreprocessing.preset("0-1")
    refused(
        lambda: read(np.zeros((2, 4, 5, 1), np.uint8), spec("n", 3, 4, 5), image=image),
        "uint8[2, 4, 5, 1]",
        "3",
    )


@pytest.mark.parametrize("mapped_bytes", [0, 40, 2**20])
def test_a_mapped_file_is_mapped_anew_so_that_what_was_read_can_go(tmp_path, monkeypatch, mapped_bytes):
    monkeypatch.setattr(slicing, "_MAPPED_BYTES", mapped_bytes)
    np.save(tmp_path / "a.npy", _x(9, 4))
    reads = []
    read_file = NpyFile.read
    monkeypatch.setattr(NpyFile, "read", lambda file, key: reads.append(key) or read_file(file, key))
    samples = read(tmp_path, VECTOR)
    np.testing.assert_array_equal(np.concatenate([s["x"] for s in samples]), _x(9, 4))
    assert len(reads) == {0: 9, 40: 3, 2**20: 1}[mapped_bytes]

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantkit.errors import CacheError, DataError
from quantkit.statistics import GramMatrix, gram_bytes

ROWS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 2), st.integers(1, 12), st.integers(1, 5)),
    elements=st.floats(-1e3, 1e3, width=32),
)


def gram_of(*parts):
    cubes = [p[None] if p.ndim == 2 else p for p in parts]
    made = GramMatrix(cubes[0].shape[2], cubes[0].shape[0])
    for part in parts:
        made.observe(part)
    return made


@given(ROWS)
def test_products_are_those_of_every_vector_with_itself(rows):
    gram = gram_of(rows)
    x = rows.astype(np.float64)
    np.testing.assert_allclose(gram.products, np.einsum("gmi,gmj->gij", x, x), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(gram.sums, x.sum(axis=1), rtol=1e-12, atol=1e-9)
    assert gram.count == rows.shape[1]


@given(ROWS, st.integers(0, 12))
def test_batches_and_merging_change_nothing(rows, cut):
    first, second = rows[:, :cut], rows[:, cut:]
    whole, merged = gram_of(rows), gram_of(first).merge(gram_of(second))
    for other in (gram_of(first, second), merged):
        assert other.count == whole.count
        # Sums of terms up to 1e6: 1e-12 of the largest.
        np.testing.assert_allclose(other.products, whole.products, rtol=1e-12, atol=1e-6)
        np.testing.assert_allclose(other.sums, whole.sums, rtol=1e-12, atol=1e-9)


@given(ROWS)
def test_the_error_of_an_output_is_that_of_its_gram_matrix(rows):
    change = np.random.default_rng(0).normal(size=(rows.shape[0], rows.shape[2]))
    direct = np.square(np.einsum("gmk,gk->gm", rows.astype(np.float64), change)).mean(axis=1)
    found = np.einsum("gi,gij,gj->g", change, gram_of(rows).second_moment, change)
    np.testing.assert_allclose(found, direct, rtol=1e-9, atol=1e-6)


def test_covariance_is_the_second_moment_about_the_mean():
    rows = np.random.default_rng(1).normal(3, 1, (200, 4)).astype(np.float32)
    gram = gram_of(rows)
    np.testing.assert_allclose(gram.covariance[0], np.cov(rows.T.astype(np.float64), bias=True), rtol=1e-9)
    np.testing.assert_allclose(gram.mean[0], rows.mean(axis=0, dtype=np.float64))
    np.testing.assert_allclose(gram.importance[0], np.square(rows.astype(np.float64)).mean(axis=0))


def test_dividing_the_channels_is_observing_divided_vectors():
    rows = np.random.default_rng(2).normal(size=(50, 4)).astype(np.float32)
    scale = np.array([0.5, 2, 4, 0.25])
    divided, again = gram_of(rows).divided(scale), gram_of((rows / scale).astype(np.float32))
    np.testing.assert_allclose(divided.products, again.products, rtol=1e-12)
    np.testing.assert_allclose(divided.sums, again.sums, rtol=1e-12, atol=1e-12)


def test_sums_do_not_stall():
    gram = GramMatrix(1)
    for _ in range(3):
        gram.observe(np.full((1, 1), 2**20, np.float32))
        gram.observe(np.full((1000, 1), 1e-3, np.float32))
    assert gram.sums[0, 0] == pytest.approx(3 * 2**20 + 3, rel=1e-13)


def test_arrays_bring_the_matrix_back():
    gram = gram_of(np.random.default_rng(3).normal(size=(2, 7, 3)).astype(np.float32))
    arrays = gram.to_arrays()
    assert GramMatrix.from_arrays(arrays) == gram
    assert gram_bytes(3, 2) == sum(a.nbytes for a in arrays.values())


def test_what_is_not_finite_is_told():
    gram = GramMatrix(2)
    gram.observe(np.array([[1, np.inf]], np.float32))
    assert not gram.is_finite
    assert gram_of(np.ones((1, 2), np.float32)).is_finite


def test_vectors_of_another_length_are_refused():
    with pytest.raises(DataError, match=r"\(3, 5\) where \(1, any, 4\) belongs"):
        GramMatrix(4).observe(np.zeros((3, 5), np.float32))
    with pytest.raises(DataError, match="differ"):
        GramMatrix(4).merge(GramMatrix(5))


def test_damaged_arrays_are_refused():
    arrays = gram_of(np.ones((2, 3), np.float32)).to_arrays()
    with pytest.raises(CacheError, match="damaged"):
        GramMatrix.from_arrays({**arrays, "products": np.zeros((1, 2, 2))})
    with pytest.raises(CacheError, match="damaged"):
        GramMatrix.from_arrays({"sums": arrays["sums"]})

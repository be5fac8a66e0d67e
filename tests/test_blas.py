import numpy as np
import pytest

from quantkit import blas


@pytest.fixture
def library() -> tuple[object, object]:
    found = blas._openblas()
    if found is None:
        pytest.skip("this NumPy multiplies by another library")
    return found


def test_small_products_run_on_one_thread_and_afterwards_it_is_as_before(library) -> None:
    get, put = library
    before = get()
    put(2)
    try:
        with blas.threads_for(256):
            assert get() == 1
            np.ones((64, 64)) @ np.ones((64, 64))
        assert get() == 2
        with pytest.raises(ZeroDivisionError), blas.threads_for(256):
            raise ZeroDivisionError
        assert get() == 2
    finally:
        put(before)


def test_large_products_take_all(library) -> None:
    get, _ = library
    before = get()
    with blas.threads_for(blas.SMALL + 1):
        assert get() == before


def test_without_openblas_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_openblas", lambda: None)
    with blas.threads_for(8):
        assert (np.ones((2, 2)) @ np.ones((2, 2)) == 2).all()

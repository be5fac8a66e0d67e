import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from quantkit.blas import SMALL, threads_for


def threads() -> set[int]:
    return {pool["num_threads"] for pool in ThreadpoolController().info() if pool["user_api"] == "blas"}


def test_small_products_run_on_one_thread_and_afterwards_it_is_as_before() -> None:
    with ThreadpoolController().limit(limits=2, user_api="blas"):
        before = threads()
        with threads_for(256):
            assert threads() == {1}
            np.ones((64, 64)) @ np.ones((64, 64))
        assert threads() == before
        with pytest.raises(ZeroDivisionError), threads_for(256):
            raise ZeroDivisionError
        assert threads() == before


def test_large_products_take_all() -> None:
    before = threads()
    with threads_for(SMALL + 1):
        assert threads() == before

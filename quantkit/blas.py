"""How many threads NumPy multiplies on: products of a layer's size are as fast on one, and do not wait for another."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy  # noqa: F401 - its library of products must be loaded before libraries are looked for
from threadpoolctl import ThreadpoolController

# Matrices up to so many rows. On two cores that others used too, GPTQ of a small Llama took 22 s on two threads, which
# spin until the other has come, and 4.7 s on one; with nothing else running, 3.8 s on two.
SMALL = 1024


@contextmanager
def threads_for(size: int) -> Iterator[None]:
    """Multiply on one thread while the block runs, where matrices have at most 1024 rows.

    The result does not depend then on how many processors there are.

    Args:
        size: the longest axis that is summed over.
    """
    if size > SMALL:
        yield
        return
    with _libraries().limit(limits=1, user_api="blas"):
        yield


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()

"""How many threads NumPy multiplies on: products of a layer's size are as fast on one, and do not wait for another."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

# Matrices up to so many rows. On two cores that others used too, GPTQ of a small Llama took 22 s on two threads, which
# spin until the other has come, and 4.7 s on one; with nothing else running, 3.8 s on two.
SMALL = 1024


@contextmanager
def threads_for(size: int) -> Iterator[None]:
    """Multiply on one thread while the block runs, where matrices have at most 1024 rows.

    The result does not depend then on how many processors there are. Nothing changes where NumPy was built with
    another library than OpenBLAS.

    Args:
        size: the longest axis that is summed over.
    """
    library = _openblas() if size <= SMALL else None
    if library is None:
        yield
        return
    get, put = library
    before = get()
    put(1)
    try:
        yield
    finally:
        put(before)


@cache
def _openblas() -> tuple[Callable[[], int], Callable[[int], object]] | None:
    """What tells and sets the threads of the OpenBLAS that NumPy's packages bring; None where they bring none."""
    package = Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        for path in sorted(folder.glob("*openblas*")):
            # It is loaded already: this is the same one.
            library = ctypes.CDLL(str(path))
            for prefix in ("scipy_", ""):
                for suffix in ("64_", ""):
                    name = f"{prefix}openblas_{{}}_num_threads{suffix}"
                    if hasattr(library, name.format("set")) and hasattr(library, name.format("get")):
                        return getattr(library, name.format("get")), getattr(library, name.format("set"))
    return None

"""What the tests of data share: a refusal, and short names for inputs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from quantkit.data import InputSpec, open_data
from quantkit.errors import DataError


def spec(*shape: int | str | None, name: str = "x", dtype: Any = np.float32) -> InputSpec:
    return InputSpec(name=name, dtype=np.dtype(dtype), shape=shape)


IMAGE = spec("batch", 3, 4, 5, name="image")
VECTOR = spec("batch", 4)


def refused(call: Callable[[], object], *words: str) -> str:
    """Assert that `call` raises a DataError of one line that has all these words in it, and return it."""
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def read(data: object, *inputs: InputSpec, **options: Any) -> list[dict[str, np.ndarray]]:
    return list(open_data(data, inputs, **options))

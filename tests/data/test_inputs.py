import numpy as np
import pytest

from quantkit.data import batch_axes, fixed_batch_size
from tests.data.helpers import spec


@pytest.mark.parametrize(
    ("shapes", "axes", "fixed"),
    [
        ([("batch", 3, 32, 32)], [0], None),
        ([(None, "seq"), (None, "seq")], [0, 0], None),
        ([(1, 3, 32, 32)], [0], 1),
        ([(8, 16)], [0], 8),
        ([(8, 16), (8,)], [0, 0], 8),
        ([("batch", 16), ()], [0, None], None),
        ([("batch", 16), (2, 64)], [0, None], None),
        ([(1, 16), (2, 1, 64)], [0, None], 1),
        ([("batch", "time", 40), (2, "batch", 64)], [0, 1], None),
        ([(2, "batch", 64), ("batch", "time", 40)], [1, 0], None),
        ([("batch", 4), (3, None)], [0, None], None),
        ([()], [None], None),
    ],
)
def test_the_batch_axis_follows_from_the_first_dimensions(shapes, axes, fixed):
    inputs = [spec(*shape, name=f"x{i}") for i, shape in enumerate(shapes)]
    assert list(batch_axes(inputs).values()) == axes
    assert fixed_batch_size(inputs) == fixed


def test_an_input_reads_as_in_onnx():
    assert str(spec("batch", None, 3, name="ids", dtype=np.int64)) == "ids: int64[batch, ?, 3]"
    assert str(spec(name="step")) == "step: float32[]"

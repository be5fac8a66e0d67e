"""How a model is refused."""

from pathlib import Path

import onnx
import pytest

from quantkit.errors import ModelError
from quantkit.graph import load_graph


def refusal(model: Path | onnx.ModelProto) -> str:
    """Return the message with which a model is refused: always one line."""
    with pytest.raises(ModelError) as caught:
        load_graph(model)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message

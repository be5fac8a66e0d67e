import pytest

from quantkit.errors import ModelError
from quantkit.graph import load_graph
from tests.models import MODELS

every_model = pytest.mark.parametrize("tiny", MODELS.values(), ids=MODELS)


def test_an_input_without_a_rank_is_refused() -> None:
    model = MODELS["gemm"].build()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(ModelError, match="x: the input's rank is not given"):
        load_graph(model).inputs  # noqa: B018

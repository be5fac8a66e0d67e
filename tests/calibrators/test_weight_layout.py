import numpy as np
import pytest

from quantkit.calibrators.weight_layout import WeightLayout

LAYOUTS = [
    ((5, 3), WeightLayout(out_axis=1)),
    ((5, 3), WeightLayout(out_axis=-1)),
    ((3, 5), WeightLayout(out_axis=0)),
    ((4, 6, 3, 3), WeightLayout(out_axis=0)),
    ((4, 2, 3, 3), WeightLayout(out_axis=0, groups=2)),
    ((6, 1, 5), WeightLayout(out_axis=0, groups=6)),
]


@pytest.mark.parametrize(("shape", "layout"), LAYOUTS, ids=str)
def test_a_weight_comes_back_from_its_columns(shape, layout):
    w = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    columns = layout.columns(w)
    outputs = shape[layout.out_axis]
    assert columns.shape == (layout.groups, layout.size(shape), outputs // layout.groups)
    np.testing.assert_array_equal(layout.weight(columns, shape), w)


def test_a_convolutions_columns_are_in_the_order_of_its_patches():
    w = np.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    np.testing.assert_array_equal(WeightLayout(out_axis=0).columns(w)[0, :, 1], w[1].reshape(-1))


@pytest.mark.parametrize(("shape", "layout"), LAYOUTS, ids=str)
def test_importance_of_inputs_broadcasts_against_the_weight(shape, layout):
    values = np.random.default_rng(0).random((layout.groups, layout.size(shape)))
    spread = np.broadcast_to(layout.importance(values, shape), shape)
    columns = layout.columns(spread)
    np.testing.assert_array_equal(columns, np.broadcast_to(values[:, :, None], columns.shape))

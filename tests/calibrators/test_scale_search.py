import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.calibrators import weight_qparams
from quantkit.calibrators.scale_search import search_scales
from quantkit.calibrators.weight_layout import WeightLayout
from quantkit.errors import SpecError
from quantkit.formats import (
    FP4_E2M1,
    FP8_E4M3,
    INT2,
    INT3,
    INT4,
    UINT4,
    QParams,
    QuantSpec,
    fake_quantize,
)
from tests.calibrators.layers import correlated, gram_of, output_loss, weights

MATMUL = WeightLayout(out_axis=1)
BLOCKS = {"axis": 0, "block_size": 16}
FREE = [
    QuantSpec(format=INT4, **BLOCKS),
    QuantSpec(format=UINT4, symmetric=False, **BLOCKS),
    QuantSpec(format=INT3, **BLOCKS),
    QuantSpec(format=INT2, **BLOCKS),
    QuantSpec(format=INT4, axis=1),
    QuantSpec(format=FP8_E4M3, axis=1),
]


def loss_of(x, w, qparams, spec):
    return output_loss(x, w, fake_quantize(w, qparams, spec))


@pytest.mark.parametrize("spec", FREE, ids=str)
@given(seed=st.integers(0, 10**6))
def test_it_never_loses_more_than_scales_that_weigh_each_error_alone(spec, seed):
    x, w = correlated(100, 40, seed=seed), weights(40, 3, seed=seed)
    gram = gram_of(x)
    found = search_scales(w, gram, spec, MATMUL)
    alone = weight_qparams(w, spec, importance=gram.importance[0][:, None])
    assert loss_of(x, w, found, spec) <= loss_of(x, w, alone, spec) * (1 + 1e-5)


def test_inputs_that_depend_on_each_other_are_worth_the_search():
    x, w = correlated(500, 64), weights(64, 48)
    gram, spec = gram_of(x), FREE[0]
    alone = weight_qparams(w, spec, importance=gram.importance[0][:, None], signed_scales=True)
    found = search_scales(w, gram, spec, MATMUL, signed_scales=True)
    assert loss_of(x, w, found, spec) < 0.8 * loss_of(x, w, alone, spec)
    assert (found.scale < 0).any()


def test_an_exhaustive_search_over_one_scale_finds_little_better():
    x, w = correlated(200, 12), weights(12, 6)
    spec = QuantSpec(format=INT4, axis=1)
    found = search_scales(w, gram_of(x), spec, MATMUL)
    cover = np.abs(w).max(axis=0) / 7
    for column in range(6):
        one = slice(column, column + 1)
        single = QuantSpec(format=INT4, axis=1)
        losses = [
            loss_of(
                x,
                w[:, one],
                QParams(cover[one] * np.float32(factor), np.zeros(1, INT4.dtype)),
                single,
            )
            for factor in np.linspace(0.5, 1.2, 400)
        ]
        mine = QParams(found.scale[one], np.zeros(1, INT4.dtype))
        assert loss_of(x, w[:, one], mine, single) <= 1.3 * min(losses)


def test_scales_in_few_bits_or_shared_stay_those_of_least_weighted_error():
    x, w = correlated(100, 32), weights(32, 16)
    gram = gram_of(x)
    for spec in (QuantSpec(format=FP4_E2M1, scale_format=FP8_E4M3, **BLOCKS), QuantSpec(format=INT4)):
        wanted = weight_qparams(w, spec, importance=gram.importance[0][:, None])
        np.testing.assert_array_equal(search_scales(w, gram, spec, MATMUL).scale, wanted.scale)


def test_scales_are_those_that_will_be_stored():
    found = search_scales(
        weights(32, 8), gram_of(correlated(80, 32)), FREE[0], MATMUL, scale_dtype=np.dtype(np.float16)
    )
    np.testing.assert_array_equal(found.scale.astype(np.float16).astype(np.float32), found.scale)


def test_grouped_convolutions_have_a_search_for_every_group():
    x = np.stack([correlated(90, 18, seed=s) for s in (0, 1)])
    w, spec = weights(8, 2, 3, 3), QuantSpec(format=INT4, axis=0)
    whole = search_scales(w, gram_of(x), spec, WeightLayout(out_axis=0, groups=2))
    parts = [
        search_scales(w[4 * g : 4 * g + 4], gram_of(x[g]), spec, WeightLayout(out_axis=0)) for g in (0, 1)
    ]
    np.testing.assert_allclose(whole.scale, np.concatenate([p.scale for p in parts]), rtol=1e-6)


def test_another_layers_matrix_is_refused():
    with pytest.raises(SpecError, match="fc2: a Gram matrix of 1 × 7"):
        search_scales(weights(8, 4), gram_of(correlated(9, 7)), FREE[0], MATMUL, name="fc2")

from dataclasses import replace

import numpy as np
import pytest

from quantkit.calibrators.layer import Layer
from quantkit.calibrators.weight_layout import WeightLayout
from quantkit.calibrators.weight_rounding import round_weight
from quantkit.errors import SpecError, UnknownNameError
from quantkit.formats import INT4, QuantSpec, dequantize
from tests.calibrators.layers import correlated, gram_of, output_loss, weights

X, W = correlated(300, 48), weights(48, 20)
SPEC = QuantSpec(format=INT4, axis=0, block_size=16)
LAYER = Layer(w=W, layout=WeightLayout(out_axis=1), spec=SPEC, gram=gram_of(X), name="fc")
ROUNDINGS = ("amax", "mse", "weighted", "output", "gptq")


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_its_error_is_that_of_the_data(rounding):
    found = round_weight(LAYER, rounding)
    assert found.output_error == pytest.approx(output_loss(X, W, dequantize(found.qtensor)), rel=1e-6)
    assert found.bias is None


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_with_the_bias_only_what_varies_is_lost(rounding):
    found = round_weight(LAYER, rounding, correct_bias=True)
    lost = X.astype(np.float64) @ (W - dequantize(found.qtensor)) - found.bias
    np.testing.assert_allclose(lost.mean(axis=0), 0, atol=1e-6)
    assert found.output_error == pytest.approx(np.square(lost).sum() / len(X), rel=1e-6)


def test_what_looks_at_more_loses_less():
    errors = [round_weight(LAYER, rounding).output_error for rounding in ROUNDINGS[1:]]
    assert errors[0] > errors[2] > errors[3] and errors[1] > errors[2]
    corrected = [round_weight(LAYER, rounding, correct_bias=True).output_error for rounding in ROUNDINGS[1:]]
    assert all(with_bias < without for with_bias, without in zip(corrected, errors, strict=True))


def test_the_weight_alone_needs_no_gram_matrix():
    alone = replace(LAYER, gram=None)
    for rounding in ("amax", "mse"):
        assert round_weight(alone, rounding).output_error is None
    for rounding in ("weighted", "output", "gptq"):
        with pytest.raises(SpecError, match=f"fc: {rounding} needs its Gram matrix"):
            round_weight(alone, rounding)
    with pytest.raises(SpecError, match="fc: bias correction needs its Gram matrix"):
        round_weight(alone, "mse", correct_bias=True)


def test_an_unknown_rounding_is_named():
    with pytest.raises(UnknownNameError, match="rounding up: choose one of"):
        round_weight(LAYER, "up")

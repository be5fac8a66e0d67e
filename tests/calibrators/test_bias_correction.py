import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.calibrators.bias_correction import bias_correction
from quantkit.calibrators.weight_layout import WeightLayout
from quantkit.errors import SpecError
from tests.calibrators.layers import correlated, gram_of, weights


@given(st.integers(0, 10**6))
def test_the_mean_of_the_output_is_restored(seed):
    x, w = correlated(60, 10, seed=seed) + 1, weights(10, 4, seed=seed)
    rounded = np.round(w * 2) / 2
    found = bias_correction(w, rounded, gram_of(x).mean, WeightLayout(out_axis=1))
    before, after = x.astype(np.float64) @ w, x.astype(np.float64) @ rounded + found
    np.testing.assert_allclose(after.mean(axis=0), before.mean(axis=0), atol=1e-5)


def test_groups_of_a_convolution_have_means_of_their_own():
    x = np.stack([correlated(40, 18, seed=s) for s in (0, 1)])
    w = weights(6, 2, 3, 3)
    rounded = np.round(w)
    found = bias_correction(w, rounded, gram_of(x).mean, WeightLayout(out_axis=0, groups=2))
    for group in (0, 1):
        part = slice(3 * group, 3 * group + 3)
        lost = x[group].astype(np.float64) @ (w - rounded)[part].reshape(3, -1).T
        np.testing.assert_allclose(found[part], lost.mean(axis=0), atol=1e-5)


def test_means_of_channels_serve_a_kernel_without_padding():
    w = weights(6, 2, 3, 3)
    by_channel = np.array([0.5, -1, 2, 3.0])
    layout = WeightLayout(out_axis=0, groups=2)
    patches = np.repeat(by_channel.reshape(2, 2), 9, axis=1)
    np.testing.assert_allclose(
        bias_correction(w, np.round(w), by_channel, layout), bias_correction(w, np.round(w), patches, layout)
    )


def test_a_mean_of_another_layer_is_refused():
    with pytest.raises(SpecError, match="fc: a mean of shape"):
        bias_correction(weights(8, 4), weights(8, 4), np.ones((1, 7)), WeightLayout(out_axis=1), name="fc")
    with pytest.raises(SpecError, match="not finite"):
        bias_correction(weights(8, 4), weights(8, 4), np.full((1, 8), np.nan), WeightLayout(out_axis=1))

import numpy as np
import pytest

from quantkit.calibrators.layer import Layer
from quantkit.calibrators.smoothquant import best_smooth_scale, smooth_scale, smoothed_range
from quantkit.calibrators.weight_layout import WeightLayout
from quantkit.errors import SpecError
from quantkit.formats import INT8, UINT8, QuantSpec, fake_quantize, qparams_from_range, range_of
from quantkit.statistics import ChannelStats
from tests.calibrators.layers import correlated, gram_of, output_loss, weights

MATMUL = WeightLayout(out_axis=1)
W8, A8 = QuantSpec(format=INT8, axis=1), QuantSpec(format=INT8)


def stats_of(x):
    stats = ChannelStats(-1)
    stats.observe(x)
    return stats


def layers_of(x, *parts):
    return [Layer(w=w, layout=MATMUL, spec=W8, gram=gram_of(x), name="fc") for w in parts]


def literal_loss(x, parts, scale, activation=A8):
    """Divide, quantize both, multiply, compare."""
    smoothed = (x / scale).astype(np.float32)
    rounded = fake_quantize(
        smoothed, qparams_from_range(range_of(smoothed, activation), activation), activation
    )
    lost = 0.0
    for w in parts:
        scaled = (w * scale[:, None]).astype(np.float32)
        q = fake_quantize(scaled, qparams_from_range(range_of(scaled, W8), W8), W8)
        lost += float(np.square(x.astype(np.float64) @ w - rounded.astype(np.float64) @ q).sum() / len(x))
    return lost


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_it_is_the_published_formula_over_all_layers_that_read_the_tensor(alpha):
    x, parts = correlated(50, 12), [weights(12, 4, seed=1), 3 * weights(12, 6, seed=2)]
    wide = np.abs(np.concatenate(parts, axis=1)).max(axis=1)
    wanted = np.abs(x).max(axis=0) ** alpha / wide ** (1 - alpha)
    np.testing.assert_allclose(smooth_scale(stats_of(x), layers_of(x, *parts), alpha), wanted, rtol=1e-5)


def test_smoothing_an_outlier_saves_the_others():
    x, w = correlated(200, 32, outliers=2), weights(32, 16)
    scale = smooth_scale(stats_of(x), layers_of(x, w), 0.5)
    assert literal_loss(x, [w], scale) < 0.2 * literal_loss(x, [w], np.ones(32))


@pytest.mark.parametrize("activation", [A8, QuantSpec(format=UINT8, symmetric=False)], ids=str)
@pytest.mark.parametrize("outliers", [0, 1, 4])
def test_auto_is_about_as_good_as_the_best_alpha(outliers, activation):
    x, parts = correlated(400, 32, outliers=outliers), [weights(32, 16, seed=s) for s in (1, 2)]
    layers = layers_of(x, *parts)
    scale, alpha = best_smooth_scale(stats_of(x), layers, activation)
    best = min(
        literal_loss(x, parts, smooth_scale(stats_of(x), layers, a), activation)
        for a in np.arange(0, 0.81, 0.05)
    )
    assert 0 <= alpha <= 0.8
    assert literal_loss(x, parts, scale, activation) < 1.25 * best


def test_the_range_after_smoothing_is_that_of_the_divided_channels():
    x = correlated(80, 12, outliers=1)
    scale = np.random.default_rng(0).uniform(0.1, 9, 12)
    found = smoothed_range(stats_of(x), scale)
    assert (found.lo, found.hi) == (pytest.approx((x / scale).min()), pytest.approx((x / scale).max()))


def test_channels_without_input_or_weight_stay():
    x, w = correlated(50, 8), weights(8, 4)
    x[:, 2], w[5] = 0, 0
    scale = smooth_scale(stats_of(x), layers_of(x, w))
    assert scale[2] == scale[5] == 1
    assert output_loss(x, w, w * scale[:, None] / scale[:, None]) < 1e-9


def test_tied_channels_have_one_scale():
    ties = [c % 4 for c in range(12)]
    scale = smooth_scale(
        stats_of(correlated(50, 12)), layers_of(correlated(50, 12), weights(12, 4)), ties=ties
    )
    np.testing.assert_array_equal(scale, scale[ties])


def test_what_cannot_be_smoothed_is_refused():
    x = correlated(20, 8)
    layers = layers_of(x, weights(8, 4))
    with pytest.raises(SpecError, match=r"alpha 1\.5; give a number from 0 to 1"):
        smooth_scale(stats_of(x), layers, 1.5)
    with pytest.raises(SpecError, match="never seen"):
        smooth_scale(ChannelStats(-1), layers)
    blind = [Layer(w=weights(8, 4), layout=MATMUL, spec=W8, name="fc")]
    with pytest.raises(SpecError, match="needs its Gram matrix"):
        best_smooth_scale(stats_of(x), blind, A8)

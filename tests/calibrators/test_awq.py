from dataclasses import replace

import numpy as np
import pytest

from quantkit.calibrators import weight_qparams
from quantkit.calibrators.awq import awq_scale
from quantkit.calibrators.layer import Layer
from quantkit.calibrators.weight_layout import WeightLayout
from quantkit.errors import SpecError
from quantkit.formats import E8M0, FP4_E2M1, FP8_E4M3, INT4, UINT4, QuantSpec, fake_quantize
from tests.calibrators.layers import correlated, gram_of, output_loss, weights

MATMUL = WeightLayout(out_axis=1)
INT4_BLOCKS = QuantSpec(format=INT4, axis=0, block_size=16)


def layer(x, w, spec=INT4_BLOCKS, layout=MATMUL):
    return Layer(w=w, layout=layout, spec=spec, gram=gram_of(x), name="fc")


def literal_error(x, w, scale):
    """Scale, round every block with the best of four clips by weighted error, scale back, run the data."""
    s = scale[:, None]
    scaled, importance = w * s, np.square(x, dtype=np.float64).mean(axis=0)[:, None] / s**2
    rounded = np.empty_like(scaled)
    for start in range(0, len(w), 16):
        block = slice(start, start + 16)
        for n in range(w.shape[1]):
            part, h = scaled[block, n], importance[block, 0]
            tries = []
            for clip in (1.0, 0.92, 0.84, 0.76):
                step = np.abs(part).max() / 7 * clip
                tries.append(np.clip(np.rint(part / step), -8, 7) * step)
            rounded[block, n] = min(tries, key=lambda t: float((h * (t - part) ** 2).sum()))
    return output_loss(x, w, rounded / s)


@pytest.mark.parametrize("outliers", [0, 3])
def test_the_error_is_that_of_the_data_itself(outliers):
    x, w = correlated(150, 40, outliers=outliers), weights(40, 12)
    found = awq_scale([layer(x, w)], 40)
    assert found.error_unscaled == pytest.approx(literal_error(x, w, np.ones(40)), rel=1e-3)
    assert found.error == pytest.approx(literal_error(x, w, found.scale), rel=1e-3)


def test_every_ratio_that_is_tried_is_worse_or_equal():
    x, w = correlated(150, 40, outliers=3), weights(40, 12)
    found = awq_scale([layer(x, w)], 40)
    magnitude = np.sqrt(np.square(x, dtype=np.float64).mean(axis=0))
    for ratio in (0.25, 0.5, 0.75, 1.0):
        assert found.error <= literal_error(x, w, magnitude**ratio) * (1 + 1e-3)


def test_outlier_channels_get_larger_weights_and_less_error():
    x, w = correlated(300, 48, outliers=3), weights(48, 32)
    found = awq_scale([layer(x, w)], 48)
    large = np.square(x).mean(axis=0) > 50
    assert found.scale[large].min() > 2 * np.median(found.scale[~large])
    assert found.error < 0.5 * found.error_unscaled
    assert found.scale.max() * found.scale.min() == pytest.approx(1)


def test_no_scale_found_by_chance_is_much_better():
    x, w = correlated(200, 32, outliers=2), weights(32, 8)
    found = awq_scale([layer(x, w)], 32)
    rng, best = np.random.default_rng(0), found.error
    scale = found.scale
    for _ in range(300):
        tried = scale * np.exp(rng.normal(0, 0.3, 32))
        error = literal_error(x, w, tried)
        if error < best:
            best, scale = error, tried
    # What 32 numbers can do beyond two, by random ascent.
    assert best > 0.5 * found.error


def test_layers_that_share_an_input_share_a_scale():
    x = correlated(200, 32, outliers=2)
    parts = [weights(32, 8, seed=s) for s in (1, 2)]
    together = awq_scale([layer(x, w) for w in parts], 32)
    joined = awq_scale([layer(x, np.concatenate(parts, axis=1))], 32)
    np.testing.assert_allclose(together.scale, joined.scale, rtol=1e-6)
    assert together.error == pytest.approx(joined.error, rel=1e-5)


def test_tied_channels_have_one_scale():
    ties = [c % 8 for c in range(32)]
    found = awq_scale([layer(correlated(100, 32, outliers=3), weights(32, 6))], 32, ties=ties)
    np.testing.assert_array_equal(found.scale, found.scale[ties])


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(format=INT4, axis=1),
        QuantSpec(format=UINT4, axis=0, block_size=16, symmetric=False),
        QuantSpec(format=FP8_E4M3, axis=1),
        QuantSpec(format=FP4_E2M1, axis=0, block_size=16, scale_format=FP8_E4M3),
        QuantSpec(format=FP4_E2M1, axis=0, block_size=32, scale_format=E8M0),
        QuantSpec(format=FP8_E4M3, block_shape=(16, 16)),
    ],
    ids=str,
)
def test_any_format_is_scaled(spec):
    x, w = correlated(200, 40, outliers=2), weights(40, 16)
    found = awq_scale([layer(x, w, spec)], 40)
    assert found.error <= found.error_unscaled
    scaled = (w * found.scale[:, None]).astype(np.float32)
    importance = (gram_of(x).importance[0] / found.scale**2)[:, None]
    rounded = fake_quantize(scaled, weight_qparams(scaled, spec, importance=importance), spec)
    assert output_loss(x, w, rounded / found.scale[:, None]) <= 1.25 * found.error


def test_a_convolutions_channels_are_scaled_with_all_their_kernel():
    x = np.stack([correlated(100, 72, seed=s) for s in (0, 1)])
    x[0, :, 9:18] *= 40
    w = weights(8, 8, 3, 3)
    found = awq_scale([layer(x, w, QuantSpec(format=INT4, axis=0), WeightLayout(out_axis=0, groups=2))], 16)
    assert found.scale.shape == (16,) and found.error < 0.7 * found.error_unscaled
    assert found.scale[1] > 2 * np.delete(found.scale, 1).max()


def test_dead_channels_do_no_harm():
    x, w = correlated(100, 32, outliers=2), weights(32, 8)
    x[:, 5] = 0
    w[7] = 0
    found = awq_scale([layer(x, w)], 32)
    assert np.isfinite(found.scale).all() and (found.scale > 0).all()


def test_without_a_gram_matrix_it_says_what_to_do():
    with pytest.raises(SpecError, match="fc: AWQ needs its Gram matrix"):
        awq_scale([replace(layer(correlated(9, 8), weights(8, 2)), gram=None)], 8)

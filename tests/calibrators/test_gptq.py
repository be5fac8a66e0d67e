import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.calibrators import weight_qparams
from quantkit.calibrators.gptq import GptqOptions, gptq
from quantkit.calibrators.weight_layout import WeightLayout
from quantkit.errors import SpecError
from quantkit.formats import (
    E8M0,
    FP4_E2M1,
    FP8_E4M3,
    INT2,
    INT3,
    INT4,
    INT8,
    UINT4,
    QParams,
    QuantSpec,
    dequantize,
    fake_quantize,
    quantize,
    scale_shape,
)
from tests.calibrators.layers import correlated, gram_of, output_loss, weights

MATMUL = WeightLayout(out_axis=1)
BLOCKS = {"axis": 0, "block_size": 16}
SPECS = [
    QuantSpec(format=INT4, **BLOCKS),
    QuantSpec(format=UINT4, symmetric=False, **BLOCKS),
    QuantSpec(format=INT3, **BLOCKS),
    QuantSpec(format=INT2, **BLOCKS),
    QuantSpec(format=INT4, axis=1),
    QuantSpec(format=INT8),
    QuantSpec(format=FP4_E2M1, scale_format=FP8_E4M3, **BLOCKS),
    QuantSpec(format=FP4_E2M1, scale_format=E8M0, **BLOCKS),
    QuantSpec(format=FP8_E4M3, block_shape=(16, 16)),
]
PUBLISHED = GptqOptions(sweeps=0)


def literal_gptq(w, h, step, zero, fmt, *, damping, act_order):
    """Optimal brain quantization with one order for all columns, as the paper derives it; float64, w (K, N)."""
    w, h = w.astype(np.float64), h.astype(np.float64).copy()
    h[np.diag_indices(len(h))] *= 1 + damping
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(len(h))
    inverse, rounded = np.linalg.inv(h), np.empty_like(w)
    for i in order:
        codes = np.clip(np.rint(w[i] / step[i]) + zero[i], fmt.min, fmt.max)
        rounded[i] = (codes - zero[i]) * step[i]
        w -= np.outer(inverse[:, i], (w[i] - rounded[i]) / inverse[i, i])
        w[i] = rounded[i]
        left = inverse[:, i].copy()
        inverse -= np.outer(left, left) / left[i]
    return rounded


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block", [1, 5, 128])
@pytest.mark.parametrize("spec", SPECS[:4], ids=str)
def test_it_is_the_published_algorithm(spec, block, act_order):
    x, w = correlated(200, 24), weights(24, 6)
    gram = gram_of(x)
    qparams = weight_qparams(w, spec)
    options = GptqOptions(damping=0.02, act_order=act_order, block=block, sweeps=0)
    found = gptq(w, gram, spec, MATMUL, options=options, qparams=qparams)
    step, zero = (
        np.repeat(a.astype(np.float64), 16, axis=0)[:24] for a in (qparams.scale, qparams.zero_point)
    )
    wanted = literal_gptq(
        w, gram.second_moment[0], step, zero, spec.format, damping=0.02, act_order=act_order
    )
    np.testing.assert_allclose(dequantize(found), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sweeps", [0, 4])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_format_loses_less_than_rounding_to_nearest(spec, sweeps):
    x, w = correlated(400, 48), weights(48, 32)
    found = gptq(w, gram_of(x), spec, MATMUL, options=GptqOptions(sweeps=sweeps))
    nearest = fake_quantize(w, weight_qparams(w, spec), spec)
    assert output_loss(x, w, dequantize(found)) < 0.75 * output_loss(x, w, nearest)
    assert found.qparams.scale.shape == scale_shape(w.shape, spec)


@given(st.integers(0, 10**6))
def test_sweeps_never_lose(seed):
    x, w = correlated(60, 20, seed=seed), weights(20, 5, seed=seed)
    losses = [
        output_loss(x, w, dequantize(gptq(w, gram_of(x), SPECS[3], MATMUL, options=GptqOptions(sweeps=n))))
        for n in (0, 1, 3)
    ]
    assert losses[0] * (1 + 1e-5) >= losses[1] and losses[1] * (1 + 1e-5) >= losses[2]


@given(st.integers(0, 10**6))
def test_in_the_end_no_single_code_could_be_better(seed):
    x, w = correlated(60, 8, seed=seed), weights(8, 3, seed=seed)
    spec = QuantSpec(format=INT2, axis=0, block_size=4)
    found = gptq(w, gram_of(x), spec, MATMUL, options=GptqOptions(sweeps=30))
    values = dequantize(found)
    least = output_loss(x, w, values)
    step = np.repeat(found.qparams.scale, 4, axis=0)
    for k, n in np.ndindex(w.shape):
        for code in range(-2, 2):
            other = values.copy()
            other[k, n] = code * step[k, n]
            assert output_loss(x, w, other) >= least * (1 - 1e-5) - 1e-9


def test_an_exhaustive_search_finds_little_better():
    x, w = correlated(100, 6), weights(6, 1)
    spec = QuantSpec(format=INT2, axis=1)
    qparams = weight_qparams(w, spec)
    found = gptq(w, gram_of(x), spec, MATMUL, qparams=qparams, options=PUBLISHED)
    codes = np.stack(np.meshgrid(*[np.arange(-2, 2)] * 6, indexing="ij"), axis=-1).reshape(-1, 6)
    lost = x @ (w - codes.T * qparams.scale)
    best = np.square(lost, dtype=np.float64).sum(axis=0).min() / len(x)
    nearest = output_loss(x, w, fake_quantize(w, qparams, spec))
    loss = output_loss(x, w, dequantize(found))
    assert best * (1 - 1e-6) <= loss < best + 0.25 * (nearest - best)


@pytest.mark.parametrize("out_axis", [0, 1])
def test_a_transposed_weight_gives_transposed_codes(out_axis):
    x, w = correlated(100, 20), weights(20, 6)
    straight = gptq(w, gram_of(x), QuantSpec(format=INT4, **BLOCKS), MATMUL)
    turned = gptq(
        np.ascontiguousarray(w.T),
        gram_of(x),
        QuantSpec(format=INT4, axis=1, block_size=16),
        WeightLayout(out_axis=0),
    )
    np.testing.assert_array_equal(turned.qvalue.T.astype(np.int8), straight.qvalue.astype(np.int8))
    np.testing.assert_array_equal(turned.qparams.scale.T, straight.qparams.scale)


def test_the_groups_of_a_convolution_are_layers_of_their_own():
    x = np.stack([correlated(80, 18, seed=s) for s in (0, 1)])
    w = weights(8, 2, 3, 3)
    spec = QuantSpec(format=INT4, axis=0)
    whole = gptq(w, gram_of(x), spec, WeightLayout(out_axis=0, groups=2))
    for group in (0, 1):
        part = slice(4 * group, 4 * group + 4)
        alone = gptq(w[part], gram_of(x[group]), spec, WeightLayout(out_axis=0))
        np.testing.assert_array_equal(whole.qvalue[part].astype(int), alone.qvalue.astype(int))


def test_inputs_that_are_always_zero_get_zero_weights_and_widen_no_scale():
    x, w = correlated(100, 16), weights(16, 4)
    x[:, 3], w[3] = 0, 1000
    found = gptq(w, gram_of(x), QuantSpec(format=INT4, **BLOCKS), MATMUL)
    assert np.all(found.qvalue[3].astype(int) == 0)
    assert found.qparams.scale.max() < 2


def test_how_large_an_input_is_changes_nothing():
    x, w, spec = correlated(400, 32), weights(32, 16), QuantSpec(format=INT4, axis=0, block_size=1)
    factors = 2.0 ** np.random.default_rng(4).integers(-6, 7, (32, 1)).astype(np.float32)
    step, zero = np.full(w.shape, 0.4, np.float32), np.zeros(w.shape, INT4.dtype)
    options = GptqOptions(sweeps=0, act_order=False)
    plain = gptq(w, gram_of(x), spec, MATMUL, options=options, qparams=QParams(step, zero))
    scaled = gptq(
        w * factors,
        gram_of(x / factors[:, 0]),
        spec,
        MATMUL,
        options=options,
        qparams=QParams(step * factors, zero),
    )
    np.testing.assert_array_equal(plain.qvalue.astype(int), scaled.qvalue.astype(int))


def test_centred_errors_are_those_beside_their_mean():
    x = correlated(300, 24) + np.float32(3)
    w, spec = weights(24, 8), QuantSpec(format=INT4, axis=1)
    spreads = [
        np.var(x @ (w - dequantize(gptq(w, gram_of(x), spec, MATMUL, centred=c))), axis=0).sum()
        for c in (True, False)
    ]
    assert spreads[0] < spreads[1]


def test_equal_input_gives_equal_bytes():
    x, w = correlated(100, 40), weights(40, 12)
    first, second = (gptq(w, gram_of(x), SPECS[0], MATMUL, signed_scales=True) for _ in range(2))
    assert first.qvalue.tobytes() == second.qvalue.tobytes()
    assert first.qparams.scale.tobytes() == second.qparams.scale.tobytes()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_are_those_of_the_returned_values(spec):
    w = weights(32, 16)
    found = gptq(w, gram_of(correlated(90, 32)), spec, MATMUL, scale_dtype=np.dtype(np.float16))
    again = quantize(dequantize(found), found.qparams, spec)
    np.testing.assert_array_equal(again.qvalue.astype(np.float32), found.qvalue.astype(np.float32))
    if spec.scale_format is None:
        stored = found.qparams.scale.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(stored, found.qparams.scale)


def test_what_does_not_belong_is_refused():
    x, w = correlated(10, 8), weights(8, 4)
    with pytest.raises(SpecError, match="fc: a Gram matrix of 1 × 8 for a weight of shape"):
        gptq(weights(6, 4), gram_of(x), SPECS[0], MATMUL, name="fc")
    with pytest.raises(SpecError, match="seen no input"):
        gptq(w, gram_of(x[:0]), SPECS[0], MATMUL)
    x[0, 0] = np.nan
    with pytest.raises(SpecError, match="NaN or infinity among its inputs"):
        gptq(w, gram_of(x), SPECS[0], MATMUL)
    with pytest.raises(SpecError, match="give damping > 0"):
        GptqOptions(damping=0)

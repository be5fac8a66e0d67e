import math
from dataclasses import asdict

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.special import log_softmax, rel_entr, softmax

from quantkit.errors import DataError
from quantkit.metrics.outputs import OutputComparison, SignalToNoise

RNG = np.random.default_rng(0)
INF, NAN = np.inf, np.nan

values = st.floats(-1e3, 1e3, width=32)
tensors = arrays(np.float32, array_shapes(max_dims=3, max_side=6), elements=values)


def signal(*pairs):
    made = SignalToNoise()
    for reference, quantized in pairs:
        made.update(np.asarray(reference), np.asarray(quantized))
    return made


def compare(reference, quantized, labels=None):
    made = OutputComparison("logits")
    made.update(np.asarray(reference), np.asarray(quantized), None if labels is None else np.asarray(labels))
    return made.result()


# --- SQNR and cosine ---


def test_sqnr_is_the_ratio_of_energies_in_decibels():
    # Σ ref² = 25, Σ (q − ref)² = 0.25
    assert signal(([3.0, 4.0], [3.0, 4.5])).sqnr_db == pytest.approx(20)


def test_sqnr_is_over_everything_and_not_a_mean_of_batches():
    quiet = (np.full(4, 0.01), np.full(4, 0.02))
    loud = (np.full(4, 100.0), np.full(4, 101.0))
    expected = 10 * math.log10((4 * 0.01**2 + 4 * 100**2) / (4 * 0.01**2 + 4))
    assert signal(quiet, loud).sqnr_db == pytest.approx(expected)


@given(tensors)
def test_an_identical_output_has_no_noise(x):
    assert signal((x, x.copy())).sqnr_db == INF
    assert signal((x, x.copy())).cosine == pytest.approx(1)


@given(tensors, st.integers(-20, -1))
def test_sqnr_follows_from_the_relative_error_alone(x, exponent):
    made = signal((x.astype(np.float64), x.astype(np.float64) * (1 + 2.0**exponent)))
    expected = -20 * exponent * math.log10(2) if np.any(x) else INF
    assert made.sqnr_db == pytest.approx(expected, abs=1e-6)


@given(tensors, st.data())
def test_batches_give_what_the_whole_gives(x, data):
    noisy = x + data.draw(arrays(np.float32, x.shape, elements=st.floats(-1, 1, width=32)))
    cut = data.draw(st.integers(0, x.shape[0]))
    whole, parts = signal((x, noisy)), signal((x[:cut], noisy[:cut]), (x[cut:], noisy[cut:]))
    assert parts.sqnr_db == pytest.approx(whole.sqnr_db)
    assert parts.cosine == pytest.approx(whole.cosine)
    assert parts.count == whole.count


@given(tensors, st.data())
def test_cosine_is_that_of_numpy(x, data):
    y = data.draw(arrays(np.float32, x.shape, elements=values))
    a, b = x.astype(np.float64).ravel(), y.astype(np.float64).ravel()
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    if norm:
        assert signal((x, y)).cosine == pytest.approx(a @ b / norm, abs=1e-9)
    assert -1 <= signal((x, y)).cosine <= 1


def test_a_small_noise_is_not_lost_in_the_rounding_of_large_sums():
    reference = np.full(1000, 1e6)
    assert signal((reference, reference + 1e-3)).sqnr_db == pytest.approx(180, abs=1e-3)


def test_sums_do_not_stall_at_float32():
    tiny = np.full(1, 1e-4, np.float32)
    made = signal((np.full(1, 1e4, np.float32), np.full(1, 1e4, np.float32)), *[(tiny, 2 * tiny)] * 5000)
    assert made.sqnr_db == pytest.approx(10 * math.log10(1e8 / (5000 * 1e-8)), abs=1e-3)


def test_what_is_longer_than_a_chunk_is_read_to_its_end():
    reference = np.ones(300_000, np.float32)
    quantized = reference.copy()
    quantized[-1] = 2
    assert signal((reference, quantized)).sqnr_db == pytest.approx(10 * math.log10(300_000))


def test_noise_without_signal_is_minus_infinity():
    made = signal((np.zeros(3), np.ones(3)))
    assert made.sqnr_db == -INF
    assert made.cosine == 0


def test_nothing_seen_has_no_sqnr():
    made = signal((np.zeros((0, 3)), np.zeros((0, 3))))
    assert made.sqnr_db is None
    assert made.cosine is None


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int64, np.uint8, bool]
)
def test_every_element_type_is_compared(dtype):
    reference = np.array([1, 0, 1, 1]).astype(dtype)
    assert signal((reference, np.array([1, 0, 1, 0]).astype(dtype))).sqnr_db == pytest.approx(
        10 * math.log10(3)
    )


def test_unsigned_integers_do_not_wrap():
    assert signal((np.array([3], np.uint8), np.array([1], np.uint8))).sqnr_db == pytest.approx(
        10 * math.log10(9 / 4)
    )


def test_a_scalar_output_is_compared():
    assert signal((np.array(2.0), np.array(3.0))).sqnr_db == pytest.approx(10 * math.log10(4))


def test_different_shapes_are_refused():
    with pytest.raises(DataError, match=r"\(2, 3\).*\(3, 2\)"):
        signal((np.zeros((2, 3)), np.zeros((3, 2))))


# --- what is not finite ---


@pytest.mark.parametrize("same", [INF, -INF, NAN])
def test_what_is_not_finite_in_both_spoils_nothing(same):
    made = signal(([3.0, 4.0, same], [3.0, 4.5, same]))
    assert made.sqnr_db == pytest.approx(20)
    assert made.cosine == pytest.approx(signal(([3.0, 4.0], [3.0, 4.5])).cosine)
    assert made.broken_count == 0


def test_a_saturated_infinity_is_left_out():
    made = signal(([3.0, 4.0, -INF], [3.0, 4.5, -448.0]))
    assert made.sqnr_db == pytest.approx(20)
    assert made.broken_count == 0


@pytest.mark.parametrize(
    ("good", "bad"), [(1.0, NAN), (1.0, INF), (1.0, -INF), (INF, -INF), (INF, NAN), (NAN, INF)]
)
def test_what_only_the_quantized_model_lost_is_counted_and_is_infinite_noise(good, bad):
    made = signal(([3.0, good, good], [3.0, bad, bad]), ([1.0], [1.0]))
    assert made.broken_count == 2
    assert made.sqnr_db == -INF
    assert math.isnan(made.cosine)


def test_masked_logits_leave_every_measure_finite():
    reference = RNG.normal(size=(4, 5, 8))
    reference[..., 6:] = -INF
    quantized = reference + 0.01 * RNG.normal(size=reference.shape)
    found = compare(reference, quantized, np.zeros((4, 5), np.int64))
    measures = (
        found.sqnr_db,
        found.cosine,
        found.kl_mnat,
        found.perplexity_float,
        found.perplexity_quantized,
    )
    assert all(math.isfinite(m) for m in measures)
    without = compare(reference[..., :6], quantized[..., :6], np.zeros((4, 5), np.int64))
    assert asdict(found) == pytest.approx(asdict(without), rel=1e-9)


def test_a_row_of_nan_disagrees_is_wrong_and_is_infinitely_far():
    reference = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    quantized = np.array([[NAN, NAN, NAN], [3.0, 2.0, 1.0]])
    # NaN's argmax is 0: the first row would be called right were it not looked at.
    found = compare(reference, quantized, [0, 0])
    assert (found.top1_agreement, found.kl_mnat, found.accuracy_quantized) == (0.5, INF, 0.5)
    assert found.broken_count == 3


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_row_without_a_distribution_in_float_is_not_compared(bad):
    undefined = np.full((1, 3), bad)
    reference = np.concatenate([[[1.0, 2.0, 3.0]], undefined])
    found = compare(reference, np.concatenate([[[1.0, 2.0, 3.0]], undefined]))
    assert (found.top1_agreement, found.kl_mnat) == (1, 0)


# --- classes ---


@given(arrays(np.float32, (5, 4), elements=values), arrays(np.float32, (5, 4), elements=values))
def test_kl_is_that_of_scipy(reference, quantized):
    p, q = softmax(reference.astype(np.float64), axis=1), log_softmax(quantized.astype(np.float64), axis=1)
    expected = (
        np.where(p > 0, p * (log_softmax(reference.astype(np.float64), axis=1) - q), 0).sum(axis=1).mean()
    )
    assert compare(reference, quantized).kl_mnat == pytest.approx(1000 * expected, rel=1e-9, abs=1e-9)


def test_kl_is_from_float_to_quantized_and_not_the_other_way():
    p, q = np.array([[0.9, 0.1]]), np.array([[0.5, 0.5]])
    assert compare(np.log(p), np.log(q)).kl_mnat == pytest.approx(1000 * rel_entr(p, q).sum())
    assert compare(np.log(q), np.log(p)).kl_mnat == pytest.approx(1000 * rel_entr(q, p).sum())


@given(arrays(np.float32, (3, 6), elements=values), st.floats(-1e4, 1e4))
def test_kl_does_not_see_a_shift_of_all_logits(logits, shift):
    shifted = logits.astype(np.float64) + shift
    assert compare(logits, shifted).kl_mnat == pytest.approx(0, abs=1e-6)


@given(arrays(np.float32, (3, 6), elements=values), arrays(np.float32, (3, 6), elements=values))
def test_kl_is_never_negative(reference, quantized):
    assert compare(reference, quantized).kl_mnat >= 0
    assert compare(reference, reference).kl_mnat == 0


def test_huge_logits_do_not_overflow():
    found = compare([[1e30, 0.0]], [[0.0, 1e30]], [0])
    assert found.kl_mnat == pytest.approx(1e33)


def test_top1_agreement_is_the_fraction_of_rows_with_the_same_largest():
    reference = np.eye(4)
    quantized = np.eye(4)[[0, 1, 2, 0]]
    assert compare(reference, quantized).top1_agreement == 0.75


def test_accuracy_is_against_the_labels_for_both_models():
    found = compare(np.eye(4), np.eye(4)[[0, 0, 0, 0]], [0, 1, 2, 0])
    assert (found.accuracy_float, found.accuracy_quantized) == (0.75, 0.5)


def test_a_classifier_has_no_perplexity():
    assert compare(np.eye(4), np.eye(4), [0, 1, 2, 0]).perplexity_float is None


@given(arrays(np.float32, (2, 3, 5), elements=values), arrays(np.int64, (2, 3), elements=st.integers(0, 4)))
def test_perplexity_is_exp_of_the_mean_cross_entropy_of_tokens(logits, tokens):
    chosen = np.take_along_axis(log_softmax(logits.astype(np.float64), axis=-1), tokens[..., None], axis=-1)
    nats = -chosen.mean()
    found = compare(logits, logits, tokens)
    assert found.perplexity_float == pytest.approx(math.exp(nats) if nats < 709 else INF, rel=1e-9)
    assert found.perplexity_quantized == found.perplexity_float


def test_equal_logits_have_the_perplexity_of_the_vocabulary():
    found = compare(np.zeros((1, 2, 65)), np.zeros((1, 2, 65)), np.zeros((1, 2), np.int32))
    assert found.perplexity_float == pytest.approx(65)


def test_labels_of_minus_100_are_ignored():
    logits = RNG.normal(size=(2, 4, 7))
    labels = RNG.integers(0, 7, (2, 4))
    padded = labels.copy()
    padded[:, 2:] = -100
    # Agreement and KL keep all rows: they need no labels.
    some, cut = compare(logits, logits, padded), compare(logits[:, :2], logits[:, :2], labels[:, :2])
    assert (some.accuracy_float, some.perplexity_float) == (cut.accuracy_float, cut.perplexity_float)


def test_labels_that_are_all_ignored_give_no_accuracy():
    found = compare(np.eye(3), np.eye(3), [-100, -100, -100])
    assert (found.accuracy_float, found.accuracy_quantized) == (None, None)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (np.zeros((3, 1), int), r"\(3, 1\)"),
        (np.zeros(4, int), r"\(4,\)"),
        (np.zeros(3), "float64"),
        ([0, 3, 1], "3"),
        ([0, -1, -100], "labels of logits: 1 labels are negative, the first -1; .* -100 where there is none"),
    ],
)
def test_labels_that_do_not_fit_are_refused_with_what_is_wanted(labels, found):
    with pytest.raises(DataError, match=found):
        compare(np.eye(3), np.eye(3), labels)


def test_refused_labels_leave_the_sums_as_they_were():
    made = OutputComparison("logits")
    made.update(np.eye(3), np.eye(3), np.array([0, 1, 2]))
    before = made.result()
    with pytest.raises(DataError):
        made.update(np.eye(3), -np.eye(3), np.array([0, 1, 5]))
    assert made.result() == before


@pytest.mark.parametrize("shape", [(6,), (), (2, 3, 4, 5), (7, 1)])
def test_an_output_that_is_not_of_classes_has_no_agreement(shape):
    found = compare(np.ones(shape), np.ones(shape))
    assert (found.top1_agreement, found.kl_mnat, found.sqnr_db) == (None, None, INF)


def test_an_output_of_integers_has_no_agreement():
    assert compare(np.ones((3, 4), int), np.ones((3, 4), int)).kl_mnat is None


def test_labels_make_classes_of_the_last_axis_at_any_rank():
    labels = np.zeros((2, 3, 4), int)
    assert compare(np.ones((2, 3, 4, 5)), np.ones((2, 3, 4, 5)), labels).accuracy_float == 1


@given(st.integers(1, 30), st.randoms(use_true_random=False))
def test_all_measures_are_those_of_the_whole_however_it_is_cut(cut, random):
    rng = np.random.default_rng(random.randrange(1000))
    reference = rng.normal(size=(30, 5)).astype(np.float32)
    quantized = reference + rng.normal(size=(30, 5)).astype(np.float32)
    labels = np.where(rng.random(30) < 0.2, -100, rng.integers(0, 5, 30))
    parts = OutputComparison("logits")
    for part in (slice(None, cut), slice(cut, None)):
        parts.update(reference[part], quantized[part], labels[part])
    whole, found = compare(reference, quantized, labels), parts.result()
    assert found.top1_agreement == whole.top1_agreement
    assert (found.accuracy_float, found.accuracy_quantized) == (
        whole.accuracy_float,
        whole.accuracy_quantized,
    )
    assert found.kl_mnat == pytest.approx(whole.kl_mnat)


def test_rows_beyond_a_chunk_are_counted():
    logits = np.zeros((70_000, 3), np.float32)
    logits[:, 1] = 1
    quantized = logits.copy()
    quantized[-1, 2] = 2
    assert compare(logits, quantized).top1_agreement == pytest.approx(1 - 1 / 70_000, abs=1e-9)


def test_a_vocabulary_longer_than_a_chunk_is_read_row_by_row():
    logits = np.zeros((1, 2, 200_000), np.float32)
    logits[..., -1] = 1
    assert compare(logits, logits).top1_agreement == 1


def test_half_precision_logits_are_compared_in_double():
    reference = np.array([[1, 2, 3]], np.float16)
    assert compare(reference, reference.astype(np.float16)).kl_mnat == 0
    bfloat = reference.astype(ml_dtypes.bfloat16)
    assert compare(bfloat, bfloat).top1_agreement == 1

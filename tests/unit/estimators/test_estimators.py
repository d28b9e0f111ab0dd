"""Estimates from packed statistics against a direct transcription of the equations."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memtail.estimators import expected_standard_error, false_discovery, high_influence_pairs, influence, memorization, top_influencers
from memtail.estimators.binomial import difference_interval, difference_standard_error, share, standard_error
from memtail.estimators.memorization import from_counts
from memtail.statistics import Statistics, cooccurrence
from memtail.statistics import popcount_avx2 as lookup
from memtail.statistics.snapshot import Snapshot
from memtail.trials import Shard
from tests.support.batches import batch_of as batch
from tests.support.batches import random_bits


def direct_memorization(M, C):
    with np.errstate(invalid="ignore"):
        p_in = (M * C).sum(0) / M.sum(0)
        p_out = ((1 - M) * C).sum(0) / (1 - M).sum(0)
    return p_in, p_out


def direct_standard_error(correct_in, k_in, correct_out, k_out):
    """By Agresti and Caffo: a success and a failure more in each group; NaN if there is no estimate."""
    variance = 0
    for correct, k in ((correct_in, k_in), (correct_out, k_out)):
        p = (correct + 1) / (k + 2)
        variance = variance + p * (1 - p) / (k + 2)
    return np.where((k_in == 0) | (k_out == 0), np.nan, np.sqrt(variance))


shapes = {"t": st.integers(1, 150), "n": st.integers(1, 40), "q": st.integers(1, 40), "seed": st.integers(0, 10**6)}


@given(**shapes, shard=st.integers(1, 70))
@settings(max_examples=60, deadline=None)
def test_memorization_follows_the_papers_equation(t, n, q, seed, shard):
    M, C, T = random_bits(seed, t, n, q)
    statistics = Statistics(n, q)
    for first in range(0, t, shard):
        statistics.accumulate(batch(first, M[first : first + shard], C[first : first + shard], T[first : first + shard]))
    result = memorization(statistics)
    p_in, p_out = direct_memorization(M.astype(int), C.astype(int))
    k_in, k_out = M.sum(0), t - M.sum(0)
    error = direct_standard_error((M & C).sum(0), k_in, (~M & C).sum(0), k_out)
    np.testing.assert_allclose(result.value, p_in - p_out, atol=1e-12)
    np.testing.assert_allclose(result.standard_error, error, atol=1e-12)
    assert (result.k_in == k_in).all()
    assert (result.k_out == k_out).all()
    assert (np.isnan(result.value) == ((k_in == 0) | (k_out == 0))).all()
    assert result.undefined == int(((k_in == 0) | (k_out == 0)).sum())


@given(**shapes, on=st.sampled_from(["test", "train"]))
@settings(max_examples=60, deadline=None)
def test_influence_follows_the_papers_equation(t, n, q, seed, on):
    M, C, T = random_bits(seed, t, n, q)
    statistics = Statistics(n, q)
    statistics.accumulate(batch(0, M, C, T))
    result = influence(statistics.packed(), slice(None), slice(None), on)
    other = (T if on == "test" else C).astype(int)
    inside, outside = M.astype(int), 1 - M.astype(int)
    with np.errstate(invalid="ignore", divide="ignore"):
        p_in, p_out = inside.T @ other / inside.sum(0)[:, None], outside.T @ other / outside.sum(0)[:, None]
    error = direct_standard_error(inside.T @ other, inside.sum(0)[:, None], outside.T @ other, outside.sum(0)[:, None])
    np.testing.assert_allclose(result.value, p_in - p_out, atol=1e-12)
    np.testing.assert_allclose(result.standard_error, error, atol=1e-12)
    assert result.error is result.standard_error  # the name in 0.1.0


@given(t=st.integers(1, 200), a=st.integers(1, 150), b=st.integers(1, 150), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_cooccurrence_counts_the_trials_set_in_both(t, a, b, seed):
    rng = np.random.default_rng(seed)
    words = -(-t // 64)
    left = rng.integers(0, 2**64, (words, a), dtype=np.uint64)
    right = rng.integers(0, 2**64, (words, b), dtype=np.uint64)
    expected = np.bitwise_count(left[:, :, None] & right[:, None]).sum(0)
    assert (cooccurrence(left, right) == expected).all()


def test_packed_statistics_are_no_second_copy_of_the_bits():
    M, C, T = random_bits(3, 200, 30, 20)
    statistics = Statistics(30, 20)
    statistics.accumulate(batch(0, M, C, T))
    for name in ("membership", "train_correct", "test_correct"):
        assert np.shares_memory(getattr(statistics.packed(), name), getattr(statistics.packed(), name))


def test_statistics_do_not_depend_on_the_order_in_which_batches_arrive():
    M, C, T = random_bits(3, 200, 30, 20)
    bounds = [(0, 70), (70, 71), (71, 130), (130, 200)]
    packed = []
    for order in (bounds, bounds[::-1]):
        statistics = Statistics(30, 20)
        for first, last in order:
            statistics.accumulate(batch(first, M[first:last], C[first:last], T[first:last]))
        packed.append(statistics.packed())
    for name in ("membership", "train_correct", "test_correct", "counted"):
        assert (getattr(packed[0], name) == getattr(packed[1], name)).all()


def test_a_trial_is_counted_once_however_often_it_arrives():
    M, C, T = random_bits(4, 20, 30, 20)
    statistics = Statistics(30, 20)
    assert statistics.accumulate(batch(0, M, C, T)) == 20
    assert statistics.accumulate(batch(0, M, C, T)) == 0
    assert statistics.accumulate(batch(10, M[10:], C[10:], T[10:])) == 0
    assert statistics.trials == 20
    assert (statistics.k_in == M.sum(0)).all()


def test_diverged_and_missing_trials_do_not_count():
    M, C, T = random_bits(5, 10, 30, 20)
    C[4], T[4] = False, False
    statistics = Statistics(30, 20)
    statistics.accumulate(batch(100, M, C, T, diverged=(104,)))
    kept = np.arange(10) != 4
    p_in, p_out = direct_memorization(M[kept].astype(int), C[kept].astype(int))
    np.testing.assert_allclose(memorization(statistics).value, p_in - p_out, atol=1e-12)
    assert statistics.trials == statistics.packed().trials == 9
    assert statistics.diverged == 1
    assert (influence(statistics.packed(), slice(None), slice(None)).value.shape) == (30, 20)


def test_margins_are_summed_exactly_in_any_order():
    M, C, T = random_bits(6, 50, 8, 4)
    margins = np.random.default_rng(0).normal(scale=100, size=(50, 8)).astype(np.float16)
    forwards, backwards = Statistics(8, 4), Statistics(8, 4)
    for first in range(50):
        forwards.accumulate(batch(first, M[[first]], C[[first]], T[[first]], margins=margins[[first]]))
    for first in range(49, -1, -1):
        backwards.accumulate(batch(first, M[[first]], C[[first]], T[[first]], margins=margins[[first]]))
    assert (forwards.margin_in == backwards.margin_in).all()
    assert (forwards.margin_out == backwards.margin_out).all()
    np.testing.assert_allclose(forwards.margin_in / 2**24, (margins.astype(float) * M).sum(0), rtol=1e-12)


@given(t=st.integers(1, 60), n=st.integers(1, 20), classes=st.integers(1, 400), shard=st.integers(1, 30), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_held_out_misclassifications_are_counted_once_per_trial_in_any_order(t, n, classes, shard, seed):
    M, C, T = random_bits(seed, t, n, 3)
    rng = np.random.default_rng(seed)
    predicted = rng.integers(0, classes, (t, n)) // rng.integers(1, 9)
    diverged = tuple(np.flatnonzero(rng.random(t) < 0.1).tolist())
    C[list(diverged)] = False
    statistics = Statistics(n, 3)
    for first in [*rng.permutation(range(0, t, shard)).tolist(), 0]:
        some = slice(first, first + shard)
        statistics.accumulate(batch(first, M[some], C[some], T[some], diverged, predicted=predicted[some]))
    counted = ~np.isin(np.arange(t), diverged)
    most, times = statistics.held_out_misclassifications.most_frequent(n)
    for i in range(n):
        votes = np.bincount(predicted[counted & ~M[:, i] & ~C[:, i], i], minlength=classes)
        assert (most[i], times[i]) == ((votes.argmax(), votes.max()) if votes.any() else (-1, 0))
    statistics.accumulate(batch(t, M[:1], C[:1], T[:1]))
    assert statistics.held_out_misclassifications is None  # not recorded by all trials


def test_pairs_are_all_those_of_one_class_above_both_thresholds_by_falling_influence():
    rng = np.random.default_rng(7)
    M, C, T = random_bits(8, 40, 60, 50)
    train_labels, test_labels = rng.integers(0, 3, 60), rng.integers(0, 3, 50)
    statistics = Statistics(60, 50)
    statistics.accumulate(batch(0, M, C, T))
    mem, packed = memorization(statistics), statistics.packed()
    pairs = high_influence_pairs(packed, mem, train_labels, test_labels, 0.05, 0.1)
    everything = influence(packed, slice(None), slice(None)).value
    with np.errstate(invalid="ignore"):
        expected = (mem.value[:, None] >= 0.05) & (everything >= 0.1) & (train_labels[:, None] == test_labels)
    assert set(zip(pairs.train.tolist(), pairs.test.tolist(), strict=True)) == set(
        zip(*(x.tolist() for x in np.nonzero(expected)), strict=True)
    )
    assert len(pairs) > 10
    assert (np.diff(pairs.influence) <= 0).all()
    assert (pairs.influence == everything[pairs.train, pairs.test]).all()
    assert (pairs.mem == mem.value[pairs.train]).all()


def test_without_labels_pairs_are_those_of_any_examples():
    M, C, T = random_bits(8, 40, 60, 50)
    statistics = Statistics(60, 50)
    statistics.accumulate(batch(0, M, C, T))
    mem, packed = memorization(statistics), statistics.packed()
    none = np.zeros(60, np.int64), np.zeros(50, np.int64)
    pairs = high_influence_pairs(packed, mem, *none, 0.05, 0.1)
    with np.errstate(invalid="ignore"):
        expected = (mem.value[:, None] >= 0.05) & (influence(packed, slice(None), slice(None)).value >= 0.1)
    assert len(pairs) == expected.sum()
    assert expected[pairs.train, pairs.test].all()
    assert false_discovery(packed, mem.value, *none, pairs.train, pairs.test, 0.05).tested == (mem.value >= 0.05).sum() * 50


@pytest.mark.parametrize("device", [None, "cpu"])
def test_without_a_test_set_there_is_memorization_and_no_influence(tmp_path, device):
    M, C, T = random_bits(8, 70, 60, 0)
    statistics = Statistics(60, 0)
    statistics.accumulate(batch(0, M, C, T))
    Snapshot("f", statistics, {Shard(0, 69): "tag"}).write(tmp_path / "snapshot.npz")
    packed = Snapshot.read(tmp_path / "snapshot.npz", 60, 0).statistics.packed()
    mem = memorization(packed)
    np.testing.assert_array_equal(mem.value, memorization(statistics).value)
    assert packed.test_correct.shape == (2, 0)
    assert influence(packed, slice(None), slice(None)).value.shape == (60, 0)
    labels = np.arange(60) % 2, np.empty(0, np.int64)
    assert len(high_influence_pairs(packed, mem, *labels, device=device)) == 0
    assert top_influencers(packed, 3, device=device)[0].shape == (0, 3)
    assert false_discovery(packed, mem.value, *labels, labels[1], labels[1]).tested == 0


@given(k=st.integers(1, 12), seed=st.integers(0, 50), on=st.sampled_from(["test", "train"]))
@settings(max_examples=25, deadline=None)
def test_top_influencers_are_the_largest_of_every_column(k, seed, on):
    M, C, T = random_bits(seed, 30, 9, 7)
    statistics = Statistics(9, 7)
    statistics.accumulate(batch(0, M, C, T))
    everything = influence(statistics.packed(), slice(None), slice(None), on).value
    index, value = top_influencers(statistics.packed(), k, on)
    for column in range(everything.shape[1]):
        order = [i for i in np.argsort(-everything[:, column], kind="stable") if not np.isnan(everything[i, column])][:k]
        assert index[column].tolist() == order + [-1] * (k - len(order))
        np.testing.assert_array_equal(value[column], [everything[i, column] for i in order] + [np.nan] * (k - len(order)))


@given(count=st.integers(0, 60), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_the_standard_error_of_a_share_is_the_binomial_one_with_two_models_more_and_nan_without_models(count, seed):
    correct = np.random.default_rng(seed).integers(0, count + 1, (3, 4))
    p = share(correct, count)
    if count == 0:
        assert np.isnan(p).all()
        assert np.isnan(standard_error(p, count)).all()
    else:
        from scipy.stats import binom

        np.testing.assert_allclose(p, correct / count)
        more = binom(count + 2, (correct + 1) / (count + 2)).std() / (count + 2)
        np.testing.assert_allclose(standard_error(p, count), more, atol=1e-12)
        difference = difference_standard_error(p, count, p.T[:3, :3].mean(), 7)
        np.testing.assert_allclose(difference**2, standard_error(p, count) ** 2 + standard_error(p.T[:3, :3].mean(), 7) ** 2)
    assert standard_error(float(p[0, 0]), count) == pytest.approx(standard_error(p, count)[0, 0], nan_ok=True)


def test_standard_errors_are_above_0_where_all_models_agree():
    mem = from_counts(*(np.array(counts) for counts in ([45, 45, 45, 0], [19, 19, 19, 19], [45, 45, 0, 0], [19, 0, 0, 19])))
    assert mem.value.tolist()[:3] == [0, 1, 0]
    assert (mem.standard_error[:3] > 0.04).all()
    low, high = mem.interval
    assert np.isnan([mem.standard_error[3], low[3], high[3]]).all()
    assert high[1] == 1  # an interval ends at the largest difference
    assert low[1] == pytest.approx(0.8311, abs=1e-4)


def test_confidence_intervals_are_those_of_agresti_and_caffo():
    # no success among 10 and 10: 2 of 24 in each group, 0 +- 1.96 sqrt(2 (1/12) (11/12) / 12)
    low, high = difference_interval([0.0, 0.8], [10, 70], [0.0, 0.6], [10, 80])
    assert [low[0], high[0]] == pytest.approx([-0.2211, 0.2211], abs=1e-4)
    # 56 of 70 and 48 of 80: 57/72 - 49/82 = 0.1941, 1.96 sqrt(0.002290 + 0.002932) = 0.1416
    assert [low[1], high[1]] == pytest.approx([0.0525, 0.3357], abs=1e-4)


def test_confidence_intervals_equal_those_of_statsmodels():
    # 31 of 45 and 4 of 19, 640 of 700 and 150 of 300, 10 of 10 and 0 of 20; statsmodels 0.15 does not cut the last at 1:
    # confint_proportions_2indep(31, 45, 4, 19, method="agresti-caffo", compare="diff")
    low, high = difference_interval([31 / 45, 640 / 700, 1.0], [45, 700, 10], [4 / 19, 0.5, 0.0], [19, 300, 20])
    np.testing.assert_allclose([low, high], [[0.217048, 0.352987, 0.692243], [0.668464, 0.473224, 1.0]], atol=1e-6)


@given(k_in=st.integers(1, 60), k_out=st.integers(1, 60), seed=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_a_confidence_interval_contains_the_estimate(k_in, k_out, seed):
    rng = np.random.default_rng(seed)
    mem = from_counts(np.array([k_in]), np.array([k_out]), rng.integers(0, k_in + 1, 50), rng.integers(0, k_out + 1, 50))
    low, high = mem.interval
    assert (low >= -1).all()
    assert (low <= mem.value).all()
    assert (mem.value <= high).all()
    assert (high <= 1).all()


def test_expected_standard_error_equals_the_papers_worst_case():
    assert expected_standard_error(1000, 0.7) == pytest.approx(np.sqrt(1.19 / 1000), rel=1e-3)


@pytest.mark.skipif(not lookup.POSSIBLE, reason="this processor has no byte shuffle")
@given(words=st.integers(0, 20), a=st.integers(2, 300), b=st.integers(2, 140), seed=st.integers(0, 10**6))
@example(words=1100, a=3, b=5, seed=0)  # more trials than 16 bits can count
@settings(max_examples=40, deadline=None)
def test_both_kernels_count_pairs_equally(words, a, b, seed):
    rng = np.random.default_rng(seed)
    left, right = (rng.integers(0, 2**64, (words, count), dtype=np.uint64) for count in (a, b))
    left[:, 0], right[:, 0] = 2**64 - 1, 2**64 - 1  # the largest count
    expected = np.bitwise_count(left[:, :, None] & right[:, None, :]).sum(0, dtype=np.int32)
    result = []
    for faster in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lookup, "FASTER", faster)
            result.append(cooccurrence(left, right))
    assert (result[0] == expected).all()
    assert (result[1] == expected).all()

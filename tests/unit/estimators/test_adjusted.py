"""Adjusted influence against regression by plain numpy, and the pairs that it selects in trials with known effects."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from memtail.estimators import high_influence_pairs, memorization
from memtail.estimators.adjusted import BANDWIDTH, RATE, adjusted_influence, select_pairs
from memtail.statistics import Statistics
from memtail.statistics.soft import ONE, quantized
from tests.support.batches import batch_of

T, N, Q = 400, 40, 30
LABELS, TEST_LABELS = np.zeros(N, np.int64), np.zeros(Q, np.int64)


def trials_of(seed, t=T, effect=2.0, influencers=3):
    """Membership, correctness and scores: each test example depends on the first training examples, or on none without effect."""
    rng = np.random.default_rng(seed)
    M = rng.random((t, N)) < 0.7
    odds = rng.normal(0, 1, (t, Q)) + effect * (M[:, :influencers].sum(1, keepdims=True) - 0.7 * influencers)
    return M, odds > 0, quantized(1 / (1 + np.exp(-odds)))


def packed_of(M, X, scores, first=0, diverged=()):
    statistics = Statistics(M.shape[1], X.shape[1])
    batch = batch_of(first, M, M, X, diverged)
    if scores is not None:
        batch = replace(batch, train_score=np.zeros(M.shape, np.uint8), test_score=scores)
    statistics.accumulate(batch)
    return statistics.packed()


def regressed(M, c, i, j, others):
    """Influence of example i adjusted for the others, and its z, by plain least squares: i is left out of what is taken from c."""
    centred, c = M - M.mean(0), c[:, j] - c[:, j].mean()
    slopes = np.linalg.lstsq(centred[:, others], c, rcond=None)[0] if others else np.empty(0)
    slopes[[place for place, other in enumerate(others) if other == i]] = 0
    rest = c - centred[:, others] @ slopes
    difference = rest[M[:, i]].mean() - rest[~M[:, i]].mean()
    inside, outside = M[:, i].sum(), (~M[:, i]).sum()
    return difference, difference / np.sqrt(rest @ rest / (len(c) - 1 - len(others)) * (1 / inside + 1 / outside))


@pytest.mark.parametrize("scored", [True, False])
def test_values_equal_a_regression_with_plain_numpy(scored):
    M, X, S = trials_of(1)
    if scored:
        odds = scipy.special.logit(S.clip(0.5, ONE - 0.5) / ONE)
        c = np.rint(scipy.stats.norm.cdf(odds / (BANDWIDTH * odds.std(0))) * ONE) / ONE
    else:
        c = X.astype(float)
    train, test = np.array([0, 2, 3, 20]), np.arange(Q)
    value, z = adjusted_influence(packed_of(M, X, S if scored else None, 17, diverged=()), train, test, np.setdiff1d(np.arange(N), train))
    scale = np.sqrt(1 + BANDWIDTH**2) if scored else 1
    for place, j in ((0, 0), (1, 5), (1, 29), (2, 0), (3, 7)):
        i = train[place]
        effect = [abs(regressed(M, c, other, j, [])[1]) for other in range(N)]
        others = [other for other in np.argsort(-np.array(effect))[:12].tolist() if effect[other] >= 3]
        assert {0, 1, 2} <= set(others)
        expected = regressed(M, c, i, j, others)
        np.testing.assert_allclose([value[place, j], z[place, j]], [expected[0] * scale, expected[1]], rtol=1e-9, atol=1e-12)


def test_adjusting_reduces_the_noise_and_keeps_the_mean():
    values, plain = [], []
    for seed in range(60):
        M, X, S = trials_of(seed, t=150)
        packed = packed_of(M, X, S)
        values.append(adjusted_influence(packed, np.array([0]), np.arange(1), np.arange(1, N))[0][0, 0])
        plain.append(adjusted_influence(packed, np.array([0]), np.arange(1), np.empty(0, np.int64))[0][0, 0])
    assert np.mean(values) == pytest.approx(np.mean(plain), abs=0.05)
    assert np.std(values) < 0.7 * np.std(plain)


def test_pairs_with_an_effect_are_selected_and_few_others():
    M, X, S = trials_of(5)
    pairs = select_pairs(packed_of(M, X, S), np.ones(N), LABELS, TEST_LABELS)
    found = set(zip(pairs.train.tolist(), pairs.test.tolist(), strict=True))
    assert found == {(i, j) for i in range(3) for j in range(Q)}
    assert pairs.tested == N * Q
    assert (pairs.rate <= RATE).all()
    assert (np.diff(pairs.value) <= 0).all()
    for values in (pairs.value, pairs.z):  # so that libraries of linear algebra, which differ in the last bits, give equal files
        np.testing.assert_array_equal(values, np.round(values, 6))


def test_each_block_of_test_examples_is_a_sign_of_progress():
    M, X, S = trials_of(5, t=60)
    packed, signs = packed_of(M, np.tile(X, 20), np.tile(S, 20)), []
    select_pairs(packed, np.ones(N), LABELS, np.zeros(20 * Q, np.int64), progress=lambda: signs.append("sign"))
    assert len(signs) == 3  # of 600 test examples in blocks of 256


@pytest.mark.parametrize("scored", [True, False])
def test_without_influence_hardly_any_pair_is_selected(scored):
    """At most in RATE of the runs a pair is selected by chance, where all are without influence; fixed thresholds select many."""
    selected, by_thresholds = 0, 0
    for seed in range(30):
        M, X, S = trials_of(seed, t=60, effect=0)
        packed = packed_of(M, X, S if scored else None)
        selected += len(select_pairs(packed, np.ones(N), LABELS, TEST_LABELS)) > 0
        mem = replace(memorization(packed), value=np.ones(N))
        by_thresholds += len(high_influence_pairs(packed, mem, LABELS, TEST_LABELS))
    assert selected <= 8  # of 30, of which 3 are expected
    assert by_thresholds > 1000


def test_the_place_of_a_trial_and_diverged_trials_change_nothing():
    M, X, S = trials_of(2, t=100)
    whole = packed_of(np.vstack([M, ~M[:2]]), np.vstack([X, ~X[:2]]), np.vstack([S, 255 - S[:2]]), first=50, diverged=(150, 151))
    places = np.arange(0, N, 2), np.arange(Q), np.arange(1, N, 2)
    np.testing.assert_array_equal(adjusted_influence(whole, *places), adjusted_influence(packed_of(M, X, S), *places))


@pytest.mark.parametrize("t", [1, 2, 11])
def test_few_trials_and_examples_without_an_estimate_select_no_pair(t):
    M, X, S = trials_of(3, t=t)
    M[:, 0], M[:, 1] = True, False
    packed = packed_of(M, X, S)
    value, z = adjusted_influence(packed, np.arange(N), np.arange(Q), np.empty(0, np.int64))
    assert np.isnan([value[:2], z[:2]]).all()
    pairs = select_pairs(packed, np.ones(N), LABELS, TEST_LABELS)
    assert not np.isin(pairs.train, [0, 1]).any()


def test_a_pair_in_which_one_decides_the_other_is_selected():
    M, X, _ = trials_of(6, t=60, effect=0)
    X[:, 4] = M[:, 7]
    pairs = select_pairs(packed_of(M, X, None), np.ones(N), LABELS, TEST_LABELS)
    assert (pairs.train.tolist(), pairs.test.tolist(), pairs.value.tolist()) == ([7], [4], [pytest.approx(1)])
    assert np.isfinite(pairs.z).all()


def test_pairs_are_of_one_class_and_of_memorized_examples():
    M, X, S = trials_of(4)
    mem, labels = np.where(np.arange(N) == 1, 0.1, 0.9), np.arange(N) % 2
    pairs = select_pairs(packed_of(M, X, S), mem, labels, TEST_LABELS)
    assert set(pairs.train.tolist()) == {0, 2}
    assert len(select_pairs(packed_of(M, X, S), np.zeros(N), LABELS, TEST_LABELS)) == 0

"""False discovery rates and standard errors of counts, against brute force, scipy and simulation."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memtail.estimators import convergence, false_discovery, memorization
from memtail.estimators.convergence import memorization_by, stages
from memtail.estimators.false_discovery import LARGEST_RATE, discovery_rates, mid_p
from memtail.statistics import Statistics
from tests.support.batches import batch_of as batch
from tests.support.batches import random_bits


def statistics_of(M, C, T, first=0):
    statistics = Statistics(M.shape[1], T.shape[1])
    statistics.accumulate(batch(first, M, C, T))
    return statistics


def planted(seed, t, n, q, influenced):
    """Membership and correctness in which training example i raises the accuracy on test example i, for the first few."""
    rng = np.random.default_rng(seed)
    M, T = rng.random((t, n)) < 0.7, rng.random((t, q)) < rng.uniform(0.2, 1.1, q)
    T[:, :influenced] = M[:, :influenced] | (rng.random((t, influenced)) < 0.3)
    return M, rng.random((t, n)) < 0.5, T


@given(t=st.integers(1, 200), n=st.integers(1, 30), q=st.integers(1, 30), influenced=st.integers(0, 10), seed=st.integers(0, 10**6))
@example(t=12, n=24, q=8, influenced=7, seed=8140)  # a rate of 1/220 * 22, which is 0.1: rounding decides whether it is kept
@settings(max_examples=25, deadline=None)
def test_rates_equal_those_of_fishers_test_and_benjamini_hochberg_over_all_tested_pairs(t, n, q, influenced, seed):
    from scipy import stats

    M, C, T = planted(seed, t, n, q, min(influenced, n, q))
    rng = np.random.default_rng(seed)
    labels, test_labels, mem = rng.integers(0, 3, n), rng.integers(0, 3, q), rng.choice([0.1, 0.25, 0.9, np.nan], n)
    train, test = np.nonzero((mem >= 0.25)[:, None] & (labels[:, None] == test_labels))
    both, k_in, correct = (M[:, train] & T[:, test]).sum(0), M.sum(0)[train], T.sum(0)[test]
    tails = stats.hypergeom.sf(both - 1, t, correct, k_in)
    expected = stats.false_discovery_control(tails) if len(tails) else tails
    order = rng.permutation(len(train))[: max(1, len(train) // 2)]
    result = false_discovery(statistics_of(M, C, T).packed(), mem, labels, test_labels, train[order], test[order])
    assert result.tested == len(train)
    decided = ~np.isclose(expected, LARGEST_RATE, rtol=1e-9, atol=0)
    rate = np.where(expected <= LARGEST_RATE, expected, 1)
    np.testing.assert_allclose(result.rate[decided[order]], rate[order][decided[order]], rtol=1e-7)
    np.testing.assert_allclose(
        result.kept[~np.isclose(result.kept, LARGEST_RATE, rtol=1e-9, atol=0)], np.sort(rate[decided & (rate < 1)]), rtol=1e-7
    )


def test_rates_are_those_of_the_example_of_benjamini_and_hochberg():
    # the 15 tests of their paper, of which they keep 4 at 5%; rates by multipletests(..., method="fdr_bh") of statsmodels 0.15
    tails = np.array([1, 4, 19, 95, 201, 278, 298, 344, 459, 3240, 4262, 5719, 6528, 7590, 10000]) / 10000
    rate, kept = discovery_rates(tails[tails <= LARGEST_RATE], len(tails), tails)
    expected = [0.0015, 0.003, 0.0095, 0.035625, 0.0603, 0.063857, 0.063857, 0.0645, 0.0765]
    np.testing.assert_allclose(kept, expected, atol=1e-6)
    np.testing.assert_allclose(rate, [*expected, *np.ones(6)], atol=1e-6)
    assert (rate <= 0.05).sum() == 4


def test_the_mid_p_of_a_pair_counts_half_of_what_was_observed():
    import scipy.stats

    M, C, T = planted(2, 80, 20, 20, 8)
    T[:, 0] = M[:, 0]  # the most that is possible
    packed = statistics_of(M, C, T).packed()
    train, test = (part.ravel() for part in np.indices((20, 20)))
    null = scipy.stats.hypergeom(80, T.sum(0)[test], M.sum(0)[train])
    both = (M[:, train] & T[:, test]).sum(0)
    expected = null.sf(both) + null.pmf(both) / 2
    result, small = mid_p(packed, train, test), null.sf(both - 1) <= LARGEST_RATE
    np.testing.assert_allclose(result[small], expected[small], rtol=1e-9)
    assert (result[~small] >= 0.5).all()
    assert small.sum() > 10


def test_planted_pairs_are_kept_and_hardly_any_others():
    labels = np.zeros(60, np.int64)
    M, C, T = planted(1, 150, 60, 60, 0)
    everything = [part.ravel() for part in np.indices((60, 60))]
    assert (false_discovery(statistics_of(M, C, T).packed(), np.ones(60), labels, labels, *everything).rate > 0.05).all()
    M, C, T = planted(1, 150, 60, 60, 12)
    rate = false_discovery(statistics_of(M, C, T).packed(), np.ones(60), labels, labels, *everything).rate.reshape(60, 60)
    result = np.argwhere(rate <= 0.05).tolist()
    assert {(i, i) for i in range(12)} <= {(i, j) for i, j in result}
    assert len(result) <= 15


@given(t=st.integers(1, 150), n=st.integers(1, 40), seed=st.integers(0, 10**6), first=st.integers(0, 70))
@settings(max_examples=25, deadline=None)
def test_memorization_by_selected_trials_equals_that_of_their_statistics_alone(t, n, seed, first):
    M, C, T = random_bits(seed, t, n, 3)
    chosen = np.random.default_rng(seed).random((4, t)) < 0.6
    ((_, result),) = memorization_by(statistics_of(M, C, T, first).packed(), chosen)
    for row, some in enumerate(chosen):
        expected = memorization(statistics_of(M[some], C[some], T[some]))
        for name in ("value", "standard_error", "k_in", "k_out"):
            np.testing.assert_array_equal(getattr(result, name)[row], getattr(expected, name))


def test_the_last_stage_has_all_trials_and_each_earlier_one_the_first_half():
    M, C, T = random_bits(3, 100, 30, 4)
    result = convergence(statistics_of(M, C, T, first=7).packed(), (0.1, 0.25), (0.5, 1.0), np.linspace(-1, 1, 41))
    assert [stage.trials for stage in result] == stages(100) == [25, 50, 100]
    for stage in result:
        mem = memorization(statistics_of(M[: stage.trials], C[: stage.trials], T[: stage.trials]))
        value = mem.value[~np.isnan(mem.value)]
        np.testing.assert_allclose(stage.shares, [(value >= step).mean() for step in (0.1, 0.25)])
        np.testing.assert_allclose(stage.standard_errors, np.nanquantile(mem.standard_error, (0.5, 1.0)))
        assert stage.mean == pytest.approx(value.mean())
        assert stage.counts.sum() == len(value)


@pytest.mark.parametrize("together", [0.0, 0.1])
def test_the_standard_error_of_a_share_equals_its_deviation_over_repetitions(together):
    # examples of which some models fail all `together`, so that their scores are not independent
    rng = np.random.default_rng(0)
    truth = rng.uniform(0, 0.6, 300)
    shares, errors = [], []
    for _ in range(60):
        M, bad = rng.random((200, 300)) < 0.7, rng.random((200, 1)) < together
        C = M | ((rng.random((200, 300)) >= truth) & ~bad)
        last = convergence(statistics_of(M, C, C[:, :1]).packed(), (0.25,), (0.5,), np.linspace(-1, 1, 3))[-1]
        shares.append(last.shares[0])
        errors.append(last.shares_se[0])
    assert 0.75 < np.mean(errors) / np.std(shares, ddof=1) < 1.35

"""Agreement of two sets of trials, and confidence intervals over models."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtail.estimators import influence, influence_at, memorization
from memtail.statistics import Statistics
from memtail.studies.agreement import Estimates, compare
from memtail.studies.intervals import difference, mean
from tests.support.batches import batch_of as batch

LABELS = np.zeros(9, np.int64), np.zeros(7, np.int64)


def statistics(seed, trials, first=0):
    rng = np.random.default_rng(seed)
    result = Statistics(9, 7)
    result.accumulate(batch(first, *(rng.random((trials, size)) < 0.6 for size in (9, 9, 7))))
    return result


@given(seed=st.integers(0, 10**6), trials=st.integers(1, 150), share=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_estimates_by_selected_trials_equal_those_of_their_statistics_alone(seed, trials, share):
    rng = np.random.default_rng(seed)
    bits = [rng.random((trials, size)) < 0.6 for size in (9, 9, 7)]
    whole, alone = Statistics(9, 7), Statistics(9, 7)
    whole.accumulate(batch(0, *bits))
    kept = np.flatnonzero(rng.random(trials) < share)
    for trial in kept:
        alone.accumulate(batch(int(trial), *(each[[trial]] for each in bits)))
    packed = whole.packed().select(kept)
    assert packed.trials == len(kept)
    assert packed.counted_trials.tolist() == kept.tolist()
    for one, other in zip(vars(memorization(packed)).values(), vars(memorization(alone)).values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_influence_at_pairs_equals_that_of_the_matrix():
    packed = statistics(3, 40).packed()
    i, j = np.divmod(np.arange(63), 7)
    np.testing.assert_allclose(influence_at(packed, i, j), influence(packed, slice(None), slice(None)).value.ravel())


def test_agreement_counts_the_intersection_and_the_union_of_selections():
    first, second = (Estimates.of(statistics(seed, 60).packed(), *LABELS) for seed in (1, 2))
    for each in compare(first, second).agreements:
        if each.score == "memorization":
            chosen = [set(np.flatnonzero(estimates.mem.value >= each.threshold)) for estimates in (first, second)]
            apart = {i: abs(first.mem.value[i] - second.mem.value[i]) for i in range(9)}
        else:
            chosen = [
                {(i, j) for i, j, infl in zip(pairs.train, pairs.test, pairs.influence, strict=True) if infl >= each.threshold}
                for pairs in (first.pairs, second.pairs)
            ]  # fmt: skip
            matrices = [influence(estimates.packed, slice(None), slice(None)).value for estimates in (first, second)]
            apart = {(i, j): abs(matrices[0][i, j] - matrices[1][i, j]) for i in range(9) for j in range(7)}
        either, both = chosen[0] | chosen[1], chosen[0] & chosen[1]
        assert (each.first, each.second) == (len(chosen[0]), len(chosen[1]))
        assert each.jaccard == (pytest.approx(len(both) / len(either)) if either else None)
        assert each.difference == (pytest.approx(np.mean([apart[one] for one in either])) if either else None)


def test_equal_trials_agree_in_full_and_ranks_are_those_of_spearman():
    estimates = Estimates.of(statistics(5, 60).packed(), *LABELS)
    comparison = compare(estimates, estimates)
    assert {each.jaccard for each in comparison.agreements} <= {1.0, None}
    assert {each.difference for each in comparison.agreements} <= {0.0, None}
    assert comparison.rank_correlation == pytest.approx(1)
    from scipy.stats import spearmanr

    other = Estimates.of(statistics(6, 60).packed(), *LABELS)
    assert compare(estimates, other).rank_correlation == pytest.approx(spearmanr(estimates.mem.value, other.mem.value).statistic)


def test_intervals_equal_those_of_statistical_tables():
    three = mean(np.array([1.0, 2.0, 3.0]))
    assert three.value == 2
    assert three.half == pytest.approx(4.3027 / np.sqrt(3), rel=1e-4)
    apart = difference(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 1.0, 2.0, 3.0]))
    assert apart.value == 1
    assert apart.half == pytest.approx(2.4469 * np.sqrt(5 / 3 / 2), rel=1e-4)
    assert vars(difference(np.ones(3), np.zeros(3))) == {"value": 1.0, "half": 0.0}
    assert str(mean(np.array([0.01, 0.02, 0.03]))) == "2.00 ± 2.48"

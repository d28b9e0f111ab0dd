"""Soft outcomes: exact sums in any order, and estimates that equal those of plain numpy."""

from dataclasses import replace

import numpy as np
import pytest

from memtail.confidence import Z
from memtail.errors import ScoresError, StoreError
from memtail.estimators import convergence, high_influence_pairs, influence, memorization
from memtail.estimators.ranking import expected_overlap
from memtail.estimators.soft import soft_influence, soft_influence_at, soft_memorization
from memtail.execution.stopping import trials_needed
from memtail.spec import UntilSpec
from memtail.statistics import Statistics
from memtail.statistics.snapshot import Snapshot
from memtail.statistics.soft import ONE, quantized
from memtail.trials import Shard
from tests.support.batches import batch_of, random_bits

T, N, Q = 150, 23, 17


@pytest.fixture(scope="module")
def trials():
    """M, and scores of training and test examples, in 255ths."""
    M, C, X = random_bits(3, T, N, Q)
    rng = np.random.default_rng(4)
    return M, C, X, rng.integers(0, 256, (T, N)).astype(np.uint8), rng.integers(0, 256, (T, Q)).astype(np.uint8)


def accumulated(trials, order=range(0, T, 10), diverged=(), scored=lambda first: True):
    statistics = Statistics(N, Q)
    M, C, X, S, P = trials
    for first in order:
        rows = slice(first, first + 10)
        batch = batch_of(first, M[rows], C[rows], X[rows], diverged)
        statistics.accumulate(replace(batch, train_score=S[rows], test_score=P[rows]) if scored(first) else batch)
    return statistics


def welch(inside, outside):
    """Difference of means and its standard error, by definition."""
    error = [group.var(ddof=1) / len(group) if len(group) > 1 else np.nan for group in (inside, outside)]
    means = [group.mean() if len(group) else np.nan for group in (inside, outside)]
    return means[0] - means[1], np.sqrt(error[0] + error[1])


def test_memorization_of_scores_equals_a_computation_with_plain_numpy(trials):
    M, _, _, S, _ = trials
    soft = soft_memorization(accumulated(trials))
    expected = np.array([welch(S[M[:, i], i] / ONE, S[~M[:, i], i] / ONE) for i in range(N)])
    np.testing.assert_allclose(soft.value, expected[:, 0], atol=1e-12)
    np.testing.assert_allclose(soft.standard_error, expected[:, 1], atol=1e-12)
    assert np.isnan(soft.value).any()
    np.testing.assert_allclose(soft.score_in - soft.score_out, soft.value)


def test_influence_on_scores_equals_a_computation_with_plain_numpy(trials):
    M, _, _, _, P = trials
    packed = accumulated(trials, diverged=(3, 77)).packed()
    counted = np.delete(np.arange(T), [3, 77])
    expected = np.array(
        [[welch(P[counted][M[counted, i], j] / ONE, P[counted][~M[counted, i], j] / ONE) for j in range(Q)] for i in range(N)]
    )
    block = soft_influence(packed, slice(None), slice(None))
    np.testing.assert_allclose(block.value, expected[..., 0], atol=1e-12)
    np.testing.assert_allclose(block.standard_error, expected[..., 1], atol=1e-12)
    part = soft_influence(packed, np.array([2, 5]), np.array([3, 16]))
    np.testing.assert_array_equal(part.value, block.value[np.ix_([2, 5], [3, 16])])
    np.testing.assert_array_equal(part.standard_error, block.standard_error[np.ix_([2, 5], [3, 16])])
    train, test = np.array([0, 4, 4, 22]), np.array([1, 0, 16, 3])
    value, error = soft_influence_at(packed, train, test)
    np.testing.assert_array_equal(value, block.value[train, test])
    np.testing.assert_array_equal(error, block.standard_error[train, test])


def test_sums_have_equal_bits_in_any_order(trials):
    one, other = accumulated(trials), accumulated(trials, order=reversed(range(0, T, 10)))
    assert one.digest() == other.digest()
    for mine, theirs in zip(vars(one.soft).values(), vars(other.soft).values(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(one.packed().test_score, other.packed().test_score)
    changed = [each.copy() for each in trials]
    changed[4][0, 0] ^= 1
    assert accumulated(changed).digest() != one.digest()


def test_a_trial_without_scores_leaves_none(trials):
    statistics = accumulated(trials, scored=lambda first: first != 40)
    assert statistics.soft is None
    assert statistics.packed().test_score is None
    assert soft_memorization(statistics) is None
    assert soft_influence(statistics.packed(), slice(None), slice(None)) is None
    assert soft_influence_at(statistics.packed(), np.array([0]), np.array([0])) is None
    assert statistics.digest() == accumulated(trials, scored=lambda first: False).digest()


def test_selected_trials_keep_their_scores(trials):
    packed = accumulated(trials).packed()
    some = np.arange(0, T, 2)
    M, _, _, _, P = trials
    value, _ = soft_influence_at(packed.select(some), np.array([5]), np.array([6]))
    np.testing.assert_allclose(value, welch(P[some][M[some, 5], 6] / ONE, P[some][~M[some, 5], 6] / ONE)[0])


def test_scores_are_rounded_to_255ths():
    assert quantized(np.array([0.0, 1.0, 0.5, 1 / 255, 0.4999 / 255])).tolist() == [0, 255, 128, 1, 0]


def without_correctness(trials, order=range(0, T, 10), diverged=()):
    statistics = Statistics(N, Q, scores_only=True)
    M, C, X, S, P = trials
    for first in order:
        rows = slice(first, first + 10)
        batch = batch_of(first, M[rows], C[rows], X[rows], diverged)
        statistics.accumulate(replace(batch, train_correct=None, test_correct=None, train_score=S[rows], test_score=P[rows]))
    return statistics


def test_without_correctness_the_estimates_are_those_of_scores(trials):
    both, alone = accumulated(trials, diverged=(3,)), without_correctness(trials, diverged=(3,))
    soft, mem = soft_memorization(both), memorization(alone)
    np.testing.assert_array_equal(mem.value, soft.value)
    np.testing.assert_array_equal(mem.standard_error, soft.standard_error)
    np.testing.assert_array_equal(mem.p_out, soft.score_out)
    packed, labels = alone.packed(), (np.zeros(N, np.int64), np.zeros(Q, np.int64))
    pairs = high_influence_pairs(packed, mem, *labels, mem_threshold=-0.05, infl_threshold=0.05)
    block = soft_influence(both.packed(), slice(None), slice(None))
    expected = (mem.value >= -0.05)[:, None] & (block.value >= 0.05)
    assert sorted(zip(pairs.train.tolist(), pairs.test.tolist(), strict=True)) == list(zip(*map(list, np.nonzero(expected)), strict=True))
    np.testing.assert_array_equal(pairs.influence, block.value[pairs.train, pairs.test])
    np.testing.assert_array_equal(pairs.influence_se, block.standard_error[pairs.train, pairs.test])
    np.testing.assert_array_equal(pairs.mem, mem.value[pairs.train])
    assert len(pairs) > 10
    with pytest.raises(ScoresError, match="these trials have scores only, and correctness is needed"):
        influence(packed, slice(None), slice(None))
    with pytest.raises(StoreError, match="trials 0-9: has correctness"):
        alone.accumulate(batch_of(0, *(bits[:10] for bits in trials[:3])))


def test_without_correctness_scores_converge_to_those_of_all_trials(trials):
    alone = without_correctness(trials, diverged=(3,))
    M, _, _, S, _ = trials
    stages = convergence(alone.packed(), [0.02], [0.5, 1.0], np.linspace(-1, 1, 41))
    counted = np.delete(np.arange(T), 3)
    for stage in stages:
        first = counted[: stage.trials]
        values = np.array([welch(S[first][M[first, i], i] / ONE, S[first][~M[first, i], i] / ONE) for i in range(N)])
        defined = ~np.isnan(values[:, 0])
        assert stage.mean == pytest.approx(values[defined, 0].mean())
        assert stage.shares[0] == pytest.approx((values[defined, 0] >= 0.02).mean())
        errors = values[~np.isnan(values[:, 1]), 1]
        np.testing.assert_allclose(stage.standard_errors, np.quantile(errors, [0.5, 1.0]))


@pytest.mark.parametrize("after", [0, 70])
def test_without_correctness_a_snapshot_continues_to_equal_bits_in_any_order(trials, tmp_path, after):
    whole, backwards = without_correctness(trials), without_correctness(trials, order=range(T - 10, -10, -10))
    assert whole.digest() == backwards.digest() != accumulated(trials).digest()
    part = without_correctness(trials, order=range(0, after, 10))
    Snapshot("f", part, {Shard(0, 9): "tag"}).write(tmp_path / "snapshot.npz")
    restored = Snapshot.read(tmp_path / "snapshot.npz", N, Q).statistics
    assert (restored.scores_only, restored.digest()) == (True, part.digest())
    M, C, X, S, P = trials
    for first in range(after, T, 10):
        rows = slice(first, first + 10)
        batch = batch_of(first, M[rows], C[rows], X[rows])
        restored.accumulate(replace(batch, train_correct=None, test_correct=None, train_score=S[rows], test_score=P[rows]))
    assert restored.digest() == whole.digest()
    np.testing.assert_array_equal(restored.packed().select(np.arange(20)).train_score, whole.packed().select(np.arange(20)).train_score)


def test_bounds_and_intervals_of_scores_follow_their_standard_errors(trials):
    statistics = without_correctness(trials)
    mem = memorization(statistics)
    low, high = mem.interval
    np.testing.assert_allclose(high - low, np.minimum(2 * Z * mem.standard_error, high - low))
    np.testing.assert_allclose((low + high)[mem.standard_error < 0.1] / 2, mem.value[mem.standard_error < 0.1])
    estimated = ~np.isnan(mem.standard_error)
    share = float(np.mean(estimated)) / 2
    error = np.quantile(np.where(estimated, mem.standard_error, np.inf), share, method="higher")
    needed = trials_needed(UntilSpec(standard_error=error / 2, quantile=share), statistics)
    assert needed == pytest.approx(4 * T)
    assert trials_needed(UntilSpec(interval_width=4 * Z * error, quantile=share), statistics) == pytest.approx(T / 4)
    assert 0 < expected_overlap(mem, 5) < 1

"""What the rule for stopping does to scores: simulated experiments with known rates, stopped at their bounds."""

from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import pytest

from memtail.errors import SpecError
from memtail.estimators import memorization
from memtail.estimators.overlap import jaccard, pair_selection
from memtail.estimators.ranking import expected_overlap
from memtail.execution.stopping import next_round, trials_needed
from memtail.spec import Experiment
from memtail.statistics import Statistics
from tests.support.planted import PlantedPairs

RATES = [(p_in, p_out) for p_in in np.arange(0.05, 1, 0.15) for p_out in np.arange(0.05, 1, 0.15) if p_in >= p_out]
NO_LABELS = np.empty(0, np.int64), np.empty(0, np.int64)  # only pairs need them


@dataclass
class Counts:
    """The part of the statistics from which memorization is estimated."""

    trials: int
    k_in: np.ndarray
    correct_in: np.ndarray
    correct: np.ndarray
    scores_only: bool = False

    @property
    def k_out(self):
        return self.trials - self.k_in

    def more(self, trials, p_in, p_out, rng):
        members = rng.random((trials, len(p_in))) < 0.7
        correct = rng.random(members.shape) < np.where(members, p_in, p_out)
        k_in, correct_in = members.sum(0), (members & correct).sum(0)
        return Counts(self.trials + trials, self.k_in + k_in, self.correct_in + correct_in, self.correct + correct.sum(0))


def none(n):
    return Counts(0, *np.zeros((3, n), np.int64))


def subsets(**until):
    return Experiment.parse({"name": "e", "dataset": {"name": "digits"}, "model": {"name": "mlp"}, "subsets": {"until": until}}).subsets


def stopped(declared, p_in, p_out, rng):
    """The estimates of an experiment at its end, and the numbers of trials after each round."""
    counts, rounds = none(len(p_in)), []
    while declared is not None:
        counts = counts.more(declared.trials - counts.trials, p_in, p_out, rng)
        rounds.append(counts.trials)
        trials = next_round(declared, counts, 10**6, NO_LABELS)
        declared = trials and declared.model_copy(update={"trials": trials})
    return memorization(counts), rounds


def held(mem, true):
    low, high = mem.interval
    return (low <= true + 1e-12) & (true - 1e-12 <= high)


@pytest.mark.parametrize(
    "until", [{"standard_error": 0.05}, {"interval_width": 0.15, "quantile": 1.0}, {"standard_error": 0.03, "quantile": 0.5}]
)
def test_intervals_cover_after_the_rule_has_stopped_the_experiment(until):
    rng, (p_in, p_out) = np.random.default_rng(0), np.array(RATES).T.repeat(20, 1)
    covered = [held(stopped(subsets(**until), p_in, p_out, rng)[0], p_in - p_out) for _ in range(20)]
    by_rate = np.mean(covered, 0).reshape(len(RATES), -1).mean(1)
    assert 0.93 <= by_rate.mean() <= 0.97
    assert by_rate.min() > 0.9


@pytest.mark.parametrize(("p_in", "p_out"), [(0.65, 0.65), (0.95, 0.5), (1.0, 0.95)])
def test_intervals_cover_where_one_example_alone_stops_the_experiment(p_in, p_out):
    rng = np.random.default_rng(1)
    rates = np.array([p_in]), np.array([p_out])
    covered = [held(stopped(subsets(standard_error=0.05, quantile=1.0), *rates, rng)[0], p_in - p_out) for _ in range(1000)]
    assert np.mean(covered) > 0.9


def test_a_width_of_the_intervals_is_reached_in_a_few_rounds_and_with_few_trials_too_many():
    rng, (p_in, p_out) = np.random.default_rng(2), np.array(RATES).T.repeat(5, 1)
    declared = subsets(interval_width=0.2, quantile=0.5)
    mem, rounds = stopped(declared, p_in, p_out, rng)
    widths = np.quantile(mem.interval[1] - mem.interval[0], 0.5, method="higher")
    assert 0.17 < widths <= 0.2
    assert 2 <= len(rounds) <= 4
    assert rounds[-1] < declared.until.most_trials(0.7)


def test_all_bounds_have_to_hold():
    rng, (p_in, p_out) = np.random.default_rng(3), np.array(RATES).T
    counts = none(len(p_in)).more(64, p_in, p_out, rng)
    error, width = {"standard_error": 0.05}, {"interval_width": 0.1}
    needed = [trials_needed(subsets(**until).until, counts) for until in (error, width, error | width)]
    assert needed[2] == max(needed)
    assert needed[0] < needed[1]
    most = [subsets(**until).until.most_trials(0.7) for until in (error, width, error | width)]
    assert most[2] == max(most) == most[1]


def test_examples_on_which_all_models_agree_ask_for_the_trials_that_they_need():
    k_in = np.full(10, 45)
    counts = Counts(64, k_in, k_in, np.full(10, 64))
    needed = trials_needed(subsets(standard_error=0.01).until, counts)
    later = Counts(round(needed), k_in * round(needed) // 64, k_in * round(needed) // 64, np.full(10, round(needed)))
    assert memorization(later).standard_error.max() == pytest.approx(0.01, rel=0.03)
    assert needed < 64 * (memorization(counts).standard_error.max() / 0.01) ** 2 / 3  # as errors that fall with the square root


def test_a_ranking_is_sought_until_two_runs_agree_on_it():
    rng = np.random.default_rng(4)
    p_out = rng.uniform(0, 1, 3000)
    p_in = p_out + (1 - p_out) * rng.beta(0.5, 2, 3000)
    declared = subsets(ranking={"top": 300, "overlap": 0.8})
    mem, rounds = stopped(declared, p_in, p_out, rng)
    assert 2 <= len(rounds) <= 4
    assert rounds[-1] < declared.until.most_trials(0.7) == 11905
    overlaps = []
    for _ in range(10):
        one, other = (memorization(none(3000).more(rounds[-1], p_in, p_out, rng)) for _ in range(2))
        rankings = [set(np.argsort(-each.value)[:300].tolist()) for each in (one, other)]
        overlaps.append(len(rankings[0] & rankings[1]) / len(rankings[0] | rankings[1]))
    assert 0.77 < np.mean(overlaps) < 0.86
    assert expected_overlap(mem, 300) >= 0.8


@pytest.mark.parametrize("trials", [256, 1024])
def test_the_overlap_expected_from_one_run_is_that_of_two(trials):
    rng = np.random.default_rng(5)
    p_out = np.where(rng.random(2000) < 0.6, 1 - rng.beta(0.3, 20, 2000), rng.beta(0.8, 0.8, 2000))  # as of images
    p_in = 1 - rng.beta(0.3, 10, 2000) * (1 - p_out)
    runs = [memorization(none(2000).more(trials, p_in, p_out, rng)) for _ in range(8)]
    rankings = [set(np.argsort(-each.value, kind="stable")[:200].tolist()) for each in runs]
    measured = np.mean([len(one & other) / len(one | other) for one, other in combinations(rankings, 2)])
    assert np.mean([expected_overlap(each, 200) for each in runs]) == pytest.approx(measured, abs=0.03)


def test_a_ranking_of_equal_examples_ends_at_the_most_trials():
    p = np.full(50, 0.5)
    rng, declared = np.random.default_rng(6), subsets(standard_error=0.2, ranking={"top": 10, "overlap": 0.9})
    _, rounds = stopped(declared, p, p, rng)
    assert rounds[-1] == declared.until.most_trials(0.7)
    assert all(later <= 4 * earlier for earlier, later in pairwise(rounds))


def test_pairs_are_sought_until_two_runs_agree_on_them():
    declared = subsets(pairs={"overlap": 0.85})
    labels, chosen = (PlantedPairs.train_labels, PlantedPairs.test_labels), []
    for seed in range(4):
        world, current = PlantedPairs(seed), declared.model_copy(update={"trials": 64})
        statistics, rounds = Statistics(*PlantedPairs.size), 0
        while current is not None:
            world.extend(statistics, current.trials)
            trials, rounds = next_round(current, statistics, 10**6, labels), rounds + 1
            current = trials and declared.model_copy(update={"trials": trials})
        assert 2 <= rounds <= 4
        assert 128 < statistics.trials < 512 < declared.until.most_trials(0.7) == 11905
        chosen.append(pair_selection(statistics.packed(), *labels))
    assert 0.82 < np.mean([jaccard(one, other) for one, other in combinations(chosen, 2)]) < 0.95


def test_without_pairs_trials_are_added_up_to_the_most():
    declared = subsets(pairs={"overlap": 0.6}).model_copy(update={"trials": 100})
    labels = PlantedPairs.train_labels, PlantedPairs.test_labels
    assert next_round(declared, PlantedPairs(0, effect=0.0).statistics(100), 10**6, labels) == 400
    assert next_round(declared, PlantedPairs(0, effect=0.0).statistics(100), 250, labels) == 250
    assert next_round(declared, PlantedPairs(0, effect=0.0).statistics(100), 100, labels) is None


@pytest.mark.parametrize("until", [{}, {"quantile": 0.9}, {"interval_width": 2}, {"interval_width": 0}, {"ranking": {"top": 5}}])
def test_a_bound_is_needed_and_has_to_be_possible(until):
    with pytest.raises(SpecError, match=r"interval_width|ranking.overlap"):
        subsets(**until)

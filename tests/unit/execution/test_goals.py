"""Numbers of trials that a forecast names."""

import pytest

from memtail.errors import ScoresError, UnsupportedError
from memtail.estimators import expected_standard_error
from memtail.execution.goals import Goal, described, error_goal, overlap_goals, until_goals
from memtail.experiment_store import Record
from memtail.spec import Experiment
from tests.support.planted import PlantedPairs

LABELS = PlantedPairs.train_labels, PlantedPairs.test_labels


def experiment(**until):
    return Experiment.parse({"name": "e", "dataset": {"name": "digits"}, "model": {"name": "mlp"}, "subsets": {"until": until}})


def test_until_has_a_largest_number_of_trials_and_with_scores_an_expected_one():
    bounded = experiment(standard_error=0.02)
    assert until_goals(bounded, 10**6, None, LABELS) == [Goal("until, at most", 2977)]
    assert until_goals(bounded, 2000, None, LABELS) == [Goal("until, at most", 2000)]
    expected, most = until_goals(bounded, 10**6, PlantedPairs(0).statistics(100).packed(), LABELS)
    assert 100 < expected.trials < most.trials
    assert described(bounded.subsets.until) == "standard errors of 95% of the training examples at most 0.02"
    assert described(experiment(pairs={"overlap": 0.8}).subsets.until) == "overlap 0.8 of the selected pairs"


def test_a_standard_error_takes_the_smallest_number_of_trials_that_is_enough():
    trials = error_goal(0.05, 0.7).trials
    assert expected_standard_error(trials, 0.7) <= 0.05 < expected_standard_error(trials - 1, 0.7)


def test_an_overlap_has_numbers_of_trials_for_examples_and_for_pairs():
    memorized, pairs = overlap_goals("e", 0.5, PlantedPairs(0).statistics(200).packed(), LABELS)
    assert (memorized.name, pairs.name) == ("overlap 0.5 of memorized examples", "overlap 0.5 of selected pairs")
    assert memorized.trials == pairs.trials == 50
    with pytest.raises(
        ScoresError, match=r"^--overlap: experiment 'e' has scores of 99 trials, and at least 100 are needed: train some 250$"
    ):
        overlap_goals("e", 0.5, PlantedPairs(0).statistics(99).packed(), LABELS)


def test_bounds_that_begin_with_more_trials_than_are_allowed_are_refused():
    declared = experiment(standard_error=0.0002)
    record = Record(declared, declared.fingerprint("d"), declared.canonical("d"), 60, 40, 16)
    with pytest.raises(
        UnsupportedError, match="trials in its first round, and at most 1000000 are allowed: declare larger bounds in subsets"
    ):
        record.check_limits()

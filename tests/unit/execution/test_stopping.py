"""Experiments that end at a declared standard error."""

import numpy as np
import pytest

from memtail.errors import SpecError
from memtail.estimators import expected_standard_error, memorization
from memtail.execution.declare import check_pairs
from memtail.execution.embedded import run
from memtail.execution.stopping import next_round
from memtail.scores.pointer import latest_version
from memtail.spec import Experiment, UntilSpec
from memtail.statistics import Statistics
from memtail.storage.local import LocalStore


def most_trials(standard_error, fraction):
    return UntilSpec(standard_error=standard_error).most_trials(fraction)


def first_round(standard_error, fraction):
    return UntilSpec(standard_error=standard_error).first_round(fraction)


def spec(**subsets):
    model, training = {"name": "mlp", "hidden": [16]}, {"epochs": 2}
    return Experiment.parse({"name": "e", "dataset": {"name": "digits"}, "model": model, "training": training, "subsets": subsets})


def test_the_worst_case_is_never_exceeded_and_always_enough():
    assert expected_standard_error(most_trials(0.02, 0.7), 0.7) <= 0.02 < expected_standard_error(most_trials(0.02, 0.7) - 1, 0.7)
    assert first_round(0.02, 0.7) == most_trials(0.02, 0.7) // 20
    assert first_round(0.3, 0.5) == most_trials(0.3, 0.5)


def test_until_sets_the_first_round_and_is_not_in_the_fingerprint():
    sharp, blunt = spec(until={"standard_error": 0.02}), spec(until={"standard_error": 0.05}, trials=100)
    assert sharp.subsets.trials == first_round(0.02, 0.7)
    assert blunt.subsets.trials == 100
    assert sharp.fingerprint("d") == blunt.fingerprint("d") == spec(trials=3).fingerprint("d")
    for until, message in (
        ({"standard_error": 0}, "greater than or equal to 0.0001"),
        ({}, "standard_error"),
        ({"standard_error": "x"}, "valid number"),
    ):
        with pytest.raises(SpecError, match=message):
            spec(until=until)


def test_a_run_ends_once_its_standard_errors_reach_the_bound(tmp_path):
    experiment = spec(until={"standard_error": 0.04, "quantile": 0.9})
    seconds = []
    summary = run(experiment, tmp_path, on_progress=lambda state: seconds.append(state.seconds))
    assert seconds == sorted(seconds)  # of all rounds, as the rate and the time left take them
    store = LocalStore(tmp_path)
    pointer = latest_version(store, "e")
    trials = summary["trials"]
    assert experiment.subsets.trials < trials < most_trials(0.04, 0.7)
    assert pointer.summary.trials == trials
    from memtail import load_scores

    errors = load_scores(tmp_path / "experiments" / "e").memorization["mem_se"]
    assert np.quantile(errors, 0.9, method="higher") <= 0.04
    # a repeated run changes nothing, also without a declared number of trials
    assert run(experiment, tmp_path) == summary


def test_examples_without_an_estimate_prolong_a_run_at_most_to_the_worst_case():
    experiment = spec(until={"standard_error": 0.1}, trials=10)
    nothing, labels = Statistics(5, 5), (np.zeros(5, np.int64), np.zeros(5, np.int64))
    assert 10 < next_round(experiment.subsets, nothing, 10**6, labels) <= most_trials(0.1, 0.7)
    assert np.isnan(memorization(nothing).standard_error).all()
    assert next_round(spec(until={"standard_error": 0.1}, trials=most_trials(0.1, 0.7)).subsets, nothing, 10**6, labels) is None
    assert next_round(experiment.subsets, nothing, 12, labels) == 12
    assert next_round(spec(until={"standard_error": 0.1}, trials=12).subsets, nothing, 12, labels) is None
    assert next_round(spec(trials=10).subsets, nothing, 10**6, labels) is None


def test_a_bound_on_pairs_takes_a_test_set():
    experiment = spec(until={"pairs": {"overlap": 0.8}})
    assert experiment.subsets.trials == 595
    with pytest.raises(
        SpecError, match=r"^subsets\.until\.pairs: the dataset of experiment 'e' has no test set, so there are no pairs: use"
    ):
        check_pairs(experiment, 0)
    check_pairs(spec(until={"standard_error": 0.05}), 0)
    check_pairs(experiment, 1)

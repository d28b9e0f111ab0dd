"""What the aggregator shows of an experiment: how far it is, how accurate, how sharp, and how memorization is distributed."""

import math
from datetime import datetime

import numpy as np

from memtail.estimators import expected_standard_error, memorization
from memtail.execution.stopping import trials_needed
from memtail.scores.files import mean_accuracy
from memtail.scores.pointer import ScorePointer
from memtail.scores.summary import MEM_STEPS, SE_QUANTILES
from memtail.spec import SubsetsSpec
from memtail.statistics import Statistics
from services.aggregator import metrics
from services.common.experiment_series import ExperimentSeries

_BIN = 0.05
_ACCURACIES = {"in_subset": "in_subset_accuracy", "held_out": "held_out_accuracy", "test": "test_accuracy"}


def experiment_series(linger: float) -> ExperimentSeries:
    """All that is shown of experiments, until `linger` seconds after their ends."""
    of_experiments = (
        metrics.FOLDED,
        metrics.DIVERGED,
        metrics.NEEDED,
        metrics.ACCURACY,
        metrics.STANDARD_ERROR,
        metrics.EXPECTED_ERROR,
        metrics.MEMORIZED,
        metrics.HISTOGRAM,
        metrics.PAIRS,
        metrics.PUBLISHED,
        metrics.PUBLISHED_TRIALS,
        metrics.REFUSED,
    )
    return ExperimentSeries(of_experiments, linger)


def show_statistics(name: str, subsets: SubsetsSpec, statistics: Statistics) -> None:
    """What follows from the trials folded so far; costs O(n)."""
    trials = len(statistics.metrics)
    metrics.FOLDED.labels(name).set(trials)
    metrics.DIVERGED.labels(name).set(statistics.diverged)
    metrics.NEEDED.labels(name).set(max(0, _wanted(subsets, statistics) - trials))
    if not statistics.trials:
        return
    for examples, attribute in _ACCURACIES.items():
        if (accuracy := mean_accuracy(statistics, attribute)) is not None:
            metrics.ACCURACY.labels(name, examples).set(accuracy)
    mem = memorization(statistics)
    value, error = mem.value[~np.isnan(mem.value)], mem.standard_error[~np.isnan(mem.standard_error)]
    for quantile in SE_QUANTILES if len(error) else ():
        metrics.STANDARD_ERROR.labels(name, f"{quantile:g}").set(np.quantile(error, quantile))
    metrics.EXPECTED_ERROR.labels(name).set(expected_standard_error(statistics.trials, subsets.fraction))
    for step in MEM_STEPS:
        metrics.MEMORIZED.labels(name, f"{step:g}").set((value >= step).sum())
    edges = np.linspace(-1, 1, round(2 / _BIN) + 1)
    for begin, count in zip(edges, np.histogram(value, edges)[0], strict=False):
        metrics.HISTOGRAM.labels(name, f"{begin:.2f}").set(count)


def show_scores(name: str, pointer: ScorePointer | None) -> None:
    """What is published, by the pointer to it."""
    if pointer is None:
        return
    metrics.PUBLISHED.labels(name).set(datetime.fromisoformat(pointer.published).timestamp())
    metrics.PUBLISHED_TRIALS.labels(name).set(pointer.summary.accumulated_trials)
    metrics.PAIRS.labels(name).set(pointer.summary.pairs.count)


def _wanted(subsets: SubsetsSpec, statistics: Statistics) -> int:
    """The trials asked for, or those that the standard error asked for takes."""
    if subsets.until is None:
        return subsets.trials
    return math.ceil(min(trials_needed(subsets.until, statistics), subsets.until.most_trials(subsets.fraction)))

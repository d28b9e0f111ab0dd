"""Updates of the aggregator's metrics: progress, accuracies, standard errors, and the distribution of memorization."""

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
# Accuracies by their label; mean scores, where only scores are recorded, have labels of their own.
_ACCURACIES = {"in_subset": "in_subset_accuracy", "held_out": "held_out_accuracy", "test": "test_accuracy"}
_MEAN_SCORES = {f"{examples}_score": attribute for examples, attribute in _ACCURACIES.items()}


def experiment_series(linger: float) -> ExperimentSeries:
    """Return the series by experiment, which are removed `linger` seconds after its end."""
    of_experiments = (
        metrics.ACCUMULATED,
        metrics.DIVERGED,
        metrics.NEEDED,
        metrics.ACCURACY,
        metrics.STANDARD_ERROR,
        metrics.EXPECTED_ERROR,
        metrics.MEMORIZED,
        metrics.HISTOGRAM,
        metrics.SELECTED_PAIRS,
        metrics.PAIRS,
        metrics.PUBLISHED,
        metrics.PUBLISHED_TRIALS,
        metrics.REFUSED,
    )
    return ExperimentSeries(of_experiments, linger)


def update_statistics(name: str, subsets: SubsetsSpec, statistics: Statistics) -> None:
    """Update the metrics of the accumulated trials; costs O(n)."""
    trials = len(statistics.metrics)
    metrics.ACCUMULATED.labels(name).set(trials)
    metrics.DIVERGED.labels(name).set(statistics.diverged)
    metrics.NEEDED.labels(name).set(max(0, _trials_to_reach(subsets, statistics) - trials))
    if not statistics.trials:
        return
    for examples, attribute in (_MEAN_SCORES if statistics.scores_only else _ACCURACIES).items():
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


def update_finished(name: str, pointer: ScorePointer | None) -> None:
    """Update the metrics of an experiment that was finished before this process began, as far as its published summary has them."""
    if pointer is None:
        return
    summary = pointer.summary
    update_scores(name, pointer)
    metrics.ACCUMULATED.labels(name).set(summary.accumulated_trials)
    metrics.DIVERGED.labels(name).set(summary.diverged)
    metrics.NEEDED.labels(name).set(0)
    for examples, attribute in (_MEAN_SCORES if summary.outcome == "score" else _ACCURACIES).items():
        if (accuracy := getattr(summary, attribute)) is not None:
            metrics.ACCURACY.labels(name, examples).set(accuracy)
    for quantile in SE_QUANTILES:
        if (error := summary.mem_se_quantile(quantile)) is not None:
            metrics.STANDARD_ERROR.labels(name, f"{quantile:g}").set(error)


def update_scores(name: str, pointer: ScorePointer | None) -> None:
    """Update the metrics of the published scores."""
    if pointer is None:
        return
    metrics.PUBLISHED.labels(name).set(datetime.fromisoformat(pointer.published).timestamp())
    metrics.PUBLISHED_TRIALS.labels(name).set(pointer.summary.accumulated_trials)
    if pointer.summary.n_test:
        metrics.PAIRS.labels(name).set(pointer.summary.pairs.count)
        if (selected := pointer.summary.selected_pairs) is not None:
            metrics.SELECTED_PAIRS.labels(name).set(selected.count)


def _trials_to_reach(subsets: SubsetsSpec, statistics: Statistics) -> int:
    """The declared number of trials, or the number that the declared precision takes; at least those of the round with a bound on pairs."""
    if subsets.until is None:
        return subsets.trials
    needed = math.ceil(min(trials_needed(subsets.until, statistics), subsets.until.most_trials(subsets.fraction)))
    return needed if subsets.until.pairs is None else max(needed, subsets.trials)  # agreement on pairs takes seconds to estimate

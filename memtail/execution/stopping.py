"""The stopping rule: rounds of trials until the scores are as exact as the experiment asks for.

The first round is small; each later one has the trials that are enough if the observed rates are the true ones. The rule depends on the
outcomes alone, so a run, a service and a repetition of either train the same trials.
"""

import math
from collections.abc import Callable

import numpy as np

from memtail.confidence import Z
from memtail.estimators import Memorization, memorization
from memtail.estimators.binomial import Floats, difference_interval, difference_standard_error
from memtail.estimators.overlap import expected_pair_overlap
from memtail.estimators.pairs import Indices
from memtail.estimators.ranking import expected_overlap
from memtail.spec import SubsetsSpec, UntilSpec
from memtail.statistics import Statistics
from memtail.statistics.accumulator import PackedTrials

# Training and test labels, int64 [n] and [q].
Labels = tuple[Indices, Indices]


def next_round(
    subsets: SubsetsSpec, statistics: Statistics, limit: int, labels: Labels, progress: Callable[[], object] = lambda: None
) -> int | None:
    """Return the number of trials of the next round, once `subsets.trials` are accumulated; None if these are enough.

    Args:
        subsets: the subset design, with the present number of trials and the bounds `until`.
        statistics: statistics of these trials; diverged ones do not count.
        limit: maximum number of trials, whatever the bound.
        labels: training and test labels, int64 [n] and [q], in original order.
        progress: called after each piece of work with a bound `pairs`, which takes seconds.
    """
    until = subsets.until
    if until is None or subsets.trials >= (most := min(limit, until.most_trials(subsets.fraction))):
        return None
    needed = trials_needed(until, statistics, labels, progress)
    if needed <= statistics.trials:
        return None
    # at least a tenth more, so that few rounds are needed, of which each waits for its slowest shard
    return min(most, max(math.ceil(needed) if math.isfinite(needed) else 0, subsets.trials + subsets.trials // 10 + 1))


def trials_needed(
    until: UntilSpec, statistics: Statistics | PackedTrials, labels: Labels | None = None, progress: Callable[[], object] = lambda: None
) -> float:
    """Return the number of trials that reaches all bounds if the rates stay as they are; infinite while too many examples have no estimate.

    The number of the statistics is returned if it is enough. Costs O(n), O(n log n) with a bound `ranking`, and four selections of pairs
    with a bound `pairs`, which is left out without labels. Arguments are those of `next_round`.
    """
    mem = memorization(statistics)
    # before the first trial no example has an estimate
    if not math.isfinite(_quantile(mem.value, until.quantile)):
        return math.inf
    trials = statistics.trials
    needed = [_trials_for_errors(until, mem, trials)]
    if until.ranking is not None:
        needed.append(_trials_for_overlap(until.ranking.overlap, expected_overlap(mem, until.ranking.top), trials))
    if until.pairs is not None and labels is not None:
        packed = statistics if isinstance(statistics, PackedTrials) else statistics.packed()
        needed.append(_trials_for_overlap(until.pairs.overlap, expected_pair_overlap(packed, *labels, progress), trials))
    return max(needed)


def _trials_for_errors(until: UntilSpec, mem: Memorization, trials: int) -> float:
    """The number of trials with errors and intervals within their bounds, to within 1%."""
    if mem.of_scores:  # whose errors fall with the square root of the trials
        error = _quantile(mem.standard_error, until.quantile)
        excess = [error / until.standard_error] if until.standard_error is not None else []
        excess += [2 * Z * error / until.interval_width] if until.interval_width is not None else []
        return trials * max(excess, default=1.0) ** 2

    def enough(number: float) -> bool:
        groups = mem.p_in, mem.k_in * (number / trials), mem.p_out, mem.k_out * (number / trials)
        low, high = difference_interval(*groups)
        bounds = ((difference_standard_error(*groups), until.standard_error), (high - low, until.interval_width))
        return all(bound is None or _quantile(values, until.quantile) <= bound for values, bound in bounds)

    fewest, most = float(trials), float(trials)
    while not enough(most):
        fewest, most = most, 2 * most
    while most > 1.01 * fewest:
        middle = math.sqrt(fewest * most)
        fewest, most = (fewest, middle) if enough(middle) else (middle, most)
    return most


def _trials_for_overlap(wanted: float, expected: float, trials: int) -> float:
    """The number of trials with an overlap, or four times the present ones: what lies further is uncertain."""
    # what is missing from 1 falls with the square root of the trials, as do the errors that decide it
    return trials * min(max(1.0, (1 - expected) / (1 - wanted)) ** 2, 4.0)


def _quantile(values: Floats, quantile: float) -> float:
    """The value that this share of the examples does not exceed; examples without an estimate exceed all."""
    return float(np.quantile(np.where(np.isnan(values), np.inf, values), quantile, method="higher"))

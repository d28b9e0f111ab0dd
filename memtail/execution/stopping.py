"""The stopping rule: rounds of trials until the scores are as exact as the experiment asks for.

The first round is small; each later one has the trials that are enough if the observed rates are the true ones. The rule depends on the
outcomes alone, so a run, a service and a repetition of either train the same trials.
"""

import math

import numpy as np

from memtail.confidence import Z
from memtail.estimators import Memorization, memorization
from memtail.estimators.binomial import Floats, difference_interval, difference_standard_error
from memtail.estimators.ranking import expected_overlap
from memtail.spec import RankingSpec, SubsetsSpec, UntilSpec
from memtail.statistics import Statistics


def next_round(subsets: SubsetsSpec, statistics: Statistics, limit: int) -> int | None:
    """Return the number of trials of the next round, once `subsets.trials` are accumulated; None if these are enough.

    Args:
        subsets: the subset design, with the present number of trials and the bounds `until`.
        statistics: statistics of these trials; diverged ones do not count.
        limit: maximum number of trials, whatever the bound.
    """
    until = subsets.until
    if until is None:
        return None
    needed, most = trials_needed(until, statistics), min(limit, until.most_trials(subsets.fraction))
    if needed <= statistics.trials or subsets.trials >= most:
        return None
    # at least a tenth more, so that few rounds are needed, of which each waits for its slowest shard
    return min(most, max(math.ceil(needed) if math.isfinite(needed) else 0, subsets.trials + subsets.trials // 10 + 1))


def trials_needed(until: UntilSpec, statistics: Statistics) -> float:
    """Return the number of trials that reaches all bounds if the rates stay as they are; infinite while too many examples have no estimate.

    The number of the statistics is returned if it is enough. Costs O(n), and O(n log n) with a bound `ranking`.
    """
    mem = memorization(statistics)
    # before the first trial no example has an estimate
    if not math.isfinite(_quantile(mem.value, until.quantile)):
        return math.inf
    needed = _trials_for_errors(until, mem, statistics.trials)
    return needed if until.ranking is None else max(needed, _trials_for_ranking(until.ranking, mem, statistics.trials))


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


def _trials_for_ranking(ranking: RankingSpec, mem: Memorization, trials: int) -> float:
    """The number of trials with the overlap, or four times the present ones: what lies further is uncertain."""
    missing = 1 - expected_overlap(mem, ranking.top)
    # what is missing from 1 falls with the square root of the trials, as do the errors that decide it
    return trials * min(max(1.0, missing / (1 - ranking.overlap)) ** 2, 4.0)


def _quantile(values: Floats, quantile: float) -> float:
    """The value that this share of the examples does not exceed; examples without an estimate exceed all."""
    return float(np.quantile(np.where(np.isnan(values), np.inf, values), quantile, method="higher"))

"""The stopping rule: rounds of trials until the scores are as exact as the experiment asks for.

The first round is small; each later one has the trials that the present standard errors call for, since these fall with the square root
of the number of trials. The rule depends on the outcomes alone, so a run, a service and a repetition of either train the same trials.
"""

import math

import numpy as np

from memtail.estimators import memorization
from memtail.spec import SubsetsSpec, UntilSpec
from memtail.statistics import Statistics


def next_round(subsets: SubsetsSpec, statistics: Statistics, limit: int) -> int | None:
    """Return the number of trials of the next round, once `subsets.trials` are accumulated; None if these are enough.

    Args:
        subsets: the subset design, with the present number of trials and the bound `until` on a quantile of the standard errors.
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
    """Return the number of trials that the present standard errors call for; infinite while too many examples have no estimate."""
    errors = memorization(statistics).standard_error
    # before the first trial no example has an estimate
    error = float(np.quantile(np.where(np.isnan(errors), np.inf, errors), until.quantile, method="higher"))
    return statistics.trials * (error / until.standard_error) ** 2 if math.isfinite(error) else math.inf

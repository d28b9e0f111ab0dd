"""How many trials are enough: experiments that end when their scores are sharp enough, in rounds.

The first round is small; each later one has the trials that the present standard errors say are needed, since they fall with the square
root of the number of trials. What is trained follows from the outcomes alone, so that a run, a service and a repetition of either come to
the same trials.
"""

import math

import numpy as np

from memtail.estimators import memorization
from memtail.spec import SubsetsSpec, UntilSpec
from memtail.statistics import Statistics


def next_round(subsets: SubsetsSpec, statistics: Statistics) -> int | None:
    """The number of trials to have next, once `subsets.trials` are there; None if that is enough.

    Args:
        subsets: with the present number of trials, and `until`: the quantile of the examples' standard errors that is to come down.
        statistics: of those trials; diverged ones do not count.
    """
    until = subsets.until
    if until is None:
        return None
    needed, most = trials_needed(until, statistics), until.most_trials(subsets.fraction)
    if needed <= statistics.trials or subsets.trials >= most:
        return None
    # at least a tenth more, so that few rounds are needed, of which each waits for its slowest shard
    return min(most, max(math.ceil(needed) if math.isfinite(needed) else 0, subsets.trials + subsets.trials // 10 + 1))


def trials_needed(until: UntilSpec, statistics: Statistics) -> float:
    """The trials that the present standard errors say are needed for `until`; infinite while too many examples have no estimate."""
    errors = memorization(statistics).standard_error
    # before the first trial no example has an estimate
    error = float(np.quantile(np.where(np.isnan(errors), np.inf, errors), until.quantile, method="higher"))
    return statistics.trials * (error / until.standard_error) ** 2 if math.isfinite(error) else math.inf

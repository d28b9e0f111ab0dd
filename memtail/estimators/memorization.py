"""Memorization of training examples, with standard errors and confidence intervals."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from memtail.estimators.binomial import Floats, difference_interval, difference_standard_error, normal_interval, share
from memtail.estimators.soft import SoftMemorization, soft_memorization
from memtail.statistics import Statistics
from memtail.statistics.accumulator import Counts, PackedTrials


@dataclass(frozen=True)
class Memorization:
    """Estimates for n training examples; NaN for an example in every subset or in none.

    Where only scores are recorded, these are estimates of `memtail.estimators.soft`: mem_p, with Welch's standard errors, and mean scores.

    Attributes:
        value: float64 [n], mem_i = p_in - p_out.
        standard_error: float64 [n], of `value`.
        p_in, p_out: float64 [n], accuracy on the example of the models trained with it, and of those trained without it.
        k_in, k_out: int64 [n], the numbers of these models.
        of_scores: whether these are estimates of scores.
    """

    value: Floats
    standard_error: Floats
    p_in: Floats
    p_out: Floats
    k_in: Counts
    k_out: Counts
    of_scores: bool = False

    @cached_property
    def interval(self) -> tuple[Floats, Floats]:
        """float64 [n] and [n], the lower and the upper end of the 95% confidence interval of `value`."""
        if self.of_scores:
            return normal_interval(self.value, self.standard_error)
        return difference_interval(self.p_in, self.k_in, self.p_out, self.k_out)

    @property
    def undefined(self) -> int:
        """The number of examples without an estimate."""
        return int(np.isnan(self.value).sum())


def memorization(statistics: Statistics | PackedTrials) -> Memorization:
    """Estimate memorization by the equation of `memtail.estimators`, from column sums alone: O(n)."""
    if statistics.scores_only and (soft := soft_memorization(statistics)) is not None:
        return from_scores(soft, statistics.k_in.copy(), statistics.k_out)
    return from_counts(statistics.k_in.copy(), statistics.k_out, statistics.correct_in, statistics.correct - statistics.correct_in)


def from_scores(soft: SoftMemorization, k_in: Counts, k_out: Counts) -> Memorization:
    """Take estimates of scores, with the numbers of models behind them, in place of those of correctness."""
    return Memorization(soft.value, soft.standard_error, soft.score_in, soft.score_out, k_in, k_out, of_scores=True)


def from_counts(k_in: Counts, k_out: Counts, correct_in: Counts, correct_out: Counts) -> Memorization:
    """Estimate memorization from counts.

    Args:
        k_in: int64, the models trained with each example.
        k_out: int64 of this shape or one that broadcasts, as all others; the models trained without it.
        correct_in: int64, the models trained with it that classify it correctly.
        correct_out: int64, the models trained without it that classify it correctly.

    Returns:
        Estimates of the common shape.
    """
    p_in, p_out = share(correct_in, k_in), share(correct_out, k_out)
    return Memorization(p_in - p_out, difference_standard_error(p_in, k_in, p_out, k_out), p_in, p_out, k_in, k_out)


def expected_standard_error(trials: int, fraction: float) -> float:
    """Return the largest standard deviation of an estimate from t trials, with m = fraction * n: sqrt(1.19 / t) at 0.7.

    It is that of p_in = p_out = 1/2. The standard errors of the estimates are at most this, since each group has two models more there.
    """
    return float(np.sqrt(0.25 / (fraction * trials) + 0.25 / ((1 - fraction) * trials)))

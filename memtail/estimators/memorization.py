"""Memorization of every training example, with its standard error."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memtail.estimators.binomial import Floats, difference_standard_error, share
from memtail.statistics import Statistics
from memtail.statistics.accumulator import PackedTrials

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Memorization:
    """Estimates for n training examples; NaN where an example was never in or never out.

    Attributes:
        value: float64 [n], mem_i = p_in - p_out.
        error: float64 [n], its standard error.
        p_in, p_out: float64 [n], accuracy on the example of the models that saw it, and of those that did not.
        k_in, k_out: int64 [n], how many models those are.
    """

    value: Floats
    error: Floats
    p_in: Floats
    p_out: Floats
    k_in: Counts
    k_out: Counts

    @property
    def undefined(self) -> int:
        """The number of examples without an estimate."""
        return int(np.isnan(self.value).sum())


def memorization(statistics: Statistics | PackedTrials) -> Memorization:
    """Memorization by the equation of `memtail.estimators`; needs nothing but column sums, so it costs O(n)."""
    return from_counts(statistics.k_in.copy(), statistics.k_out, statistics.correct_in, statistics.correct - statistics.correct_in)


def from_counts(k_in: Counts, k_out: Counts, correct_in: Counts, correct_out: Counts) -> Memorization:
    """The same from counts of one shape: the models that saw each example and those that did not, and of either those that got it right."""
    p_in, p_out = share(correct_in, k_in), share(correct_out, k_out)
    return Memorization(p_in - p_out, difference_standard_error(p_in, k_in, p_out, k_out), p_in, p_out, k_in, k_out)


def expected_standard_error(trials: int, fraction: float) -> float:
    """The largest standard error to expect of t trials: both rates at 1/2, m = fraction * n; sqrt(1.19 / t) at 0.7."""
    return float(np.sqrt(0.25 / (fraction * trials) + 0.25 / ((1 - fraction) * trials)))

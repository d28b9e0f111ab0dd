"""Memorization and influence of soft outcomes, with Welch's standard errors.

With s the score of a model on an example, in [0, 1], the equations of `memtail.estimators` hold with s in place of correctness:

    mem_p_i    = mean of s_i over trials with i in the subset - mean of s_i over the others
    infl_p_ij  = mean of s_j over trials with i in the subset - mean of s_j over the others
    SE^2       = var_in / k_in + var_out / k_out

var_in and var_out are the unbiased variances of the two groups. An estimate needs a trial in each group, its standard error two: NaN else.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import numpy.typing as npt

from memtail.estimators.binomial import Floats, share
from memtail.estimators.influence import Index
from memtail.statistics import Statistics, cooccurrence
from memtail.statistics.accumulator import PackedTrials, column_sums
from memtail.statistics.soft import ONE, PLANES, Sums, Words


@dataclass(frozen=True)
class SoftMemorization:
    """Estimates for n training examples.

    Attributes:
        value: float64 [n], mem_p.
        standard_error: float64 [n], of `value`.
        score_in, score_out: float64 [n], mean scores of the models trained with the example, and of those trained without it.
    """

    value: Floats
    standard_error: Floats
    score_in: Floats
    score_out: Floats


def soft_memorization(statistics: Statistics) -> SoftMemorization | None:
    """Estimate memorization of scores from column sums alone: O(n); None if a trial has no scores."""
    if statistics.soft is None:
        return None
    soft, k_in, k_out = statistics.soft, statistics.k_in, statistics.k_out
    score_in, score_out = share(soft.score_in, k_in) / ONE, share(soft.score_out, k_out) / ONE
    variance = _mean_variance(soft.score_in, soft.square_in, k_in) + _mean_variance(soft.score_out, soft.square_out, k_out)
    return SoftMemorization(score_in - score_out, np.sqrt(variance), score_in, score_out)


@dataclass(frozen=True)
class SoftInfluence:
    """Influences of a training examples on the scores of b test examples.

    Attributes:
        members: uint64 [W, a], subsets of the trials, by training example.
        planes: uint64 [8, W, b], scores of the test examples.
        k_in: int64 [a], trials trained with the training example.
        trials: t.
    """

    members: Words
    planes: Words
    k_in: Sums
    trials: int

    @cached_property
    def value(self) -> Floats:
        """float64 [a, b], infl_p; NaN in the rows of training examples in every subset or in none."""
        (score_in, _), (score_out, _) = self._sums(squares=False)
        k_in = self.k_in[:, None]
        return (share(score_in, k_in) - share(score_out, self.trials - k_in)) / ONE

    @cached_property
    def standard_error(self) -> Floats:
        """float64 [a, b], of `value`; it takes 36 co-occurrence products, and `value` eight."""
        (score_in, square_in), (score_out, square_out) = self._sums(squares=True)
        k_in = self.k_in[:, None]
        return np.sqrt(_mean_variance(score_in, square_in, k_in) + _mean_variance(score_out, square_out, self.trials - k_in))

    def _sums(self, squares: bool) -> tuple[tuple[Sums, Sums], tuple[Sums, Sums]]:
        """Sums of scores and their squares, [a, b], over the trials with the training example and over the others."""
        score_in, square_in = np.zeros((2, self.members.shape[1], self.planes.shape[2]), np.int64)
        score, square = np.zeros((2, self.planes.shape[2]), np.int64)
        for plane, words in enumerate(self.planes):
            product = cooccurrence(self.members, words).astype(np.int64)
            score_in += product << plane
            square_in += product << 2 * plane
            score += column_sums(words) << plane
            square += column_sums(words) << 2 * plane
        for one, other in combinations(range(PLANES), 2) if squares else ():
            both = self.planes[one] & self.planes[other]
            square_in += cooccurrence(self.members, both).astype(np.int64) << one + other + 1
            square += column_sums(both) << one + other + 1
        return (score_in, square_in), (score - score_in, square - square_in)


def soft_influence(packed: PackedTrials, train: Index, test: Index) -> SoftInfluence | None:
    """Estimate influences on scores.

    Args:
        packed: the statistics.
        train: the training examples (rows), a slice or indices.
        test: the test examples (columns), a slice or indices.

    Returns:
        The block of these rows and columns; None if a trial has no scores.
    """
    if packed.test_score is None:
        return None
    return SoftInfluence(packed.membership[:, train], packed.test_score[:, :, test], packed.k_in[train], packed.trials)


def soft_influence_at(packed: PackedTrials, train: npt.NDArray[np.int64], test: npt.NDArray[np.int64]) -> tuple[Floats, Floats] | None:
    """Estimate the influences of p training examples on the score of one test example each.

    Args:
        packed: the statistics.
        train: int64 [p], training indices.
        test: int64 [p], test indices.

    Returns:
        float64 [p], the influences, and float64 [p], their standard errors; None if a trial has no scores.
    """
    if packed.test_score is None:
        return None
    score, square, score_in, square_in = np.zeros((4, len(train)), np.int64)
    for members, planes in zip(packed.membership, packed.test_score.swapaxes(0, 1), strict=True):
        inside, columns = members[train], planes[:, test]
        products = [(plane, plane, 2 * plane) for plane in range(PLANES)]
        products += [(one, other, one + other + 1) for one, other in combinations(range(PLANES), 2)]
        for one, other, power in products:
            both = columns[one] & columns[other]
            all_models, models_in = np.bitwise_count(both).astype(np.int64), np.bitwise_count(both & inside).astype(np.int64)
            square += all_models << power
            square_in += models_in << power
            if one == other:
                score += all_models << one
                score_in += models_in << one
    k_in = packed.k_in[train]
    k_out = packed.trials - k_in
    value = (share(score_in, k_in) - share(score - score_in, k_out)) / ONE
    variance = _mean_variance(score_in, square_in, k_in) + _mean_variance(score - score_in, square - square_in, k_out)
    return value, np.sqrt(variance)


def _mean_variance(total: Sums, squares: Sums, count: npt.NDArray[np.int64]) -> Floats:
    """Variance of the mean of `count` scores from their sum and the sum of their squares, in 255ths; NaN for fewer than two.

    The numerator is exact: `count` * `squares` - `total`^2 stays below 2^63 for some ten million trials.
    """
    numerator = count * squares - total**2
    count = np.broadcast_to(count, numerator.shape)
    variance: Floats = np.full(numerator.shape, np.nan)
    np.divide(numerator, count.astype(np.float64) ** 2 * (count - 1) * ONE**2, out=variance, where=count > 1)
    return variance

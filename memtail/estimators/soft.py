"""Memorization and influence of soft outcomes, with Welch's standard errors.

With s the score of a model on an example, in [0, 1], the equations of `memtail.estimators` hold with s in place of correctness:

    mem_p_i    = mean of s_i over trials with i in the subset - mean of s_i over the others
    infl_p_ij  = mean of s_j over trials with i in the subset - mean of s_j over the others
    SE^2       = var_in / k_in + var_out / k_out

var_in and var_out are the unbiased variances of the two groups. An estimate needs a trial in each group, its standard error two: NaN else.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import numpy.typing as npt

from memtail.errors import ScoresError
from memtail.estimators.binomial import Floats, share
from memtail.estimators.influence import BLOCK, Index
from memtail.statistics import Statistics, cooccurrence
from memtail.statistics.accumulator import PackedTrials, column_sums, unpack_words
from memtail.statistics.soft import ONE, PLANES, PRODUCTS, SoftSums, Sums, Words


@dataclass(frozen=True)
class SoftMemorization:
    """Estimates for n training examples, or [s, n] for them by each of s selections of trials.

    Attributes:
        value: float64 [n], mem_p.
        standard_error: float64 [n], of `value`.
        score_in, score_out: float64 [n], mean scores of the models trained with the example, and of those trained without it.
    """

    value: Floats
    standard_error: Floats
    score_in: Floats
    score_out: Floats


def soft_memorization(statistics: Statistics | PackedTrials) -> SoftMemorization | None:
    """Estimate memorization of scores from column sums alone: O(n); None if a trial has no scores.

    Packed statistics have the scores of training examples only where these are in the place of correctness.
    """
    if (sums := statistics.soft) is None:
        return None
    return _memorization(sums, statistics.k_in, statistics.k_out)


def soft_memorization_by(selections: Words, trials: Sums, members: Words, planes: Words, errors: bool) -> tuple[SoftMemorization, Sums]:
    """Estimate memorization of the scores of b training examples by s selections of trials.

    Args:
        selections: uint64 [W, s], packed.
        trials: int64 [s, 1], the trials of each selection.
        members: uint64 [W, b], the subsets.
        planes: uint64 [8, W, b], the scores.
        errors: whether to compute standard errors, which take three quarters of the time; they are NaN else.

    Returns:
        The estimates, [s, b], and int64 [s, b], the trials of each selection with each example in their subset.
    """
    k_in = cooccurrence(selections, members).astype(np.int64)
    (score_in, square_in), (score, square) = (_selected(selections, each, errors) for each in (planes & members, planes))
    sums = SoftSums(score_in, square_in, score - score_in, square - square_in)
    return _memorization(sums, k_in, trials - k_in, errors), k_in


def _selected(selections: Words, planes: Words, squares: bool) -> tuple[Sums, Sums]:
    """Sums of scores and of their squares, int64 [s, b], over selections of trials; the latter are of no use without `squares`."""
    score, square = np.zeros((2, selections.shape[1], planes.shape[2]), np.int64)
    for one, other, exponent in PRODUCTS if squares else PRODUCTS[:PLANES]:
        product = cooccurrence(selections, planes[one] & planes[other]).astype(np.int64)
        square += product << exponent
        if one == other:
            score += product << one
    return score, square


def _memorization(sums: SoftSums, k_in: Sums, k_out: Sums, errors: bool = True) -> SoftMemorization:
    score_in, score_out = share(sums.score_in, k_in) / ONE, share(sums.score_out, k_out) / ONE
    variance = np.full(score_in.shape, np.nan)
    if errors:
        variance = _mean_variance(sums.score_in, sums.square_in, k_in) + _mean_variance(sums.score_out, sums.square_out, k_out)
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

    def standard_error_at(self, i: npt.NDArray[np.int64], j: npt.NDArray[np.int64]) -> Floats:
        """Return float64 [p], the standard errors at p places (i, j) of the block alone."""
        return self.at(i, j)[1]

    def at(self, i: npt.NDArray[np.int64], j: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Return float64 [p], the influences at p places (i, j) of the block, and float64 [p], their standard errors."""
        score, square, score_in, square_in = np.zeros((4, len(i)), np.int64)
        for members, planes in zip(self.members, self.planes.swapaxes(0, 1), strict=True):
            inside, columns = members[i], planes[:, j]
            for one, other, weight in PRODUCTS:
                both = columns[one] & columns[other]
                all_models, models_in = np.bitwise_count(both).astype(np.int64), np.bitwise_count(both & inside).astype(np.int64)
                square += all_models << weight
                square_in += models_in << weight
                if one == other:
                    score += all_models << one
                    score_in += models_in << one
        k_in = self.k_in[i]
        k_out = self.trials - k_in
        value = (share(score_in, k_in) - share(score - score_in, k_out)) / ONE
        variance = _mean_variance(score_in, square_in, k_in) + _mean_variance(score - score_in, square - square_in, k_out)
        return value, np.sqrt(variance)

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


def soft_influence_blocks(packed: PackedTrials, train: npt.NDArray[np.int64], test: Index) -> Iterator[tuple[slice, SoftInfluence]]:
    """Estimate influences of many training examples on scores, as `memtail.estimators.influence_blocks`; nothing without scores."""
    for start in range(0, len(train), BLOCK):
        rows = slice(start, min(start + BLOCK, len(train)))
        if (block := soft_influence(packed, train[rows], test)) is not None:
            yield rows, block


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
    return SoftInfluence(packed.membership, packed.test_score, packed.k_in, packed.trials).at(train, test)


def scores_on_test(packed: PackedTrials, test: int) -> Floats:
    """Return float64 [t], the scores of the trials that count on a test example, by index. Raises: ScoresError: a trial has none."""
    if packed.test_score is None:
        raise ScoresError("not all trials have recorded scores")
    bits = unpack_words(packed.test_score[:, :, test])[:, packed.counted_mask]
    scores: Floats = (bits << np.arange(PLANES)[:, None]).sum(0) / ONE
    return scores


def mean_score(scores: Floats) -> tuple[float, float]:
    """Return the mean of scores, NaN without any, and its standard error, NaN for fewer than two."""
    value = float(scores.mean()) if len(scores) else np.nan
    return value, float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else np.nan


def _mean_variance(total: Sums, squares: Sums, count: npt.NDArray[np.int64]) -> Floats:
    """Variance of the mean of `count` scores from their sum and the sum of their squares, in 255ths; NaN for fewer than two.

    The numerator is exact: `count` * `squares` - `total`^2 stays below 2^63 for some ten million trials.
    """
    numerator = count * squares - total**2
    count = np.broadcast_to(count, numerator.shape)
    variance: Floats = np.full(numerator.shape, np.nan)
    np.divide(numerator, count.astype(np.float64) ** 2 * (count - 1) * ONE**2, out=variance, where=count > 1)
    return variance

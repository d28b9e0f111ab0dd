"""Convergence of memorization as trials arrive, and standard errors of statistics over examples.

The share of examples above a threshold is not a mean over trials, and its terms are dependent, since all examples share the trials.
So its standard error has no closed form and comes from random halves of the trials. A mean over half of t trials, drawn
without replacement, deviates from the mean over all t trials with the variance of the latter; so the standard deviation of a statistic
over halves is its standard error (half-sampling; Shao and Tu, The Jackknife and Bootstrap, 1995, chapter 2). The jackknife, which leaves
out blocks of trials, fails because thresholds are not smooth.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memtail.estimators.binomial import Floats
from memtail.estimators.memorization import Memorization, from_counts, from_scores
from memtail.estimators.soft import soft_memorization_by
from memtail.statistics import cooccurrence
from memtail.statistics.accumulator import PackedTrials, Words, pack_words

#: Random halves behind a standard error.
HALVES = 32
#: Examples per block, which bounds the memory.
BLOCK = 4096
# Trials of the first stage, at least.
_FEWEST = 16


@dataclass(frozen=True)
class Stage:
    """Memorization by the first trials, over the examples with an estimate from them.

    Attributes:
        trials: their number.
        standard_errors: float64, the requested quantiles of the examples' standard errors.
        shares, shares_se: float64, the share of the examples with mem_i at or above each threshold, and its standard error.
        counts, counts_se: float64, the number of examples in each bin of a histogram, and its standard error.
        mean, mean_se: the mean of mem_i, and its standard error.
    """

    trials: int
    standard_errors: Floats
    shares: Floats
    shares_se: Floats
    counts: Floats
    counts_se: Floats
    mean: float
    mean_se: float


def stages(trials: int) -> list[int]:
    """Return numbers of trials up to `trials`, each twice the one before."""
    numbers = [trials]
    while numbers[-1] >= 2 * _FEWEST:
        numbers.append(numbers[-1] // 2)
    return numbers[::-1]


def convergence(packed: PackedTrials, thresholds: Sequence[float], quantiles: Sequence[float], edges: Floats) -> list[Stage]:
    """Estimate memorization after each of `stages(t)` of the t trials, in the order of their indices.

    Args:
        packed: the statistics.
        thresholds: of memorization.
        quantiles: of its standard errors, 0 to 1.
        edges: float64, of the histogram's bins.

    Returns:
        The stages; the last is of all trials. Halves are drawn with a fixed seed, so equal statistics give equal stages.
    """
    numbers = stages(packed.trials)
    selections = np.concatenate([_halves(packed, number) for number in numbers])
    rows = len(selections)
    errors: Floats = np.empty((len(numbers), packed.n_train))
    above = np.zeros((rows, len(thresholds)))
    counts = np.zeros((rows, len(edges) - 1))
    defined, total = np.zeros(rows), np.zeros(rows)
    whole = np.arange(len(numbers)) * (1 + HALVES)  # rows with all trials of a stage
    for block, mem in memorization_by(packed, selections[whole]):
        errors[:, block] = mem.standard_error
    for _, mem in memorization_by(packed, selections, errors=False):
        value = mem.value  # NaN is above no threshold, and in no bin
        defined += (~np.isnan(value)).sum(1)
        total += np.nansum(value, 1)
        above += np.stack([(value >= threshold).sum(1) for threshold in thresholds], 1)
        counts += np.stack([np.histogram(row, edges)[0] for row in value])
    with np.errstate(invalid="ignore"):
        shares, means = above / defined[:, None], total / defined
    result = []
    for place, number in enumerate(numbers):
        first = whole[place]
        halves = slice(first + 1, first + 1 + HALVES)
        estimated = errors[place][~np.isnan(errors[place])]
        result.append(
            Stage(
                number,
                np.quantile(estimated, quantiles) if len(estimated) else np.full(len(quantiles), np.nan),
                shares[first],
                shares[halves].std(0, ddof=1),
                counts[first],
                counts[halves].std(0, ddof=1),
                float(means[first]),
                float(means[halves].std(ddof=1)),
            )
        )
    return result


def memorization_by(
    packed: PackedTrials, selections: npt.NDArray[np.bool_], *, errors: bool = True
) -> Iterator[tuple[slice, Memorization]]:
    """Estimate memorization by selections of trials, a block of examples at a time.

    Args:
        packed: the statistics.
        selections: bool [s, t], each row a selection of the trials that count, by index.
        errors: whether standard errors are needed. Those of scores take three quarters of the time, and are NaN without.

    Yields:
        The place of the examples, and their estimates, of shape [s, block].
    """
    words = _words(packed, selections)
    trials = selections.sum(1)[:, None]
    for start in range(0, packed.n_train, BLOCK):
        block = slice(start, min(start + BLOCK, packed.n_train))
        members = packed.membership[:, block]
        if packed.train_score is not None:
            soft, k_in = soft_memorization_by(words, trials, members, packed.train_score[:, :, block], errors)
            yield block, from_scores(soft, k_in, trials - k_in)
            continue
        correct = packed.correctness("train")[:, block]
        k_in, correct_in, correct_all = (cooccurrence(words, bits).astype(np.int64) for bits in (members, members & correct, correct))
        yield block, from_counts(k_in, trials - k_in, correct_in, correct_all - correct_in)


def _halves(packed: PackedTrials, number: int) -> npt.NDArray[np.bool_]:
    """Bool [1 + HALVES, t]: the first `number` trials, and random halves of them."""
    rng = np.random.default_rng(number)
    selections = np.zeros((1 + HALVES, packed.trials), np.bool_)
    selections[0, :number] = True
    for row in selections[1:]:
        row[rng.permutation(number)[: number // 2]] = True
    return selections


def _words(packed: PackedTrials, selections: npt.NDArray[np.bool_]) -> Words:
    """uint64 [W, s]: the selections, packed as the statistics are."""
    counted = packed.counted_mask
    bits = np.zeros((len(selections), len(counted)), np.bool_)
    bits[:, counted] = selections
    return np.ascontiguousarray(pack_words(bits).T)

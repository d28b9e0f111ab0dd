"""How scores sharpen as trials arrive, and how far what is counted over examples may be off.

The number of examples above a threshold is no mean over trials, so it has no standard error in closed form, and its terms depend on one
another: all examples were trained on in the same trials. It is taken from random halves of the trials. Half of t trials, drawn without
replacement, gives a mean that differs from that of all t by as much as that of all t differs from the truth; so the spread of a statistic
over halves is its standard error (half-sampling; Shao and Tu, The Jackknife and Bootstrap, 1995, chapter 2). Leaving out blocks of
trials, the jackknife, would not do, since thresholds are not smooth.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memtail.estimators.binomial import Floats
from memtail.estimators.memorization import Memorization, from_counts
from memtail.statistics import cooccurrence
from memtail.statistics.accumulator import PackedTrials, Words, pack_words

#: Random halves that a standard error is taken from.
HALVES = 32
#: Examples per block, which bounds the memory.
BLOCK = 4096
# The fewest trials that a convergence begins with.
_FEWEST = 16


@dataclass(frozen=True)
class Stage:
    """Memorization by the first so many trials, over all examples that then have an estimate; those without one are left out.

    Attributes:
        trials: how many.
        standard_errors: float64, the quantiles asked for of the examples' standard errors.
        shares, share_errors: float64, the share of the examples with mem_i at or above each threshold, and its standard error.
        counts, count_errors: float64, the number of examples in each bin of a histogram, and its standard error.
        mean, mean_error: the mean of mem_i, and its standard error.
    """

    trials: int
    standard_errors: Floats
    shares: Floats
    share_errors: Floats
    counts: Floats
    count_errors: Floats
    mean: float
    mean_error: float


def stages(trials: int) -> list[int]:
    """Numbers of trials, each twice the one before, up to `trials`."""
    numbers = [trials]
    while numbers[-1] >= 2 * _FEWEST:
        numbers.append(numbers[-1] // 2)
    return numbers[::-1]


def convergence(packed: PackedTrials, thresholds: Sequence[float], quantiles: Sequence[float], edges: Floats) -> list[Stage]:
    """Memorization after each of `stages(t)` of the t trials, in the order of their indices.

    Args:
        packed: the statistics.
        thresholds: of memorization.
        quantiles: of its standard errors, 0 to 1.
        edges: of the histogram's bins.

    Returns:
        One stage each; the last is of all trials. Halves are drawn with a fixed seed, so equal statistics give equal stages.
    """
    numbers = stages(packed.trials)
    chosen = np.concatenate([_halves(packed, number) for number in numbers])
    rows = len(chosen)
    errors: Floats = np.empty((len(numbers), packed.n_train))
    above = np.zeros((rows, len(thresholds)))
    counts = np.zeros((rows, len(edges) - 1))
    defined, total = np.zeros(rows), np.zeros(rows)
    whole = np.arange(len(numbers)) * (1 + HALVES)
    for block, mem in memorization_by(packed, chosen):
        errors[:, block] = mem.error[whole]
        value = mem.value  # NaN is at or above nothing, and in no bin
        defined += (~np.isnan(value)).sum(1)
        total += np.nansum(value, 1)
        above += np.stack([(value >= threshold).sum(1) for threshold in thresholds], 1)
        counts += np.stack([np.histogram(row, edges)[0] for row in value])
    with np.errstate(invalid="ignore"):
        shares, means = above / defined[:, None], total / defined
    found = []
    for place, number in enumerate(numbers):
        first = whole[place]
        halves = slice(first + 1, first + 1 + HALVES)
        known = errors[place][~np.isnan(errors[place])]
        found.append(
            Stage(
                number,
                np.quantile(known, quantiles) if len(known) else np.full(len(quantiles), np.nan),
                shares[first],
                shares[halves].std(0, ddof=1),
                counts[first],
                counts[halves].std(0, ddof=1),
                float(means[first]),
                float(means[halves].std(ddof=1)),
            )
        )
    return found


def memorization_by(packed: PackedTrials, chosen: npt.NDArray[np.bool_]) -> Iterator[tuple[slice, Memorization]]:
    """Memorization by some of the trials only, a block of examples at a time.

    Args:
        packed: the statistics.
        chosen: bool [s, t], each row a choice among the trials that count, by index.

    Yields:
        The examples' place, and their estimates, of shape [s, block].
    """
    words = _words(packed, chosen)
    trials = chosen.sum(1)[:, None]
    for start in range(0, packed.n_train, BLOCK):
        block = slice(start, min(start + BLOCK, packed.n_train))
        members, right = packed.membership[:, block], packed.train_correct[:, block]
        k_in, correct_in, correct = (cooccurrence(words, bits).astype(np.int64) for bits in (members, members & right, right))
        yield block, from_counts(k_in, trials - k_in, correct_in, correct - correct_in)


def _halves(packed: PackedTrials, number: int) -> npt.NDArray[np.bool_]:
    """Bool [1 + HALVES, t]: the first `number` trials, and random halves of them."""
    rng = np.random.default_rng(number)
    chosen = np.zeros((1 + HALVES, packed.trials), np.bool_)
    chosen[0, :number] = True
    for row in chosen[1:]:
        row[rng.permutation(number)[: number // 2]] = True
    return chosen


def _words(packed: PackedTrials, chosen: npt.NDArray[np.bool_]) -> Words:
    """uint64 [W, s]: the choices, at the places that the trials have in the statistics."""
    counted = packed.counted_mask
    bits = np.zeros((len(chosen), len(counted)), np.bool_)
    bits[:, counted] = chosen
    return np.ascontiguousarray(pack_words(bits).T)

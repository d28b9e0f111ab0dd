"""Overlap of what two runs select, as random halves of the trials of one show it, and the trials that an overlap needs.

The overlap of two selections is the Jaccard coefficient J, the size of their intersection over the size of their union. Two disjoint halves
of t trials show how far two runs of t / 2 trials agree; two halves of half of the trials, how far runs of t / 4 do, and so on.

What is missing from 1 falls with a power of the trials, 1 - J = a t^-b: the share of examples whose score is so close to the threshold that
chance decides falls with their standard error. An overlap reached with fewer trials than there are is read from the measurements. For a
higher one the power law is fitted to their logarithms by least squares, once for each split. From the halves alone, b is taken as 1/2, by
which standard errors fall: a fitted b has more noise than the factor of 2 to the whole needs.

The splits are drawn from the numbers of the trials, so equal trials have equal overlaps in any order.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from memtail.estimators.adjusted import select_pairs
from memtail.estimators.memorization import memorization
from memtail.estimators.pairs import Indices
from memtail.randomness import Purpose, random_keys
from memtail.statistics.accumulator import PackedTrials

#: Number of random splits of the trials, and the fewest trials of a half.
SPLITS = 5
SMALLEST_HALF = 50
#: The power law is used up to this multiple of the largest measured number of trials.
REACH = 8

# The power of the trials by which standard errors fall, and the splits that are worth their seconds where a run waits for them.
_EXPONENT = 0.5
_FEW_SPLITS = 2


@dataclass(frozen=True)
class Overlaps:
    """Overlaps of two disjoint sets of `trials` trials each, one for each random split; None where neither set selects anything."""

    trials: int
    by_split: Sequence[float | None]

    @property
    def defined(self) -> list[float]:
        """The overlaps that are not None."""
        return [overlap for overlap in self.by_split if overlap is not None]

    @property
    def mean(self) -> float | None:
        """Mean of those that are not None; None if there are none."""
        return mean_defined(self.by_split)


@dataclass(frozen=True)
class Needed:
    """Trials needed for an overlap.

    Attributes:
        trials: the number; None if it is unknown or beyond reach.
        beyond: lower bound of the number if it is beyond reach.
        fewest, most: range of the number over single splits, where it was extrapolated; None if beyond reach.
        measured: whether the overlap was reached by the measurements: `trials` reach it, and half as many do not, or were not measured.
    """

    trials: int | None = None
    beyond: int | None = None
    fewest: int | None = None
    most: int | None = None
    measured: bool = False


def halves(packed: PackedTrials, trials: int, split: int) -> tuple[PackedTrials, PackedTrials]:
    """Draw two disjoint sets of trials.

    Args:
        packed: the statistics.
        trials: number of trials of each set, at most half of all.
        split: number of the split: equal ones of equal trials are equal.
    """
    drawn = packed.counted_trials[np.argsort(random_keys(packed.trials, 0, Purpose.HALVES, trials, split))]
    return packed.select(drawn[:trials]), packed.select(drawn[trials : 2 * trials])


def sizes(trials: int) -> list[int]:
    """Return the numbers of trials at which halves are compared, falling: half of all, a quarter, and so on; none if these are too few."""
    numbers = []
    while (trials := trials // 2) >= SMALLEST_HALF:
        numbers.append(trials)
    return numbers


def jaccard(first: Indices, second: Indices) -> float | None:
    """Return the overlap of two selections, int64 [a] and [b] without repetitions; None if both are empty."""
    both = len(np.intersect1d(first, second, assume_unique=True))
    union = len(first) + len(second) - both
    return both / union if union else None


def mean_defined(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None; None if there are none."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def pair_selection(
    packed: PackedTrials, train_labels: Indices, test_labels: Indices, progress: Callable[[], object] = lambda: None
) -> Indices:
    """Select pairs by adjusted influence: int64 [p], the numbers train * q + test. Arguments are those of `select_pairs`."""
    pairs = select_pairs(packed, memorization(packed).value, train_labels, test_labels, progress=progress)
    return pairs.train * packed.n_test + pairs.test


def expected_pair_overlap(
    packed: PackedTrials, train_labels: Indices, test_labels: Indices, progress: Callable[[], object] = lambda: None
) -> float:
    """Return the expected overlap of the pairs that two disjoint runs of as many trials select by adjusted influence.

    Halves that both select no pair have an overlap of 0, as they would agree on none; without any pair in common, 0 is returned.

    Args:
        packed: the statistics.
        train_labels: int64 [n].
        test_labels: int64 [q].
        progress: called after each piece of work: four selections, each of half of the trials.
    """
    overlaps = []
    for split in range(_FEW_SPLITS):
        chosen = (pair_selection(half, train_labels, test_labels, progress) for half in halves(packed, packed.trials // 2, split))
        overlaps.append(jaccard(*chosen) or 0.0)
    mean = sum(overlaps) / len(overlaps)
    return 1 - (1 - mean) / 2**_EXPONENT if mean else 0.0


def trials_for_overlap(overlap: float, measured: Sequence[Overlaps]) -> Needed:
    """Estimate the number of trials of two runs that have an overlap.

    Args:
        overlap: the overlap.
        measured: measurements with equally many splits each, those of most trials first; at least one.
    """
    reached = None
    for each in measured:
        if each.mean is None or each.mean < overlap:
            break
        reached = each.trials
    if reached is not None:
        return Needed(reached, measured=True)
    splits = len(measured[0].by_split)
    estimates = sorted(_extrapolate(overlap, [(each.trials, each.by_split[split]) for each in measured]) for split in range(splits))
    if math.isnan(sum(estimates)):
        return Needed()
    fewest, middle, most = (
        None if math.isinf(trials) else math.ceil(trials) for trials in (estimates[0], estimates[splits // 2], estimates[-1])
    )
    return Needed(middle, REACH * measured[0].trials if middle is None else None, fewest, most)


def _extrapolate(overlap: float, measured: Sequence[tuple[int, float | None]]) -> float:
    """Trials for an overlap by the power law through one split of each number; infinite beyond `REACH`, NaN if there is no fit."""
    points = [(trials, jaccard) for trials, jaccard in measured if jaccard is not None and jaccard < 1]
    if len(points) < 2:
        return math.nan
    slope, intercept = np.polyfit([math.log(trials) for trials, _ in points], [math.log(1 - jaccard) for _, jaccard in points], 1)
    most = measured[0][0]
    exponent = (math.log(1 - overlap) - intercept) / slope if slope < 0 else math.inf
    return max(most, math.exp(exponent)) if exponent <= math.log(REACH * most) else math.inf

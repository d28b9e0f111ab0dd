"""Adjusted influence, and the pairs that it selects: the same ones from about half the trials that thresholds of influence need.

Influence is a difference of two shares of correct models, and whether a model is correct is one bit of what its score s on a test example
says: scores of 0.51 and of 0.99 count the same. So correctness is replaced by a smooth step of the score,

    c = Phi(log(s / (1 - s)) / (BANDWIDTH sd))

where sd is the standard deviation of the log-odds of the example over the trials. A difference of means of c has less noise than one of
correctness. It is smaller, too: by sqrt(1 + BANDWIDTH^2) for log-odds that are normal around 0, so it is multiplied by that.

Much of the remaining noise comes from other training examples, since a test example that depends on one often depends on several. So the
difference is adjusted, by linear regression on their membership, for those candidates whose effects on the example are largest, all but the
training example itself. Subsets do not depend on outcomes, so this changes the noise, and not what is estimated.

Without scores, c is correctness. Where only scores are recorded, it is the score itself, as it need not be a probability.

Sums over trials are sums of integers, so equal trials give equal sums in any order. Values of selected pairs are rounded.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from memtail.estimators.binomial import Floats
from memtail.estimators.false_discovery import LARGEST_RATE, discovery_rates
from memtail.estimators.pairs import INFL_THRESHOLD, MEM_THRESHOLD, Indices, candidates
from memtail.statistics import cooccurrence
from memtail.statistics.accumulator import PackedTrials, Words, unpack_words
from memtail.statistics.soft import ONE, PLANES

#: Width of the step, in standard deviations of the log-odds of the example.
BANDWIDTH = 2.5
#: Smallest adjusted influence of a selected pair where c is a smooth step; else it is the paper's threshold of influence.
SMOOTHED_THRESHOLD = 0.18
#: Largest false discovery rate of a selected pair.
RATE = 0.1

# An example is adjusted for at most this many candidates, whose effects have at least this many standard errors, and for at most one per
# this many trials.
_MOST_ADJUSTED = 12
_SMALLEST_EFFECT = 3.0
_TRIALS_PER_ADJUSTED = 10
# Bounds of the memory: test examples per block, and training examples per product.
_COLUMNS = 256
_ROWS = 4096
# Trials per product: float32 holds their sums exactly.
_TRIALS = 2**24 // ONE

# Least variance of c, that of its rounding to 255ths: outcomes may have no noise, and what is left of a regression is then 0 or less.
_ROUNDING = 1 / 12
# Decimals of selected values, far below their standard errors: regressions differ in the last bits between processors, and equal trials are
# to give equal files.
_DECIMALS = 6

_Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SelectedPairs:
    """Pairs of one class by falling adjusted influence; ties by training index, then by test index.

    Attributes:
        train, test: int64 [p], indices in original order.
        value: float64 [p], adjusted influence.
        z: float64 [p], adjusted influence in standard errors that hold without influence.
        rate: float64 [p], the false discovery rate at which the pair is kept (its q-value) among all pairs tested.
        tested: the number of pairs tested.
    """

    train: Indices
    test: Indices
    value: Floats
    z: Floats
    rate: Floats
    tested: int

    def __len__(self) -> int:
        return len(self.train)


def select_pairs(
    packed: PackedTrials,
    mem: Floats,
    train_labels: Indices,
    test_labels: Indices,
    mem_threshold: float = MEM_THRESHOLD,
    progress: Callable[[], object] = lambda: None,
) -> SelectedPairs:
    """Select pairs by adjusted influence, among the pairs of one class with mem_i >= `mem_threshold`.

    Args:
        packed: the statistics.
        mem: float64 [n], memorization.
        train_labels: int64 [n].
        test_labels: int64 [q].
        mem_threshold: of memorization.
        progress: called after each block of test examples, as one takes a second or more of many training examples.

    Returns:
        The pairs of at least the threshold of adjusted influence, at a false discovery rate of at most `RATE`.
    """
    threshold = SMOOTHED_THRESHOLD if _smooth(packed) else INFL_THRESHOLD
    parts, small, tested = [np.empty((4, 0))], [np.empty(0)], 0
    for rows, columns in candidates(mem, train_labels, test_labels, mem_threshold):
        for part in _slices(len(columns), _COLUMNS):
            block = columns[part]
            value, z = (np.round(each, _DECIMALS) for each in adjusted_influence(packed, rows, block))
            tails = ndtr(-z)
            i, j = np.nonzero((value >= threshold) & (tails <= LARGEST_RATE))
            parts.append(np.stack([rows[i], block[j], value[i, j], z[i, j]]))
            small.append(tails[tails <= LARGEST_RATE])
            tested += tails.size
            progress()
    train, test, value, z = np.concatenate(parts, axis=1)
    rate, _ = discovery_rates(np.concatenate(small), tested, ndtr(-z))
    order = np.lexsort((test, train, -value))
    order = order[rate[order] <= RATE]
    return SelectedPairs(train[order].astype(np.int64), test[order].astype(np.int64), value[order], z[order], rate[order], tested)


def adjusted_influence(packed: PackedTrials, train: Indices, test: Indices) -> tuple[Floats, Floats]:
    """Estimate the adjusted influence of each training example on each test example.

    Args:
        packed: the statistics.
        train: int64 [a], the candidates: the training examples, whose membership is also adjusted for.
        test: int64 [b], test examples.

    Returns:
        float64 [a, b], adjusted influences, and float64 [a, b], their z; NaN in the rows of training examples in every subset or in none.
    """
    t, words = packed.trials, packed.membership[:, train]
    steps = _steps(packed, test)
    product, total = _sums_in(packed, words, steps), steps.sum(0, dtype=np.int64)
    squares = np.einsum("tj,tj->j", steps, steps, dtype=np.int64) - total**2 / t  # of deviations from the mean
    k_in = packed.k_in[train][:, None].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = product / k_in - (total - product) / (t - k_in)
        unit = np.sqrt(1 / k_in + 1 / (t - k_in))
        chosen = _largest_effects(difference / (np.sqrt(squares / (t - 1)) * unit), t)
    union = np.unique(np.concatenate(chosen))
    together = cooccurrence(words, words[:, union]) if len(union) else np.empty((len(train), 0), np.int32)
    left = np.full(len(test), t - 1)  # degrees of freedom
    with np.errstate(divide="ignore", invalid="ignore"):
        for j, near in enumerate(chosen):
            both, members = together[:, np.searchsorted(union, near)], k_in[near, 0]
            effects = product[near, j] - members * total[j] / t
            slopes = np.linalg.lstsq(both[near] - np.outer(members, members) / t, effects, rcond=None)[0]
            overlap = both / k_in - (members - both) / (t - k_in)  # difference of the shares of trials with the other
            difference[:, j] -= overlap @ slopes
            difference[near, j] += slopes  # not for itself, with which its overlap is 1
            squares[j] -= slopes @ effects
            left[j] -= len(near)
        z = difference / (np.sqrt(np.maximum(squares, t * _ROUNDING) / left) * unit)
    scale = np.sqrt(1 + BANDWIDTH**2) if _smooth(packed) else 1.0
    return difference * scale / ONE, np.where(np.isfinite(z), z, np.nan)


def _largest_effects(effect: Floats, trials: int) -> list[Indices]:
    """For each column of effects [a, b], in standard errors, the rows to adjust for, ascending."""
    size = np.where(np.isfinite(effect), np.abs(effect), 0)
    largest = np.argsort(-size, axis=0, kind="stable")[: min(_MOST_ADJUSTED, trials // _TRIALS_PER_ADJUSTED)]
    return [np.sort(rows[size[rows, j] >= _SMALLEST_EFFECT]) for j, rows in enumerate(largest.T)]


def _smooth(packed: PackedTrials) -> bool:
    return packed.test_score is not None and not packed.scores_only


def _steps(packed: PackedTrials, test: Indices) -> _Bytes:
    """Values of c for test examples, in 255ths: uint8 [t, b]."""
    if packed.test_score is None:
        return _bits(packed, packed.correctness("test")[:, test]) * np.uint8(ONE)
    scores = np.zeros((packed.trials, len(test)), np.uint8)
    for plane in range(PLANES):
        scores |= _bits(packed, packed.test_score[plane][:, test]) << np.uint8(plane)
    if not _smooth(packed):
        return scores
    levels = np.arange(ONE + 1).clip(0.5, ONE - 0.5)  # rounded to 0 or 1 were scores of less than half a step
    odds = np.log(levels / (ONE - levels))
    counts = np.apply_along_axis(np.bincount, 0, scores, minlength=ONE + 1)
    mean = odds @ counts / packed.trials
    spread = np.sqrt(np.maximum(odds**2 @ counts / packed.trials - mean**2, np.finfo(np.float32).eps))
    table = np.rint(ndtr(odds[:, None] / (BANDWIDTH * spread)) * ONE).astype(np.uint8)
    steps: _Bytes = np.take_along_axis(table, scores, axis=0)
    return steps


def _sums_in(packed: PackedTrials, words: Words, steps: _Bytes) -> Floats:
    """Sums of the steps over the trials with each training example in their subset: float64 [a, b], integers."""
    out = np.zeros((words.shape[1], steps.shape[1]))
    for rows in _slices(len(out), _ROWS):
        members = _bits(packed, words[:, rows])
        for trials in _slices(len(steps), _TRIALS):
            out[rows] += members[trials].astype(np.float32).T @ steps[trials].astype(np.float32)
    return out


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def _bits(packed: PackedTrials, words: Words) -> _Bytes:
    """Unpack words [W, b] into uint8 [t, b], the bits of the trials that count."""
    bits: _Bytes = unpack_words(words.T).T[packed.counted_mask].view(np.uint8)
    return bits

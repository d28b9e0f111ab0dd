"""Adjusted influence, and the pairs that it selects: the same ones from about half the trials that thresholds of influence need.

Influence is a difference of two shares of correct models, and whether a model is correct is one bit of what its score s on a test example
says: scores of 0.51 and of 0.99 count the same. So correctness is replaced by a smooth step of the score,

    c = Phi(log(s / (1 - s)) / (BANDWIDTH sd))

where sd is the standard deviation of the log-odds of the example over the trials. A difference of means of c has less noise than one of
correctness. It is smaller, too: by sqrt(1 + BANDWIDTH^2) for log-odds that are normal around 0, so it is multiplied by that.

Much of the remaining noise comes from other training examples, since a test example that depends on one often depends on several. So the
difference is adjusted, by linear regression on their membership, for the training examples of the class whose effects on the example are
largest, all but the one in question. Subsets do not depend on outcomes, so this changes the noise, and not what is estimated.

Without scores, c is correctness. Where only scores are recorded, it is the score itself, as it need not be a probability.

Sums over trials are sums of integers, so equal trials give equal sums in any order. Values of selected pairs are rounded.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt

from memtail.estimators.binomial import Floats, normal_tail
from memtail.estimators.false_discovery import LARGEST_RATE, discovery_rates
from memtail.estimators.pairs import INFL_THRESHOLD, MEM_THRESHOLD, Indices, candidates
from memtail.statistics import cooccurrence
from memtail.statistics.accumulator import PackedTrials, Words, unpack_words
from memtail.statistics.soft import ONE, PLANES

#: Width of the step, in standard deviations of the log-odds of the example.
BANDWIDTH = 2.5
#: Smallest adjusted influence of a selected pair where c is a smooth step; else it is the paper's threshold of influence.
SMOOTHED_THRESHOLD = 0.17
#: Largest false discovery rate of a selected pair.
RATE = 0.1

# Adjusted for are at most this many training examples, whose effects have at least this many standard errors, and at most one per this many
# trials.
_MOST_ADJUSTED = 12
_SMALLEST_EFFECT = 3.0
_TRIALS_PER_ADJUSTED = 10
# Below this z tails exceed `LARGEST_RATE`, and are not computed.
_SMALLEST_Z = 1.28
# Smallest variance of c given the others, in 255ths: their resolution. It is 0 where other examples determine c.
_LEAST_VARIANCE = 1.0
# Bounds of the memory: test examples per block, and training examples per product.
_COLUMNS = 256
_ROWS = 4096
# Trials per product: float32 holds their sums exactly.
_TRIALS = 2**24 // ONE

# Decimals of selected values, far below their standard errors: regressions differ in the last bits between processors, and equal trials are
# to give equal files.
_DECIMALS = 6

_Bytes = npt.NDArray[np.uint8]
# Training examples, the trials with each in their subset, and the sums of the steps over these.
_Sums = tuple[Indices, Floats, Floats]


@dataclass(frozen=True)
class SelectedPairs:
    """Pairs of one class by falling adjusted influence; ties by training index, then by test index.

    Attributes:
        train, test: int64 [p], indices in original order.
        value: float64 [p], adjusted influence.
        z: float64 [p], adjusted influence in standard errors that hold without influence.
        rate: float64 [p], the false discovery rate at which the pair is kept (its q-value) among all pairs tested.
        tested: the number of pairs tested.
        threshold: the smallest adjusted influence of a selected pair.
    """

    train: Indices
    test: Indices
    value: Floats
    z: Floats
    rate: Floats
    tested: int
    threshold: float

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
        others = np.setdiff1d(np.flatnonzero(train_labels == train_labels[rows[0]]), rows)
        for part in _slices(len(columns), _COLUMNS):
            block = columns[part]
            value, z = (np.round(each, _DECIMALS) for each in adjusted_influence(packed, rows, block, others))
            i, j = np.nonzero((value >= threshold) & (z >= _SMALLEST_Z))
            parts.append(np.stack([rows[i], block[j], value[i, j], z[i, j]]))
            tails = normal_tail(z[z >= _SMALLEST_Z])
            small.append(tails[tails <= LARGEST_RATE])
            tested += z.size
            progress()
    train, test, value, z = np.concatenate(parts, axis=1)
    rate, _ = discovery_rates(np.concatenate(small), tested, normal_tail(z))
    order = np.lexsort((test, train, -value))
    order = order[rate[order] <= RATE]
    return SelectedPairs(
        train[order].astype(np.int64), test[order].astype(np.int64), value[order], z[order], rate[order], tested, threshold
    )


def adjusted_influence(packed: PackedTrials, train: Indices, test: Indices, others: Indices) -> tuple[Floats, Floats]:
    """Estimate the adjusted influence of each training example on each test example.

    Args:
        packed: the statistics.
        train: int64 [a], training examples.
        test: int64 [b], test examples.
        others: int64, further training examples that may be adjusted for, as those of `train` may.

    Returns:
        float64 [a, b], adjusted influences, and float64 [a, b], their z; NaN in the rows of training examples in every subset or in none.
    """
    t, words = packed.trials, packed.membership[:, train]
    steps = _steps(packed, test)
    total = steps.sum(0, dtype=np.int64)
    squares = np.einsum("tj,tj->j", steps, steps, dtype=np.int64) - total**2 / t  # of deviations from the mean
    k_in, product = _sums_in(packed, train, steps)
    further = ((others[rows], *_sums_in(packed, others[rows], steps)) for rows in _slices(len(others), _ROWS))
    chosen = _largest_effects(chain([(train, k_in, product)], further), t, total, squares)
    union = np.unique(np.concatenate([near for near, _ in chosen]))
    together = cooccurrence(words, packed.membership[:, union]) if len(union) else np.empty((len(train), 0), np.int32)
    place = np.full(packed.n_train, -1)
    place[train] = np.arange(len(train))
    with np.errstate(divide="ignore", invalid="ignore"):
        difference, unit = _difference(product, total, k_in, t)
        z = np.empty_like(difference)
        for j, (near, sums) in enumerate(chosen):
            members, both = packed.k_in[near], together[:, np.searchsorted(union, near)]
            gram = np.bitwise_count(packed.membership[:, near, None] & packed.membership[:, None, near]).sum(0, dtype=np.int64)
            effects = sums - members * total[j] / t
            slopes = np.linalg.lstsq(gram - np.outer(members, members) / t, effects, rcond=None)[0]
            overlap = both / k_in - (members - both) / (t - k_in)  # difference of the shares of trials with the other
            difference[:, j] -= overlap @ slopes
            left = np.full(len(train), squares[j] - slopes @ effects)
            own = place[near]
            # an example is not adjusted for itself, with which its overlap is 1: its effect stays in the difference and in the variance
            difference[own[own >= 0], j] += slopes[own >= 0]
            left[own[own >= 0]] += (slopes**2 * members * (t - members) / t)[own >= 0]
            z[:, j] = difference[:, j] / (np.sqrt(np.maximum(left / (t - 1 - len(near)), _LEAST_VARIANCE)) * unit[:, 0])
    scale = np.sqrt(1 + BANDWIDTH**2) if _smooth(packed) else 1.0
    return difference * scale / ONE, np.where(np.isfinite(z), z, np.nan)


def _difference(product: Floats, total: Floats, k_in: Floats, trials: int) -> tuple[Floats, Floats]:
    """Differences of means, [a, b], and, [a, 1], their standard errors where outcomes have variance 1; not finite without a group."""
    k_out = trials - k_in
    return product / k_in - (total - product) / k_out, np.sqrt(1 / k_in + 1 / k_out)


def _largest_effects(sums: Iterable[_Sums], t: int, total: Floats, squares: Floats) -> list[tuple[Indices, Floats]]:
    """For each test example, the training examples to adjust for, ascending, and the sums of steps with each in the subset."""
    most = min(_MOST_ADJUSTED, t // _TRIALS_PER_ADJUSTED)
    parts = [np.empty((4, 0))]
    for train, k_in, product in sums if most else ():
        with np.errstate(divide="ignore", invalid="ignore"):
            difference, unit = _difference(product, total, k_in, t)
            effect = np.abs(difference) / (np.sqrt(np.maximum(squares / (t - 1), _LEAST_VARIANCE)) * unit)
        i, j = np.nonzero((effect >= _SMALLEST_EFFECT) & np.isfinite(effect))
        parts.append(np.stack([j, effect[i, j], train[i], product[i, j]]))
    column, effect, index, product = np.concatenate(parts, axis=1)
    order = np.lexsort((index, -effect, column))
    kept = []
    for first, last in pairwise(np.searchsorted(column[order], np.arange(len(total) + 1))):
        largest = order[first:last][:most]
        largest = largest[np.argsort(index[largest])]
        kept.append((index[largest].astype(np.int64), product[largest]))
    return kept


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
    table = np.rint(normal_tail(-odds[:, None] / (BANDWIDTH * spread)) * ONE).astype(np.uint8)
    steps: _Bytes = np.take_along_axis(table, scores, axis=0)
    return steps


def _sums_in(packed: PackedTrials, train: Indices, steps: _Bytes) -> tuple[Floats, Floats]:
    """Trials with each training example in their subset, [a, 1], and the sums of the steps over them, [a, b]: float64, integers."""
    out = np.zeros((len(train), steps.shape[1]))
    for rows in _slices(len(out), _ROWS):
        members = _bits(packed, packed.membership[:, train[rows]])
        for trials in _slices(len(steps), _TRIALS):
            out[rows] += members[trials].astype(np.float32).T @ steps[trials].astype(np.float32)
    return packed.k_in[train][:, None].astype(np.float64), out


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def _bits(packed: PackedTrials, words: Words) -> _Bytes:
    """Unpack words [W, b] into uint8 [t, b], the bits of the trials that count."""
    bits: _Bytes = unpack_words(words.T).T[packed.counted_mask].view(np.uint8)
    return bits

"""Folding trial batches into the statistics that every estimate is taken from.

Bits are kept example by example in 64-bit words: bit b of `words[w, i]` belongs to trial 64 w + b. A trial's place follows from its
index, not from when it arrived, so the statistics of a set of trials are the same bits in whatever order they were folded. A
trial that is missing or diverged has only zeros, and is not counted.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from memtail.errors import StoreError
from memtail.statistics.misclassifications import Mistakes
from memtail.trials import TrialBatch, TrialMetrics, unpack

Words = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]

_BITS = 64


@dataclass(frozen=True)
class PackedTrials:
    """The packed statistics of t trials on n training and q test examples, as they are published.

    Attributes:
        membership, train_correct: uint64 [ceil(T / 64), n]; bit b of word w is trial 64 w + b, T the largest index + 1.
        test_correct: uint64 [ceil(T / 64), q].
        counted: uint64 [ceil(T / 64)], the trials that count; the bits of all others are 0.
    """

    membership: Words
    train_correct: Words
    test_correct: Words
    counted: Words

    @cached_property
    def trials(self) -> int:
        """t, the number of trials that count."""
        return int(np.bitwise_count(self.counted).sum())

    @cached_property
    def k_in(self) -> Counts:
        """int64 [n], trials that saw each training example."""
        return _column_sums(self.membership)

    @property
    def k_out(self) -> Counts:
        """int64 [n], trials that did not see each training example."""
        return self.trials - self.k_in

    @cached_property
    def correct_in(self) -> Counts:
        """int64 [n], of the trials that saw each training example, those that got it right."""
        return _column_sums(self.membership & self.train_correct)

    @property
    def correct(self) -> Counts:
        """int64 [n], the same as `train_right`, as `Statistics` calls it."""
        return self.train_right

    @cached_property
    def train_right(self) -> Counts:
        """int64 [n], trials that got each training example right."""
        return _column_sums(self.train_correct)

    @cached_property
    def test_right(self) -> Counts:
        """int64 [q], trials that got each test example right."""
        return _column_sums(self.test_correct)

    @property
    def counted_mask(self) -> npt.NDArray[np.bool_]:
        """Bool [64 ceil(T / 64)], whether each trial counts, by index."""
        return np.unpackbits(self.counted.astype("<u8").view(np.uint8), bitorder="little").view(np.bool_)

    @property
    def counted_trials(self) -> npt.NDArray[np.int64]:
        """int64 [t], the indices of the trials that count, ascending."""
        return np.flatnonzero(self.counted_mask)

    def select(self, trials: npt.NDArray[np.int64]) -> "PackedTrials":
        """The statistics of some of the trials, given by their indices."""
        bits = np.zeros(_BITS * len(self.counted), np.bool_)
        bits[trials] = True
        kept = self.counted & pack_words(bits)
        every = kept[:, None]
        return PackedTrials(self.membership & every, self.train_correct & every, self.test_correct & every, kept)

    @property
    def n_train(self) -> int:
        """N."""
        return len(self.membership.T)

    @property
    def n_test(self) -> int:
        """Q."""
        return len(self.test_correct.T)


def pack_words(bits: npt.NDArray[np.bool_]) -> Words:
    """Bool [..., 64 W] -> uint64 [..., W]: bit b of word w is bits[..., 64 w + b]."""
    return np.packbits(bits, axis=-1, bitorder="little").view("<u8").astype(np.uint64)


def _column_sums(words: Words) -> Counts:
    total = np.zeros(words.shape[1], np.int64)
    for row in words:
        total += np.bitwise_count(row)
    return total


class Statistics:
    """Statistics that grow: each trial is counted once, and the cost of a fold does not depend on what was folded before.

    Args:
        n_train, n_test: n and q.

    Attributes:
        k_in: int64 [n], trials that saw the example.
        correct_in: int64 [n], of those, the trials that got it right.
        correct: int64 [n], trials that got it right, whether or not they saw it.
        metrics: of every folded trial, diverged ones included, by trial index.
        diverged: how many of them diverged.
        margin_in, margin_out: int64 [n], sums of the logit margins in units of 2^-24 (exact for float16), over the trials that saw the
            example and those that did not; None unless margins were recorded.
        held_out_mistakes: what the trials that did not see an example took it for; None unless all that count have recorded it.
    """

    def __init__(self, n_train: int, n_test: int) -> None:
        self.n_train, self.n_test = n_train, n_test
        self.k_in: Counts = np.zeros(n_train, np.int64)
        self.correct_in: Counts = np.zeros(n_train, np.int64)
        self.correct: Counts = np.zeros(n_train, np.int64)
        self.metrics: dict[int, TrialMetrics] = {}
        self.diverged = 0
        self.margin_in: Counts | None = None
        self.margin_out: Counts | None = None
        self.held_out_mistakes: Mistakes | None = Mistakes()
        self._membership: list[Words] = []
        self._train_correct: list[Words] = []
        self._test_correct: list[Words] = []
        self._counted: list[int] = []

    @property
    def trials(self) -> int:
        """t, the number of trials that count."""
        return len(self.metrics) - self.diverged

    @property
    def k_out(self) -> Counts:
        """int64 [n], trials that did not see the example."""
        return self.trials - self.k_in

    def accumulate(self, batch: TrialBatch) -> int:
        """Add the trials of a batch that are not there yet; returns how many were added.

        Raises:
            StoreError: the batch is of a dataset of another size.
        """
        if (batch.n_train, batch.n_test) != (self.n_train, self.n_test):
            raise StoreError(
                f"{batch.shard}: has {batch.n_train} training and {batch.n_test} test examples, "
                f"the experiment {self.n_train} and {self.n_test}"
            )
        members = unpack(batch.membership, self.n_train)
        train = unpack(batch.train_correct, self.n_train)
        test = unpack(batch.test_correct, self.n_test)
        mistaken, mistakes = batch.mistaken(), batch.train_mistakes
        ends = np.cumsum(mistaken.sum(1))
        added = 0
        for row, trial in enumerate(batch.trial.tolist()):
            if trial in self.metrics:
                continue
            added += 1
            self.metrics[trial] = batch.metrics[row]
            if batch.metrics[row].diverged:
                self.diverged += 1
                continue
            self._place(trial, members[row], train[row], test[row])
            self.k_in += members[row]
            self.correct_in += members[row] & train[row]
            self.correct += train[row]
            if mistakes is None:
                self.held_out_mistakes = None
            elif self.held_out_mistakes is not None:
                wrong = np.flatnonzero(mistaken[row])
                unseen = ~members[row][wrong]
                self.held_out_mistakes.add(wrong[unseen], mistakes[ends[row] - len(wrong) : ends[row]][unseen])
            if batch.train_margin is not None:
                self._add_margin(members[row], batch.train_margin[row])
        return added

    def _place(self, trial: int, members: npt.NDArray[np.bool_], train: npt.NDArray[np.bool_], test: npt.NDArray[np.bool_]) -> None:
        word, bit = divmod(trial, _BITS)
        while len(self._counted) <= word:
            self._counted.append(0)
            self._membership.append(np.zeros(self.n_train, np.uint64))
            self._train_correct.append(np.zeros(self.n_train, np.uint64))
            self._test_correct.append(np.zeros(self.n_test, np.uint64))
        self._counted[word] |= 1 << bit
        for words, bits in ((self._membership, members), (self._train_correct, train), (self._test_correct, test)):
            words[word] |= bits.astype(np.uint64) << np.uint64(bit)

    def _add_margin(self, members: npt.NDArray[np.bool_], margin: npt.NDArray[np.float16]) -> None:
        if self.margin_in is None or self.margin_out is None:
            self.margin_in, self.margin_out = np.zeros(self.n_train, np.int64), np.zeros(self.n_train, np.int64)
        fixed = (margin.astype(np.float64) * 2**24).astype(np.int64)
        self.margin_in += np.where(members, fixed, 0)
        self.margin_out += np.where(members, 0, fixed)

    def packed(self) -> PackedTrials:
        """All bits so far, as arrays."""

        def stacked(words: list[Words], count: int) -> Words:
            return np.stack(words) if words else np.zeros((0, count), np.uint64)

        return PackedTrials(
            stacked(self._membership, self.n_train),
            stacked(self._train_correct, self.n_train),
            stacked(self._test_correct, self.n_test),
            np.array(self._counted, np.uint64),
        )

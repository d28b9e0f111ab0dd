"""Accumulates trial batches into the statistics from which every estimate is computed.

Bits are stored by example in words of 64 trials: bit b of `words[w, i]` belongs to trial 64 w + b. The place of a trial follows from its
index, so the statistics of a set of trials have equal bits in whatever order they are accumulated. A trial that is missing or diverged has
only zeros and does not count.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from memtail.errors import ScoresError, StoreError
from memtail.statistics.misclassifications import Misclassifications
from memtail.statistics.soft import PLANES, SoftSums, place, plane_sums
from memtail.trials import TrialBatch, TrialMetrics, unpack

Words = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]

_BITS = 64


@dataclass(frozen=True)
class PackedTrials:
    """Packed statistics of t trials on n training and q test examples, as published.

    Attributes:
        membership, train_correct: uint64 [ceil(T / 64), n]; bit b of word w is trial 64 w + b, and T is the largest index + 1.
            `train_correct` is None where only scores are recorded.
        test_correct: uint64 [ceil(T / 64), q]; None likewise.
        counted: uint64 [ceil(T / 64)], the trials that count; the bits of all others are 0.
        test_score: uint64 [8, ceil(T / 64), q], the bit planes of scores (see `memtail.statistics.soft`); None if a trial that counts has
            no scores.
        train_score: uint64 [8, ceil(T / 64), n], where only scores are recorded; None else.
    """

    membership: Words
    train_correct: Words | None
    test_correct: Words | None
    counted: Words
    test_score: Words | None = None
    train_score: Words | None = None

    @property
    def scores_only(self) -> bool:
        """Whether the trials have scores in place of correctness."""
        return self.train_correct is None or self.test_correct is None

    @cached_property
    def soft(self) -> SoftSums | None:
        """Sums of the scores of training examples; None without `train_score`."""
        if self.train_score is None:
            return None
        (score_in, square_in), (score, square) = plane_sums(self.train_score & self.membership), plane_sums(self.train_score)
        return SoftSums(score_in, square_in, score - score_in, square - square_in)

    def correctness(self, split: Literal["train", "test"]) -> Words:
        """Return `train_correct` or `test_correct`. Raises: ScoresError: only scores are recorded."""
        words = self.train_correct if split == "train" else self.test_correct
        if words is None:
            raise ScoresError("these trials have scores only, and correctness is needed: train them with record: {scores: true}")
        return words

    @cached_property
    def trials(self) -> int:
        """t, the number of trials that count."""
        return int(np.bitwise_count(self.counted).sum())

    @cached_property
    def k_in(self) -> Counts:
        """int64 [n], trials with each training example in their subset."""
        return column_sums(self.membership)

    @property
    def k_out(self) -> Counts:
        """int64 [n], trials with each training example outside their subset."""
        return self.trials - self.k_in

    @cached_property
    def correct_in(self) -> Counts:
        """int64 [n], trials with each training example in their subset that classify it correctly."""
        return column_sums(self.membership & self.correctness("train"))

    @cached_property
    def correct(self) -> Counts:
        """int64 [n], trials that classify each training example correctly."""
        return column_sums(self.correctness("train"))

    @cached_property
    def correct_on_test(self) -> Counts:
        """int64 [q], trials that classify each test example correctly."""
        return column_sums(self.correctness("test"))

    @property
    def counted_mask(self) -> npt.NDArray[np.bool_]:
        """Bool [64 ceil(T / 64)], whether each trial counts, by index."""
        return unpack_words(self.counted)

    @property
    def counted_trials(self) -> npt.NDArray[np.int64]:
        """int64 [t], indices of the trials that count, ascending."""
        return np.flatnonzero(self.counted_mask)

    def select(self, trials: npt.NDArray[np.int64]) -> "PackedTrials":
        """Return the statistics of some trials, by their indices."""
        bits = np.zeros(_BITS * len(self.counted), np.bool_)
        bits[trials] = True
        selected = self.counted & pack_words(bits)
        outcomes = (self.train_correct, self.test_correct, self.test_score, self.train_score)
        train, test, test_score, train_score = (None if words is None else words & selected[:, None] for words in outcomes)
        return PackedTrials(self.membership & selected[:, None], train, test, selected, test_score, train_score)

    @property
    def n_train(self) -> int:
        """The number of training examples, n."""
        return int(self.membership.shape[1])

    @property
    def n_test(self) -> int:
        """The number of test examples, q."""
        words = self.test_correct if self.test_score is None else self.test_score
        return 0 if words is None else int(words.shape[-1])


def pack_words(bits: npt.NDArray[np.bool_]) -> Words:
    """Pack bool [..., 64 W] into uint64 [..., W]: bit b of word w is bits[..., 64 w + b]."""
    return np.packbits(bits, axis=-1, bitorder="little").view("<u8").astype(np.uint64)


def unpack_words(words: Words) -> npt.NDArray[np.bool_]:
    """Unpack uint64 [..., W] into bool [..., 64 W], the inverse of `pack_words`."""
    contiguous = np.ascontiguousarray(words.astype("<u8"))
    return np.unpackbits(contiguous.view(np.uint8), axis=-1, bitorder="little").view(np.bool_)


def column_sums(words: Words) -> Counts:
    """Count the bits of each column: uint64 [W, b] -> int64 [b]."""
    total = np.zeros(words.shape[1], np.int64)
    for row in words:
        total += np.bitwise_count(row)
    return total


class Statistics:
    """Statistics that grow: each trial is counted once, and adding one costs O(n + q), however many there are.

    Args:
        n_train, n_test: n and q.
        scores_only: whether the trials have scores in place of correctness; then sums of correctness are 0.

    Attributes:
        k_in: int64 [n], trials with the example in their subset.
        correct_in: int64 [n], those of them that classify it correctly.
        correct: int64 [n], trials that classify it correctly, whether or not it is in their subset.
        metrics: of every accumulated trial, diverged ones included, by index.
        diverged: number of diverged trials.
        margin_in, margin_out: int64 [n], sums of logit margins over the trials with the example inside and outside their subset, in units
            of 2^-24, in which float16 is exact; None if margins are not recorded.
        held_out_misclassifications: classes predicted by the trials with the example outside their subset; None if a trial that counts has
            not recorded them.
        soft: sums of the scores of training examples; None if a trial that counts has no scores.
        by_epoch: of each epoch after which all trials that count have recorded outcomes, int64 [2, n]: trials with the example in their
            subset that classify it correctly after the epoch, and trials that do so whether or not it is in their subset.
        conditions: numbers of accumulated trials by device, version of torch and version of memtail. No estimate depends on them.
    """

    def __init__(self, n_train: int, n_test: int, *, scores_only: bool = False) -> None:
        self.n_train, self.n_test, self.scores_only = n_train, n_test, scores_only
        self.k_in: Counts = np.zeros(n_train, np.int64)
        self.correct_in: Counts = np.zeros(n_train, np.int64)
        self.correct: Counts = np.zeros(n_train, np.int64)
        self.metrics: dict[int, TrialMetrics] = {}
        self.diverged = 0
        self.conditions: dict[str, dict[str, int]] = {}
        self.margin_in: Counts | None = None
        self.margin_out: Counts | None = None
        self.held_out_misclassifications: Misclassifications | None = Misclassifications()
        self.soft: SoftSums | None = SoftSums.zeros(n_train)
        self.by_epoch: dict[int, Counts] = {}
        # with room for more words, which takes no memory before it is used
        self._membership: Words = np.zeros((0, n_train), np.uint64)
        self._train_correct: Words | None = None if scores_only else np.zeros((0, n_train), np.uint64)
        self._test_correct: Words | None = None if scores_only else np.zeros((0, n_test), np.uint64)
        self._test_score: Words | None = np.zeros((PLANES, 0, n_test), np.uint64)
        self._train_score: Words | None = np.zeros((PLANES, 0, n_train), np.uint64) if scores_only else None
        self._counted: list[int] = []

    @classmethod
    def restored(
        cls,
        packed: PackedTrials,
        metrics: Sequence[TrialMetrics],
        misclassifications: Misclassifications | None,
        margins: tuple[Counts, Counts] | None,
        soft: SoftSums | None,
        by_epoch: dict[int, Counts],
    ) -> "Statistics":
        """Return statistics that consist of these parts, whose arrays they take over.

        Args:
            packed: the bits.
            metrics: of every accumulated trial.
            misclassifications: `held_out_misclassifications`.
            margins: `margin_in` and `margin_out`.
            soft: `soft`.
            by_epoch: `by_epoch`.
        """
        statistics = cls(packed.n_train, packed.n_test, scores_only=packed.scores_only)
        statistics.k_in = packed.k_in
        if not packed.scores_only:
            statistics.correct_in, statistics.correct = packed.correct_in, packed.correct
        statistics.metrics = {entry.trial: entry for entry in metrics}
        statistics.diverged = sum(entry.diverged for entry in metrics)
        statistics.margin_in, statistics.margin_out = margins or (None, None)
        statistics.held_out_misclassifications = misclassifications
        statistics.by_epoch = by_epoch
        statistics._membership, statistics._counted = packed.membership, packed.counted.tolist()
        statistics._train_correct, statistics._test_correct = packed.train_correct, packed.test_correct
        statistics._train_score = packed.train_score
        statistics.soft = soft
        if packed.test_score is not None or soft is None:
            statistics._test_score = packed.test_score
        return statistics

    @property
    def trials(self) -> int:
        """t, the number of trials that count."""
        return len(self.metrics) - self.diverged

    @property
    def k_out(self) -> Counts:
        """int64 [n], trials with the example outside their subset."""
        return self.trials - self.k_in

    def accumulate(self, batch: TrialBatch) -> int:
        """Add the trials of a batch that are not included yet.

        Args:
            batch: of any trials.

        Returns:
            The number of trials added.

        Raises:
            StoreError: the batch belongs to a dataset of another size, or has scores in place of correctness where others do not.
        """
        if (batch.n_train, batch.n_test) != (self.n_train, self.n_test):
            raise StoreError(
                f"{batch.shard}: has {batch.n_train} training and {batch.n_test} test examples, "
                f"the experiment {self.n_train} and {self.n_test}"
            )
        if batch.scores_only != self.scores_only:
            raise StoreError(f"{batch.shard}: {'lacks' if batch.scores_only else 'has'} correctness, the experiment does not")
        members = unpack(batch.membership, self.n_train)
        correctness, mistakes = None if self.scores_only else batch.correctness(), batch.mistakes()
        added = 0
        for row, trial in enumerate(batch.trial.tolist()):
            if trial in self.metrics:
                continue
            added += 1
            self.metrics[trial] = batch.metrics[row]
            if batch.metrics[row].diverged:
                self.diverged += 1
                continue
            self._place(trial, members[row])
            self.k_in += members[row]
            if correctness is not None:
                self._add_correctness(trial, members[row], *(bits[row] for bits in correctness))
            if mistakes is None:
                self.held_out_misclassifications = None
            elif self.held_out_misclassifications is not None:
                examples, predicted = mistakes[row]
                held_out = ~members[row][examples]
                self.held_out_misclassifications.add(examples[held_out], predicted[held_out])
            if batch.train_margin is not None:
                self._add_margin(members[row], batch.train_margin[row])
            if batch.train_score is None or batch.test_score is None:
                self.soft = self._test_score = None
            elif self.soft is not None and self._test_score is not None:
                self.soft.add(members[row], batch.train_score[row])
                place(self._test_score[:, trial // _BITS], trial % _BITS, batch.test_score[row])
                if self._train_score is not None:
                    place(self._train_score[:, trial // _BITS], trial % _BITS, batch.train_score[row])
            self._add_snapshots(batch, row, members[row])
        for condition, value in batch.provenance.conditions().items() if added else ():
            counts = self.conditions.setdefault(condition, {})
            counts[value] = counts.get(value, 0) + added
        return added

    def _place(self, trial: int, members: npt.NDArray[np.bool_]) -> None:
        word, bit = divmod(trial, _BITS)
        if word >= len(self._counted):
            self._counted += [0] * (word + 1 - len(self._counted))
            self._membership = _with_room(self._membership, word + 1)
            for name in ("_train_correct", "_test_correct", "_train_score", "_test_score"):
                if (words := getattr(self, name)) is not None:
                    setattr(self, name, _with_room(words, word + 1))
        self._counted[word] |= 1 << bit
        self._membership[word] |= members.astype(np.uint64) << np.uint64(bit)

    def _add_correctness(
        self, trial: int, members: npt.NDArray[np.bool_], train: npt.NDArray[np.bool_], test: npt.NDArray[np.bool_]
    ) -> None:
        word, bit = divmod(trial, _BITS)
        for words, bits in ((self._train_correct, train), (self._test_correct, test)):
            if words is not None:
                words[word] |= bits.astype(np.uint64) << np.uint64(bit)
        self.correct_in += members & train
        self.correct += train

    def _add_margin(self, members: npt.NDArray[np.bool_], margin: npt.NDArray[np.float16]) -> None:
        if self.margin_in is None or self.margin_out is None:
            self.margin_in, self.margin_out = np.zeros(self.n_train, np.int64), np.zeros(self.n_train, np.int64)
        fixed_point = (margin.astype(np.float64) * 2**24).astype(np.int64)
        self.margin_in += np.where(members, fixed_point, 0)
        self.margin_out += np.where(members, 0, fixed_point)

    def _add_snapshots(self, batch: TrialBatch, row: int, members: npt.NDArray[np.bool_]) -> None:
        if batch.snapshot_epochs is None or batch.snapshot_correct is None:
            self.by_epoch = {}
            return
        if self.trials == 1:  # the first
            self.by_epoch = {epoch: np.zeros((2, self.n_train), np.int64) for epoch in batch.snapshot_epochs.tolist()}
        correct = dict(zip(batch.snapshot_epochs.tolist(), unpack(batch.snapshot_correct[:, row], self.n_train), strict=True))
        self.by_epoch = {epoch: sums for epoch, sums in self.by_epoch.items() if epoch in correct}
        for epoch, sums in self.by_epoch.items():
            sums[0] += members & correct[epoch]
            sums[1] += correct[epoch]

    def digest(self) -> str:
        """SHA-256 (hex) of the bits and of the numbers of the diverged trials: equal for equal trials in whatever order they came."""
        diverged = sorted(trial for trial, metrics in self.metrics.items() if metrics.diverged)
        digest = hashlib.sha256(json.dumps([self.n_train, self.n_test, self._counted, diverged]).encode())
        packed = self.packed()
        for words in (packed.membership, packed.train_correct, packed.test_correct):
            for row in () if words is None else words:
                digest.update(row.astype("<u8", copy=False).tobytes())
        if self.soft is not None and self.trials:
            for sums in vars(self.soft).values():
                digest.update(sums.astype("<i8", copy=False).tobytes())
            for planes in (packed.test_score, packed.train_score):
                for word in () if planes is None else planes.swapaxes(0, 1):
                    digest.update(word.astype("<u8", copy=False).tobytes())
        for epoch, sums in self.by_epoch.items():
            digest.update(f"epoch {epoch}".encode() + sums.astype("<i8", copy=False).tobytes())
        return digest.hexdigest()

    def packed(self) -> PackedTrials:
        """Return the bits, of which there is no second copy: they change with the trials that are accumulated afterwards."""
        words = len(self._counted)

        def held(array: Words | None) -> Words | None:
            return None if array is None else array[..., :words, :]

        return PackedTrials(
            self._membership[:words],
            held(self._train_correct),
            held(self._test_correct),
            np.array(self._counted, np.uint64),
            held(self._test_score) if words or self.scores_only else None,
            held(self._train_score),
        )


def _with_room(words: Words, count: int) -> Words:
    """Return words [..., W, b], or a copy with room for `count` words: twice as many, so that copies are rare."""
    held = words.shape[-2]
    if count <= held:
        return words
    room = np.zeros((*words.shape[:-2], max(count, 2 * held), words.shape[-1]), np.uint64)
    room[..., :held, :] = words
    return room

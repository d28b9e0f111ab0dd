"""Influence of training examples on other examples, in blocks, with standard errors."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from memtail.estimators.binomial import Floats, difference_interval, difference_standard_error, share
from memtail.statistics import cooccurrence
from memtail.statistics.accumulator import Counts, PackedTrials, Words

Index = npt.NDArray[np.integer] | slice
#: The examples influenced: test examples, or training examples.
Target = Literal["test", "train"]

#: Training examples per block, which bounds the memory of a pass over all pairs.
BLOCK = 512


@dataclass(frozen=True)
class Influence:
    """Influences of a training examples on b other examples: counts, and the estimates that follow from them.

    Attributes:
        both: int32 [a, b], trials trained with the training example that classify the other correctly.
        k_in: int64 [a], trials trained with the training example.
        correct: int64 [b], trials that classify the other example correctly.
        trials: t.
    """

    both: npt.NDArray[np.int32]
    k_in: Counts
    correct: Counts
    trials: int

    @cached_property
    def value(self) -> Floats:
        """float64 [a, b], infl_ij; NaN in the rows of training examples in every subset or in none."""
        from memtail.estimators import influence_kernels  # compiles

        out = np.empty(self.both.shape)
        if len(self.correct) == 1:
            influence_kernels.influence_column(self.both[:, 0], self.k_in, self.correct[0], self.trials, out[:, 0])
        else:
            influence_kernels.influence_values(self.both, self.k_in, self.correct, self.trials, out)
        return out

    @cached_property
    def standard_error(self) -> Floats:
        """float64 [a, b], of `value`."""
        return influence_standard_error(self.both, self.k_in[:, None], self.correct, self.trials)

    @property
    def error(self) -> Floats:
        """Earlier name of `standard_error`."""
        return self.standard_error

    def standard_error_at(self, i: npt.NDArray[np.integer], j: npt.NDArray[np.integer]) -> Floats:
        """Return float64 [p], the standard errors at p places (i, j) of the block alone."""
        return influence_standard_error(self.both[i, j], self.k_in[i], self.correct[j], self.trials)


def influence_standard_error(both: npt.NDArray[np.int32], k_in: Counts, correct: Counts, trials: int) -> Floats:
    """Return float64, the standard errors of influences from counts of shapes that broadcast; see `Influence` for the arguments."""
    k_out = trials - k_in
    return difference_standard_error(share(both, k_in), k_in, share(correct - both, k_out), k_out)


def influence_interval(both: npt.NDArray[np.int32], k_in: Counts, correct: Counts, trials: int) -> tuple[Floats, Floats]:
    """Return float64, the lower and upper ends of the 95% confidence intervals of influences from such counts."""
    k_out = trials - k_in
    return difference_interval(share(both, k_in), k_in, share(correct - both, k_out), k_out)


def correctness(packed: PackedTrials, on: Target) -> tuple[Words, Counts]:
    """Return correctness on the influenced examples: uint64 [W, b], packed, and int64 [b], the trials that are correct on each."""
    return packed.correctness(on), packed.correct_on_test if on == "test" else packed.correct


def influence(packed: PackedTrials, train: Index, other: Index, on: Target = "test") -> Influence:
    """Estimate influences by the equation of `memtail.estimators`.

    Args:
        packed: the statistics.
        train: the training examples (rows), a slice or indices.
        other: the examples influenced (columns), a slice or indices.
        on: whether these are test or training examples.

    Returns:
        The block of these rows and columns.
    """
    words, correct = correctness(packed, on)
    both = cooccurrence(packed.membership[:, train], words[:, other])
    return Influence(both, packed.k_in[train], correct[other], packed.trials)


def correct_in_at(packed: PackedTrials, train: npt.NDArray[np.int64], test: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Return int32 [p], the trials with each training example in their subset that classify its test example correctly."""
    both = np.zeros(len(train), np.int32)
    for members, correct in zip(packed.membership, packed.correctness("test"), strict=True):
        both += np.bitwise_count(members[train] & correct[test])
    return both


def influence_at(packed: PackedTrials, train: npt.NDArray[np.int64], test: npt.NDArray[np.int64]) -> Floats:
    """Estimate the influence of p training examples on one test example each.

    Args:
        packed: the statistics.
        train: int64 [p], training indices.
        test: int64 [p], test indices.

    Returns:
        float64 [p]; NaN where there is no estimate.
    """
    both, k_in = correct_in_at(packed, train, test), packed.k_in[train]
    return share(both, k_in) - share(packed.correct_on_test[test] - both, packed.trials - k_in)


def influence_blocks(
    packed: PackedTrials, train: npt.NDArray[np.int64], other: Index, on: Target = "test"
) -> Iterator[tuple[slice, Influence]]:
    """Estimate influences of many training examples, `BLOCK` at a time.

    Args:
        packed: the statistics.
        train: int64 [a], training indices.
        other: the examples influenced, a slice or indices.
        on: whether these are test or training examples.

    Yields:
        The place of each block in `train`, and the block.
    """
    for start in range(0, len(train), BLOCK):
        rows = slice(start, min(start + BLOCK, len(train)))
        yield rows, influence(packed, train[rows], other, on)

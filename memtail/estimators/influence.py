"""Influence of training examples on other examples, in blocks, with standard errors."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from memtail.estimators.binomial import Floats, difference_standard_error, share
from memtail.statistics import cooccurrence
from memtail.statistics.accumulator import Counts, PackedTrials

Index = npt.NDArray[np.integer] | slice
Target = Literal["test", "train"]

#: Training examples per block, which bounds the memory that a whole pass over all pairs takes.
BLOCK = 512


@dataclass(frozen=True)
class Influence:
    """A block of influences: of a training examples on b others, as counts and the estimates that follow from them.

    Attributes:
        both: int32 [a, b], trials that saw the first and got the second right.
        k_in: int64 [a], trials that saw the first.
        right: int64 [b], trials that got the second right.
        trials: t.
    """

    both: npt.NDArray[np.int32]
    k_in: Counts
    right: Counts
    trials: int

    @cached_property
    def value(self) -> Floats:
        """float64 [a, b], infl_ij; NaN rows where a training example was never in or never out."""
        from memtail.estimators import influence_kernels  # compiles

        out = np.empty(self.both.shape)
        if len(self.right) == 1:
            influence_kernels.influence_column(self.both[:, 0], self.k_in, self.right[0], self.trials, out[:, 0])
        else:
            influence_kernels.influence_values(self.both, self.k_in, self.right, self.trials, out)
        return out

    @cached_property
    def error(self) -> Floats:
        """float64 [a, b], the standard error of every value."""
        return influence_error(self.both, self.k_in[:, None], self.right, self.trials)

    def error_at(self, i: npt.NDArray[np.integer], j: npt.NDArray[np.integer]) -> Floats:
        """float64 [p], the standard errors at p places of the block only."""
        return influence_error(self.both[i, j], self.k_in[i], self.right[j], self.trials)


def influence_error(both: npt.NDArray[np.int32], k_in: Counts, right: Counts, trials: int) -> Floats:
    """float64, the standard errors of influences from their counts, of shapes that broadcast: see `Influence`."""
    k_out = trials - k_in
    return difference_standard_error(share(both, k_in), k_in, share(right - both, k_out), k_out)


def influence(packed: PackedTrials, train: Index, other: Index, on: Target = "test") -> Influence:
    """Influence of the chosen training examples on the chosen others, by the equation of `memtail.estimators`.

    Args:
        packed: the statistics.
        train: which training examples (rows), a slice or indices.
        other: which examples they act on (columns).
        on: whether those are test examples or training examples.
    """
    words, right = (packed.test_correct, packed.test_right) if on == "test" else (packed.train_correct, packed.train_right)
    both = cooccurrence(packed.membership[:, train], words[:, other])
    return Influence(both, packed.k_in[train], right[other], packed.trials)


def influence_at(packed: PackedTrials, train: npt.NDArray[np.int64], test: npt.NDArray[np.int64]) -> Floats:
    """float64 [p], the influence of p training examples on a test example each; NaN where there is no estimate."""
    both = np.zeros(len(train), np.int64)
    for seen, right in zip(packed.membership, packed.test_correct, strict=True):
        both += np.bitwise_count(seen[train] & right[test])
    k_in = packed.k_in[train]
    return share(both, k_in) - share(packed.test_right[test] - both, packed.trials - k_in)


def influence_blocks(
    packed: PackedTrials, train: npt.NDArray[np.int64], other: Index, on: Target = "test"
) -> Iterator[tuple[slice, Influence]]:
    """`influence` of many training examples, a block at a time; yields each block's place among `train`."""
    for start in range(0, len(train), BLOCK):
        rows = slice(start, min(start + BLOCK, len(train)))
        yield rows, influence(packed, train[rows], other, on)

"""Influence of training examples on other examples, in blocks, with standard errors."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from memtail.estimators.memorization import Floats, rate, standard_error
from memtail.statistics import cooccurrence
from memtail.statistics.accumulator import PackedTrials, Words

Index = npt.NDArray[np.integer] | slice
Target = Literal["test", "train"]

#: Training examples per block, which bounds the memory that a whole pass over all pairs takes.
BLOCK = 1024


@dataclass(frozen=True)
class Influence:
    """A block of influences: `value` and `error`, float64 [a, b]; NaN rows where a training example was never in or never out."""

    value: Floats
    error: Floats


def influence(packed: PackedTrials, train: Index, other: Index, on: Target = "test") -> Influence:
    """Influence of the chosen training examples on the chosen others, by the equation of `memtail.estimators`.

    Args:
        packed: the statistics.
        train: which training examples (rows), a slice or indices.
        other: which examples they act on (columns).
        on: whether those are test examples or training examples.
    """
    members = packed.membership[:, train]
    right = _correct(packed, on)[:, other]
    both = cooccurrence(members, right)
    k_in = column_sums(members)[:, None]
    k_out = packed.trials - k_in
    p_in = rate(both, k_in)
    p_out = rate(column_sums(right)[None] - both, k_out)
    return Influence(p_in - p_out, standard_error(p_in, k_in, p_out, k_out))


def influence_blocks(
    packed: PackedTrials, train: npt.NDArray[np.int64], other: Index, on: Target = "test"
) -> Iterator[tuple[slice, Influence]]:
    """`influence` of many training examples, a block at a time; yields each block's place among `train`."""
    for start in range(0, len(train), BLOCK):
        rows = slice(start, min(start + BLOCK, len(train)))
        yield rows, influence(packed, train[rows], other, on)


def column_sums(words: Words) -> npt.NDArray[np.int64]:
    """uint64 [W, a] -> int64 [a], the number of trials whose bit is set."""
    total = np.zeros(words.shape[1], np.int64)
    for row in words:
        total += np.bitwise_count(row)
    return total


def _correct(packed: PackedTrials, on: Target) -> Words:
    return packed.test_correct if on == "test" else packed.train_correct

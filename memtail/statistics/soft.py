"""Statistics of soft outcomes: scores in [0, 1], such as the probability of the label, in 255ths.

Sums over trials are sums of integers, so equal trials give equal bits in any order and on any machine. The scores of test examples are kept
as eight bit planes, each packed as correctness is: bit b of word w of plane p is bit p of the score of trial 64 w + b. The co-occurrence
product of the membership with each plane, weighted by its power of two, gives the sums of an influence.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Self

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Sums = npt.NDArray[np.int64]
Scores = npt.NDArray[np.uint8]

#: A score of 1.
ONE = 255
#: Bits of a score.
PLANES = 8
#: Products of two planes that sum up to squares, with the exponents of their weights.
PRODUCTS = [(plane, plane, 2 * plane) for plane in range(PLANES)]
PRODUCTS += [(one, other, one + other + 1) for one, other in combinations(range(PLANES), 2)]


def quantized(scores: npt.NDArray[np.floating]) -> Scores:
    """Round scores in [0, 1] to 255ths: uint8 of the same shape."""
    rounded: Scores = np.rint(scores * ONE).astype(np.uint8)
    return rounded


@dataclass
class SoftSums:
    """Sums over trials of the scores of n training examples, in 255ths, and of their squares.

    Attributes:
        score_in, square_in: int64 [n], over the trials with the example in their subset.
        score_out, square_out: int64 [n], over the trials with the example outside their subset.
    """

    score_in: Sums
    square_in: Sums
    score_out: Sums
    square_out: Sums

    @classmethod
    def zeros(cls, n_train: int) -> Self:
        """Sums over no trial."""
        return cls(*(np.zeros(n_train, np.int64) for _ in range(4)))

    def add(self, members: npt.NDArray[np.bool_], scores: Scores) -> None:
        """Add a trial.

        Args:
            members: bool [n], its subset.
            scores: uint8 [n].
        """
        values = scores.astype(np.int64)
        self.score_in += np.where(members, values, 0)
        self.square_in += np.where(members, values**2, 0)
        self.score_out += np.where(members, 0, values)
        self.square_out += np.where(members, 0, values**2)


def plane_sums(planes: Words) -> tuple[Sums, Sums]:
    """Sum over trials the scores of b examples and their squares: uint64 [8, W, b] -> int64 [b] each."""
    score, square = np.zeros((2, planes.shape[2]), np.int64)
    for one, other, exponent in PRODUCTS:
        count = np.bitwise_count(planes[one] & planes[other]).sum(0, dtype=np.int64)
        square += count << exponent
        if one == other:
            score += count << one
    return score, square


def place(planes: Words, bit: int, scores: Scores) -> None:
    """Write the scores of a trial into the planes of its word.

    Args:
        planes: uint64 [8, q].
        bit: of the trial in the word; 0 in all planes.
        scores: uint8 [q].
    """
    for plane in range(PLANES):
        planes[plane] |= (scores >> plane & 1).astype(np.uint64) << np.uint64(bit)

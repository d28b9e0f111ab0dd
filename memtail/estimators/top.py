"""The largest influences on every example, in one pass over all pairs."""

import numpy as np
import numpy.typing as npt

from memtail.estimators.influence import Target, influence_blocks
from memtail.estimators.memorization import Floats
from memtail.statistics.accumulator import PackedTrials


def top_influencers(packed: PackedTrials, k: int, on: Target = "test") -> tuple[npt.NDArray[np.int64], Floats]:
    """The k training examples of greatest influence on every other example.

    Memory stays within a block of influences; the matrix is never held.

    Returns:
        int64 [b, k] training indices and float64 [b, k] influences, falling, ties by index; -1 and NaN where fewer than k
        training examples have an estimate.
    """
    from memtail.statistics import kernels  # compiles

    others = packed.n_test if on == "test" else packed.n_train
    index, value = np.full((others, k), -1, np.int64), np.full((others, k), -np.inf)
    for rows, block in influence_blocks(packed, np.arange(packed.n_train), slice(None), on):
        kernels.keep_largest(block.value, rows.start, index, value)
    value[index < 0] = np.nan
    return index, value

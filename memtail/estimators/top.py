"""The largest influences on every example, in one pass over all pairs."""

import numpy as np
import numpy.typing as npt

from memtail.estimators.binomial import Floats
from memtail.estimators.influence import Target, influence_blocks
from memtail.statistics.accumulator import PackedTrials


def top_influencers(packed: PackedTrials, k: int, on: Target = "test", device: str | None = None) -> tuple[npt.NDArray[np.int64], Floats]:
    """The k training examples of greatest influence on every other example.

    Memory stays within a block of influences; the matrix is never held.

    Args:
        packed: the statistics.
        k: how many; at least 1.
        on: whether the others are test examples or training examples.
        device: where to compute: None (the processor, without torch), or torch's "cuda", "cuda:N" or "cpu". The answer is the same.

    Returns:
        int64 [b, k] training indices and float64 [b, k] influences, falling, ties by index; -1 and NaN where fewer than k
        training examples have an estimate.
    """
    if device is not None:
        from memtail.estimators.influence_torch import DeviceInfluence  # needs torch

        words, right = (packed.test_correct, packed.test_right) if on == "test" else (packed.train_correct, packed.train_right)
        return DeviceInfluence(packed.membership, packed.k_in, words, right, packed.trials, device).top(k)
    from memtail.estimators import influence_kernels  # compiles

    others = packed.n_test if on == "test" else packed.n_train
    index, value = np.full((others, k), -1, np.int64), np.full((others, k), -np.inf)
    for rows, block in influence_blocks(packed, np.arange(packed.n_train), slice(None), on):
        influence_kernels.keep_largest(block.value, rows.start, index, value)
    value[index < 0] = np.nan
    return index, value

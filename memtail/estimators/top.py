"""The largest influences on every example, in one pass over all pairs."""

import numpy as np
import numpy.typing as npt

from memtail.estimators.binomial import Floats
from memtail.estimators.influence import Target, correctness, influence_blocks
from memtail.statistics.accumulator import PackedTrials


def top_influencers(packed: PackedTrials, k: int, on: Target = "test", device: str | None = None) -> tuple[npt.NDArray[np.int64], Floats]:
    """Find the k training examples with the largest influence on each example, with memory for one block of influences.

    Args:
        packed: the statistics.
        k: at least 1.
        on: whether test or training examples are influenced.
        device: None to compute on the processor without torch, or torch's "cuda", "cuda:N" or "cpu"; the results are equal.

    Returns:
        int64 [b, k] training indices and float64 [b, k] influences, falling, ties by index; -1 and NaN where fewer than k
        training examples have an estimate.
    """
    if device is not None:
        from memtail.estimators.influence_torch import DeviceInfluence  # needs torch

        return DeviceInfluence(packed.membership, packed.k_in, *correctness(packed, on), packed.trials, device).top(k)
    from memtail.estimators import influence_kernels  # compiles

    others = packed.n_test if on == "test" else packed.n_train
    index, value = np.full((others, k), -1, np.int64), np.full((others, k), -np.inf)
    for rows, block in influence_blocks(packed, np.arange(packed.n_train), slice(None), on):
        influence_kernels.keep_largest(block.value, rows.start, index, value)
    value[index < 0] = np.nan
    return index, value

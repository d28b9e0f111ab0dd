"""Batches of each trial: their order is a pure function of (seed, trial, epoch)."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from memtail.randomness import Purpose, stream


def epoch_order(seed: int, trials: Sequence[int], epoch: int, subsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the order in which each trial sees its subset in an epoch.

    Args:
        seed: the experiment's seed.
        trials: the S trials of a stack.
        epoch: from 0.
        subsets: int64 [S, m], each trial's examples.

    Returns:
        int64 [S, m]: a permutation of each row.
    """
    return np.stack([stream(seed, Purpose.ORDER, trial, epoch).permutation(subset) for trial, subset in zip(trials, subsets, strict=True)])


def batch_bounds(m: int, batch_size: int) -> list[tuple[int, int]]:
    """Return start and stop of each batch of an epoch of m examples.

    The last batch may be smaller. A single left-over example joins the batch before, since it has no batch statistics.
    """
    starts = list(range(0, m, batch_size))
    if batch_size > 1 and len(starts) > 1 and m - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], m], strict=True))
